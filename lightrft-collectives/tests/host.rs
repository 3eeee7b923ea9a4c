//! Ranks as processes pass the suite: this test binary runs itself once per rank
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use lightrft_collectives::launch::{Launcher, Output};
use lightrft_collectives::testing::{Mismatch, conformance, mismatch};
use lightrft_collectives::{Communicator, CommunicatorExt, Error, Loss, Rendezvous, Transport};

/// Runs the ignored test `role` of this file as `ranks` processes.
fn run_ranks(role: &str, ranks: usize, transport: Transport) {
    let outcome = Launcher::new(std::env::current_exe().unwrap())
        .args([role, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("TRANSPORT", if transport == Transport::Tcp { "tcp" } else { "auto" })
        .ranks(ranks)
        .output(Output::Prefixed)
        .run()
        .unwrap();
    assert!(outcome.is_success(), "{role}: {outcome}");
}

fn world() -> std::sync::Arc<dyn Communicator> {
    let tcp = std::env::var("TRANSPORT").is_ok_and(|t| t == "tcp");
    let transport = if tcp { Transport::Tcp } else { Transport::Auto };
    Rendezvous::from_env().unwrap().timeout(Duration::from_secs(20)).transport(transport).init().unwrap()
}

#[test]
fn processes_conform_through_shared_memory() {
    for ranks in 1..=4 {
        run_ranks("rank_conforms", ranks, Transport::Auto);
    }
}

#[test]
fn processes_conform_over_tcp() {
    for ranks in 2..=4 {
        run_ranks("rank_conforms", ranks, Transport::Tcp);
    }
}

#[test]
fn more_processes_conform_through_shared_memory() {
    for ranks in [5, 8] {
        run_ranks("rank_conforms", ranks, Transport::Auto);
    }
}

#[test]
fn more_processes_conform_over_tcp() {
    for ranks in [5, 8] {
        run_ranks("rank_conforms", ranks, Transport::Tcp);
    }
}

#[test]
#[ignore = "a rank of the four above"]
fn rank_conforms() {
    let comm = world();
    conformance(&*comm).unwrap();
    // A group that is a part of the world, in another order, promises the same.
    if comm.world_size() == 3
        && let Some(group) = comm.subgroup(&[2, 0]).unwrap()
    {
        conformance(&*group).unwrap();
    }
}

#[test]
fn processes_that_disagree_all_learn_of_it() {
    for transport in [Transport::Auto, Transport::Tcp] {
        run_ranks("rank_disagrees", 3, transport);
    }
}

#[test]
#[ignore = "a rank of processes_that_disagree_all_learn_of_it"]
fn rank_disagrees() {
    let comm = world();
    for case in Mismatch::ALL {
        let group = comm.subgroup(&[0, 1, 2]).unwrap().unwrap();
        mismatch(&*group, case);
        // One dead group does not touch the others.
        comm.barrier().unwrap();
    }
}

#[test]
fn a_process_that_leaves_is_named() {
    for transport in [Transport::Auto, Transport::Tcp] {
        run_ranks("rank_leaves", 3, transport);
    }
}

#[test]
#[ignore = "a rank of a_process_that_leaves_is_named"]
fn rank_leaves() {
    let comm = world();
    comm.barrier().unwrap();
    if comm.rank() == 1 {
        return;
    }
    let result = comm.barrier();
    assert!(matches!(result, Err(Error::PeerLost { rank: 1, how: Loss::Left, .. })), "{result:?}");
}
