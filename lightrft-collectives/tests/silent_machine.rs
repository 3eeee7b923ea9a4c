//! A machine that falls silent is lost within five seconds: two network namespaces, and the link between them is cut
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use lightrft_collectives::{CommunicatorExt, Error, Loss, ReduceOp, Rendezvous};

/// Runs `ip` with these words; whether it did what it was told.
fn ip(words: &str) -> bool {
    Command::new("ip").args(words.split(' ')).status().is_ok_and(|status| status.success())
}

/// Two namespaces with a link between them, removed at the end.
struct Machines;

impl Machines {
    fn new() -> Option<Self> {
        let made = ip("netns add lightrft-a") && ip("netns add lightrft-b");
        let machines = Machines;
        let linked = made
            && ip("link add lightrft-a netns lightrft-a type veth peer name lightrft-b netns lightrft-b")
            && ip("-n lightrft-a addr add 10.213.7.1/24 dev lightrft-a")
            && ip("-n lightrft-b addr add 10.213.7.2/24 dev lightrft-b")
            && ip("-n lightrft-a link set lightrft-a up")
            && ip("-n lightrft-b link set lightrft-b up")
            && ip("-n lightrft-a link set lo up")
            && ip("-n lightrft-b link set lo up");
        linked.then_some(machines)
    }

    /// A rank on machine `a` or `b`, in a process namespace of its own, as on a machine of its own.
    fn start(machine: &str, rank: usize) -> Child {
        Command::new("ip")
            .args([
                "netns",
                "exec",
                &format!("lightrft-{machine}"),
                "unshare",
                "--pid",
                "--fork",
                "--kill-child",
            ])
            .arg(std::env::current_exe().unwrap())
            .args(["rank_on_a_machine", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", "2")
            .env("MASTER_ADDR", "10.213.7.1")
            .env("MASTER_PORT", "29411")
            .env("LIGHTRFT_TRUST_NETWORK", "1")
            .spawn()
            .unwrap()
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        ip("netns del lightrft-a");
        ip("netns del lightrft-b");
    }
}

#[test]
#[ignore = "needs root, `ip` and `unshare`"]
fn a_machine_that_falls_silent_is_lost_within_five_seconds() {
    let Some(_machines) = Machines::new() else { panic!("no network namespaces can be made here") };
    let mut ranks = [Machines::start("a", 0), Machines::start("b", 1)];
    std::thread::sleep(Duration::from_secs(8));
    // Each end believes that the other is gone, and says so: it ends well.
    let begin = Instant::now();
    assert!(ip("-n lightrft-a link set lightrft-a down"));
    for rank in &mut ranks {
        assert!(rank.wait().unwrap().success());
        println!("a rank knew and ended after {:?}", begin.elapsed());
    }
    assert!(begin.elapsed() < Duration::from_secs(6), "{:?}", begin.elapsed());
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_on_a_machine() {
    let comm = Rendezvous::from_env().unwrap().init().unwrap();
    let mut last = Instant::now();
    let error = loop {
        let mut data = [1f32; 8];
        match comm.all_reduce(&mut data, ReduceOp::Sum) {
            Ok(()) => last = Instant::now(),
            Err(error) => break error,
        }
        // The link may be cut while nothing is under way, too.
        std::thread::sleep(Duration::from_millis(20));
    };
    let other = 1 - comm.rank();
    println!("{error}, {:?} after the last call that went through", last.elapsed());
    assert!(
        matches!(error, Error::PeerLost { rank, how: Loss::Silent | Loss::Died, .. } if rank == other),
        "{error}"
    );
    assert!(last.elapsed() < Duration::from_secs(5), "{:?}", last.elapsed());
}
