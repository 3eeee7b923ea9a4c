//! The operating system's file system.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::OFlags;

use crate::aligned::ALIGN;
use crate::direct::{self, DirectFile};
use crate::fs::{Entry, EntryKind, FileSystem, Lock, ReadFile, WriteFile, parent_of};

/// The operating system's file system.
///
/// Room for a file is set aside when it is created. Large files are written past the page cache (`O_DIRECT`): a
/// checkpoint that nobody reads soon need not push out what is read, and on a disk that is written through the page
/// cache the durable write of 1 GiB takes several times as long. Where the file system refuses that (some network and
/// memory file systems), they are written through the page cache. Reading goes through the page cache.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsFileSystem {
    writes: Writes,
}

#[derive(Clone, Copy, Debug, Default)]
enum Writes {
    #[default]
    PastPageCache,
    Buffered,
}

impl OsFileSystem {
    /// Writes past the page cache where that is possible.
    pub const fn new() -> Self {
        OsFileSystem { writes: Writes::PastPageCache }
    }

    /// Writes through the page cache always: for a checkpoint that is read again at once on the same machine, or a
    /// file system whose unbuffered writes are slow.
    pub const fn buffered() -> Self {
        OsFileSystem { writes: Writes::Buffered }
    }

    /// Makes the name of a directory durable that somebody else created, perhaps just now.
    fn sync_name_in(&self, parent: &Path) -> io::Result<()> {
        match self.sync_dir(parent) {
            // Of a directory that we may not even open, or of a kind that cannot be synced (a mount point may lie in
            // one), no more can be asked: whoever made the directory answers for its name.
            Err(e) if no_such_sync(e.kind()) => Ok(()),
            synced => synced,
        }
    }

    fn create_file(&self, path: &Path, bytes: u64) -> io::Result<DirectFile<File>> {
        let file = OpenOptions::new().write(true).create_new(true).open(path)?;
        if let Err(e) = direct::set_aside(&file, bytes) {
            // What it has got so far is given back.
            let _ = fs::remove_file(path);
            return Err(e);
        }
        let direct = match self.writes {
            Writes::PastPageCache if bytes >= ALIGN as u64 => direct::open(path),
            _ => None,
        };
        Ok(DirectFile::new(file, direct))
    }
}

impl FileSystem for OsFileSystem {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        if path.as_os_str().is_empty() {
            return Ok(());
        }
        let parent = parent_of(path);
        if path.is_dir() {
            return self.sync_name_in(parent);
        }
        self.create_dir_all(parent)?;
        match fs::create_dir(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => self.sync_name_in(parent),
            Err(e) => Err(e),
            Ok(()) => self.sync_dir(parent),
        }
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn WriteFile>> {
        Ok(Box::new(self.create_file(path, bytes)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadFile>> {
        // Opening a named pipe, which anybody may have put there, waits for a writer, unless told not to. Regular files
        // are read in the same way with the flag.
        let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
        let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Box::new(file))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let file_type = match entry.file_type() {
                // It was removed since its name was read.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                file_type => file_type?,
            };
            let kind = match file_type {
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

    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        use rustix::io::Errno;
        renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).map_err(|errno| match errno {
            // A kernel or a file system without the operation.
            Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP => {
                io::Error::new(io::ErrorKind::Unsupported, errno)
            }
            other => other.into(),
        })
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
        loop {
            match file.try_lock() {
                Ok(()) => {
                    // For whoever wonders who holds it; nothing reads it back. On a full disk it must not keep us from
                    // the sweep that makes room.
                    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
                    return Ok(Some(Box::new(OsLock { _file: file })));
                }
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(TryLockError::Error(e)) => return Err(why_not_locked(e)),
            }
        }
    }
}

fn no_such_sync(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{InvalidInput, PermissionDenied, ReadOnlyFilesystem, Unsupported};
    matches!(kind, InvalidInput | PermissionDenied | ReadOnlyFilesystem | Unsupported)
}

/// Tells a file system that has no locks from one that fails. A network file system whose lock service does not run
/// says that there are no locks left.
fn why_not_locked(error: io::Error) -> io::Error {
    use rustix::io::Errno;
    let none = [Errno::NOSYS, Errno::OPNOTSUPP, Errno::NOLCK].map(Errno::raw_os_error);
    match error.raw_os_error() {
        Some(code) if none.contains(&code) => io::Error::new(io::ErrorKind::Unsupported, error),
        _ => error,
    }
}

#[derive(Debug)]
struct OsLock {
    /// Closing the file gives the lock up.
    _file: File,
}

impl Lock for OsLock {}

impl ReadFile for File {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, into, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aligned::AlignedBuf;

    /// A folder on a disk and, where the system has one, a folder in memory.
    fn folders() -> Vec<tempfile::TempDir> {
        let in_memory = Path::new("/dev/shm");
        let mut folders = vec![tempfile::tempdir().unwrap()];
        if in_memory.is_dir() {
            folders.push(tempfile::tempdir_in(in_memory).unwrap());
        }
        folders
    }

    fn memory(bytes: usize) -> AlignedBuf {
        let mut memory = AlignedBuf::default();
        memory.set_len(bytes).unwrap();
        memory.bytes_mut().iter_mut().enumerate().for_each(|(i, b)| *b = (i * 7 % 251) as u8);
        memory
    }

    #[test]
    fn files_of_any_length_hold_what_was_written_to_the_byte() {
        let around = |n: usize| [n - 1, n, n + 1];
        for folder in folders() {
            for bytes in [512, ALIGN, 2 * ALIGN, 64 * 1024].into_iter().flat_map(around).chain([0, 1]) {
                let content = memory(bytes);
                for (name, fs) in [("past", OsFileSystem::new()), ("through", OsFileSystem::buffered())] {
                    let path = folder.path().join(format!("{name}-{bytes}"));
                    let file = fs.create(&path, bytes as u64).unwrap();
                    // In two blocks, the later one first.
                    let cut = (bytes / 2).next_multiple_of(ALIGN).min(bytes);
                    file.write_all_at(cut as u64, &content.bytes()[cut..]).unwrap();
                    file.write_all_at(0, &content.bytes()[..cut]).unwrap();
                    file.sync_data().unwrap();
                    assert_eq!(fs::read(&path).unwrap(), content.bytes(), "{}: {file:?}", path.display());
                }
            }
        }
    }

    #[test]
    fn memory_and_offsets_that_are_not_aligned_are_written_too() {
        for folder in folders() {
            let content = memory(3 * ALIGN);
            let path = folder.path().join("file");
            let file = OsFileSystem::new().create(&path, content.bytes().len() as u64).unwrap();
            for (at, part) in content.bytes().chunks(1000).enumerate().rev() {
                file.write_all_at(at as u64 * 1000, part).unwrap();
            }
            file.sync_data().unwrap();
            assert_eq!(fs::read(&path).unwrap(), content.bytes());
        }
    }

    #[test]
    fn only_a_file_system_without_locks_is_used_without_one() {
        use rustix::io::Errno;
        let kind = |errno: Errno| why_not_locked(io::Error::from_raw_os_error(errno.raw_os_error())).kind();
        for none in [Errno::NOSYS, Errno::OPNOTSUPP, Errno::NOLCK] {
            assert_eq!(kind(none), io::ErrorKind::Unsupported, "{none}");
        }
        for broken in [Errno::IO, Errno::STALE, Errno::NOMEM, Errno::TIMEDOUT] {
            assert_ne!(kind(broken), io::ErrorKind::Unsupported, "{broken}");
        }
    }

    #[test]
    fn a_buffered_file_system_never_goes_past_the_page_cache() {
        let folder = tempfile::tempdir().unwrap();
        let file = OsFileSystem::buffered().create_file(&folder.path().join("file"), 1 << 20).unwrap();
        assert!(format!("{file:?}").contains("direct: false"), "{file:?}");
    }

    #[test]
    fn a_system_that_refuses_a_direct_write_gets_it_buffered() {
        for folder in folders() {
            let content = memory(4 * ALIGN);
            let path = folder.path().join("file");
            // Half a sector: where direct writes are possible at all, the system refuses this one.
            let file = OsFileSystem::new().create_file(&path, 4 * ALIGN as u64).unwrap().with_align(256);
            file.write_all_at(256, &content.bytes()[256..]).unwrap();
            file.write_all_at(0, &content.bytes()[..256]).unwrap();
            file.sync_data().unwrap();
            assert_eq!(fs::read(&path).unwrap(), content.bytes());
        }
    }

    #[test]
    fn a_file_for_which_there_is_no_room_is_refused_and_not_left() {
        // A disk would fill itself before it refused; a file system in memory knows its limit.
        for folder in folders().iter().skip(1) {
            let path = folder.path().join("file");
            let refused = OsFileSystem::new().create(&path, 1 << 50).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::StorageFull, "{refused}");
            assert!(!path.exists());
            OsFileSystem::new().create(&path, 10).unwrap();
            let exists = OsFileSystem::new().create(&path, 10).unwrap_err();
            assert_eq!(exists.kind(), io::ErrorKind::AlreadyExists);
            assert!(path.exists(), "another's file is not removed");
        }
    }
}
