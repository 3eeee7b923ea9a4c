//! What a step computes, wherever weights and cache are.

use super::pages::PageId;
use crate::Result;

/// A token to compute.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    pub(super) token: u32,
    /// Its position in its sequence.
    pub(super) position: usize,
    /// Index of its sequence among the tables of the step.
    pub(super) sequence: usize,
}

/// New tokens of any sequences, at any positions, side by side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step<'a> {
    /// Pages that memory is needed for.
    pub(super) pages: usize,
    /// Pages to copy, in this order and before anything is computed: from, to.
    pub(super) copies: &'a [(PageId, PageId)],
    /// The columns of one sequence stand in their order.
    pub(super) columns: &'a [Column],
    /// The pages of each sequence.
    pub(super) tables: &'a [&'a [PageId]],
    /// Columns whose logits are asked for.
    pub(super) wanted: &'a [usize],
}

/// A model whose weights and cache are at hand.
pub(super) trait Forward: Sync {
    /// Number of token ids.
    fn vocabulary(&self) -> usize;

    /// Computes a step. The keys and values of its columns are in the pages afterwards.
    ///
    /// # Errors
    /// The system's or the device's, for memory within the budget that it does not have, and the device's own.
    fn step(&mut self, step: &Step<'_>) -> Result<()>;

    /// Logits of the last step's wanted column of this index, in the order of the tokens; in `scratch`, if they lie
    /// otherwise.
    fn logits<'l>(&'l self, wanted: usize, scratch: &'l mut Vec<f32>) -> &'l [f32];
}
