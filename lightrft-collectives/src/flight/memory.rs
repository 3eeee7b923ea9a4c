//! The flight recorder's memory: words that one process writes and others read; one of this crate's unsafe fences
//!
//! The memory is a sealed file without a name: the kernel keeps it for as long as anybody maps it, so that it outlives
//! the process that writes to it. Every word is an atomic; there is no way to a word but by its index, checked.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A mapping of a whole file of words.
#[derive(Debug)]
struct Mapping {
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping belongs to this value and lives until its `Drop`; nothing in it is tied to a thread.
unsafe impl Send for Mapping {}
// SAFETY: only atomics are reached through it.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps all of `file`, of `words` words.
    fn new(file: &impl AsFd, words: usize, protection: ProtFlags) -> io::Result<Self> {
        let bytes = words * size_of::<AtomicU64>();
        let size = fstat(file)?.st_size;
        // A file that shrank under a reader would kill it with SIGBUS.
        if size as u64 != bytes as u64 || !fcntl_get_seals(file)?.contains(SealFlags::SHRINK) {
            let text = format!("{size} bytes that may shrink, expected {bytes} that may not");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of this process. The file has
        // `bytes` bytes and is sealed against shrinking, which cannot be undone (both checked).
        let base = unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, file, 0)? };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Mapping { base, words })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: `words` words are mapped for as long as `self`, page-aligned; for an atomic any bytes are valid, and
        // other processes may change them at any time.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; no reference into it outlives `self`.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}

/// Words that this process writes.
#[derive(Debug)]
pub(crate) struct Written(Mapping);

impl Written {
    /// Makes zeroed words in a memory file of this name. Others open the file for as long as it is kept.
    pub(crate) fn new(name: &str, words: usize) -> io::Result<(Self, OwnedFd)> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, (words * size_of::<AtomicU64>()) as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
        let mapping = Mapping::new(&fd, words, ProtFlags::READ | ProtFlags::WRITE)?;
        // From here on nobody else can write. Old kernels do not know this seal, and need not.
        let _ = fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE | SealFlags::SEAL);
        Ok((Written(mapping), fd))
    }
}

impl Deref for Written {
    type Target = [AtomicU64];

    fn deref(&self) -> &[AtomicU64] {
        self.0.words()
    }
}

/// Words that another process writes.
#[derive(Debug)]
pub(crate) struct Read(Mapping);

impl Read {
    /// Maps the memory file at `path`.
    pub(crate) fn open(path: &Path, words: usize) -> io::Result<Self> {
        Mapping::new(&File::open(path)?, words, ProtFlags::READ).map(Read)
    }
}

/// A place to read words from.
pub(crate) trait Words {
    /// The word at `index`.
    fn load(&self, index: usize, order: Ordering) -> u64;
}

impl Words for Read {
    // The mapping is read-only, where loads of this size are allowed and nothing else is: so this is all there is.
    fn load(&self, index: usize, order: Ordering) -> u64 {
        self.0.words()[index].load(order)
    }
}

impl Words for Written {
    fn load(&self, index: usize, order: Ordering) -> u64 {
        self[index].load(order)
    }
}

/// The processor's clock: equal on all processors of a machine where the kernel itself keeps time by it.
#[cfg(target_arch = "x86_64")]
pub(crate) fn cycles() -> u64 {
    // SAFETY: the instruction exists on every x86-64 processor and touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// This processor's clock is not known to be the same for all.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn cycles() -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn others_see_what_is_written_and_can_neither_write_nor_shrink_it() {
        let (written, fd) = Written::new("test", 512).unwrap();
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let read = Read::open(path.as_ref(), 512).unwrap();
        written[511].store(7, Ordering::Relaxed);
        assert_eq!(read.load(511, Ordering::Relaxed), 7);
        assert!(ftruncate(&fd, 8).is_err());
        let file = File::options().read(true).write(true).open(&path).unwrap();
        assert!(Mapping::new(&file, 512, ProtFlags::READ | ProtFlags::WRITE).is_err());
        assert!(Read::open(path.as_ref(), 513).is_err());
        drop((written, fd));
        assert_eq!(read.load(511, Ordering::Relaxed), 7);
    }
}
