//! Ranks as threads pass the suite, and a rank that fails ends the others
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use lightrft_collectives::local::World;
use lightrft_collectives::testing::{Mismatch, conformance, mismatch};
use lightrft_collectives::{CommunicatorExt, Error, Loss, ReduceOp};

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
