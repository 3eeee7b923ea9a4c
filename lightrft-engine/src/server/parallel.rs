//! One call's requests sent side by side: as many at once as a server takes, results in order, the first failure ends all.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use crate::{Error, Result};

/// Runs `run` on every job, on at most `width` threads at once. Results are in the order of the jobs.
///
/// `done` hears of every result as it comes, on the calling thread. After the first failure, of a job or of `done`, no
/// other job begins, `interrupt` is called to end those under way, and that failure is returned when they have ended.
pub(crate) fn in_parallel<J: Sync, R: Send>(
    width: usize,
    jobs: &[J],
    run: impl Fn(&J) -> Result<R> + Sync,
    mut done: impl FnMut(&R) -> Result<()>,
    interrupt: impl Fn(),
) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let (results, received) = mpsc::channel();
    let mut found: Vec<Option<R>> = jobs.iter().map(|_| None).collect();
    let mut failure = None;
    thread::scope(|scope| {
        let (run, next, stop) = (&run, &next, &stop);
        for index in 0..width.max(1).min(jobs.len()) {
            let results = results.clone();
            let work = move || {
                while !stop.load(Ordering::SeqCst) {
                    let at = next.fetch_add(1, Ordering::SeqCst);
                    let Some(job) = jobs.get(at) else { return };
                    if results.send((at, run(job))).is_err() {
                        return;
                    }
                }
            };
            // A request waits for its reply and parses it: little of a stack is needed.
            let thread = thread::Builder::new().name("lightrft-request".into()).stack_size(512 << 10);
            match thread.spawn_scoped(scope, work) {
                Ok(_) => {}
                // Fewer threads do the same work.
                Err(_) if index > 0 => break,
                Err(source) => {
                    let source = Box::new(source);
                    failure = Some(Error::Backend { engine: "server", operation: "start a thread", source });
                    return;
                }
            }
        }
        drop(results);
        for (at, result) in received {
            let result = result.and_then(|result| done(&result).map(|()| result));
            match result {
                Ok(result) => found[at] = Some(result),
                Err(error) if failure.is_none() => {
                    failure = Some(error);
                    stop.store(true, Ordering::SeqCst);
                    interrupt();
                }
                // The others were ended, or failed for the same reason.
                Err(_) => {}
            }
        }
    });
    match failure {
        Some(error) => Err(error),
        None => Ok(found.into_iter().flatten().collect()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};

    use super::*;

    fn failure(index: usize) -> Error {
        Error::Name { name: index.to_string(), reason: "of a test".into() }
    }

    #[test]
    fn results_are_in_order_whatever_the_width() {
        let jobs: Vec<usize> = (0..100).collect();
        for width in [0, 1, 7, 1000] {
            let mut heard = 0;
            let hear = |_: &usize| {
                heard += 1;
                Ok(())
            };
            let results = in_parallel(width, &jobs, |job| Ok(job * 2), hear, || ()).unwrap();
            assert!(results.iter().enumerate().all(|(at, result)| *result == at * 2));
            assert_eq!((results.len(), heard), (100, 100));
        }
        assert!(in_parallel(4, &[], |job: &usize| Ok(*job), |_| Ok(()), || ()).unwrap().is_empty());
    }

    #[test]
    fn no_more_than_width_run_at_once() {
        let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let run = |_: &usize| {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            thread::yield_now();
            now.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        };
        in_parallel(3, &[0; 200], run, |()| Ok(()), || ()).unwrap();
        assert!(most.into_inner() <= 3);
    }

    #[test]
    fn the_first_failure_is_told_and_ends_those_under_way() {
        let (ended, wake) = (Mutex::new(false), Condvar::new());
        let begun = AtomicUsize::new(0);
        let jobs: Vec<usize> = (0..1000).collect();
        let run = |job: &usize| {
            begun.fetch_add(1, Ordering::SeqCst);
            if *job == 1 {
                return Err(failure(1));
            }
            // The others end only by the interruption.
            let _ended = wake.wait_while(ended.lock().unwrap(), |ended| !*ended).unwrap();
            Err::<(), _>(failure(*job))
        };
        let interrupt = || {
            *ended.lock().unwrap() = true;
            wake.notify_all();
        };
        let error = in_parallel(4, &jobs, run, |()| Ok(()), interrupt).unwrap_err();
        assert!(matches!(error, Error::Name { name, .. } if name == "1"));
        assert!(begun.into_inner() < 10, "nothing begins after a failure");
    }

    #[test]
    fn a_listener_that_fails_ends_the_call() {
        let error = in_parallel(2, &[0; 50], |job| Ok(*job), |_: &i32| Err(failure(7)), || ()).unwrap_err();
        assert!(matches!(error, Error::Name { name, .. } if name == "7"));
    }
}
