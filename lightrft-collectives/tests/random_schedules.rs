//! Random schedules: all ranks draw the same calls from a seed, a process that is alone says what each must give
//!
//! Short by default. `SCHEDULES=200` runs that many seeds on each backend and world size, `SCHEDULE_SEED=17` begins
//! at that seed, `SCHEDULE_STEPS` and `SCHEDULE_BYTES` (of the largest part) change each.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::Duration;

use lightrft_collectives::Transport;
use lightrft_collectives::local::World;

use common::perform::Rank;
use common::processes::{Job, join, number, seed};
use common::schedule::Schedule;

const WORLDS: [usize; 6] = [1, 2, 3, 4, 5, 8];

/// The deadline of every wait: nothing is slow here but the machine.
const LIMIT: Duration = Duration::from_secs(60);

fn seeds() -> std::ops::Range<u64> {
    let first = number("SCHEDULE_SEED").unwrap_or(0);
    first..first + number("SCHEDULES").unwrap_or(1)
}

fn steps() -> usize {
    number("SCHEDULE_STEPS").map_or(60, |n| n as usize)
}

fn schedule(seed: u64, world: usize) -> Schedule {
    // All ranks together check up to this many bytes times the square of their number.
    let largest = (2_000_000 / (world * world)).min(300_000);
    Schedule::new(seed, world, number("SCHEDULE_BYTES").map_or(largest, |n| n as usize))
}

#[test]
fn threads_agree_with_a_process_that_is_alone() {
    for ranks in WORLDS {
        for seed in seeds() {
            let world = World::new(ranks).timeout(LIMIT);
            let result = world.launch(|comm| {
                Rank::new(comm).follow(seed, &mut schedule(seed, ranks), steps());
                Ok::<_, lightrft_collectives::Error>(())
            });
            result.unwrap();
        }
    }
}

#[test]
fn processes_that_share_memory_agree_with_one_that_is_alone() {
    processes(Transport::Auto);
}

#[test]
fn connected_processes_agree_with_one_that_is_alone() {
    processes(Transport::Tcp);
}

/// One world of processes per size, through which all seeds go: groups of earlier schedules have gone by then.
fn processes(transport: Transport) {
    for ranks in WORLDS {
        let Some(first) = seeds().next() else { return };
        let role = "rank_follows_schedules";
        let job = Job { role, ranks, transport, seed: first, variables: Vec::new(), notes: None };
        let outcome = job.run();
        assert!(
            outcome.is_success(),
            "{transport:?}, {ranks} ranks: {outcome}; its panic says seed and step"
        );
    }
}

#[test]
#[ignore = "a rank of the two above"]
fn rank_follows_schedules() {
    let comm = join(LIMIT);
    for seed in seed()..seeds().end {
        Rank::new(comm.clone()).follow(seed, &mut schedule(seed, comm.world_size()), steps());
    }
}

#[test]
fn equal_seeds_draw_equal_schedules_and_others_do_not() {
    let draw = |seed| {
        let mut schedule = schedule(seed, 5);
        (0..200).map(|_| format!("{:?}", schedule.next())).collect::<Vec<_>>()
    };
    assert_eq!(draw(3), draw(3));
    assert_ne!(draw(3), draw(4));
}
