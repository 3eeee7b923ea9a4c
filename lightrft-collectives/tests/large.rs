//! Byte counts beyond 31 and 32 bits: nothing on the way is cut off
//!
//! `cargo test --release -p lightrft-collectives --test large -- --ignored more_than` needs 16 GiB of memory and a minute.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::Duration;

use lightrft_collectives::{Communicator, CommunicatorExt, ReduceOp, Transport};

use common::processes::{Job, join};

/// Above 2 GiB, and no multiple of anything.
const LARGE: usize = (1 << 31) + 77;

/// Places that a cut-off length, or a 32-bit offset, would get wrong.
const PLACES: [usize; 7] = [0, 1, (1 << 20) + 1, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, LARGE - 1];

fn run(role: &str, transport: Transport) {
    let outcome = Job { role, ranks: 2, transport, seed: 0, variables: Vec::new(), notes: None }.run();
    assert!(outcome.is_success(), "{role}, {transport:?}: {outcome}");
}

#[test]
#[ignore = "needs 16 GiB of memory and a release build"]
fn more_than_two_gibibytes_are_reduced_and_more_than_four_gathered() {
    run("rank_takes_much", Transport::Auto);
}

#[test]
#[ignore = "needs 16 GiB of memory and a release build"]
fn more_than_two_gibibytes_are_reduced_and_more_than_four_gathered_over_connections() {
    run("rank_takes_much", Transport::Tcp);
}

#[test]
#[ignore = "a rank of the tests above"]
fn rank_takes_much() {
    let comm = join(Duration::from_secs(100));
    all_reduce(&*comm);
    all_gather(&*comm);
}

/// Rank `rank`'s byte at `at`.
fn byte(rank: usize, at: usize) -> u8 {
    if PLACES.contains(&at) { (at >> 13) as u8 ^ at as u8 ^ (40 * rank) as u8 } else { rank as u8 + 1 }
}

fn bytes(rank: usize) -> Vec<u8> {
    let mut bytes = vec![rank as u8 + 1; LARGE];
    PLACES.iter().for_each(|at| bytes[*at] = byte(rank, *at));
    bytes
}

/// All but the places are equal to `rest`, and the places to what `at` says.
fn assert_bytes(got: &[u8], rest: u8, at: impl Fn(usize) -> u8) {
    let block = vec![rest; 1 << 20];
    for (index, chunk) in got.chunks(block.len()).enumerate() {
        if *chunk != block[..chunk.len()] {
            for (i, x) in chunk.iter().enumerate().filter(|(_, x)| **x != rest) {
                let i = index * block.len() + i;
                assert!(PLACES.contains(&i) && *x == at(i), "byte {i} is {x}");
            }
        }
    }
    PLACES.iter().for_each(|i| assert_eq!(got[*i], at(*i), "byte {i}"));
}

fn all_reduce(comm: &dyn Communicator) {
    let mut data = bytes(comm.rank());
    comm.all_reduce(&mut data, ReduceOp::Sum).unwrap();
    assert_bytes(&data, 3, |i| byte(0, i).wrapping_add(byte(1, i)));
}

fn all_gather(comm: &dyn Communicator) {
    let mut all = vec![0; 2 * LARGE];
    comm.all_gather(&bytes(comm.rank()), &mut all).unwrap();
    for (rank, part) in all.chunks(LARGE).enumerate() {
        assert_bytes(part, rank as u8 + 1, |i| byte(rank, i));
    }
}
