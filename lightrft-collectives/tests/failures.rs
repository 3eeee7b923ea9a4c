//! What goes wrong in a job of processes is named, in time and alike on all ranks; what is not concerned goes on
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lightrft_collectives::launch::Launcher;
use lightrft_collectives::testing::survive;
use lightrft_collectives::{
    Communicator, CommunicatorExt, Error, Loss, ReduceOp, Rendezvous, Transport, flight,
};
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, getpid, kill_process, pidfd_getfd, pidfd_open,
};

/// Longer than any bound that is asserted, and than survivors may take on a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// A loss is noticed within 100 ms on a quiet machine; a test machine may be busy.
const SOON: Duration = Duration::from_secs(2);

/// Runs the ignored test `role` of this file as ranks, over shared memory and over TCP. Those of `killed` must end by
/// SIGKILL, the others well.
fn run(role: &str, ranks: usize, killed: &[usize]) {
    for transport in ["auto", "tcp"] {
        let folder = tempfile::tempdir().unwrap();
        let outcome = Launcher::new(std::env::current_exe().unwrap())
            .args([role, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .env("TRANSPORT", transport)
            .env("NOTES", folder.path())
            .env(flight::DIRECTORY, folder.path().join("flights"))
            .ranks(ranks)
            // The survivors must end by themselves.
            .grace(LONG * 2)
            .run()
            .unwrap();
        for (rank, status) in outcome.statuses.iter().enumerate() {
            let was_killed = status.signal() == Some(9);
            assert!(status.success() || was_killed, "{role} over {transport}: rank {rank}: {status}");
            assert_eq!(was_killed, killed.contains(&rank), "{role} over {transport}: rank {rank}: {status}");
        }
        // Each rank has left what it was told; all survivors were told the same.
        let told: Vec<String> = (0..ranks)
            .filter(|rank| !killed.contains(rank))
            .map(|rank| std::fs::read_to_string(folder.path().join(format!("told-{rank}"))).unwrap())
            .collect();
        assert!(told.windows(2).all(|pair| pair[0] == pair[1]), "{role} over {transport}: {told:#?}");
    }
}

/// A rank's view of the test.
struct Rank {
    world: Arc<dyn Communicator>,
    notes: PathBuf,
}

impl Rank {
    fn join(timeout: Duration) -> Self {
        let tcp = std::env::var("TRANSPORT").unwrap() == "tcp";
        let transport = if tcp { Transport::Tcp } else { Transport::Auto };
        let rendezvous = Rendezvous::from_env().unwrap().timeout(timeout).transport(transport);
        let world = rendezvous.report_after(Duration::from_millis(800)).init().unwrap();
        Rank { world, notes: PathBuf::from(std::env::var_os("NOTES").unwrap()) }
    }

    fn is(&self, rank: usize) -> bool {
        self.world.rank() == rank
    }

    fn note(&self, name: &str) -> PathBuf {
        self.notes.join(name)
    }

    /// What this rank was told, but for the name of the call, which may differ.
    fn was_told(&self, what: &str) {
        std::fs::write(self.note(&format!("told-{}", self.world.rank())), what).unwrap();
    }

    fn put(&self, name: &str) {
        std::fs::write(self.note(name), std::process::id().to_string()).unwrap();
    }

    fn await_note(&self, name: &str) -> u32 {
        await_file(&self.note(name)).parse().unwrap()
    }
}

/// Returns when a process has ended; it may not have been reaped.
fn await_end(pid: u32) {
    let begin = Instant::now();
    let state = || std::fs::read_to_string(format!("/proc/{pid}/stat"));
    while state().is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(begin.elapsed() < LONG, "{pid}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn await_file(path: &Path) -> String {
    let begin = Instant::now();
    loop {
        if let Ok(text) = std::fs::read_to_string(path)
            && !text.is_empty()
        {
            return text;
        }
        assert!(begin.elapsed() < LONG, "{}", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn kill_myself(signal: Signal) {
    kill_process(getpid(), signal).unwrap();
    std::thread::sleep(LONG);
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

/// Calls on `group` until one fails; returns the error.
fn reduce_until_it_fails(group: &dyn Communicator) -> Error {
    let begin = Instant::now();
    loop {
        let mut data = vec![1f32; 10_000];
        if let Err(error) = group.all_reduce(&mut data, ReduceOp::Sum) {
            return error;
        }
        assert!(begin.elapsed() < LONG);
    }
}

/// The error without what may differ: the call.
fn verdict(error: &Error) -> String {
    match error {
        Error::PeerLost { group, rank, pid, host, how, .. } => format!("{group} {rank} {pid} {host} {how}"),
        Error::Mismatch { .. } => error.to_string(),
        Error::Timeout { group, waited, missing, report, .. } => {
            format!("{group} {waited:?} {missing:?} {report}")
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_death_kills_the_groups_that_the_rank_was_in_and_no_other() {
    run("rank_in_two_pairs", 4, &[3]);
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_in_two_pairs() {
    let rank = Rank::join(LONG);
    let pairs = [[0, 1], [2, 3]].map(|pair| rank.world.subgroup(&pair).unwrap());
    let pair = pairs.into_iter().flatten().next().unwrap();
    pair.barrier().unwrap();
    if rank.is(3) {
        rank.put("death");
        kill_myself(Signal::KILL);
    }
    rank.await_note("death");
    let begin = Instant::now();
    let error = reduce_until_it_fails(&*rank.world);
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    let pid = rank.await_note("death");
    let named = matches!(&error, Error::PeerLost { rank: 3, how: Loss::Died, pid: p, .. } if *p == pid);
    assert!(named, "{error}");
    // At once, from then on.
    assert_eq!(verdict(&rank.world.barrier().unwrap_err()), verdict(&error));
    rank.was_told(&verdict(&error));
    if rank.is(2) {
        let error = pair.barrier().unwrap_err();
        assert!(matches!(error, Error::PeerLost { rank: 3, how: Loss::Died, .. }), "{error}");
    } else {
        for _ in 0..100 {
            let mut sum = [1f32];
            pair.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            assert_eq!(sum, [2.0]);
        }
    }
    // The first failure was written down, with the last calls of the dead.
    let account =
        rank.note("flights").join(format!("rank{}-pid{}.txt", rank.world.rank(), std::process::id()));
    let account = std::fs::read_to_string(account).unwrap();
    assert!(account.contains("Died") && account.contains(&format!("rank 3 of 4 (pid {pid})")), "{account}");
}

#[test]
fn who_comes_late_hears_of_the_death_and_not_only_of_those_who_left_because_of_it() {
    run("rank_that_comes_late", 4, &[3]);
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_that_comes_late() {
    let rank = Rank::join(LONG);
    let with = rank.world.subgroup(&[0, 1, 3]).unwrap();
    let without = rank.world.subgroup(&[0, 1, 2]).unwrap();
    rank.world.barrier().unwrap();
    if rank.is(3) {
        rank.put("death");
        kill_myself(Signal::KILL);
    }
    if rank.is(0) {
        // It meets nothing but what the others have left behind.
        (1..3).for_each(|other| drop(await_file(&rank.note(&format!("told-{other}")))));
        (1..3).for_each(|other| await_end(rank.await_note(&format!("pid-{other}"))));
    } else {
        rank.put(&format!("pid-{}", rank.world.rank()));
        rank.await_note("death");
    }
    for group in [with, Some(rank.world.clone())].into_iter().flatten() {
        let error = reduce_until_it_fails(&*group);
        let named = matches!(error, Error::PeerLost { rank: 3, how: Loss::Died, .. });
        assert!(named, "{error}");
    }
    if rank.is(0) {
        let begin = Instant::now();
        let error = without.unwrap().barrier().unwrap_err();
        let named = matches!(error, Error::PeerLost { rank: 1 | 2, how: Loss::LeftAfter { lost: 3 }, .. });
        assert!(named, "{error}");
        assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    }
    rank.was_told("well");
}

#[test]
fn two_deaths_at_one_time_are_one_verdict() {
    for _ in 0..3 {
        run("rank_with_two_that_die", 4, &[1, 2]);
    }
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_with_two_that_die() {
    let rank = Rank::join(LONG);
    rank.world.barrier().unwrap();
    if rank.is(1) || rank.is(2) {
        rank.put(&format!("ready-{}", rank.world.rank()));
        rank.await_note("go");
        kill_myself(Signal::KILL);
    }
    if rank.is(0) {
        rank.await_note("ready-1");
        rank.await_note("ready-2");
        rank.put("go");
    }
    rank.await_note("go");
    let begin = Instant::now();
    let error = reduce_until_it_fails(&*rank.world);
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    assert!(matches!(error, Error::PeerLost { rank: 1 | 2, how: Loss::Died, .. }), "{error}");
    rank.was_told(&verdict(&error));
}

#[test]
fn a_death_is_noticed_though_a_child_holds_the_connections() {
    run("rank_with_a_child", 3, &[1]);
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_with_a_child() {
    let rank = Rank::join(LONG);
    rank.world.barrier().unwrap();
    if rank.is(1) {
        rank.put("ready");
        rank.await_note("held");
        rank.put("death");
        kill_myself(Signal::KILL);
    }
    // As a child would, that was forked by mistake.
    let held = if rank.is(0) { hold_sockets_of(rank.await_note("ready")) } else { Vec::new() };
    if rank.is(0) {
        rank.put("held");
    }
    rank.await_note("death");
    let begin = Instant::now();
    let error = reduce_until_it_fails(&*rank.world);
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    assert!(matches!(error, Error::PeerLost { rank: 1, how: Loss::Died, .. }), "{error}");
    rank.was_told(&verdict(&error));
    drop(held);
}

/// Copies of all sockets of a process: they are not closed when it ends.
fn hold_sockets_of(pid: u32) -> Vec<OwnedFd> {
    let process = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let mut held = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let entry = entry.unwrap();
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        if target.to_string_lossy().starts_with("socket:") {
            let fd = entry.file_name().to_string_lossy().parse().unwrap();
            match pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()) {
                Ok(socket) => held.push(socket),
                Err(error) => eprintln!("the connections are not held open: {error}"),
            }
        }
    }
    held
}

#[test]
fn a_stopped_rank_is_not_lost_but_named_at_the_deadline_by_all_alike() {
    run("rank_beside_a_stopped_one", 3, &[]);
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_beside_a_stopped_one() {
    let rank = Rank::join(Duration::from_secs(2));
    rank.world.barrier().unwrap();
    if rank.is(2) {
        rank.put("ready");
        rank.await_note("woken");
        // The others had come to the call that it comes to now, so it may pass; then it hears.
        let error = (0..).find_map(|_| rank.world.barrier().err()).unwrap();
        return rank.was_told(&verdict(&error));
    }
    let pid = rank.await_note("ready");
    if rank.is(0) {
        signal(pid, Signal::STOP);
        let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        while !stat().contains(") T ") {
            std::thread::yield_now();
        }
        rank.put("stopped");
    }
    rank.await_note("stopped");
    let begin = Instant::now();
    let error = rank.world.barrier().unwrap_err();
    assert!(begin.elapsed() >= Duration::from_secs(1) && begin.elapsed() < LONG, "{:?}", begin.elapsed());
    rank.was_told(&verdict(&error));
    if rank.is(0) {
        await_file(&rank.note("told-1"));
        signal(pid, Signal::CONT);
        rank.put("woken");
    }
    // Its connections must stay until the stopped one has heard.
    await_file(&rank.note("told-2"));
    let Error::Timeout { missing, report, .. } = error else { panic!("{error}") };
    assert_eq!(missing, [2], "{report}");
    assert!(report.contains("is stopped"), "{report}");
}

#[test]
fn a_rank_that_was_seen_to_come_is_not_missing_though_it_cannot_say_so() {
    run("rank_beside_one_that_came_and_was_stopped", 3, &[]);
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_beside_one_that_came_and_was_stopped() {
    let rank = Rank::join(Duration::from_secs(2));
    rank.world.barrier().unwrap();
    if rank.is(1) {
        rank.put("comes");
    }
    if rank.is(0) {
        let pid = rank.await_note("comes");
        let begin = Instant::now();
        // It says for whom it waits once it has shown the others that it has come.
        let waits = |group: &flight::GroupState| group.waiting_for.contains(&2);
        while !flight::read(pid).unwrap().iter().flat_map(|flight| &flight.groups).any(waits) {
            assert!(begin.elapsed() < LONG);
        }
        signal(pid, Signal::STOP);
    }
    if rank.is(2) {
        await_file(&rank.note("told-0"));
    }
    // The frames of those that came are there: who comes late may pass before it hears of the verdict, and once only.
    let error = (0..2).find_map(|_| rank.world.barrier().err()).unwrap();
    assert!(matches!(&error, Error::Timeout { missing, .. } if missing == &[2]), "{error}");
    rank.was_told(&verdict(&error));
    if rank.is(0) {
        signal(rank.await_note("comes"), Signal::CONT);
        // Its connections must stay until the stopped one has heard.
        await_file(&rank.note("told-1"));
    }
    await_file(&rank.note("told-2"));
}

#[test]
fn a_skipped_call_is_named_at_the_deadline_with_what_its_rank_does_instead() {
    run("rank_that_may_skip", 3, &[]);
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_that_may_skip() {
    let rank = Rank::join(Duration::from_secs(2));
    let pair = rank.world.subgroup(&[1, 2]).unwrap();
    rank.world.barrier().unwrap();
    if rank.is(2) {
        // Rank 1 never comes here: the deadline of this call is later than that of the others.
        let result = pair.unwrap().run_within(lightrft_collectives::Operation::Barrier, Some(LONG));
        let Err(Error::PeerLost { rank: 1, how: Loss::Left, .. }) = result else { panic!("{result:?}") };
        let error = rank.world.barrier().unwrap_err();
        return rank.was_told(&verdict(&error));
    }
    let error = rank.world.barrier().unwrap_err();
    rank.was_told(&verdict(&error));
    let Error::Timeout { missing, report, .. } = error else { panic!("{error}") };
    assert_eq!(missing, [2], "{report}");
    let (does, there) = ("is in barrier() at step", "of `world/0`");
    assert!(report.contains("rank 2") && report.contains(does) && report.contains(there), "{report}");
}

#[test]
fn a_large_call_with_another_count_is_a_mismatch_while_a_rank_is_still_to_come() {
    run("rank_that_gathers_more_or_late", 4, &[]);
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_that_gathers_more_or_late() {
    let rank = Rank::join(LONG);
    rank.world.barrier().unwrap();
    // Large enough to be read where it lies.
    let count = if rank.is(2) { 20_000 } else { 16_384 };
    let (input, mut output) = (vec![1f32; count], vec![0f32; 4 * count]);
    if rank.is(3) {
        // Rank 2 waits for it first, and has not seen the others' calls.
        (0..2).for_each(|other| drop(await_file(&rank.note(&format!("told-{other}")))));
    }
    let begin = Instant::now();
    let error = rank.world.all_gather(&input, &mut output).unwrap_err();
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    assert!(matches!(error, Error::Mismatch { rank: 2, .. } | Error::Mismatch { other: 2, .. }), "{error}");
    rank.was_told(&verdict(&error));
}

#[test]
fn a_message_that_waits_for_a_collective_call_is_a_mismatch_before_the_deadline() {
    run("rank_that_sends_or_reduces", 2, &[]);
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_that_sends_or_reduces() {
    let rank = Rank::join(LONG * 10);
    rank.world.barrier().unwrap();
    let begin = Instant::now();
    let mut data = [1f32];
    let result = if rank.is(0) {
        rank.world.recv(&mut data, 1)
    } else {
        rank.world.all_reduce(&mut data, ReduceOp::Sum)
    };
    assert!(begin.elapsed() < LONG / 2, "{:?}", begin.elapsed());
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Mismatch { rank: 0, other: 1, .. }), "{error}");
    rank.was_told(&verdict(&error));
}

#[test]
fn ranks_that_wait_for_each_other_in_two_groups_learn_of_their_deadlock() {
    run("rank_in_a_deadlock", 2, &[]);
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_in_a_deadlock() {
    let rank = Rank::join(Duration::from_secs(4));
    let other = rank.world.subgroup(&[0, 1]).unwrap().unwrap();
    let (first, second) = if rank.is(0) { (&rank.world, &other) } else { (&other, &rank.world) };
    let error = first.barrier().unwrap_err();
    let Error::Timeout { report, .. } = &error else { panic!("{error}") };
    std::fs::write(rank.note(&format!("report-{}", rank.world.rank())), report).unwrap();
    // On each group both are told the same. Not before both calls have failed: one could still meet the other.
    rank.put(&format!("failed-{}", rank.world.rank()));
    (0..2).for_each(|other| drop(await_file(&rank.note(&format!("failed-{other}")))));
    // The deadlines are the same: who comes to it first still sees the other wait.
    let reports = [0, 1].map(|r| std::fs::read_to_string(rank.note(&format!("report-{r}"))).unwrap());
    let parts = ["deadlock", "`world`", "`world/0`", "waits for rank 0", "waits for rank 1"];
    assert!(reports.iter().any(|r| parts.iter().all(|part| r.contains(part))), "{reports:#?}");
    let error_there = second.barrier().unwrap_err();
    let mut told = [verdict(&error), verdict(&error_there)];
    told.sort();
    rank.was_told(&told.join("\n"));
}

#[test]
fn survivors_make_a_new_group_without_the_rank_that_served_the_store() {
    run("rank_that_goes_on", 4, &[0]);
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_that_goes_on() {
    let rank = Rank::join(LONG);
    rank.world.barrier().unwrap();
    if rank.is(0) {
        kill_myself(Signal::KILL);
    }
    assert_eq!(survive(&*rank.world, 0).unwrap().name(), "world~1");
    rank.was_told("well");
}

#[test]
fn survivors_come_together_although_others_die_while_they_do() {
    run("rank_that_goes_on_while_others_die", 5, &[0, 3, 4]);
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_that_goes_on_while_others_die() {
    let rank = Rank::join(LONG);
    rank.world.barrier().unwrap();
    if rank.is(3) {
        kill_myself(Signal::KILL);
    }
    reduce_until_it_fails(&*rank.world);
    if rank.is(0) {
        // In the midst of it.
        std::thread::spawn(|| kill_myself(Signal::KILL));
    }
    let mut group = rank.world.rebuild(LONG);
    if rank.is(4) {
        kill_myself(Signal::KILL);
    }
    let begin = Instant::now();
    loop {
        assert!(begin.elapsed() < LONG);
        let now = group.unwrap();
        match now.barrier() {
            Ok(()) if now.ranks() == [1, 2] => break,
            Ok(()) => group = Ok(now),
            Err(error) => {
                assert!(matches!(error, Error::PeerLost { rank: 0 | 4, .. }), "{error}");
                group = now.rebuild(LONG);
            }
        }
    }
    rank.was_told("well");
}

#[test]
fn who_does_not_come_in_time_is_left_behind_and_told_so() {
    run("rank_that_may_be_late", 3, &[]);
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_that_may_be_late() {
    let rank = Rank::join(LONG);
    rank.world.barrier().unwrap();
    if rank.is(2) {
        await_file(&rank.note("told-0"));
        await_file(&rank.note("told-1"));
        let error = rank.world.rebuild(LONG).unwrap_err();
        assert!(matches!(error, Error::PeerLost { rank: 2, how: Loss::Silent, .. }), "{error}");
        return rank.was_told("well");
    }
    let group = rank.world.rebuild(Duration::from_secs(1)).unwrap();
    assert_eq!(group.ranks(), [0, 1]);
    group.barrier().unwrap();
    rank.was_told("well");
    await_file(&rank.note("told-2"));
}

#[test]
fn a_hanging_job_is_read_from_outside() {
    run("rank_that_is_read", 2, &[]);
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_that_is_read() {
    let rank = Rank::join(LONG);
    let group = rank.world.subgroup(&[1, 0]).unwrap().unwrap();
    group.barrier().unwrap();
    rank.put(&format!("pid-{}", rank.world.rank()));
    if rank.is(1) {
        rank.await_note("read");
        group.barrier().unwrap();
        return rank.was_told("well");
    }
    let pids = [0, 1].map(|other| rank.await_note(&format!("pid-{other}")));
    let reader = std::thread::spawn(move || {
        // The other thread gets to wait, and says for whom.
        let begin = Instant::now();
        loop {
            assert!(begin.elapsed() < LONG);
            let output = std::process::Command::new(env!("CARGO_BIN_EXE_lightrft-flight"))
                .args(pids.map(|pid| pid.to_string()))
                .output()
                .unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            if text.contains("rank 1 is missing at step") && text.contains("waiting for rank 1") {
                return text;
            }
        }
    });
    let notes = rank.notes.clone();
    let read = std::thread::spawn(move || {
        let text = reader.join().unwrap();
        std::fs::write(notes.join("read"), std::process::id().to_string()).unwrap();
        text
    });
    group.barrier().unwrap();
    let text = read.join().unwrap();
    assert!(text.contains("rank 0 of 2") && text.contains("rank 1 of 2"), "{text}");
    assert!(text.contains("of `world/0`: it is in no call; its last: barrier() at step"), "{text}");
    rank.was_told("well");
}
