//! Pages of the cache: a budget, counted references, and the memory behind them.

use std::collections::TryReserveError;

use super::attention::{PAGE_TOKENS, PageLayout};

/// A page's place in the pool.
pub(in super::super) type PageId = u32;

/// The pages of all sequences. A page may belong to several, which then only read it.
#[derive(Debug)]
pub(in super::super) struct Pool {
    layout: PageLayout,
    /// Most pages at once.
    limit: usize,
    /// Memory is taken when a page is used first, and kept for the next one that needs it.
    pages: Vec<Box<[f32]>>,
    /// How many sequences hold each page.
    owners: Vec<u32>,
    free: Vec<PageId>,
}

impl Pool {
    /// An empty pool of at most `limit` pages.
    pub(in super::super) fn new(layout: PageLayout, limit: usize) -> Self {
        Self {
            layout,
            limit: limit.min(u32::MAX as usize),
            pages: Vec::new(),
            owners: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Pages that so many tokens fill.
    pub(in super::super) fn pages_of(tokens: usize) -> usize {
        tokens.div_ceil(PAGE_TOKENS)
    }

    pub(in super::super) fn layout(&self) -> PageLayout {
        self.layout
    }

    /// Bytes of memory held, used or not.
    pub(in super::super) fn bytes(&self) -> usize {
        self.pages.len() * self.layout.elems() * size_of::<f32>()
    }

    /// Bytes of so many pages.
    pub(in super::super) fn bytes_of(&self, pages: usize) -> u64 {
        pages as u64 * self.layout.elems() as u64 * size_of::<f32>() as u64
    }

    /// Gives the memory back.
    pub(in super::super) fn clear(&mut self) {
        *self = Self::new(self.layout, self.limit);
    }

    /// Pages that can still be taken.
    pub(in super::super) fn available(&self) -> usize {
        self.free.len() + (self.limit - self.pages.len().min(self.limit))
    }

    /// Gives every page back, keeping the memory.
    pub(in super::super) fn reset(&mut self) {
        self.owners.fill(0);
        self.free = (0..self.pages.len() as u32).rev().collect();
    }

    /// A page of its own, with whatever it held before; `None` when the budget is spent.
    pub(in super::super) fn take(&mut self) -> Result<Option<PageId>, TryReserveError> {
        if let Some(id) = self.free.pop() {
            self.owners[id as usize] = 1;
            return Ok(Some(id));
        }
        if self.pages.len() >= self.limit {
            return Ok(None);
        }
        let mut page = Vec::new();
        page.try_reserve_exact(self.layout.elems())?;
        page.resize(self.layout.elems(), 0.0);
        self.pages.push(page.into_boxed_slice());
        self.owners.push(1);
        Ok(Some((self.pages.len() - 1) as PageId))
    }

    /// Counts one more owner.
    pub(in super::super) fn share(&mut self, id: PageId) {
        self.owners[id as usize] += 1;
    }

    /// Counts one owner less; the page of none is free.
    pub(in super::super) fn release(&mut self, id: PageId) {
        let owners = &mut self.owners[id as usize];
        *owners = owners.saturating_sub(1);
        if *owners == 0 {
            self.free.push(id);
        }
    }

    /// Whether more than one sequence holds it.
    pub(in super::super) fn is_shared(&self, id: PageId) -> bool {
        self.owners[id as usize] > 1
    }

    /// Copies the contents of one page to another.
    pub(in super::super) fn copy(&mut self, from: PageId, to: PageId) {
        if let Ok([from, to]) = self.pages.get_disjoint_mut([from as usize, to as usize]) {
            to.copy_from_slice(from);
        }
    }

    pub(super) fn page(&self, id: PageId) -> &[f32] {
        &self.pages[id as usize]
    }

    pub(super) fn page_mut(&mut self, id: PageId) -> &mut [f32] {
        &mut self.pages[id as usize]
    }
}
