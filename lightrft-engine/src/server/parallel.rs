//! One call's requests sent side by side: as many at once as a server takes, results in order, the first failure ends all.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::Duration;

use crate::{Error, Result};

/// The longest time without a word.
const TICK: Duration = Duration::from_millis(100);

/// Runs `run` on every job, on at most `width` threads at once. Results are in the order of the jobs.
///
/// `hear` is given every result as it comes, on the calling thread, and nothing at least every tenth of a second: a caller
/// that wants no more is heard however long the jobs take. After the first failure, of a job or of `hear`, no
/// other job begins, `interrupt` is called to end those under way, and that failure is returned when they have ended.
pub(crate) fn in_parallel<J: Sync, R: Send>(
    width: usize,
    jobs: &[J],
    run: impl Fn(&J) -> Result<R> + Sync,
    mut hear: impl FnMut(Option<&R>) -> Result<()>,
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
        loop {
            let result = match received.recv_timeout(TICK) {
                Ok((at, result)) => {
                    result.and_then(|result| hear(Some(&result)).map(|()| found[at] = Some(result)))
                }
                // Those under way are being ended.
                Err(RecvTimeoutError::Timeout) if failure.is_some() => continue,
                Err(RecvTimeoutError::Timeout) => hear(None),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            match result {
                Ok(()) => {}
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
            let hear = |result: Option<&usize>| {
                heard += usize::from(result.is_some());
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
        in_parallel(3, &[0; 200], run, |_| Ok(()), || ()).unwrap();
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
        let error = in_parallel(4, &jobs, run, |_| Ok(()), interrupt).unwrap_err();
        assert!(matches!(error, Error::Name { name, .. } if name == "1"));
        assert!(begun.into_inner() < 10, "nothing begins after a failure");
    }

    #[test]
    fn a_listener_that_fails_ends_the_call() {
        let hear = |_: Option<&i32>| Err(failure(7));
        let error = in_parallel(2, &[0; 50], |job| Ok(*job), hear, || ()).unwrap_err();
        assert!(matches!(error, Error::Name { name, .. } if name == "7"));
    }

    #[test]
    fn a_listener_is_heard_while_nothing_is_done() {
        let (ended, wake) = (Mutex::new(false), Condvar::new());
        let run = |job: &usize| {
            // It ends only by the interruption, or the test's patience.
            let patience = Duration::from_secs(60);
            let wait = wake.wait_timeout_while(ended.lock().unwrap(), patience, |ended| !*ended).unwrap();
            assert!(!wait.1.timed_out(), "nobody was asked whether to go on");
            Err::<(), _>(failure(*job))
        };
        let interrupt = || {
            *ended.lock().unwrap() = true;
            wake.notify_all();
        };
        let mut silent = 0;
        let hear = |result: Option<&()>| {
            assert!(result.is_none());
            silent += 1;
            if silent < 3 { Ok(()) } else { Err(failure(7)) }
        };
        let error = in_parallel(2, &[0, 1], run, hear, interrupt).unwrap_err();
        assert!(matches!(error, Error::Name { name, .. } if name == "7"));
        assert_eq!(silent, 3, "after the failure there is nothing to ask");
    }
}
