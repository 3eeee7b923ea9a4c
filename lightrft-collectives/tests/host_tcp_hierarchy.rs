//! Ranks on several machines, played by one: both levels together promise what one does
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::Duration;

use lightrft_collectives::launch::{Launcher, Outcome, Output};
use lightrft_collectives::testing::{Mismatch, conformance, mismatch};
use lightrft_collectives::{Communicator, CommunicatorExt, Error, Loss, ReduceOp, Rendezvous};

/// Runs the ignored test `role` of this file on machines that have these numbers of ranks. With names of machines, one
/// letter for each rank: `aab` is two ranks on one and a third on another.
fn run_ranks(role: &str, machines: &str, settings: &[(&str, &str)]) -> Outcome {
    // A launcher gives all ranks the same variables; this one differs.
    let script = r#"LIGHTRFT_HOST_ID=$(echo "$MACHINES" | cut -c$((RANK + 1))) exec "$0" "$@""#;
    let exe = std::env::current_exe().unwrap();
    let launcher = Launcher::new("/bin/sh")
        .args(["-c", script, exe.to_str().unwrap()])
        .args([role, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("MACHINES", machines)
        .ranks(machines.len())
        .grace(Duration::from_secs(60))
        .output(Output::Prefixed);
    settings.iter().fold(launcher, |launcher, (name, value)| launcher.env(name, value)).run().unwrap()
}

fn all_succeed(role: &str, machines: &str) {
    let outcome = run_ranks(role, machines, &[]);
    assert!(outcome.is_success(), "{role} on {machines}: {outcome}");
}

fn world() -> Arc<dyn Communicator> {
    Rendezvous::from_env().unwrap().timeout(Duration::from_secs(40)).init().unwrap()
}

#[test]
fn two_machines_of_two_ranks_conform() {
    all_succeed("rank_conforms", "aabb");
}

#[test]
fn three_machines_of_different_sizes_conform() {
    all_succeed("rank_conforms", "abbc");
}

#[test]
fn machines_that_share_some_lanes_only_conform() {
    all_succeed("rank_conforms", "aaabb");
}

#[test]
#[ignore = "a rank of those above"]
fn rank_conforms() {
    conformance(&*world()).unwrap();
}

#[test]
fn ranks_of_two_machines_that_disagree_all_learn_of_it() {
    for machines in ["aabb", "aab", "abb", "abbcc"] {
        all_succeed("rank_disagrees", machines);
    }
}

#[test]
#[ignore = "a rank of ranks_of_two_machines_that_disagree_all_learn_of_it"]
fn rank_disagrees() {
    let comm = world();
    let all: Vec<usize> = (0..comm.world_size()).collect();
    for case in Mismatch::ALL {
        mismatch(&*comm.subgroup(&all).unwrap().unwrap(), case);
    }
    // Whoever it is: at the end of a lane or not; on two levels, or with a call that is made on one.
    for odd in all.clone() {
        // The root of a broadcast, which gets no data, must still hear of all: of one small enough to go out as it comes, and of
        // one that goes out in a single piece on two levels.
        for (elements, calls) in [
            (2, ["all_reduce", "broadcast"]),
            (300_000, ["all_reduce", "reduce"]),
            (2, ["broadcast", "reduce"]),
            (50_000, ["broadcast", "reduce"]),
        ] {
            let group = comm.subgroup(&all).unwrap().unwrap();
            let mut data = vec![1f32; elements];
            let result = match calls[usize::from(comm.rank() == odd)] {
                "all_reduce" => group.all_reduce(&mut data, ReduceOp::Sum),
                "broadcast" => group.broadcast(&mut data, 0),
                _ => group.reduce(&mut data, ReduceOp::Sum, 0),
            };
            let Err(Error::Mismatch { rank, other, .. }) = result else {
                panic!("{calls:?}, {odd}: {result:?}")
            };
            assert!(rank == odd || other == odd, "{rank} and {other}, not {odd}");
        }
    }
    comm.barrier().unwrap();
}

#[test]
fn a_killed_rank_is_named_on_all_machines() {
    for victim in 0..3 {
        let outcome = run_ranks("rank_reduces", "aab", &[("VICTIM", &victim.to_string())]);
        let failure = outcome.failure.as_ref().unwrap();
        assert_eq!((failure.rank, failure.status.signal()), (victim, Some(9)), "{outcome}");
        let survivors = (0..3).filter(|rank| *rank != victim);
        // Each survivor has checked what it was told; a failed assertion would have ended it with another code.
        assert!(survivors.into_iter().all(|rank| outcome.statuses[rank].success()), "{outcome}");
    }
}

#[test]
#[ignore = "a rank of a_killed_rank_is_named_on_all_machines"]
fn rank_reduces() {
    let victim: usize = std::env::var("VICTIM").unwrap().parse().unwrap();
    let comm = world();
    let mut data = vec![1f32; 1 << 20];
    for round in 0.. {
        if round == 5 && comm.rank() == victim {
            std::thread::spawn(|| {
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            });
        }
        let Err(error) = comm.all_reduce(&mut data, ReduceOp::Max) else { continue };
        let named = matches!(error, Error::PeerLost { rank, how: Loss::Died, .. } if rank == victim);
        assert!(round >= 5 && named, "round {round}: {error}");
        break;
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_on_all_machines() {
    for absent in 0..3 {
        let outcome = run_ranks("rank_waits", "aab", &[("ABSENT", &absent.to_string())]);
        assert!(outcome.is_success(), "{outcome}");
    }
}

#[test]
#[ignore = "a rank of a_rank_that_does_not_come_is_named_on_all_machines"]
fn rank_waits() {
    let absent: usize = std::env::var("ABSENT").unwrap().parse().unwrap();
    let comm = world();
    let other = comm.subgroup(&[0, 1, 2]).unwrap().unwrap();
    if comm.rank() == absent {
        // Busy with another group until the others have given this rank up and left.
        let left = other.recv(&mut [0u8], (absent + 1) % 3);
        assert!(matches!(left, Err(Error::PeerLost { how: Loss::Left, .. })), "{left:?}");
        assert!(matches!(comm.barrier(), Err(Error::Timeout { .. })));
        return;
    }
    let operation = lightrft_collectives::Operation::Barrier;
    let result = comm.run_within(operation, Some(Duration::from_secs(2)));
    assert!(matches!(&result, Err(Error::Timeout { missing, .. }) if *missing == [absent]), "{result:?}");
}
