//! Calls under way: their order, their ends, what a dropped handle or queue leaves behind
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use lightrft_collectives::local::World;
use lightrft_collectives::{
    Communicator, CommunicatorExt, Error, GroupOptions, Loss, Pending, Queue, ReduceOp, Result, Single,
};

/// As long as anything here may take on a machine that does a lot else.
const SOON: Duration = Duration::from_secs(20);

/// The smallest runtime there is.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}

#[test]
fn calls_under_way_can_be_awaited() {
    let results = World::run(3, |comm| {
        let queue = Queue::new(comm)?;
        block_on(async {
            let sum = queue.all_reduce(vec![queue.rank() as f32; 1000], ReduceOp::Sum);
            let names = queue.all_gather_object(&format!("rank {}", queue.rank()));
            // In the other order.
            let names = names.await?;
            Ok((sum.await?[999], names.join(", ")))
        })
    })
    .unwrap();
    assert_eq!(results, vec![(3.0, "rank 0, rank 1, rank 2".to_string()); 3]);
}

#[test]
fn a_call_runs_while_its_rank_does_something_else() {
    // Rank 1 calls only after rank 0 has been seen to go on past its own call.
    let (went_on, wait) = mpsc::channel();
    let wait = Mutex::new(wait);
    World::run(2, |comm| {
        let queue = Queue::new(comm)?;
        if queue.rank() == 0 {
            let sum = queue.all_reduce(vec![1i32; 8], ReduceOp::Sum);
            assert!(!sum.is_done());
            let sum = sum.wait_within(Duration::from_millis(1)).unwrap_err();
            went_on.send(()).unwrap();
            assert_eq!(sum.wait()?, [2; 8]);
        } else {
            wait.lock().unwrap().recv_timeout(SOON).unwrap();
            assert_eq!(queue.all_reduce(vec![1i32; 8], ReduceOp::Sum).wait()?, [2; 8]);
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn calls_from_many_threads_of_a_rank_take_turns() {
    let queue = Queue::new(Single::world()).unwrap();
    let made = Arc::new(AtomicUsize::new(0));
    thread::scope(|scope| {
        for thread in 0..4 {
            let (queue, made) = (&queue, made.clone());
            scope.spawn(move || {
                for i in 0..200 {
                    if (thread + i) % 2 == 0 {
                        let seam: &dyn Communicator = queue;
                        seam.barrier().unwrap();
                    } else {
                        let made = made.clone();
                        let _dropped = queue.enqueue(move |_| {
                            made.fetch_add(1, Ordering::SeqCst);
                            Ok(())
                        });
                    }
                }
            });
        }
    });
    queue.flush();
    assert_eq!(made.load(Ordering::SeqCst), 400);
}

#[test]
fn a_call_through_its_own_queue_has_its_turn_already() {
    World::run(2, |comm| {
        let queue = Arc::new(Queue::new(comm)?);
        let inner = queue.clone();
        let done = queue.enqueue(move |_| {
            let seam: &dyn Communicator = &*inner;
            inner.flush();
            seam.barrier()
        });
        done.wait_within(SOON).unwrap()
    })
    .unwrap();
}

#[test]
fn a_dropped_handle_does_not_leave_the_others_waiting() {
    World::run(2, |comm| {
        let queue = Queue::new(comm)?;
        if queue.rank() == 0 {
            drop(queue.all_reduce(vec![1f32; 10_000], ReduceOp::Sum));
            queue.flush();
        } else {
            assert_eq!(queue.all_reduce(vec![1f32; 10_000], ReduceOp::Sum).wait()?[0], 2.0);
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_dropped_queue_does_not_wait_and_what_it_was_given_ends() {
    let (dropped, wait) = mpsc::channel();
    let wait = Mutex::new(wait);
    World::run(2, |comm| {
        let queue = Queue::new(comm.clone())?;
        if comm.rank() == 0 {
            let begin = Instant::now();
            let calls: Vec<Pending<Vec<i64>>> =
                (0..5i64).map(|i| queue.all_reduce(vec![i], ReduceOp::Sum)).collect();
            drop(queue);
            assert!(begin.elapsed() < SOON);
            dropped.send(()).unwrap();
            for (i, call) in calls.into_iter().enumerate() {
                assert_eq!(call.wait()?, [2 * i64::try_from(i).unwrap()]);
            }
        } else {
            wait.lock().unwrap().recv_timeout(SOON).unwrap();
            for i in 0..5i64 {
                assert_eq!(queue.all_reduce(vec![i], ReduceOp::Sum).wait()?, [2 * i]);
            }
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn who_has_waited_for_all_and_drops_the_queue_has_let_go_of_the_group() {
    for _ in 0..100 {
        let comm = Single::world();
        let queue = Queue::new(comm.clone()).unwrap();
        queue.all_reduce(vec![1f32], ReduceOp::Sum).wait().unwrap();
        let failed = queue.broadcast(vec![1f32], 7);
        assert!(failed.wait().is_err());
        drop(queue);
        assert_eq!(Arc::strong_count(&comm), 1);
    }
}

#[test]
fn a_failure_ends_all_that_is_under_way_and_all_that_comes_after() {
    World::run(2, |comm| {
        let own = comm.subgroup_with(&[0, 1], &GroupOptions::default().exclusive())?.unwrap();
        let queue = Queue::new(own)?;
        let calls: Vec<Result<Vec<f32>>> = (0..5)
            .map(|i| {
                let op = if i == 2 && queue.rank() == 1 { ReduceOp::Max } else { ReduceOp::Sum };
                queue.all_reduce(vec![1.0], op)
            })
            .collect::<Vec<_>>()
            .into_iter()
            .map(Pending::wait)
            .collect();
        assert!(calls[..2].iter().all(Result::is_ok));
        assert!(calls[2..].iter().all(|call| matches!(call, Err(Error::Mismatch { .. }))), "{calls:?}");
        let seam: &dyn Communicator = &queue;
        assert!(matches!(seam.barrier(), Err(Error::Mismatch { .. })));
        comm.barrier()
    })
    .unwrap();
}

#[test]
fn a_lost_rank_ends_the_calls_that_wait_for_it() {
    let begin = Instant::now();
    let result = World::run(2, |comm| {
        let queue = Queue::new(comm)?;
        if queue.rank() == 1 {
            return Err(Error::Taken);
        }
        let result = queue.all_reduce(vec![1f32], ReduceOp::Sum).wait();
        assert!(matches!(result, Err(Error::PeerLost { rank: 1, how: Loss::Failed, .. })), "{result:?}");
        result.map(drop)
    });
    assert!(matches!(result, Err(Error::Taken)), "{result:?}");
    assert!(begin.elapsed() < SOON);
}

#[test]
fn one_call_may_have_a_deadline_of_its_own() {
    let (ended, wait) = mpsc::channel();
    let wait = Mutex::new(wait);
    World::run(2, |comm| {
        let own = comm.subgroup_with(&[0, 1], &GroupOptions::default().exclusive())?.unwrap();
        if comm.rank() == 0 {
            let hasty = own.within(Duration::from_millis(20));
            let result = hasty.barrier();
            assert!(matches!(&result, Err(Error::Timeout { missing, .. }) if *missing == [1]), "{result:?}");
            ended.send(()).unwrap();
        } else {
            // Only now, so that rank 0 has waited in vain.
            wait.lock().unwrap().recv_timeout(SOON).unwrap();
            assert!(matches!(own.barrier(), Err(Error::Timeout { .. })));
        }
        comm.barrier()
    })
    .unwrap();
}

#[test]
fn a_queue_over_a_deadline_gives_it_to_every_call() {
    World::run(2, |comm| {
        let own = comm.subgroup_with(&[0, 1], &GroupOptions::default().exclusive())?.unwrap();
        if comm.rank() == 0 {
            let hasty = lightrft_collectives::Within::new(own.clone(), Duration::from_millis(20));
            let queue = Queue::new(Arc::new(hasty))?;
            let result = queue.barrier().wait();
            assert!(matches!(result, Err(Error::Timeout { .. })), "{result:?}");
        }
        comm.barrier()
    })
    .unwrap();
}
