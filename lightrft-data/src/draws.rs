//! A rank's draws up to the end of an epoch, computed as they are asked for.

use std::iter::FusedIterator;

use crate::Permutation;
use crate::groups::{Deal, Draw};
use crate::mixture::MixedOrder;

/// The order of an epoch, of one data set or of a mixture.
#[derive(Clone, Debug)]
pub(crate) enum EpochOrder {
    One(Permutation),
    Mixed(MixedOrder),
}

/// Positions that are computed together where that is faster than one by one.
const BLOCK: usize = 64;

/// This rank's draws up to the end of an epoch, made by
/// [`DistributedSampler::draws`](crate::DistributedSampler::draws). Skipping costs nothing.
#[derive(Clone, Debug)]
pub struct Draws {
    order: EpochOrder,
    deal: Deal,
    /// Positions of the epoch before padding, at least 1 where there is a row.
    positions: u64,
    row: u64,
    rank: u64,
    /// Samples of the rows from `block_start` on that were computed ahead.
    block: [u64; BLOCK],
    block_start: u64,
    block_len: usize,
}

impl Draws {
    pub(crate) fn new(order: EpochOrder, deal: Deal, positions: usize, row: u64, rank: usize) -> Self {
        let (positions, rank) = (positions as u64, rank as u64);
        Self { order, deal, positions, row, rank, block: [0; BLOCK], block_start: 0, block_len: 0 }
    }

    fn skip_rows(&mut self, rows: usize) {
        self.row = self.row.saturating_add(rows as u64).min(self.deal.rows);
    }

    /// The group and the copy that this rank draws in a row.
    fn place(&self, row: u64) -> (u64, u64) {
        let seat = match self.order {
            EpochOrder::One(_) => self.rank,
            EpochOrder::Mixed(_) => self.deal.rotated(row, self.rank),
        };
        self.deal.place(row, seat)
    }

    /// The position of a row's group in the order. Groups from `positions` on are padding: the order begins again.
    fn wrapped(&self, group: u64) -> u64 {
        // Nearly none is padding, and a division would cost as much as the rest.
        if group < self.positions { group } else { group % self.positions }
    }

    /// The sample that this rank draws in the row where it stands.
    #[inline]
    fn sample(&mut self) -> Option<usize> {
        let ahead = self.row.wrapping_sub(self.block_start);
        if ahead < self.block_len as u64 {
            return Some(self.block[ahead as usize] as usize);
        }
        self.compute()
    }

    fn compute(&mut self) -> Option<usize> {
        let row = self.row;
        let order = match &self.order {
            EpochOrder::Mixed(mixed) => return mixed.at(self.wrapped(self.place(row).0)),
            EpochOrder::One(order) => order,
        };
        let group = |row| self.wrapped(self.deal.place(row, self.rank).0);
        let Some(keyed) = order.keyed() else {
            return order.at(group(row) as usize);
        };
        // Short blocks first: whoever takes one sample of many does not pay for the others.
        let len = (2 * self.block_len).clamp(BLOCK / 8, BLOCK).min((self.deal.rows - row) as usize);
        let mut positions = [0; BLOCK];
        for (row, position) in (row..row + len as u64).zip(&mut positions) {
            *position = group(row);
        }
        keyed.at_each(&positions[..len], &mut self.block);
        (self.block_start, self.block_len) = (row, len);
        Some(self.block[0] as usize)
    }
}

impl Iterator for Draws {
    type Item = Draw;

    fn next(&mut self) -> Option<Draw> {
        if self.row >= self.deal.rows {
            return None;
        }
        let index = self.sample()?;
        let (group, copy) = self.place(self.row);
        self.row += 1;
        Some(Draw { index, group, copy: copy as usize })
    }

    fn nth(&mut self, n: usize) -> Option<Draw> {
        self.skip_rows(n);
        self.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // The rows of an epoch times the ranks fit a usize.
        let left = (self.deal.rows - self.row) as usize;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Draws {}
impl FusedIterator for Draws {}

/// This rank's samples up to the end of an epoch, made by
/// [`DistributedSampler::indices`](crate::DistributedSampler::indices). Skipping costs nothing.
#[derive(Clone, Debug)]
pub struct Indices {
    pub(crate) draws: Draws,
}

impl Iterator for Indices {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        if self.draws.row >= self.draws.deal.rows {
            return None;
        }
        let index = self.draws.sample()?;
        self.draws.row += 1;
        Some(index)
    }

    fn nth(&mut self, n: usize) -> Option<usize> {
        self.draws.skip_rows(n);
        self.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.draws.size_hint()
    }
}

impl ExactSizeIterator for Indices {}
impl FusedIterator for Indices {}
