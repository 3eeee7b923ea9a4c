//! A seekable order is a bijection, and a fair one: chi-squared on positions, neighbours and whole orders.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::HashMap;

use lightrft_data::{Permutation, Shuffle};
use proptest::prelude::*;

fn order(len: usize, seed: u64, epoch: u64) -> Vec<usize> {
    Permutation::new(Shuffle::Seekable, len, seed, epoch).unwrap().iter().collect()
}

proptest! {
    #[test]
    fn a_seekable_order_holds_every_sample_once(len in 0usize..3000, seed: u64, epoch: u64) {
        let mut sorted = order(len, seed, epoch);
        sorted.sort_unstable();
        prop_assert_eq!(sorted, (0..len).collect::<Vec<_>>());
    }

    #[test]
    fn positions_of_a_huge_order_are_inside_and_distinct(len in 1usize.., seed: u64, start: usize) {
        let order = Permutation::new(Shuffle::Seekable, len, seed, 0).unwrap();
        let positions: Vec<_> = (0..50).map(|i| start.wrapping_add(i) % len).collect();
        let found: HashMap<_, _> = positions.iter().map(|&p| (order.at(p).unwrap(), p)).collect();
        let distinct: std::collections::HashSet<_> = positions.iter().collect();
        prop_assert_eq!(found.len(), distinct.len());
        prop_assert!(found.keys().all(|&sample| sample < len));
        prop_assert_eq!(order.at(len), None);
    }
}

/// How many standard deviations chi-squared lies above its mean, `cells` being equally likely.
fn excess(observed: impl IntoIterator<Item = u32>, cells: usize, draws: f64, freedom: f64) -> f64 {
    let expected = draws / cells as f64;
    let (mut chi, mut seen) = (0.0, 0);
    for count in observed {
        chi += (f64::from(count) - expected).powi(2) / expected;
        seen += 1;
    }
    chi += (cells - seen) as f64 * expected; // cells that were never hit
    (chi - freedom) / (2.0 * freedom).sqrt()
}

/// Six deviations: by chance once in a hundred million tests, while a network of too few rounds shows hundreds.
const LIMIT: f64 = 6.0;
const SEEDS: u64 = 20_000;

#[test]
fn every_sample_is_equally_likely_at_every_position_and_after_every_other() {
    for len in [2usize, 3, 4, 5, 6, 7, 8, 12, 16, 33, 64] {
        let mut at = vec![0u32; len * len];
        let mut after = vec![0u32; len * len];
        for seed in 0..SEEDS {
            let order = order(len, seed, 0);
            for (position, &sample) in order.iter().enumerate() {
                at[position * len + sample] += 1;
            }
            for pair in order.windows(2) {
                after[pair[0] * len + pair[1]] += 1;
            }
        }
        let freedom = ((len - 1) * (len - 1)) as f64;
        let positions = excess(at, len * len, (SEEDS * len as u64) as f64, freedom);
        assert!(positions.abs() < LIMIT, "positions, len {len}: {positions}");
        let pairs = len * (len - 1);
        let draws = (SEEDS * (len as u64 - 1)) as f64;
        // A sample is never after itself.
        let possible = (0..len * len).filter(|cell| cell / len != cell % len).map(|cell| after[cell]);
        let neighbours = excess(possible, pairs, draws, (pairs - 1) as f64);
        assert!(neighbours.abs() < LIMIT, "neighbours, len {len}: {neighbours}");
    }
}

#[test]
fn every_pair_of_samples_is_equally_likely_at_every_pair_of_positions() {
    for len in [4usize, 5, 6, 9, 11] {
        // Counts of (first sample, second sample) for each pair of positions.
        let mut counts = vec![0u32; (len * len) * (len * len)];
        for seed in 0..SEEDS {
            let order = order(len, seed, seed % 3);
            for (p, &a) in order.iter().enumerate() {
                for (q, &b) in order.iter().enumerate().skip(p + 1) {
                    counts[(p * len + q) * len * len + a * len + b] += 1;
                }
            }
        }
        let pairs = len * (len - 1);
        for p in 0..len {
            for q in p + 1..len {
                let start = (p * len + q) * len * len;
                let of_pair = &counts[start..start + len * len];
                let possible =
                    (0..len * len).filter(|cell| cell / len != cell % len).map(|cell| of_pair[cell]);
                let value = excess(possible, pairs, SEEDS as f64, (pairs - 1) as f64);
                assert!(value.abs() < LIMIT, "positions {p} and {q}, len {len}: {value}");
            }
        }
    }
}

#[test]
fn every_order_of_few_samples_is_equally_likely() {
    for (len, orders) in [(2, 2), (3, 6), (4, 24), (5, 120), (6, 720)] {
        let mut seen = HashMap::new();
        // Epochs must be as unrelated as seeds are.
        for epoch in 0..SEEDS {
            *seen.entry(order(len, 42, epoch)).or_insert(0u32) += 1;
        }
        let all = excess(seen.into_values(), orders, SEEDS as f64, (orders - 1) as f64);
        assert!(all.abs() < LIMIT, "len {len}: {all}");
    }
}

/// Samples whose positions differ in one half of the network only are what too few rounds would betray.
#[test]
fn samples_at_a_fixed_distance_are_unrelated() {
    const BINS: usize = 16;
    for len in [1 << 11, 1 << 12, 5000usize] {
        let bits = usize::BITS - (len - 1).leading_zeros();
        let distances = [1, 1 << (bits / 2), len / 2];
        let mut counts = distances.map(|_| [(); 2].map(|()| vec![0u32; BINS * BINS]));
        let mut draws = [0.0; 3];
        for seed in 0..200_000 / len as u64 {
            let order = order(len, seed, 7);
            for ((distance, [high, low]), draws) in distances.iter().zip(&mut counts).zip(&mut draws) {
                for (&a, &b) in order.iter().zip(&order[*distance..]) {
                    high[(a * BINS / len) * BINS + b * BINS / len] += 1;
                    low[a % BINS * BINS + b % BINS] += 1;
                    *draws += 1.0;
                }
            }
        }
        let freedom = (BINS * BINS - 1) as f64;
        for ((distance, counts), draws) in distances.iter().zip(counts).zip(draws) {
            for (name, counts) in ["high", "low"].into_iter().zip(counts) {
                let value = excess(counts, BINS * BINS, draws, freedom);
                assert!(value < LIMIT, "{name} bits, len {len}, distance {distance}: {value}");
            }
        }
    }
}
