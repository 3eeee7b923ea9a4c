//! The pages of keys and values in a GPU's memory.

use lightrft_collectives::nccl::Stream;

use super::super::pages::PageId;
use super::memory::Block;
use crate::Result;

/// Memory is taken in blocks of about so many bytes.
const BLOCK_BYTES: u64 = 64 << 20;

/// Pages, and where each lies.
#[derive(Debug)]
pub(super) struct Cache {
    page_bytes: u64,
    blocks: Vec<Block>,
    addresses: Vec<u64>,
}

impl Cache {
    /// No pages yet.
    pub(super) fn new(page_bytes: u64) -> Self {
        Self { page_bytes, blocks: Vec::new(), addresses: Vec::new() }
    }

    pub(super) fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Bytes of memory held, used or not.
    pub(super) fn bytes(&self) -> u64 {
        self.blocks.iter().map(Block::bytes).sum()
    }

    /// Frees all of it.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.page_bytes);
    }

    /// Takes memory for so many pages in all, and for some to come, but not beyond `limit`.
    pub(super) fn grow(&mut self, stream: &Stream, pages: usize, limit: usize) -> Result<()> {
        while self.addresses.len() < pages {
            let some = usize::try_from(BLOCK_BYTES / self.page_bytes.max(1)).unwrap_or(1).max(1);
            let left = limit.max(pages) - self.addresses.len();
            let count = some.min(left) as u64;
            let block = Block::zeroed(stream, count * self.page_bytes, "memory for the key-value cache")?;
            self.addresses.extend((0..count).map(|page| block.address() + page * self.page_bytes));
            self.blocks.push(block);
        }
        Ok(())
    }

    /// Where a page lies.
    pub(super) fn address(&self, page: PageId) -> u64 {
        self.addresses.get(page as usize).copied().unwrap_or_default()
    }
}
