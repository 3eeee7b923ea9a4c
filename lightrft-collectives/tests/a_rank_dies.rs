//! A rank that is killed in the midst of a call is named by every survivor, soon
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use lightrft_collectives::launch::Launcher;
use lightrft_collectives::{CommunicatorExt, Error, Loss, ReduceOp, Rendezvous, Transport};

/// The rank that is killed.
const VICTIM: usize = 1;

/// Rounds before the kill, so that it comes when all are at work.
const ROUNDS: usize = 20;

#[test]
fn a_killed_rank_is_named_by_all_who_shared_its_memory() {
    kill_one_of_three("auto");
}

#[test]
fn a_killed_rank_is_named_by_all_who_were_connected_to_it() {
    kill_one_of_three("tcp");
}

fn kill_one_of_three(transport: &str) {
    let folder = tempfile::tempdir().unwrap();
    let outcome = Launcher::new(std::env::current_exe().unwrap())
        .args(["rank_reduces", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("TRANSPORT", transport)
        .env("NOTES", folder.path())
        .ranks(3)
        // Longer than all their deadlines: the survivors must end by themselves.
        .grace(Duration::from_secs(60))
        .run()
        .unwrap();
    let failure = outcome.failure.unwrap();
    assert_eq!((failure.rank, failure.status.signal()), (VICTIM, Some(9)), "{outcome}");
    for rank in [0, 2] {
        // Each survivor has checked what it was told; a failed assertion would have ended it with another code.
        assert!(outcome.statuses[rank].success(), "rank {rank}: {}", outcome.statuses[rank]);
        assert!(folder.path().join(format!("survivor-{rank}")).exists());
    }
}

#[test]
#[ignore = "a rank of the two above"]
fn rank_reduces() {
    let notes = PathBuf::from(std::env::var_os("NOTES").unwrap());
    let transport =
        if std::env::var("TRANSPORT").unwrap() == "tcp" { Transport::Tcp } else { Transport::Auto };
    let comm = Rendezvous::from_env().unwrap().transport(transport).init().unwrap();
    let group = comm.subgroup(&[2, 1, 0]).unwrap().unwrap();
    let mut data = vec![1f32; 1 << 20];
    let time_of_death = notes.join("death");
    for round in 0.. {
        if round == ROUNDS && comm.rank() == VICTIM {
            let time_of_death = time_of_death.clone();
            std::thread::spawn(move || {
                std::fs::write(time_of_death, now().as_nanos().to_string()).unwrap();
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                    .unwrap();
            });
        }
        let Err(error) = comm.all_reduce(&mut data, ReduceOp::Max) else { continue };
        let died = Duration::from_nanos(std::fs::read_to_string(&time_of_death).unwrap().parse().unwrap());
        let noticed_after = now() - died;
        println!("{error}, {noticed_after:?} after it was killed");
        assert!(round >= ROUNDS);
        assert!(matches!(error, Error::PeerLost { rank: VICTIM, how: Loss::Died, .. }), "{error}");
        // Within 100 ms on a quiet machine; a busy one may take that long to end a process.
        assert!(noticed_after < Duration::from_secs(5), "{noticed_after:?}");
        // The same verdict from then on, at once, on every group.
        for again in [comm.barrier(), group.barrier()] {
            assert!(matches!(again, Err(Error::PeerLost { rank: VICTIM, .. })), "{again:?}");
        }
        break;
    }
    std::fs::write(notes.join(format!("survivor-{}", comm.rank())), "").unwrap();
}

fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap()
}
