//! Memory that begins where writes past the page cache want it.

use std::fmt;
use std::io;

/// Offsets, lengths and addresses of writes past the page cache are multiples of this: the page size, and at least the
/// sector size of nearly every disk.
pub(crate) const ALIGN: usize = 4096;

/// Bytes whose address is a multiple of [`ALIGN`]. Kept and used again: fresh memory costs a page fault every 4 KiB,
/// which takes longer than to fill it.
#[derive(Default)]
pub(crate) struct AlignedBuf {
    memory: Vec<u8>,
    /// Where in `memory` the aligned bytes begin.
    begin: usize,
    bytes: usize,
}

impl AlignedBuf {
    /// Makes it `bytes` long. What it then holds is unspecified: zeros, or what it held before.
    ///
    /// # Errors
    /// [`io::ErrorKind::OutOfMemory`].
    pub(crate) fn set_len(&mut self, bytes: usize) -> io::Result<()> {
        if self.begin + bytes > self.memory.len() || self.memory.is_empty() {
            // Not both at once: they may be as large as all of a model's state.
            *self = AlignedBuf::default();
            let room = bytes.checked_add(ALIGN).ok_or(io::ErrorKind::OutOfMemory)?;
            // `vec!` takes zeroed pages from the system without touching them, but ends the process where there are
            // none. So ask for them first.
            Vec::<u8>::new().try_reserve_exact(room).map_err(|_| io::ErrorKind::OutOfMemory)?;
            self.memory = vec![0; room];
            self.begin = self.memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        }
        self.bytes = bytes;
        Ok(())
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.memory[self.begin..self.begin + self.bytes]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.begin..self.begin + self.bytes]
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} of {} bytes)", self.bytes, self.memory.len())
    }
}

/// Whether memory begins at a multiple of `align`, a power of two.
pub(crate) fn is_aligned(bytes: &[u8], align: usize) -> bool {
    bytes.as_ptr().addr().is_multiple_of(align)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_any_length_is_aligned_and_kept() {
        let mut memory = AlignedBuf::default();
        assert!(memory.bytes().is_empty());
        for bytes in [1, ALIGN - 1, ALIGN, 3 * ALIGN + 5, 1 << 20] {
            memory.set_len(bytes).unwrap();
            assert_eq!(memory.bytes_mut().len(), bytes);
            assert!(is_aligned(memory.bytes(), ALIGN));
        }
        let address = memory.bytes().as_ptr();
        for bytes in [0, 7, 1 << 20] {
            memory.set_len(bytes).unwrap();
            assert_eq!((memory.bytes().as_ptr(), memory.bytes().len()), (address, bytes));
        }
    }

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        for bytes in [usize::MAX, isize::MAX as usize] {
            let refused = AlignedBuf::default().set_len(bytes).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::OutOfMemory);
        }
    }
}
