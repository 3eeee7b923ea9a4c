//! Ranks start together, and end together: by failure, by signal, with their launcher
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use lightrft_collectives::launch::{Launcher, Output};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// `script` as ranks of a shell.
fn shell(script: &str) -> Launcher {
    Launcher::new("sh").args(["-c", script])
}

/// This binary, running the ignored test `role`, with its output to be read.
fn role(role: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([role, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn the_first_failure_gives_the_code_and_ends_the_others() {
    let begin = Instant::now();
    let outcome = shell("if [ $RANK = 1 ]; then exit 7; fi; exec sleep 600")
        .ranks(3)
        .grace(Duration::from_millis(100))
        .run()
        .unwrap();
    assert_eq!(outcome.failure.map(|f| f.rank), Some(1));
    assert_eq!((outcome.exit_code(), outcome.statuses.len()), (7, 3));
    assert!(begin.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_rank_that_ignores_sigterm_is_killed() {
    let outcome = shell("trap '' TERM; if [ $RANK = 1 ]; then exit 3; fi; while :; do sleep 1; done")
        .ranks(2)
        .grace(Duration::from_millis(100))
        .run()
        .unwrap();
    assert_eq!(outcome.exit_code(), 3);
}

#[test]
fn others_may_use_the_grace_to_end_by_themselves() {
    let outcome = shell("[ $RANK = 1 ] && exit 9; sleep 0.2; exit 0")
        .ranks(2)
        .grace(Duration::from_secs(60))
        .run()
        .unwrap();
    assert_eq!(outcome.exit_code(), 9);
    assert!(outcome.statuses[0].success());
}

#[test]
fn the_grace_may_be_without_end() {
    let outcome = shell("[ $RANK = 1 ] && exit 9; exit 0").ranks(2).grace(Duration::MAX).run().unwrap();
    assert_eq!(outcome.exit_code(), 9);
}

#[test]
fn a_program_that_does_not_exist_is_an_error() {
    assert!(Launcher::new("/no/such/program").ranks(2).run().is_err());
}

#[test]
fn lines_carry_their_rank_and_ranks_their_variables() {
    let mut child = role("launcher_of_speakers");
    let mut text = String::new();
    child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success(), "{text}");
    for line in [
        "[rank 0] I am 0 of 2, 0 of 2 here",
        "[rank 1] I am 1 of 2, 1 of 2 here",
        "plain 0",
        "[rank 1] plain 1",
    ] {
        assert!(text.lines().any(|l| l == line), "no `{line}` in\n{text}");
    }
    assert!(text.lines().any(|l| l == "only 0") && !text.contains("only 1"), "{text}");
}

#[test]
#[ignore = "started by lines_carry_their_rank_and_ranks_their_variables"]
fn launcher_of_speakers() {
    println!();
    shell("echo I am $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE here").ranks(2).run().unwrap();
    shell("echo plain $RANK").ranks(2).output(Output::PlainRankZero).run().unwrap();
    shell("echo only $RANK").ranks(2).output(Output::OnlyRankZero).run().unwrap();
}

#[test]
fn ranks_die_with_a_launcher_that_is_killed() {
    let (mut child, _stdout, ranks) = launcher_of_sleepers();
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for_end(ranks);
}

#[test]
fn a_signal_to_the_launcher_reaches_the_ranks() {
    let (mut child, mut stdout, ranks) = launcher_of_sleepers();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    wait_for_end(ranks);
    let mut text = String::new();
    stdout.read_to_string(&mut text).unwrap();
    assert!(child.wait().unwrap().success(), "the role checks the outcome: {text}");
}

/// A launcher of two ranks that sleep, its output, and the ranks' process descriptors.
fn launcher_of_sleepers() -> (Child, BufReader<ChildStdout>, Vec<rustix::fd::OwnedFd>) {
    let mut child = role("launcher_of_two_that_sleep");
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let lines = stdout.by_ref().lines().map(Result::unwrap);
    let pids =
        lines.filter_map(|line| line.split_once(" pid ").and_then(|(_, pid)| pid.parse().ok())).take(2);
    let ranks =
        pids.map(|pid| pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap()).collect();
    (child, stdout, ranks)
}

#[test]
#[ignore = "started by the two tests above"]
fn launcher_of_two_that_sleep() {
    let outcome = shell("echo my pid $$; exec sleep 600").ranks(2).run().unwrap();
    assert_eq!((outcome.signal, outcome.exit_code()), (Some(15), 128 + 15));
}

fn wait_for_end(ranks: Vec<rustix::fd::OwnedFd>) {
    assert_eq!(ranks.len(), 2);
    for rank in ranks {
        let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
        let ended = poll(&mut [PollFd::new(&rank, PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(ended, 1, "a rank outlives its launcher");
    }
}
