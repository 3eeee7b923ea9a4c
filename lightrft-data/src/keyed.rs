//! A permutation computed from a key, one position at a time: no table, no start-up.
//!
//! A Feistel network permutes `0..2^bits` for the smallest power of two that is not below `len`; a value that falls
//! outside `0..len` goes through the network again until it falls inside (cycle walking: Black and Rogaway, "Ciphers
//! with arbitrary finite domains", 2002). `bits` may be odd: the two halves then differ by one bit, and each round
//! changes one half by a function of the other, so they never swap. With `2^bits < 2 len` a position costs fewer than
//! two passes on average.
//!
//! This is an order to train in, not encryption. What is asked of it is measured in `tests/shuffle_statistics.rs`:
//! every sample is equally likely at every position, and so is every pair. The order is part of what a checkpoint
//! means, so it never changes: `tests/data/keyed_orders.json` holds it.

/// Golden ratio, splitmix64's increment and the first multiplier of the round function.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Rounds of a network wider than [`NARROW_BITS`]. Six already show a bias at some distances, eight show none.
const ROUNDS: usize = 8;

/// Rounds of a narrow network. A round between halves of a few bits mixes little: lengths 5 and 6 need sixteen.
const NARROW_ROUNDS: usize = 24;

/// Widest network that counts as narrow; three bits more than where eight rounds were seen to suffice.
const NARROW_BITS: u32 = 10;

/// Positions that go through the network side by side.
const LANES: usize = 4;

#[derive(Debug)]
pub(crate) struct KeyedPermutation {
    len: u64,
    low_bits: u32,
    low_mask: u64,
    high_mask: u64,
    rounds: usize,
    keys: [u64; NARROW_ROUNDS],
}

impl KeyedPermutation {
    pub(crate) fn new(len: u64, seed: u64, epoch: u64) -> Self {
        let bits = (u64::BITS - len.saturating_sub(1).leading_zeros()).max(1);
        let low_bits = bits / 2;
        // Seed, epoch and length go through the mixer one after the other: neighbours in any of them share nothing,
        // and (seed 1, epoch 0) is not (seed 0, epoch 1).
        let mut state = splitmix64(seed);
        state = splitmix64(state ^ epoch);
        state = splitmix64(state ^ len);
        let mut keys = [0; NARROW_ROUNDS];
        for key in &mut keys {
            state = state.wrapping_add(GOLDEN);
            *key = splitmix64(state);
        }
        Self {
            len,
            low_bits,
            low_mask: (1 << low_bits) - 1,
            high_mask: (1 << (bits - low_bits)) - 1,
            rounds: if bits <= NARROW_BITS { NARROW_ROUNDS } else { ROUNDS },
            keys,
        }
    }

    /// The sample at `position`. Positions from `len` on have no meaning; the caller keeps to those below.
    pub(crate) fn at(&self, position: u64) -> u64 {
        debug_assert!(position < self.len, "position {position} of {}", self.len);
        let mut value = position;
        loop {
            value = self.pass(value);
            // Ends: the network is a bijection, so walking from inside comes back inside at the latest at `position`.
            if value < self.len {
                return value;
            }
        }
    }

    /// The samples at several positions, as [`at`](Self::at) says, in half the time or less: a pass is a chain of
    /// operations that wait for each other, and passes of [`LANES`] positions fill each other's waits.
    pub(crate) fn at_each(&self, positions: &[u64], samples: &mut [u64]) {
        let mut place = 0;
        let (mut values, mut into) = ([0; LANES], [0; LANES]);
        // Lanes from `walking` on hold no value; those below hold one that has to go through the network (again).
        let mut walking = 0;
        loop {
            while let (true, Some(&position)) = (walking < LANES, positions.get(place)) {
                (values[walking], into[walking]) = (position, place);
                walking += 1;
                place += 1;
            }
            if walking == 0 {
                return;
            }
            self.pass_lanes(&mut values);
            let filled = walking;
            walking = 0;
            for lane in 0..filled {
                // Written in any case, and kept in any case: which of the two counts is decided without a branch.
                samples[into[lane]] = values[lane];
                (values[walking], into[walking]) = (values[lane], into[lane]);
                walking += usize::from(values[lane] >= self.len);
            }
        }
    }

    fn pass(&self, value: u64) -> u64 {
        let mut values = [value];
        self.pass_lanes(&mut values);
        values[0]
    }

    fn pass_lanes<const N: usize>(&self, values: &mut [u64; N]) {
        let mut low = values.map(|value| value & self.low_mask);
        let mut high = values.map(|value| (value >> self.low_bits) & self.high_mask);
        let (pairs, _) = self.keys[..self.rounds].as_chunks::<2>();
        for [for_high, for_low] in pairs {
            for lane in 0..N {
                high[lane] ^= round(low[lane], *for_high) & self.high_mask;
            }
            for lane in 0..N {
                low[lane] ^= round(high[lane], *for_low) & self.low_mask;
            }
        }
        for lane in 0..N {
            values[lane] = (high[lane] << self.low_bits) | low[lane];
        }
    }
}

/// A function of a half (at most 32 bits) and a key whose low 32 bits all depend on every bit of both.
fn round(half: u64, key: u64) -> u64 {
    let mut z = (half ^ key).wrapping_mul(GOLDEN);
    z ^= z >> 32;
    z.wrapping_mul(0xd6e8_feb8_6659_fd93) >> 32
}

/// The mixer of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
pub(crate) fn splitmix64(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(GOLDEN);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
