//! A file system that tells what is done to it: to count bytes, to stop at a certain operation.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::fs::{Entry, FileSystem, Lock, ReadFile, WriteFile};

/// One operation on a file system, just before it is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// `create`, `write`, `sync`, `rename`, `read`, `measure`, ...
    pub kind: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Bytes read or written; 0 for the rest.
    pub bytes: u64,
}

type Watch = Arc<dyn Fn(&Operation) -> io::Result<()> + Send + Sync>;

/// Passes everything on to another file system, after telling a closure, whose error is returned instead.
#[derive(Clone)]
pub struct Observed<F> {
    inner: F,
    watch: Watch,
}

impl<F: FileSystem> Observed<F> {
    /// Watches `inner`.
    pub fn new(inner: F, watch: impl Fn(&Operation) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Observed { inner, watch: Arc::new(watch) }
    }

    fn tell(&self, kind: &'static str, path: &Path) -> io::Result<()> {
        (self.watch)(&Operation { kind, path: path.into(), bytes: 0 })
    }
}

impl<F: fmt::Debug> fmt::Debug for Observed<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Observed").field(&self.inner).finish()
    }
}

impl<F: FileSystem> FileSystem for Observed<F> {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.tell("create_dir", path)?;
        self.inner.create_dir_all(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.tell("create_dir", path)?;
        self.inner.create_dir(path)
    }

    fn create(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn WriteFile>> {
        self.tell("create", path)?;
        let file = self.inner.create(path, bytes)?;
        Ok(Box::new(ObservedFile { file, path: path.into(), watch: self.watch.clone() }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadFile>> {
        self.tell("open", path)?;
        let file = self.inner.open(path)?;
        Ok(Box::new(ObservedFile { file, path: path.into(), watch: self.watch.clone() }))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.tell("list", path)?;
        self.inner.list(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.tell("rename", from)?;
        self.inner.rename(from, to)
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        self.tell("exchange", one)?;
        self.inner.exchange(one, other)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.tell("remove", path)?;
        self.inner.remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.tell("remove_dir", path)?;
        self.inner.remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.tell("sync_dir", path)?;
        self.inner.sync_dir(path)
    }

    fn try_lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        self.tell("lock", path)?;
        self.inner.try_lock(path)
    }
}

struct ObservedFile<T: ?Sized> {
    path: PathBuf,
    watch: Watch,
    file: Box<T>,
}

impl<T: ?Sized> ObservedFile<T> {
    fn tell(&self, kind: &'static str, bytes: usize) -> io::Result<()> {
        (self.watch)(&Operation { kind, path: self.path.clone(), bytes: bytes as u64 })
    }
}

impl<T: ?Sized> fmt::Debug for ObservedFile<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ObservedFile").field(&self.path).finish()
    }
}

impl WriteFile for ObservedFile<dyn WriteFile> {
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.tell("write", bytes.len())?;
        self.file.write_all_at(offset, bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.tell("sync", 0)?;
        self.file.sync_data()
    }
}

impl ReadFile for ObservedFile<dyn ReadFile> {
    fn bytes(&self) -> io::Result<u64> {
        self.tell("measure", 0)?;
        self.file.bytes()
    }

    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.tell("read", into.len())?;
        self.file.read_exact_at(offset, into)
    }
}
