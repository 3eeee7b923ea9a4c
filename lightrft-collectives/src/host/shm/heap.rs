//! Memory that all ranks of a group have mapped, for buffers that are reduced where they lie
//!
//! A *region* is one memory file with an equal part for each rank. Its parts belong to their ranks as any memory does;
//! only within a call do others read them, or write the results of a reduction to them.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::{Arc, Weak};

use crate::host::segment::Mapping;

/// Bytes for a rank, zero at first, from its group's heap.
#[derive(Debug)]
pub(crate) struct HeapMemory {
    /// Kept mapped for as long as this is there.
    _region: Arc<Region>,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its part of the region as a box owns its bytes.
unsafe impl Send for HeapMemory {}
// SAFETY: through `&HeapMemory` the bytes are only read.
unsafe impl Sync for HeapMemory {}

#[derive(Debug)]
struct Region {
    id: u64,
    mapping: Mapping,
    rank: usize,
    world: usize,
}

impl Region {
    fn stride(&self) -> usize {
        self.mapping.bytes() / self.world
    }
}

impl HeapMemory {
    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: mapped for as long as the region, which `self` keeps; this rank's part, which nobody else writes outside of
        // a call that has borrowed it mutably.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and only this value gives references to these bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// The regions of a group that are still in use here.
#[derive(Debug, Default)]
pub(super) struct Heap {
    regions: Vec<Weak<Region>>,
    made: u64,
}

/// Buffers of all ranks in one region: where each begins.
#[derive(Debug)]
pub(super) struct Shared {
    region: Arc<Region>,
    /// By rank, from the beginning of the mapping.
    offsets: Vec<usize>,
    len: usize,
}

impl Heap {
    /// Bytes of the file that holds a part of `len` bytes for each rank: whole pages, so that ranks do not share one.
    pub(super) fn file_bytes(len: usize, world: usize) -> usize {
        len.max(1).next_multiple_of(4096) * world
    }

    /// Whether this group has ever had a region: the same answer on all ranks.
    pub(super) fn is_used(&self) -> bool {
        self.made > 0
    }

    /// Takes a mapped file as the next region.
    pub(super) fn add(&mut self, mapping: Mapping, len: usize, rank: usize, world: usize) -> HeapMemory {
        self.made += 1;
        let region = Arc::new(Region { id: self.made, mapping, rank, world });
        self.regions.retain(|region| region.strong_count() > 0);
        self.regions.push(Arc::downgrade(&region));
        let start = region.mapping.at(rank * region.stride(), len);
        HeapMemory { _region: region, start, len }
    }

    /// Where `bytes` lie, if in one of this rank's parts: the region, and the offset in the part.
    pub(super) fn find(&self, bytes: &[u8]) -> Option<(u64, usize)> {
        if bytes.is_empty() {
            return None;
        }
        self.regions.iter().filter_map(Weak::upgrade).find_map(|region| {
            let part = region.mapping.at(region.rank * region.stride(), region.stride()).as_ptr() as usize;
            let offset = (bytes.as_ptr() as usize).checked_sub(part)?;
            (offset + bytes.len() <= region.stride()).then_some((region.id, offset))
        })
    }

    /// The buffers of `len` bytes that ranks have at these offsets in their parts of region `id`; `None` if they do not lie
    /// there: the numbers come from other processes.
    pub(super) fn shared(&self, id: u64, len: usize, offsets: impl Iterator<Item = usize>) -> Option<Shared> {
        let region = self.regions.iter().filter_map(Weak::upgrade).find(|region| region.id == id)?;
        let stride = region.stride();
        let offsets: Vec<usize> = offsets
            .enumerate()
            .map(|(rank, offset)| {
                let fits = offset.checked_add(len).is_some_and(|end| end <= stride);
                fits.then(|| rank * stride + offset)
            })
            .collect::<Option<_>>()?;
        (offsets.len() == region.world).then_some(Shared { region, offsets, len })
    }
}

impl Shared {
    /// Bytes of a rank's buffer. Nobody may write them for as long as the result is used: the caller keeps to the parts
    /// that a call gives each rank.
    pub(super) fn bytes(&self, rank: usize, start: usize, len: usize) -> &[u8] {
        assert!(start + len <= self.len);
        let at = self.region.mapping.at(self.offsets[rank] + start, len);
        // SAFETY: mapped for as long as the region, which `self` keeps; any bytes are valid. The rank whose buffer it is has
        // called, and its call has not returned; while it has not, a range of the buffers is written by one rank only,
        // which has done with reading it.
        unsafe { std::slice::from_raw_parts(at.as_ptr(), len) }
    }

    /// Writes to every rank's buffer what this rank has reduced.
    pub(super) fn store(&self, start: usize, bytes: &[u8]) {
        assert!(start + bytes.len() <= self.len);
        for offset in &self.offsets {
            let at = self.region.mapping.at(offset + start, bytes.len());
            // SAFETY: mapped and in bounds (checked by `at`); `bytes` is memory of this process's own, not of the region. All
            // ranks have called and wait for each other before their calls return, so that no rank uses its buffer, and
            // only this rank writes or reads this range of the buffers.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.as_ptr(), bytes.len()) };
        }
    }
}
