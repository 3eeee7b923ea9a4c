//! Memory shared by the ranks of one machine; one of this crate's unsafe fences
//!
//! A segment is a sealed memory file without a name: the kernel frees it when the last rank that maps it ends, however
//! it ends. It holds one [`Line`] and [`SLOTS`] slots per rank:
//!
//! ```text
//! | nonce | line of rank 0 | line of rank 1 | ... | rank 0: slot 0, slot 1 | rank 1: slot 0, slot 1 | ...
//! ```
//!
//! # Protocol
//! A call is a sequence of *uses* of one slot per rank, alternating between the two. In a use each rank
//! (1) writes to its own slot, (2) publishes a step and waits for that step of all others, (3) reads theirs. A rank
//! writes to a slot again two uses later, after the step of the use between, which the others publish only once they
//! have done reading. So nobody reads what is being written, and no other wait is needed.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Bytes of a slot: two ranks' slots stay in the second-level cache.
pub(super) const SLOT: usize = 256 << 10;

/// Slots of each rank.
const SLOTS: usize = 2;

/// Steps whose signatures are kept. A rank is never more than one step ahead of another.
pub(super) const HISTORY: usize = 4;

/// What a rank shows the others, on cache lines of its own (two, since processors fetch them in pairs).
#[repr(C, align(128))]
pub(super) struct Line {
    /// The last step published; a futex.
    pub(super) step: AtomicU32,
    /// Ranks that sleep on `step`.
    pub(super) sleepers: AtomicU32,
    /// Signatures of the last steps, by step modulo [`HISTORY`].
    pub(super) signatures: [[AtomicU64; 3]; HISTORY],
}

/// Bytes before the first line.
const HEAD: usize = 128;

/// A mapping of the memory that the ranks of a group share.
#[derive(Debug)]
pub(super) struct Segment {
    base: NonNull<u8>,
    bytes: usize,
    world: usize,
    rank: usize,
}

// SAFETY: the mapping belongs to this value and lives until its `Drop`; nothing in it is tied to a thread.
unsafe impl Send for Segment {}
// SAFETY: through `&Segment` only atomics and slots that the protocol above lets nobody write are reached.
unsafe impl Sync for Segment {}

fn size(world: usize) -> usize {
    HEAD + world * (size_of::<Line>() + SLOTS * SLOT)
}

impl Segment {
    /// Makes the memory for `world` ranks. The file is for the others to [open](Segment::open) and then to close.
    pub(super) fn create(nonce: u64, world: usize, rank: usize) -> io::Result<(Self, OwnedFd)> {
        let fd = memfd_create("lightrft-group", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, size(world) as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let segment = Self::map(&fd, world, rank)?;
        segment.nonce().store(nonce, std::sync::atomic::Ordering::SeqCst);
        Ok((segment, fd))
    }

    /// Maps the memory that process `pid` made and holds open as `fd`.
    pub(super) fn open(pid: u32, fd: u64, nonce: u64, world: usize, rank: usize) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(format!("/proc/{pid}/fd/{fd}"))?;
        let segment = Self::map(&file, world, rank)?;
        if segment.nonce().load(std::sync::atomic::Ordering::SeqCst) != nonce {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not this group's memory"));
        }
        Ok(segment)
    }

    fn map(file: &impl AsFd, world: usize, rank: usize) -> io::Result<Self> {
        let bytes = size(world);
        let stat = fstat(file)?;
        if stat.st_size as u64 != bytes as u64 {
            let text = format!("{} has {} bytes, expected {bytes}", file.as_fd().as_raw_fd(), stat.st_size);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        // A file that shrank under a reader would kill it with SIGBUS.
        if !fcntl_get_seals(file)?.contains(SealFlags::SHRINK) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a file that may shrink"));
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of this process. The file has
        // `bytes` bytes and is sealed against shrinking, which cannot be undone (both checked).
        let base = unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, file, 0)? };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Segment { base, bytes, world, rank })
    }

    fn nonce(&self) -> &AtomicU64 {
        // SAFETY: the first 8 bytes of the mapping, page-aligned, are only ever used as this atomic.
        unsafe { self.base.cast::<AtomicU64>().as_ref() }
    }

    pub(super) fn world(&self) -> usize {
        self.world
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    /// The line of `rank`.
    pub(super) fn line(&self, rank: usize) -> &Line {
        assert!(rank < self.world, "rank {rank} of {}", self.world);
        // SAFETY: within the mapping (`rank` checked; `size` counts a line per rank after `HEAD`), aligned
        // (page-aligned base, `HEAD` and the size of a line are multiples of 128), and all fields are atomics, for which
        // any bytes are valid and which other processes may change at any time.
        unsafe { self.base.add(HEAD + rank * size_of::<Line>()).cast::<Line>().as_ref() }
    }

    /// Where `range` of a slot begins, checked to lie in it.
    fn slot(&self, rank: usize, slot: usize, range: &Range<usize>) -> NonNull<u8> {
        assert!(rank < self.world && slot < SLOTS && range.start <= range.end && range.end <= SLOT);
        let offset = HEAD + self.world * size_of::<Line>() + (rank * SLOTS + slot) * SLOT + range.start;
        // SAFETY: within the mapping by the assertion and `size`.
        unsafe { self.base.add(offset) }
    }

    /// Bytes of another rank's slot, after the step that published them.
    pub(super) fn read(&self, rank: usize, slot: usize, range: Range<usize>) -> &[u8] {
        let start = self.slot(rank, slot, &range);
        // SAFETY: mapped for as long as `self`; any bytes are valid; nobody writes them while they are read, by the
        // protocol above, and this process writes to its own slots only, through `&mut self`.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), range.len()) }
    }

    /// This rank's own bytes of a slot, before the step that publishes them, with everyone's others beside them: the
    /// bytes `theirs` of each rank's slot but this one's.
    pub(super) fn write_beside(
        &mut self,
        slot: usize,
        mine: Range<usize>,
        theirs: Range<usize>,
    ) -> (&mut [u8], Vec<&[u8]>) {
        let start = self.slot(self.rank, slot, &mine);
        let this = &*self;
        let others = (0..this.world)
            .map(|rank| if rank == this.rank { &[] } else { this.read(rank, slot, theirs.clone()) })
            .collect();
        // SAFETY: as in `read`; exclusive, because `&mut self` is held for as long as the result, and no part of
        // this rank's own slots is among `others`. No other rank reads them now, by the protocol above.
        (unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), mine.len()) }, others)
    }

    /// This rank's own bytes of a slot, before the step that publishes them.
    pub(super) fn write(&mut self, slot: usize, range: Range<usize>) -> &mut [u8] {
        self.write_beside(slot, range, 0..0).0
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; no reference into it outlives `self`.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_may_shrink_is_not_mapped() {
        let fd = memfd_create("loose", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, size(2) as u64).unwrap();
        let open = || Segment::open(std::process::id(), fd.as_raw_fd() as u64, 0, 2, 1);
        assert!(open().is_err());
        fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        assert!(open().is_ok());
    }
}
