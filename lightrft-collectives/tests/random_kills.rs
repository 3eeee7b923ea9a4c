//! A rank killed at a random moment of a random schedule is named by every survivor, soon
//!
//! Ten rounds each day. `cargo test --release --test random_kills -- --ignored --nocapture hundred` makes a hundred
//! and prints how long the survivors took; `KILLS=1 KILL_SEED=17` repeats the round of one seed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use lightrft_collectives::{CommunicatorExt, Error, Loss, Transport};
use rustix::process::{Signal, getpid, kill_process};

use common::perform::{Rank, Results};
use common::processes::{Job, join, notes, now, number, seed};
use common::random::Random;
use common::schedule::Schedule;

/// The deadline of a wait, far beyond the bound: who reaches it was not told of the death.
const LIMIT: Duration = Duration::from_secs(30);

/// For a machine that is busy with other things; what is promised for an idle one is 100 ms.
const BOUND: Duration = Duration::from_secs(2);

/// Bytes of the largest part.
const LARGEST: usize = 100_000;

#[test]
fn a_rank_killed_at_a_random_moment_is_named_by_all_survivors() {
    kill(number("KILLS").unwrap_or(10));
}

#[test]
#[ignore = "takes half a minute; prints the times to be compared with the promise"]
fn a_hundred_ranks_killed_at_random_moments_are_named() {
    kill(100);
}

/// Odd seeds share memory, even ones are connected.
fn kill(rounds: u64) {
    let first = number("KILL_SEED").unwrap_or(0);
    let mut times: [Vec<Duration>; 2] = Default::default();
    for seed in first..first + rounds {
        let transport = if seed % 2 == 1 { Transport::Auto } else { Transport::Tcp };
        times[(seed % 2) as usize].extend(one_round(seed, transport));
    }
    for (mut times, transport) in times.into_iter().zip(["TCP", "shared memory"]) {
        times.sort_unstable();
        let Some(worst) = times.last() else { continue };
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
        println!(
            "{transport}: {} survivors; SIGKILL to error: median {:?}, 95 % {:?}, worst {worst:?}",
            times.len(),
            at(0.5),
            at(0.95),
        );
    }
}

/// How a round goes, which all its ranks and the test draw alike.
struct Round {
    ranks: usize,
    victim: usize,
    delay: Duration,
}

impl Round {
    fn draw(seed: u64) -> Self {
        let mut random = Random::new(!seed);
        let ranks = 2 + random.below(4);
        let victim = random.below(ranks);
        // Half of them in the first steps, where groups are being made.
        let longest = *random.pick(&[3_000, 60_000]);
        Round { ranks, victim, delay: Duration::from_micros(random.below(longest) as u64) }
    }
}

/// How long after the kill, or after their call if that came later, the survivors had their error.
fn one_round(seed: u64, transport: Transport) -> Vec<Duration> {
    let Round { ranks, victim, .. } = Round::draw(seed);
    let folder = tempfile::tempdir().unwrap();
    let notes = Some(folder.path());
    let job = Job { role: "rank_works_until_it_dies", ranks, transport, seed, variables: Vec::new(), notes };
    let outcome = job.run();
    let at = format!("KILL_SEED={seed}, {transport:?}, rank {victim} of {ranks} was killed");
    assert_eq!(outcome.statuses[victim].signal(), Some(9), "{at}: {outcome}");
    let mut times = Vec::new();
    for rank in (0..ranks).filter(|rank| *rank != victim) {
        assert!(outcome.statuses[rank].success(), "{at}: rank {rank}: {}", outcome.statuses[rank]);
        let time = std::fs::read_to_string(folder.path().join(format!("survivor-{rank}"))).unwrap();
        times.push(Duration::from_nanos(time.parse().unwrap()));
        assert!(times.iter().all(|time| *time < BOUND), "{at}: {times:?}");
    }
    times
}

#[test]
#[ignore = "a rank of the two above"]
fn rank_works_until_it_dies() {
    let (seed, notes) = (seed(), notes());
    let Round { ranks, victim, delay } = Round::draw(seed);
    let comm = join(LIMIT);
    comm.barrier().unwrap();
    let time_of_death = notes.join("death");
    if comm.rank() == victim {
        let time_of_death = time_of_death.clone();
        std::thread::spawn(move || {
            // Not to wait for anything: the moment is to be random.
            std::thread::sleep(delay);
            std::fs::write(time_of_death, now().as_nanos().to_string()).unwrap();
            kill_process(getpid(), Signal::KILL).unwrap();
        });
    }
    let mut schedule = Schedule::new(seed, ranks, LARGEST);
    let mut rank = Rank::new(comm.clone());
    let (error, begun, ended) = loop {
        let step = schedule.next();
        let at = format!("seed {seed}, rank {}: {step:?}", rank.rank);
        let begun = now();
        if let Err(error) = rank.perform(&step, &schedule, Results::Ignored, &at) {
            break (error, begun, now());
        }
        // A schedule that leaves this rank out for long must not keep it from hearing: the world is everyone's.
        if let Err(error) = comm.barrier() {
            break (error, begun, now());
        }
    };
    let died =
        std::fs::read_to_string(time_of_death).unwrap_or_else(|_| panic!("{error}, but none was killed"));
    let died = Duration::from_nanos(died.parse().unwrap());
    let named =
        |error: &Error| matches!(error, Error::PeerLost { rank, how: Loss::Died, .. } if *rank == victim);
    assert!(named(&error), "{error}");
    // The same verdict from then on, at once, on every group that it was in.
    for comm in rank.comms.iter().flatten().filter(|comm| comm.ranks().contains(&victim)) {
        let again = comm.barrier();
        assert!(again.as_ref().is_err_and(named), "on `{}`: {again:?}", comm.name());
    }
    let time = ended.saturating_sub(died.max(begun));
    std::fs::write(notes.join(format!("survivor-{}", rank.rank)), time.as_nanos().to_string()).unwrap();
}
