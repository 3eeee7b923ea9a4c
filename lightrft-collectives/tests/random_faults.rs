//! One rank does something else in the midst of a random schedule: all are told, alike, and name it
//!
//! `FAULTS=50` tries that many seeds for each kind of fault, `FAULT_SEED=17` begins at that one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lightrft_collectives::local::World;
use lightrft_collectives::{Communicator, CommunicatorExt, Error, Transport};
use rustix::process::{Pid, Signal, getpid, kill_process};

use common::faults::{Fault, Plan, verdict};
use common::perform::{Rank, Results, perform_call};
use common::processes::{Job, join, notes, now, number, seed};
use common::random::Random;
use common::schedule::Schedule;

/// The deadline where ranks fall silent: long for a healthy rank on a busy machine, short for a test.
const SHORT: Duration = Duration::from_secs(3);

/// The deadline where nobody may ever reach it.
const LONG: Duration = Duration::from_secs(60);

/// For a verdict that needs no deadline, and beyond the deadline for one that does, on a machine that is very busy.
const BOUND: Duration = Duration::from_secs(8);

/// Bytes of the largest part.
const LARGEST: usize = 20_000;

fn seeds() -> std::ops::Range<u64> {
    let first = number("FAULT_SEED").unwrap_or(0);
    first..first + number("FAULTS").unwrap_or(1)
}

fn deadline(fault: Fault) -> Duration {
    if fault.is_silence() { SHORT } else { LONG }
}

/// The world of a seed: how many ranks, and how many steps before the fault.
fn draw(seed: u64) -> (usize, usize) {
    let mut random = Random::new(!seed);
    (2 + random.below(4), random.below(15))
}

/// How a member of the group that went wrong knows of it.
#[derive(Debug)]
struct Told {
    rank: usize,
    verdict: String,
    begun: Duration,
    ended: Duration,
}

/// What a rank does: the healthy part, its part in the fault, and a look at whether the rest is as it should be.
/// `give_up` returns when the others have done so. Nothing is told to those who are not in that group.
fn take_part(comm: Arc<dyn Communicator>, fault: Fault, seed: u64, others: &dyn Others) -> Option<Told> {
    let (ranks, healthy) = draw(seed);
    let mut schedule = Schedule::new(seed, ranks, LARGEST);
    let mut rank = Rank::new(comm.clone());
    rank.follow(seed, &mut schedule, healthy);
    let plan = Plan::draw(fault, &mut schedule);
    let at = format!("FAULT_SEED={seed}, {ranks} ranks, rank {}: {plan}", rank.rank);
    let culprit = rank.rank == plan.culprit;
    // A rank that is slow may still be here when the others have been told.
    let begun = now();
    if let Err(error) = comm.barrier() {
        assert!((plan.family == 0 || fault == Fault::Left) && plan.is_told_by(&error), "{at}: {error}");
        let told = Told { rank: rank.rank, verdict: verdict(&error), begun, ended: now() };
        others.tell(&told);
        return Some(told);
    }
    if fault == Fault::Left && culprit {
        return None;
    }
    if !plan.line.contains(&rank.rank) {
        if fault == Fault::Left {
            // A rank that has left is missed by all.
            let error = comm.barrier().unwrap_err();
            assert!(plan.is_told_by(&error), "{at}: {error}");
        } else if !fault.is_silence() {
            // One dead group does not touch the others.
            comm.barrier().unwrap_or_else(|error| panic!("{at}: {error}"));
        }
        return None;
    }
    let group = rank.comm(plan.family);
    match fault {
        Fault::Absent if culprit => others.await_verdicts(plan.line.len() - 1),
        Fault::Stopped if culprit => others.be_stopped(Duration::from_micros(plan.moment % 3000)),
        _ => {}
    }
    let calls = if culprit { plan.instead } else { plan.calls };
    let mut number = 0;
    let (error, begun, ended) = loop {
        let begun = now();
        let result = perform_call(group, &calls[number % 2], None, Results::Ignored, &at);
        if let Err(error) = result {
            break (error, begun, now());
        }
        number += 1;
        assert!(fault == Fault::Stopped || culprit && fault.is_silence(), "{at}: a call went through");
    };
    assert!(plan.is_told_by(&error), "{at}: {error}");
    // From then on, at once.
    let again = Instant::now();
    let same = group.barrier().unwrap_err();
    assert_eq!(verdict(&same), verdict(&error), "{at}");
    assert!(again.elapsed() < BOUND, "{at}: {:?}", again.elapsed());
    if Fault::MISMATCHES.contains(&fault) && plan.family != 0 && ranks > 1 {
        let is_world = group.world_size() == ranks && group.name() == comm.name();
        if !is_world {
            comm.barrier().unwrap_or_else(|error| panic!("{at}: {error}"));
        }
    }
    let told = Told { rank: rank.rank, verdict: verdict(&error), begun, ended };
    others.tell(&told);
    // One of them does it: once it has gone on, it may end at any moment.
    let waker = plan.line.iter().find(|member| **member != plan.culprit);
    if fault == Fault::Stopped && waker == Some(&rank.rank) {
        others.let_go_on();
    }
    Some(told)
}

/// All members, the culprit too, were told the same, in time.
fn agree(told: &[Told], fault: Fault, at: &str) {
    let last = told.iter().map(|t| t.begun).max().unwrap_or_default();
    for one in told {
        assert_eq!(one.verdict, told[0].verdict, "{at}: ranks {} and {}", one.rank, told[0].rank);
        // A stopped rank learns of it when it runs again; who waits for one, at the deadline of its call.
        let (since, limit) = if fault.is_silence() { (one.begun, SHORT + BOUND) } else { (last, BOUND) };
        let time = one.ended.saturating_sub(since);
        assert!(time < limit, "{at}: rank {} waited {time:?}", one.rank);
    }
}

/// What a rank needs of the others beside their calls.
trait Others {
    /// Waits until so many members have their verdict.
    fn await_verdicts(&self, count: usize);
    /// Stops this process after a while, until another rank lets it go on.
    fn be_stopped(&self, after: Duration);
    fn tell(&self, told: &Told);
    /// Lets the one that was stopped go on.
    fn let_go_on(&self);
}

/// Ranks as threads.
#[derive(Default)]
struct Threads {
    verdicts: AtomicUsize,
}

impl Others for Threads {
    fn await_verdicts(&self, count: usize) {
        while self.verdicts.load(Ordering::SeqCst) < count {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn be_stopped(&self, _: Duration) {}

    fn tell(&self, _: &Told) {
        self.verdicts.fetch_add(1, Ordering::SeqCst);
    }

    fn let_go_on(&self) {}
}

#[test]
fn threads_that_disagree_at_random_are_told_alike() {
    for fault in Fault::ALL.into_iter().filter(|fault| *fault != Fault::Stopped) {
        for seed in seeds() {
            let (ranks, others, told) = (draw(seed).0, Threads::default(), Mutex::new(Vec::new()));
            let result = World::new(ranks).timeout(deadline(fault)).launch(|comm| {
                let one = take_part(comm, fault, seed, &others);
                told.lock().unwrap().extend(one);
                Ok::<_, Error>(())
            });
            result.unwrap();
            agree(&told.into_inner().unwrap(), fault, &format!("FAULT_SEED={seed}, {fault:?}"));
        }
    }
}

/// Ranks as processes, with a folder between them.
struct Processes<'a> {
    notes: &'a Path,
}

impl Others for Processes<'_> {
    fn await_verdicts(&self, count: usize) {
        let told = || std::fs::read_dir(self.notes).unwrap().flatten();
        while told().filter(|f| f.file_name().to_string_lossy().starts_with("told")).count() < count {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn be_stopped(&self, after: Duration) {
        let pid = self.notes.join("pid");
        std::fs::write(&pid, getpid().as_raw_nonzero().to_string()).unwrap();
        std::thread::spawn(move || {
            std::thread::sleep(after);
            kill_process(getpid(), Signal::STOP).unwrap();
        });
    }

    fn tell(&self, told: &Told) {
        let Told { rank, verdict, begun, ended } = told;
        let text = format!("{} {} {verdict}", begun.as_nanos(), ended.as_nanos());
        // Whole at once, for those who count.
        let (draft, note) =
            (self.notes.join(format!("draft-{rank}")), self.notes.join(format!("told-{rank}")));
        std::fs::write(&draft, text).unwrap();
        std::fs::rename(draft, note).unwrap();
    }

    fn let_go_on(&self) {
        let pid = std::fs::read_to_string(self.notes.join("pid")).unwrap().parse().unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::CONT).unwrap();
    }
}

fn processes(faults: &[Fault], transport: Transport) {
    for (fault, seed) in faults.iter().flat_map(|fault| seeds().map(move |seed| (*fault, seed))) {
        let folder = tempfile::tempdir().unwrap();
        let number = Fault::ALL.iter().position(|f| *f == fault).unwrap();
        let variables = vec![("FAULT", number.to_string())];
        let (role, ranks, notes) = ("rank_takes_part", draw(seed).0, Some(folder.path()));
        let outcome = Job { role, ranks, transport, seed, variables, notes }.run();
        let at = format!("FAULT_SEED={seed}, {transport:?}, {fault:?}");
        assert!(outcome.is_success(), "{at}: {outcome}");
        let told: Vec<Told> = (0..ranks)
            .filter_map(|rank| {
                let text = std::fs::read_to_string(folder.path().join(format!("told-{rank}"))).ok()?;
                let mut words = text.splitn(3, ' ');
                let mut time = || Duration::from_nanos(words.next().unwrap().parse().unwrap());
                let (begun, ended) = (time(), time());
                Some(Told { rank, verdict: words.next().unwrap().into(), begun, ended })
            })
            .collect();
        assert!(!told.is_empty(), "{at}");
        agree(&told, fault, &at);
    }
}

#[test]
#[ignore = "a rank of the tests below"]
fn rank_takes_part() {
    let (seed, notes) = (seed(), notes());
    let fault = Fault::ALL[number("FAULT").unwrap() as usize];
    take_part(join(deadline(fault)), fault, seed, &Processes { notes: &notes });
}

#[test]
fn processes_that_share_memory_and_disagree_at_random_are_told_alike() {
    processes(&Fault::MISMATCHES, Transport::Auto);
}

#[test]
fn connected_processes_that_disagree_at_random_are_told_alike() {
    processes(&Fault::MISMATCHES, Transport::Tcp);
}

#[test]
fn a_process_that_leaves_a_random_schedule_is_named() {
    processes(&[Fault::Left], Transport::Auto);
    processes(&[Fault::Left], Transport::Tcp);
}

#[test]
fn a_process_that_falls_silent_is_named_at_the_deadline_by_those_who_share_its_memory() {
    processes(&[Fault::Absent, Fault::Stopped], Transport::Auto);
}

#[test]
fn a_process_that_falls_silent_is_named_at_the_deadline_by_those_connected_to_it() {
    processes(&[Fault::Absent, Fault::Stopped], Transport::Tcp);
}
