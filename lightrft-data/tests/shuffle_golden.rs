//! Orders equal torch's bit for bit, and ours equal those of every earlier release.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use lightrft_data::{Permutation, Shuffle};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

#[derive(Deserialize)]
struct Randperm {
    full: Vec<Full>,
    digest: Vec<Hashed>,
}

#[derive(Deserialize)]
struct Full {
    n: usize,
    seed: i64,
    perm: Vec<usize>,
}

#[derive(Deserialize)]
struct Hashed {
    n: usize,
    seed: i64,
    head: Vec<usize>,
    tail: Vec<usize>,
    sha256_le_i64: String,
}

fn randperm() -> Randperm {
    serde_json::from_str(include_str!("data/randperm.json")).unwrap()
}

fn torch(n: usize, seed: i64) -> Permutation {
    // torch takes a negative seed as its two's complement.
    Permutation::new(Shuffle::TorchExact, n, seed as u64, 0).unwrap()
}

fn check(case: &Hashed) {
    let order = torch(case.n, case.seed);
    let head: Vec<_> = order.iter().take(case.head.len()).collect();
    assert_eq!(head, case.head, "n {} seed {}", case.n, case.seed);
    let tail: Vec<_> = (case.n - case.tail.len()..case.n).map(|p| order.at(p).unwrap()).collect();
    assert_eq!(tail, case.tail, "n {} seed {}", case.n, case.seed);
    let mut hash = Sha256::new();
    let mut bytes = Vec::with_capacity(8 << 16);
    for index in order.iter() {
        bytes.extend_from_slice(&(index as i64).to_le_bytes());
        if bytes.len() == 8 << 16 {
            hash.update(&bytes);
            bytes.clear();
        }
    }
    hash.update(&bytes);
    let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, case.sha256_le_i64, "n {} seed {}", case.n, case.seed);
}

#[test]
fn small_orders_equal_torch() {
    let cases = randperm().full;
    assert_eq!(cases.len(), 122);
    for case in cases {
        let order: Vec<_> = torch(case.n, case.seed).iter().collect();
        assert_eq!(order, case.perm, "n {} seed {}", case.n, case.seed);
    }
}

#[test]
fn large_orders_equal_torch_by_digest() {
    let cases: Vec<_> = randperm().digest.into_iter().filter(|case| case.n <= 1_000_000).collect();
    assert_eq!(cases.len(), 40);
    cases.iter().for_each(check);
}

#[test]
#[ignore = "860 MB and minutes: run with --release -- --ignored huge"]
fn huge_orders_equal_torch_on_both_sides_of_the_change_of_algorithm() {
    let cases: Vec<_> = randperm().digest.into_iter().filter(|case| case.n > 1_000_000).collect();
    assert_eq!(cases.len(), 3);
    cases.iter().for_each(check);
}

#[test]
fn only_32_bits_of_seed_plus_epoch_count_under_torch() {
    let order = |seed, epoch| -> Vec<_> {
        Permutation::new(Shuffle::TorchExact, 100, seed, epoch).unwrap().iter().collect()
    };
    assert_eq!(order(42, 0), order(42 + (1 << 32), 0));
    assert_eq!(order(42, 3), order(45, 0));
    assert_eq!(order(u64::MAX, 1), order(0, 0));
    assert_ne!(order(42, 0), order(43, 0));
}

/// An order of [`Shuffle::Seekable`] at some positions.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Keyed {
    len: usize,
    seed: u64,
    epoch: u64,
    positions: Vec<usize>,
    samples: Vec<usize>,
}

fn keyed_now() -> Vec<Keyed> {
    let mut cases = Vec::new();
    for len in [1, 2, 3, 5, 6, 16, 17, 100, 1024, 1025, 100_003, 10_000_000, 1 << 40, usize::MAX] {
        for (seed, epoch) in [(0, 0), (42, 0), (42, 1), (u64::MAX, u64::MAX)] {
            let order = Permutation::new(Shuffle::Seekable, len, seed, epoch).unwrap();
            let first = 0..len.min(17);
            let last = len.saturating_sub(5).max(17)..len;
            let positions: Vec<_> = first.chain(last).collect();
            let samples = positions.iter().map(|&p| order.at(p).unwrap()).collect();
            cases.push(Keyed { len, seed, epoch, positions, samples });
        }
    }
    cases
}

#[test]
fn seekable_orders_are_those_of_every_earlier_release() {
    let kept: Vec<Keyed> = serde_json::from_str(include_str!("data/keyed_orders.json")).unwrap();
    assert_eq!(keyed_now(), kept);
}

#[test]
#[ignore = "rewrites tests/data/keyed_orders.json; positions saved by earlier releases then lose their meaning"]
fn bless() {
    let lines: Vec<_> = keyed_now().iter().map(|case| serde_json::to_string(case).unwrap()).collect();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/keyed_orders.json");
    std::fs::write(path, format!("[\n{}\n]\n", lines.join(",\n"))).unwrap();
}
