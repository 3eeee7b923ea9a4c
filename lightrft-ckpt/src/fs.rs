//! The file operations that a checkpoint needs, as a seam.

use std::fmt;
use std::io;
use std::path::Path;

/// A file system on which checkpoints live.
///
/// # Contract
/// What a crash may take away is everything that was not synced, in any combination:
/// - bytes written to a file are durable after [`WriteFile::sync_data`], together with its length;
/// - names (a file created, a directory created, a rename, a removal) are durable after
///   [`sync_dir`](FileSystem::sync_dir) on the directory that holds them;
/// - a rename within one directory is atomic: a crash leaves the old name or the new one.
///
/// Paths are used as given; relative ones are relative to the process.
pub trait FileSystem: fmt::Debug + Send + Sync {
    /// Creates a directory and those above it that are missing; no error when it is there. Their names are durable on
    /// return, and so is its own when it was there: somebody may have created it just now.
    ///
    /// # Errors
    /// When the file system refuses.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;

    /// Creates one directory.
    ///
    /// # Errors
    /// When it exists, or its parent does not.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Creates a file to write. `bytes` is the length it will have: room is set aside where that can be, and a file
    /// of which less is written may have that length nevertheless.
    ///
    /// # Errors
    /// When it exists, or its parent does not; [`io::ErrorKind::StorageFull`] when there is no room. No file is left.
    fn create(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn WriteFile>>;

    /// Opens a file to read.
    ///
    /// # Errors
    /// When it does not exist.
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadFile>>;

    /// What a directory holds, in any order.
    ///
    /// # Errors
    /// When it does not exist.
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>>;

    /// Gives a file or directory another name in the same directory. A file replaces the file that has that name.
    ///
    /// # Errors
    /// When `from` does not exist, or `to` is a directory that is not empty.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Exchanges the names of two directories that lie beside each other, atomically: a crash leaves each its old name
    /// or its new one.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where the file system has no such operation, which is the default.
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        let _ = (one, other);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Removes a file.
    ///
    /// # Errors
    /// When it does not exist.
    fn remove_file(&self, path: &Path) -> io::Result<()>;

    /// Removes an empty directory.
    ///
    /// # Errors
    /// When it holds something.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// When the file system refuses; what was not durable is then unknown.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// Takes the exclusive lock on the file `path`, which is created when missing; `None` when another holds it.
    /// The lock ends when it is dropped or its process dies.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where the file system has no locks.
    fn try_lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>>;
}

/// A file being written. Several threads may write different parts of it.
pub trait WriteFile: fmt::Debug + Send + Sync {
    /// Writes all of `bytes` at `offset`.
    ///
    /// Large files are written in blocks whose offsets, and addresses in memory, are multiples of 4096; so are their
    /// lengths, but for the last. An implementation may profit from that and must not need it.
    ///
    /// # Errors
    /// When the file system refuses; some of the bytes may be there.
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes the bytes and the length durable.
    ///
    /// # Errors
    /// When the file system refuses; a second try that succeeds proves nothing.
    fn sync_data(&self) -> io::Result<()>;
}

/// A file being read. Several threads may read it.
pub trait ReadFile: fmt::Debug + Send + Sync {
    /// Its length.
    ///
    /// # Errors
    /// When the file system refuses.
    fn bytes(&self) -> io::Result<u64>;

    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] when the file ends before.
    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
}

/// A held lock; dropping it gives it up.
pub trait Lock: fmt::Debug + Send + Sync {}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// The name, without the directory. A name that is not UTF-8 is given lossily: it is never one of ours.
    pub name: String,
    /// What it names.
    pub kind: EntryKind,
}

/// What a name in a directory stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A link, socket or anything else: never followed, never removed.
    Other,
}

/// The directory that holds `path`'s name; `.` for a bare name.
pub(crate) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => path,
    }
}
