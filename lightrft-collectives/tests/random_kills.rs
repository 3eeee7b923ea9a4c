//! A rank killed at a random moment of a random schedule is named by every survivor, soon
//!
//! Ten rounds each day. `cargo test --release --test random_kills -- --ignored --nocapture hundred` makes a hundred
//! and prints how long the survivors took; `KILLS=1 KILL_SEED=17` repeats the round of one seed. What goes wrong is reported
//! with its seed and with what every rank has to say.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fmt::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lightrft_collectives::launch::Outcome;
use lightrft_collectives::testing::Intercepted;
use lightrft_collectives::{Communicator, CommunicatorExt, Error, Loss, Transport};
use rustix::process::{Signal, getpid, kill_process};

use common::perform::{Rank, Results};
use common::processes::{Job, join, notes, now, number, seed};
use common::random::Random;
use common::schedule::Schedule;

/// The deadline of a wait, far beyond the bound: who reaches it was not told of the death.
const LIMIT: Duration = Duration::from_secs(30);

/// For a machine that is busy with other things; what is promised for an idle one is 100 ms.
const BOUND: Duration = Duration::from_secs(5);

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

/// What each rank has left behind.
fn testimony(folder: &Path, outcome: &Outcome) -> String {
    let mut text = String::new();
    for (rank, status) in outcome.statuses.iter().enumerate() {
        let note = |name: &str| std::fs::read_to_string(folder.join(format!("{name}-{rank}")));
        let _ = write!(text, "\nrank {rank}: {status}");
        for name in ["error", "panic", "survivor"] {
            let _ = note(name).map(|said| write!(text, "; {name}: {said}"));
        }
    }
    text
}

/// How long after the kill, or after their call if that came later, the survivors had their error.
fn one_round(seed: u64, transport: Transport) -> Vec<Duration> {
    let Round { ranks, victim, delay } = Round::draw(seed);
    let folder = tempfile::tempdir().unwrap();
    let notes = Some(folder.path());
    let job = Job { role: "rank_works_until_it_dies", ranks, transport, seed, variables: Vec::new(), notes };
    let outcome = job.run();
    let at = format!(
        "KILL_SEED={seed}, {transport:?}, rank {victim} of {ranks} was killed after {delay:?}: {outcome}{}",
        testimony(folder.path(), &outcome)
    );
    assert_eq!(outcome.statuses[victim].signal(), Some(9), "{at}");
    let mut times = Vec::new();
    for rank in (0..ranks).filter(|rank| *rank != victim) {
        assert!(outcome.statuses[rank].success(), "{at}");
        let time = std::fs::read_to_string(folder.path().join(format!("survivor-{rank}"))).unwrap();
        times.push(Duration::from_nanos(time.parse().unwrap()));
        assert!(times.iter().all(|time| *time < BOUND), "{at}: {times:?}");
    }
    times
}

/// A communicator that notes in `called` when it was called last, for whoever asks how long a call took to fail. What a rank
/// does to prepare a call does not count.
fn timed(comm: Arc<dyn Communicator>, called: &Arc<Mutex<Duration>>) -> Arc<dyn Communicator> {
    let note = |called: &Arc<Mutex<Duration>>| {
        let called = Arc::clone(called);
        move || *called.lock().unwrap() = now()
    };
    let (before_calls, before_others) = (note(called), note(called));
    let timed = Intercepted::new(comm, move |comm, operation, timeout| {
        before_calls();
        comm.run_within(operation, timeout)
    });
    Arc::new(timed.and_before_others(move |_| before_others()))
}

/// Whether `error`, of a call on `comm`, names the rank that was killed: as the one that is lost, or, in a group that it was
/// not in, as the reason why another survivor has left.
fn is_named(error: &Error, comm: &[usize], victim: usize) -> bool {
    let Error::PeerLost { rank, how, .. } = error else { return false };
    match how {
        Loss::Died => *rank == victim && comm.contains(&victim),
        Loss::LeftAfter { lost } => *lost == victim && !comm.contains(&victim),
        _ => false,
    }
}

#[test]
#[ignore = "a rank of the two above"]
fn rank_works_until_it_dies() {
    let (seed, notes) = (seed(), notes());
    let Round { ranks, victim, delay } = Round::draw(seed);
    let called = Arc::default();
    let comm = timed(join(LIMIT), &called);
    let me = comm.rank();
    let (note, print) = (notes.join(format!("panic-{me}")), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |panic| {
        let _ = std::fs::write(&note, panic.to_string());
        print(panic);
    }));
    let time_of_death = notes.join("death");
    let mut schedule = Schedule::new(seed, ranks, LARGEST);
    let mut rank = Rank::new(Arc::clone(&comm));
    let mut is_doomed = me == victim;
    let (error, at) = loop {
        // A schedule that leaves this rank out for long must not keep it from hearing: the world is everyone's. The first
        // time, all begin together; it may be over for the victim, and the victim over, before it is for others.
        if let Err(error) = comm.barrier() {
            break (error, "in the barrier".to_owned());
        }
        if std::mem::take(&mut is_doomed) {
            let time_of_death = time_of_death.clone();
            std::thread::spawn(move || {
                // Not to wait for anything: the moment is to be random.
                std::thread::sleep(delay);
                std::fs::write(time_of_death, now().as_nanos().to_string()).unwrap();
                kill_process(getpid(), Signal::KILL).unwrap();
            });
        }
        let step = schedule.next();
        let at = format!("seed {seed}, rank {me}: {step:?}");
        if let Err(error) = rank.perform(&step, &schedule, Results::Ignored, &at) {
            break (error, at);
        }
    };
    let (ended, begun) = (now(), *called.lock().unwrap());
    std::fs::write(notes.join(format!("error-{me}")), format!("{error}, {at}")).unwrap();
    let died =
        std::fs::read_to_string(time_of_death).unwrap_or_else(|_| panic!("{error}, but none was killed"));
    let died = Duration::from_nanos(died.parse().unwrap());
    let of_group = |name: &str| rank.comms.iter().flatten().find(|comm| comm.name() == name);
    let Error::PeerLost { group, .. } = &error else { panic!("{error}, {at}") };
    // A group that was being made is in no list: it has members of its parent.
    let members = of_group(group).map(|comm| comm.ranks().to_vec());
    let either = [vec![victim], vec![]].iter().any(|members| is_named(&error, members, victim));
    assert!(members.map_or(either, |members| is_named(&error, &members, victim)), "{error}, {at}");
    // The same verdict from then on, at once, on every group that it was in.
    for comm in rank.comms.iter().flatten().filter(|comm| comm.ranks().contains(&victim)) {
        let again = comm.barrier();
        let named = again.as_ref().is_err_and(|error| is_named(error, comm.ranks(), victim));
        assert!(named, "on `{}`: {again:?}, after {error}, {at}", comm.name());
    }
    let time = ended.saturating_sub(died.max(begun));
    std::fs::write(notes.join(format!("survivor-{me}")), time.as_nanos().to_string()).unwrap();
}
