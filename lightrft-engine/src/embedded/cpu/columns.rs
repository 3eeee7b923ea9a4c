//! Activations of a step: a column for each token, sixteen columns side by side.

use super::lanes::LANES;

/// Activations `[group, features, 16]`: column `c` is lane `c % 16` of group `c / 16`.
///
/// Products then need no transposition and no packing. Lanes past the last column are zero in the embedding and
/// therefore finite everywhere.
#[derive(Debug, Default)]
pub(super) struct Columns {
    features: usize,
    data: Vec<f32>,
}

impl Columns {
    /// Makes room for so many columns; what they hold is left over from before.
    pub(super) fn shape(&mut self, features: usize, columns: usize) {
        self.features = features;
        self.data.resize(features * columns.next_multiple_of(LANES), 0.0);
    }

    pub(super) fn features(&self) -> usize {
        self.features
    }

    /// Elements of one group: `[features, 16]`.
    pub(super) fn group_elems(&self) -> usize {
        self.features * LANES
    }

    pub(super) fn groups(&self) -> std::slice::ChunksExact<'_, f32> {
        self.data.chunks_exact(self.group_elems().max(1))
    }

    pub(super) fn groups_mut(&mut self) -> std::slice::ChunksExactMut<'_, f32> {
        let elems = self.group_elems().max(1);
        self.data.chunks_exact_mut(elems)
    }

    /// Copies features `from..from + out.len()` of column `c`.
    pub(super) fn gather(&self, c: usize, from: usize, out: &mut [f32]) {
        let start = (c / LANES * self.features + from) * LANES + c % LANES;
        for (out, x) in out.iter_mut().zip(self.data[start..].iter().step_by(LANES)) {
            *out = *x;
        }
    }

    /// Writes all features of column `c`.
    pub(super) fn scatter(&mut self, c: usize, values: impl Iterator<Item = f32>) {
        let start = c / LANES * self.group_elems() + c % LANES;
        for (to, x) in self.data[start..].iter_mut().step_by(LANES).zip(values) {
            *to = x;
        }
    }

    /// Sets the lanes from column `columns` on to zero.
    pub(super) fn clear_from(&mut self, columns: usize) {
        let elems = self.group_elems();
        let (group, lane) = (columns / LANES, columns % LANES);
        if lane > 0 && elems > 0 {
            let group = &mut self.data[group * elems..(group + 1) * elems];
            group.chunks_exact_mut(LANES).for_each(|row| row[lane..].fill(0.0));
        }
    }
}
