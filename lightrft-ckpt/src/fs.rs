//! The file operations that a checkpoint needs, as a seam, and the operating system's.

use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
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
    /// Creates a directory and those above it that are missing; no error when it is there. Durable on return.
    ///
    /// # Errors
    /// When the file system refuses.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;

    /// Creates one directory.
    ///
    /// # Errors
    /// When it exists, or its parent does not.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Creates a file to write. `bytes` is the length it will have, so that space can be set aside at once.
    ///
    /// # Errors
    /// When it exists, or its parent does not.
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

/// The operating system's file system, through the page cache.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsFileSystem;

impl FileSystem for OsFileSystem {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        if path.as_os_str().is_empty() || path.is_dir() {
            return Ok(());
        }
        let parent = parent_of(path);
        self.create_dir_all(parent)?;
        match fs::create_dir(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            Err(e) => Err(e),
            Ok(()) => self.sync_dir(parent),
        }
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create(&self, path: &Path, _bytes: u64) -> io::Result<Box<dyn WriteFile>> {
        Ok(Box::new(OpenOptions::new().write(true).create_new(true).open(path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadFile>> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Box::new(file))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let kind = match entry.file_type()? {
                t if t.is_file() => EntryKind::File,
                t if t.is_dir() => EntryKind::Dir,
                _ => EntryKind::Other,
            };
            entries.push(Entry { name: entry.file_name().to_string_lossy().into_owned(), kind });
        }
        Ok(entries)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        File::open(path)?.sync_all()
    }

    fn try_lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => {
                // For whoever wonders who holds it; nothing reads it back.
                file.set_len(0)?;
                writeln!(file, "{}", std::process::id())?;
                Ok(Some(Box::new(OsLock { _file: file })))
            }
            Err(TryLockError::WouldBlock) => Ok(None),
            // A free lock that cannot be had: network file systems without a lock service say so in several ways.
            Err(TryLockError::Error(e)) => Err(io::Error::new(io::ErrorKind::Unsupported, e)),
        }
    }
}

#[derive(Debug)]
struct OsLock {
    /// Closing the file gives the lock up.
    _file: File,
}

impl Lock for OsLock {}

impl WriteFile for File {
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, bytes, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }
}

impl ReadFile for File {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, into, offset)
    }
}

/// The directory that holds `path`'s name; `.` for a bare name.
pub(crate) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => path,
    }
}
