//! Pages of the cache as the schedule counts them: a budget, and who holds what.

/// Tokens of one page.
pub(super) const PAGE_TOKENS: usize = 16;

/// A page's place in the cache.
pub(super) type PageId = u32;

/// The pages of all sequences. A page may belong to several, which then only read it.
#[derive(Debug)]
pub(super) struct Pages {
    /// Most pages at once.
    limit: usize,
    /// How many sequences hold each page that was ever taken.
    owners: Vec<u32>,
    free: Vec<PageId>,
}

impl Pages {
    /// None yet, and `limit` at most.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit: limit.min(u32::MAX as usize), owners: Vec::new(), free: Vec::new() }
    }

    /// Pages that so many tokens fill.
    pub(super) fn pages_of(tokens: usize) -> usize {
        tokens.div_ceil(PAGE_TOKENS)
    }

    /// Pages that were ever taken: the cache needs memory for so many.
    pub(super) fn count(&self) -> usize {
        self.owners.len()
    }

    /// Forgets every page: their memory is gone.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.limit);
    }

    /// Changes how many pages there may be at once. Those that were taken before stay.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit.clamp(self.count(), u32::MAX as usize);
    }

    /// Most pages at once.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Pages that can still be taken.
    pub(super) fn available(&self) -> usize {
        self.free.len() + (self.limit - self.count().min(self.limit))
    }

    /// Gives every page back, keeping the memory, which is there for the first `held` of them: for others that were taken
    /// none was to be had.
    pub(super) fn reset(&mut self, held: usize) {
        self.owners.truncate(held);
        self.owners.fill(0);
        self.free = (0..self.count() as u32).rev().collect();
    }

    /// A page of its own, with whatever it held before; `None` when the budget is spent.
    pub(super) fn take(&mut self) -> Option<PageId> {
        if let Some(id) = self.free.pop() {
            self.owners[id as usize] = 1;
            return Some(id);
        }
        if self.count() >= self.limit {
            return None;
        }
        self.owners.push(1);
        Some((self.count() - 1) as PageId)
    }

    /// Counts one more owner.
    pub(super) fn share(&mut self, id: PageId) {
        self.owners[id as usize] += 1;
    }

    /// Counts one owner less; the page of none is free.
    pub(super) fn release(&mut self, id: PageId) {
        let owners = &mut self.owners[id as usize];
        *owners = owners.saturating_sub(1);
        if *owners == 0 {
            self.free.push(id);
        }
    }

    /// Whether more than one sequence holds it.
    pub(super) fn is_shared(&self, id: PageId) -> bool {
        self.owners[id as usize] > 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_no_memory_was_found_for_are_forgotten() {
        let mut pages = Pages::new(8);
        while pages.take().is_some() {}
        // Memory was found for three of them. Now less may be taken, though not less than is there.
        pages.reset(3);
        assert_eq!((pages.count(), pages.available()), (3, 8));
        pages.set_limit(2);
        assert_eq!((pages.limit(), pages.available()), (3, 3));
        assert_eq!([0; 4].map(|_| pages.take()), [Some(0), Some(1), Some(2), None]);
        pages.reset(usize::MAX);
        assert_eq!(
            (pages.count(), pages.available()),
            (3, 3),
            "memory beyond what was ever taken tells nothing"
        );
    }
}
