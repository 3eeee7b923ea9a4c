//! Memory shared by the ranks of one machine; one of this crate's unsafe fences
//!
//! A segment is a sealed memory file without a name: the kernel frees it when the last rank that maps it ends, however
//! it ends. It holds [`CELLS`] cells and [`SLOTS`] slots per rank:
//!
//! ```text
//! | nonce | cells of rank 0 | cells of rank 1 | ... | loans of rank 0 | ... | rank 0: slot 0, slot 1 | rank 1: slot 0, slot 1 | ...
//! ```
//!
//! # Protocol
//! A call is a sequence of *steps*. In a step each rank (1) writes to one of its two slots, the two taking turns, and to its
//! cell of the step, (2) publishes the step there and waits for that step of all others, (3) reads their cells and
//! slots. Nothing is read while it is written, with no other wait, because a rank publishes a step only when it has done
//! with reading those before:
//! - Who writes to a slot again, two steps later, has seen everyone publish the step between, and so everyone has
//!   finished reading.
//! - A cell is used again [`CELLS`] steps later.
//!
//! Where ranks read each other's own memory instead of slots, a further step ends the call: until then its
//! owner must not touch it. What becomes of it when the call fails is said in `shm/lend.rs`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Bytes of a slot: two ranks' slots stay in the second-level cache.
pub(super) const SLOT: usize = 256 << 10;

/// Slots of each rank.
const SLOTS: usize = 2;

/// Cells of each rank, taken in turn. A rank is never more than one step ahead of another.
const CELLS: usize = 4;

/// 8-byte words that fit in a cell beside the signature.
pub(super) const PAYLOAD: usize = 12;

/// What a rank shows the others in a step: two cache lines, of which a payload of up to four words needs one.
#[repr(C, align(128))]
pub(super) struct Cell {
    /// The step that this cell shows; a futex.
    pub(super) step: AtomicU32,
    /// Ranks that sleep on `step`.
    pub(super) sleepers: AtomicU32,
    /// The signature of the call.
    pub(super) signature: [AtomicU64; 3],
    /// Whatever goes with it.
    pub(super) payload: [AtomicU64; PAYLOAD],
}

/// What a rank shows of the buffers that it lends, and of those that are lent to it; each on a line of its own, since the
/// one is written in every such call and the other only when one fails.
#[repr(C, align(64))]
pub(super) struct Loans {
    /// The step whose loans this rank is at work on; 0 for none.
    pub(super) at_work: AtomicU32,
    _to_the_next_line: [u8; 60],
    /// The last step whose loan this rank took back, its call having failed; 0 for none.
    pub(super) taken_back: AtomicU32,
}

/// Bytes before the first cell.
const HEAD: usize = 128;

/// A memory file that this process has mapped, readable and writable, shared with others.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value and lives until its `Drop`; nothing in it is tied to a thread.
unsafe impl Send for Mapping {}
// SAFETY: it gives out an address only; who makes references from it answers for them.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// A new file of `bytes` zero bytes. The file is for the others to [open](Mapping::open) and then to close.
    pub(super) fn create(name: &str, bytes: usize) -> io::Result<(Self, OwnedFd)> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, bytes as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok((Self::map(&fd, bytes)?, fd))
    }

    /// The file that process `pid` made and holds open as `fd`.
    pub(super) fn open(pid: u32, fd: u64, bytes: usize) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(format!("/proc/{pid}/fd/{fd}"))?;
        Self::map(&file, bytes)
    }

    fn map(file: &impl AsFd, bytes: usize) -> io::Result<Self> {
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
        Ok(Mapping { base, bytes })
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where `offset` is mapped, checked to lie in the mapping with the `len` bytes after it.
    pub(super) fn at(&self, offset: usize, len: usize) -> NonNull<u8> {
        let end = offset.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.bytes), "{len} bytes at {offset} of {}", self.bytes);
        // SAFETY: within the mapping by the assertion.
        unsafe { self.base.add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; no reference into it outlives `self`.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// One rank's view of the memory that the ranks of a group share.
#[derive(Debug)]
pub(super) struct Segment {
    mapping: Mapping,
    world: usize,
    rank: usize,
}

/// Bytes before the first of the ranks' loans.
fn loans(world: usize) -> usize {
    HEAD + world * CELLS * size_of::<Cell>()
}

/// Bytes before the first slot.
fn slots(world: usize) -> usize {
    loans(world) + world * size_of::<Loans>()
}

fn size(world: usize) -> usize {
    slots(world) + world * SLOTS * SLOT
}

impl Segment {
    /// Makes the memory for `world` ranks. The file is for the others to [open](Segment::open) and then to close.
    pub(super) fn create(nonce: u64, world: usize, rank: usize) -> io::Result<(Self, OwnedFd)> {
        let (mapping, fd) = Mapping::create("lightrft-group", size(world))?;
        let segment = Segment { mapping, world, rank };
        segment.nonce().store(nonce, Ordering::SeqCst);
        Ok((segment, fd))
    }

    /// Maps the memory that process `pid` made and holds open as `fd`.
    pub(super) fn open(pid: u32, fd: u64, nonce: u64, world: usize, rank: usize) -> io::Result<Self> {
        let segment = Segment { mapping: Mapping::open(pid, fd, size(world))?, world, rank };
        if segment.nonce().load(Ordering::SeqCst) != nonce {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not this group's memory"));
        }
        Ok(segment)
    }

    fn nonce(&self) -> &AtomicU64 {
        // SAFETY: the first 8 bytes of the mapping, page-aligned, are only ever used as this atomic.
        unsafe { self.mapping.at(0, 8).cast::<AtomicU64>().as_ref() }
    }

    pub(super) fn world(&self) -> usize {
        self.world
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    /// The cell in which `rank` shows `step`.
    #[inline]
    pub(super) fn cell(&self, rank: usize, step: u32) -> &Cell {
        assert!(rank < self.world, "rank {rank} of {}", self.world);
        let index = rank * CELLS + step as usize % CELLS;
        let cell = self.mapping.at(HEAD + index * size_of::<Cell>(), size_of::<Cell>()).cast::<Cell>();
        // SAFETY: within the mapping (checked by `at`), aligned (page-aligned base, `HEAD` and the size of a cell are
        // multiples of 128), and all fields are atomics, for which any bytes are valid and which other processes may
        // change at any time.
        unsafe { cell.as_ref() }
    }

    /// What `rank` shows of its loans.
    pub(super) fn loans(&self, rank: usize) -> &Loans {
        assert!(rank < self.world, "rank {rank} of {}", self.world);
        let at = loans(self.world) + rank * size_of::<Loans>();
        let loans = self.mapping.at(at, size_of::<Loans>()).cast::<Loans>();
        // SAFETY: within the mapping (checked by `at`), aligned (page-aligned base, `HEAD` and the sizes of cells and loans
        // are multiples of 64), and all fields that are used are atomics, for which any bytes are valid and which other
        // processes may change at any time.
        unsafe { loans.as_ref() }
    }

    /// Where `range` of a slot begins, checked to lie in it.
    fn slot(&self, rank: usize, slot: usize, range: &Range<usize>) -> NonNull<u8> {
        assert!(rank < self.world && slot < SLOTS && range.start <= range.end && range.end <= SLOT);
        self.mapping.at(slots(self.world) + (rank * SLOTS + slot) * SLOT + range.start, range.len())
    }

    /// Bytes of a slot of any rank, after the step that published them.
    pub(super) fn read(&self, rank: usize, slot: usize, range: Range<usize>) -> &[u8] {
        let start = self.slot(rank, slot, &range);
        // SAFETY: mapped for as long as the segment; any bytes are valid; nobody writes them while they are read, other
        // ranks by the protocol above, this one because that takes `&mut self`.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), range.len()) }
    }

    /// Bytes of this rank's slot to write, before the step that publishes them.
    pub(super) fn write(&mut self, slot: usize, range: Range<usize>) -> &mut [u8] {
        self.split(slot, range).0
    }

    /// As [`write`](Segment::write), with the others' side of the same slot to read meanwhile.
    pub(super) fn split(&mut self, slot: usize, range: Range<usize>) -> (&mut [u8], Others<'_>) {
        let start = self.slot(self.rank, slot, &range);
        let others = Others { segment: self, slot };
        // SAFETY: mapped for as long as the segment; any bytes are valid. Exclusive in this process: the segment is
        // borrowed mutably for as long as the result lives, and `Others` gives out no bytes of this rank. No other rank
        // reads them now, by the protocol above.
        (unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), range.len()) }, others)
    }
}

/// The other ranks' side of a slot.
#[derive(Clone, Copy)]
pub(super) struct Others<'s> {
    segment: &'s Segment,
    slot: usize,
}

impl<'s> Others<'s> {
    /// Bytes of another rank, after the step that published them.
    pub(super) fn bytes(&self, rank: usize, range: Range<usize>) -> &'s [u8] {
        assert_ne!(rank, self.segment.rank, "not another rank");
        self.segment.read(rank, self.slot, range)
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

    #[test]
    fn a_payload_of_four_words_travels_with_its_signature_in_one_cache_line() {
        assert_eq!(std::mem::offset_of!(Cell, payload) + 4 * 8, 64);
        assert_eq!(size_of::<Cell>(), 128);
        assert_eq!((size_of::<Loans>(), std::mem::offset_of!(Loans, taken_back)), (128, 64));
    }
}
