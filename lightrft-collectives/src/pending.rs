//! The handle of a call that has been given to a [`Queue`](crate::Queue) and may not have ended yet

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// The result of a call that is under way: wait for it, or await it. It needs no runtime.
///
/// The call owns its buffers until it ends; they come back as the result. Dropping the handle neither cancels the
/// call, which the other ranks need, nor waits for it.
#[derive(Debug)]
#[must_use = "a call's failure is seen by who waits for it"]
pub struct Pending<T> {
    cell: Arc<Cell<T>>,
}

#[derive(Debug)]
struct Cell<T> {
    progress: Mutex<Progress<T>>,
    ended: Condvar,
}

#[derive(Debug)]
enum Progress<T> {
    Running(Option<Waker>),
    Ended(Result<T>),
    Taken,
}

impl<T> Cell<T> {
    fn lock(&self) -> MutexGuard<'_, Progress<T>> {
        // No caller's code runs under this lock, so a poisoned one still guards whole data.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, result: Result<T>) {
        let before = std::mem::replace(&mut *self.lock(), Progress::Ended(result));
        self.ended.notify_all();
        if let Progress::Running(Some(waker)) = before {
            waker.wake();
        }
    }
}

impl<T> Progress<T> {
    /// The result, if the call has ended; it is there once.
    fn take(&mut self) -> Option<Result<T>> {
        match std::mem::replace(self, Progress::Taken) {
            Progress::Ended(result) => Some(result),
            Progress::Taken => Some(Err(Error::Taken)),
            running => {
                *self = running;
                None
            }
        }
    }
}

impl<T> Pending<T> {
    /// A handle, and the other end, which gives it its result.
    pub(crate) fn new(rank: usize) -> (Self, Completer<T>) {
        let cell = Arc::new(Cell { progress: Mutex::new(Progress::Running(None)), ended: Condvar::new() });
        (Pending { cell: cell.clone() }, Completer { cell: Some(cell), rank })
    }

    /// Whether the call has ended, well or not.
    pub fn is_done(&self) -> bool {
        !matches!(*self.cell.lock(), Progress::Running(_))
    }

    /// Waits for the call to end, which it does at its deadline at the latest.
    ///
    /// # Errors
    /// Those of the call.
    pub fn wait(self) -> Result<T> {
        let mut progress = self.cell.lock();
        loop {
            if let Some(result) = progress.take() {
                return result;
            }
            progress = self.cell.ended.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits at most `timeout`; gives the handle back, as the error, if the call has not ended by then. The call goes on.
    ///
    /// # Errors
    /// The outer one is this handle, the inner one the call's.
    pub fn wait_within(self, timeout: Duration) -> std::result::Result<Result<T>, Self> {
        let begin = Instant::now();
        let mut progress = self.cell.lock();
        loop {
            if let Some(result) = progress.take() {
                return Ok(result);
            }
            let rest = timeout.saturating_sub(begin.elapsed());
            if rest.is_zero() {
                drop(progress);
                return Err(self);
            }
            progress = self.cell.ended.wait_timeout(progress, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl<T> Future for Pending<T> {
    type Output = Result<T>;

    /// Ready with the call's result, once; polled again after that, [`Error::Taken`].
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<T>> {
        let mut progress = self.cell.lock();
        if let Some(result) = progress.take() {
            return Poll::Ready(result);
        }
        *progress = Progress::Running(Some(context.waker().clone()));
        Poll::Pending
    }
}

/// Gives a [`Pending`] its result, an error if nothing better comes before it is dropped.
#[derive(Debug)]
pub(crate) struct Completer<T> {
    cell: Option<Arc<Cell<T>>>,
    rank: usize,
}

impl<T> Completer<T> {
    pub(crate) fn end(mut self, result: Result<T>) {
        if let Some(cell) = self.cell.take() {
            cell.end(result);
        }
    }
}

impl<T> Drop for Completer<T> {
    fn drop(&mut self) {
        if let Some(cell) = self.cell.take() {
            let message = "the thread of its queue ended".into();
            cell.end(Err(Error::Panicked { rank: self.rank, message }));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_future_is_woken_once_and_ready_once() {
        let count = Arc::new(Count::default());
        let waker = Waker::from(count.clone());
        let mut context = Context::from_waker(&waker);
        let (mut pending, completer) = Pending::new(0);
        for _ in 0..2 {
            assert!(Pin::new(&mut pending).poll(&mut context).is_pending());
        }
        assert!(!pending.is_done());
        completer.end(Ok(7));
        assert!(pending.is_done());
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(matches!(Pin::new(&mut pending).poll(&mut context), Poll::Ready(Ok(7))));
        assert!(matches!(Pin::new(&mut pending).poll(&mut context), Poll::Ready(Err(Error::Taken))));
    }

    #[test]
    fn a_handle_comes_back_from_a_wait_that_was_too_short() {
        let (pending, completer) = Pending::new(0);
        let pending = pending.wait_within(Duration::from_millis(1)).unwrap_err();
        completer.end(Ok(3));
        assert!(matches!(pending.wait_within(Duration::ZERO), Ok(Ok(3))));
    }

    #[test]
    fn a_call_that_was_never_made_is_an_error_and_no_hang() {
        let (pending, completer) = Pending::<()>::new(5);
        drop(completer);
        assert!(matches!(pending.wait(), Err(Error::Panicked { rank: 5, .. })));
    }

    #[test]
    fn a_dropped_handle_leaves_no_buffer_behind() {
        let buffer = Arc::new(());
        let (pending, completer) = Pending::new(0);
        drop(pending);
        completer.end(Ok(buffer.clone()));
        assert_eq!(Arc::strong_count(&buffer), 1);
        let (pending, completer) = Pending::new(0);
        completer.end(Ok(buffer.clone()));
        drop(pending);
        assert_eq!(Arc::strong_count(&buffer), 1);
    }
}
