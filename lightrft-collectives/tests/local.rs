//! Ranks as threads pass the suite, and a rank that fails ends the others
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use lightrft_collectives::local::World;
use lightrft_collectives::testing::{Mismatch, conformance, mismatch, survive};
use lightrft_collectives::{CommunicatorExt, Error, Loss, ReduceOp};

/// Longer than anything here takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn threads_conform() {
    for ranks in 1..=4 {
        World::run(ranks, |comm| conformance(&*comm)).unwrap();
    }
}

#[test]
fn more_threads_conform() {
    for ranks in [5, 8] {
        World::run(ranks, |comm| conformance(&*comm)).unwrap();
    }
}

#[test]
fn threads_that_disagree_all_learn_of_it() {
    for case in Mismatch::ALL {
        World::run(3, |comm| {
            mismatch(&*comm, case);
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn a_panic_reaches_the_caller_and_ends_the_others() {
    let begin = Instant::now();
    let result = World::run(3, |comm| {
        assert!(comm.rank() != 1, "one too many");
        match comm.barrier() {
            Err(Error::PeerLost { rank: 1, how: Loss::Failed, .. }) => comm.barrier(),
            other => panic!("{other:?}"),
        }
    });
    assert!(
        matches!(&result, Err(Error::Panicked { rank: 1, message }) if message.contains("one too many")),
        "{result:?}"
    );
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_rank_that_leaves_is_named_by_those_who_still_need_it() {
    let result = World::run(2, |comm| if comm.rank() == 0 { Ok(()) } else { comm.barrier() });
    assert!(matches!(result, Err(Error::PeerLost { rank: 0, how: Loss::Left, .. })), "{result:?}");
}

#[test]
fn a_slow_rank_is_waited_for_until_the_deadline() {
    let world = World::new(2).timeout(Duration::from_millis(50));
    let (late, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    let result: Result<Vec<()>, Error> = world.launch(|comm| {
        if comm.rank() == 0 {
            let result = comm.barrier();
            late.send(()).unwrap();
            result
        } else {
            wait.lock().unwrap().recv().unwrap();
            comm.barrier()
        }
    });
    assert!(matches!(result, Err(Error::Timeout { missing, .. }) if missing == [1]));
}

#[test]
fn a_message_does_not_come_through_a_dead_group() {
    World::run(2, |comm| {
        if comm.rank() == 0 {
            comm.send(&[1f32], 1)?;
            assert!(matches!(comm.barrier(), Err(Error::Mismatch { .. })));
        } else {
            assert!(matches!(comm.all_reduce(&mut [1f32], ReduceOp::Sum), Err(Error::Mismatch { .. })));
            assert!(matches!(comm.recv(&mut [0f32], 0), Err(Error::Mismatch { .. })));
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn an_object_that_meets_plain_bytes_of_the_same_length_is_a_mismatch() {
    let is_mismatch = |result: Result<(), Error>| {
        let error = result.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Mismatch { rank: 0, other: 1, .. }), "{text}");
        assert!(text.contains("U8, 1024 elements") && text.contains("a call on objects"), "{text}");
    };
    World::run(2, |comm| {
        is_mismatch(match comm.rank() {
            0 => comm.all_gather(&[1u8; 1024], &mut [0u8; 2048]),
            _ => comm.all_gather_object(&7).map(drop),
        });
        is_mismatch(comm.barrier());
        Ok(())
    })
    .unwrap();
    World::run(2, |comm| {
        is_mismatch(match comm.rank() {
            0 => comm.broadcast(&mut [1u8; 1024], 0),
            _ => comm.broadcast_object(None::<&u32>, 0).map(drop),
        });
        Ok(())
    })
    .unwrap();
}

/// The survivors of threads go on; `launch` returns what became of the lost one.
fn threads_without(
    lost: usize,
    ranks: usize,
    end: impl Fn() -> Result<(), Error> + Sync,
) -> Result<(), Error> {
    let survivors = Mutex::new(Vec::new());
    let result = World::run(ranks, |comm| {
        comm.barrier()?;
        if comm.rank() == lost {
            return end();
        }
        let group = survive(&*comm, lost)?;
        survivors.lock().unwrap().push(group.name().to_owned());
        Ok(())
    });
    assert_eq!(survivors.into_inner().unwrap(), vec!["world~1"; ranks - 1]);
    result.map(drop)
}

#[test]
fn threads_go_on_without_one_that_panicked_failed_or_returned() {
    for ranks in [2, 3, 5] {
        let result = threads_without(1, ranks, || panic!("one too many"));
        assert!(matches!(result, Err(Error::Panicked { rank: 1, .. })), "{result:?}");
        let result = threads_without(0, ranks, || Err(Error::Taken));
        assert!(matches!(result, Err(Error::Taken)), "{result:?}");
        threads_without(ranks - 1, ranks, || Ok(())).unwrap();
    }
}

#[test]
fn threads_come_together_although_others_end_while_they_do() {
    let result = World::run(4, |comm| {
        if comm.rank() == 3 {
            return Err(Error::Taken);
        }
        assert!(comm.barrier().is_err());
        if comm.rank() == 0 {
            // The others may wait for it in the first group that they make, or find it gone before.
            return Err(Error::Taken);
        }
        let mut group = comm.rebuild(LIMIT)?;
        while let Err(error) = group.barrier() {
            assert!(matches!(error, Error::PeerLost { rank: 0, how: Loss::Failed, .. }), "{error}");
            group = group.rebuild(LIMIT)?;
        }
        assert_eq!(group.ranks(), [1, 2]);
        Ok(())
    });
    assert!(matches!(result, Err(Error::Taken)), "{result:?}");
}

#[test]
fn a_thread_that_does_not_come_in_time_is_left_behind_and_told_so() {
    let done = Barrier::new(3);
    World::run(3, |comm| {
        if comm.rank() == 2 {
            done.wait();
            let result = comm.rebuild(LIMIT);
            assert!(matches!(result, Err(Error::PeerLost { rank: 2, how: Loss::Silent, .. })), "{result:?}");
            return Ok(());
        }
        let group = comm.rebuild(Duration::from_millis(100))?;
        assert_eq!(group.ranks(), [0, 1]);
        group.barrier()?;
        done.wait();
        Ok(())
    })
    .unwrap();
}

#[test]
fn groups_without_the_lost_thread_go_on_and_those_who_leave_them_say_after_whom() {
    let (failed, checked) = (Barrier::new(2), Barrier::new(2));
    let result = World::run(3, |comm| {
        let pair = comm.subgroup(&[0, 1])?;
        if comm.rank() == 2 {
            return Err(Error::Taken);
        }
        let pair = pair.unwrap();
        let named = |error: Error| matches!(error, Error::PeerLost { rank: 2, how: Loss::Failed, .. });
        assert!(comm.barrier().is_err_and(named));
        failed.wait();
        pair.barrier()?;
        checked.wait();
        if comm.rank() == 1 {
            return Ok(());
        }
        let error = pair.barrier().unwrap_err();
        let after = matches!(error, Error::PeerLost { rank: 1, how: Loss::LeftAfter { lost: 2 }, .. });
        assert!(after, "{error}");
        Ok(())
    });
    assert!(matches!(result, Err(Error::Taken)), "{result:?}");
}
