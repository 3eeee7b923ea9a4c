//! What large reductions need beside the caller's buffers: no more than 4 MiB per rank and group, on every path
//!
//! `cargo test --release -p lightrft-collectives --test memory -- --ignored --nocapture --test-threads=1 gibibyte` needs 4 GiB
//! of memory and prints the figures.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::time::Duration;

use lightrft_collectives::launch::{Launcher, Output};
use lightrft_collectives::{Communicator, CommunicatorExt, GroupOptions, ReduceOp, Rendezvous, Transport};

/// What is promised, in KiB.
const STAGING_KIB: usize = 4 << 10;

/// Runs `rank_reduces` as many times as `machines` has letters, each letter being the machine of a rank.
fn run(machines: &str, transport: &str, mebibytes: usize) {
    // A launcher gives all ranks the same variables; this one differs.
    let script = r#"LIGHTRFT_HOST_ID=$(echo "$MACHINES" | cut -c$((RANK + 1))) exec "$0" "$@""#;
    let exe = std::env::current_exe().unwrap();
    let outcome = Launcher::new("/bin/sh")
        .args(["-c", script, exe.to_str().unwrap()])
        .args(["rank_reduces", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("MACHINES", machines)
        .env("TRANSPORT", transport)
        .env("MEBIBYTES", mebibytes.to_string())
        .ranks(machines.len())
        .output(Output::Prefixed)
        .run()
        .unwrap();
    assert!(outcome.is_success(), "{machines} over {transport}: {outcome}");
}

#[test]
fn reductions_through_shared_memory_need_little_beside_the_buffers() {
    run("aa", "auto", 64);
    run("aaa", "auto", 16);
}

#[test]
fn reductions_over_tcp_need_little_beside_the_buffers() {
    run("aa", "tcp", 64);
    run("aaa", "tcp", 16);
}

#[test]
fn reductions_over_two_levels_need_little_beside_the_buffers() {
    run("aabb", "auto", 16);
    run("aaaabbbb", "auto", 8);
}

#[test]
#[ignore = "needs 4 GiB of memory and a release build"]
fn reductions_of_a_gibibyte_need_no_more() {
    run("aa", "auto", 1024);
    run("aa", "tcp", 1024);
    run("ab", "auto", 1024);
}

/// A line of /proc/self/status, in KiB.
fn status(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
}

/// Every rank has ones, and a part as long as its share of them.
fn reduce(comm: &dyn Communicator, data: &mut [i64], part: &mut [i64]) {
    let ranks = comm.world_size();
    comm.all_reduce(data, ReduceOp::Sum).unwrap();
    assert!(data.iter().all(|x| *x == ranks as i64));
    comm.reduce_scatter(&data[..part.len() * ranks], part, ReduceOp::Max).unwrap();
    assert!(part.iter().all(|x| *x == ranks as i64));
}

#[test]
#[ignore = "a rank of the tests above"]
fn rank_reduces() {
    let tcp = std::env::var("TRANSPORT").unwrap() == "tcp";
    let transport = if tcp { Transport::Tcp } else { Transport::Auto };
    let rendezvous = Rendezvous::from_env().unwrap().timeout(Duration::from_secs(60));
    let world: Arc<dyn Communicator> = rendezvous.transport(transport).init().unwrap();
    let mebibytes: usize = std::env::var("MEBIBYTES").unwrap().parse().unwrap();
    let mut data = vec![1i64; mebibytes << 17];
    let mut part = vec![1i64; data.len() / world.world_size()];
    // Another group of the same ranks calls first, and stays: what comes once in a process has come when the counting
    // begins, and no memory has been given back that could be taken again unseen.
    let all: Vec<usize> = (0..world.world_size()).collect();
    let own = GroupOptions::default().exclusive();
    let other = world.subgroup_with(&all, &own).unwrap().unwrap();
    reduce(&*other, &mut vec![1; 1 << 20], &mut vec![1; (1 << 20) / world.world_size()]);

    let before = status("VmRSS");
    // The peak is that since now; proc_pid_clear_refs(5).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    reduce(&*world, &mut data, &mut part);
    let (peak, after) = (status("VmHWM"), status("VmRSS"));
    let shared = status("RssShmem");
    println!("{mebibytes} MiB: {before} KiB before, {peak} at most, {after} after, of which {shared} shared");
    let grown = peak.saturating_sub(before);
    assert!(grown <= STAGING_KIB, "reductions of {mebibytes} MiB took {grown} KiB");
    other.barrier().unwrap();
}
