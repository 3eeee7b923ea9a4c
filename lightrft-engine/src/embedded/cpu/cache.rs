//! The memory of the cache's pages.

use std::collections::TryReserveError;

use super::super::pages::PageId;
use super::attention::PageLayout;

/// Pages of keys and values in host memory.
#[derive(Debug)]
pub(in super::super) struct Cache {
    layout: PageLayout,
    /// Memory is taken when a page is used first, and kept for the next one that needs it.
    pages: Vec<Box<[f32]>>,
}

impl Cache {
    /// No pages yet.
    pub(in super::super) fn new(layout: PageLayout) -> Self {
        Self { layout, pages: Vec::new() }
    }

    pub(super) fn layout(&self) -> PageLayout {
        self.layout
    }

    /// Bytes of one page.
    pub(in super::super) fn page_bytes(&self) -> u64 {
        self.layout.elems() as u64 * size_of::<f32>() as u64
    }

    /// Bytes of memory held, used or not.
    pub(in super::super) fn bytes(&self) -> u64 {
        self.pages.len() as u64 * self.page_bytes()
    }

    /// Gives the memory back.
    pub(in super::super) fn clear(&mut self) {
        self.pages = Vec::new();
    }

    /// Takes memory for so many pages in all.
    pub(super) fn grow(&mut self, pages: usize) -> Result<(), TryReserveError> {
        while self.pages.len() < pages {
            let mut page = Vec::new();
            page.try_reserve_exact(self.layout.elems())?;
            page.resize(self.layout.elems(), 0.0);
            self.pages.push(page.into_boxed_slice());
        }
        Ok(())
    }

    /// Copies the contents of one page to another.
    pub(super) fn copy(&mut self, from: PageId, to: PageId) {
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
