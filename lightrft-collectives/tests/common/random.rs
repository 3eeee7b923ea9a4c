//! Numbers that every rank draws alike from one seed

/// SplitMix64 (Steele, Lea and Flood, 2014): small, and any seed will do.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

/// Mixes the bits of `x` so that neighbours have nothing in common.
pub(crate) fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(mix(seed ^ 0x5851_F42D_4C95_7F2D))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number in `0..n`; 0 if there is none.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub(crate) fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    /// True `percent` times in a hundred.
    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// Some of `0..n`, at least one, in any order.
    pub(crate) fn some_of(&mut self, n: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).collect();
        for last in (1..n).rev() {
            all.swap(last, self.below(last + 1));
        }
        all.truncate(1 + self.below(n));
        all
    }
}
