//! One call on every replica at once, each on a thread of its own, with panics caught.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

use crate::{Error, Result, State};

/// Why a call of one replica came to nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// Its engine is gone, or panicked: what it holds can no longer be known.
    Died(Error),
    /// It goes on.
    Failed(Error),
}

impl Failure {
    /// The failure of a call after which the engine stands so, as far as that can be asked.
    pub(super) fn new(error: Error, state: Option<State>) -> Self {
        if error.is_death() || state == Some(State::Dead) {
            Failure::Died(error)
        } else {
            Failure::Failed(error)
        }
    }

    /// The error that names the replica.
    pub(super) fn of(self, replica: usize) -> Error {
        let (Failure::Died(error) | Failure::Failed(error)) = self;
        Error::Replica { replica, source: Box::new(error) }
    }
}

/// Runs `call`; a panic is the death of the engine that it was made on.
pub(super) fn caught<T>(
    operation: &'static str,
    call: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    // What a panic leaves half done belongs to an engine that nobody asks anything again.
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| {
        let source = format!("panicked: {}", message(panic.as_ref())).into();
        Err(Failure::Died(Error::Backend { engine: "data parallel", operation, source }))
    })
}

/// Runs `call` on every item at once. Results are in the order of the items.
pub(super) fn side_by_side<I: Send, T: Send>(
    operation: &'static str,
    items: Vec<I>,
    call: impl Fn(I) -> Result<T, Failure> + Sync,
) -> Vec<Result<T, Failure>> {
    let call = &call;
    if items.len() < 2 {
        return items.into_iter().map(|item| caught(operation, || call(item))).collect();
    }
    thread::scope(|scope| {
        let start = |item| spawn(scope, operation, move || caught(operation, || call(item)));
        let started: Vec<_> = items.into_iter().map(start).collect();
        let end = |thread: Result<thread::ScopedJoinHandle<'_, _>, Failure>| match thread?.join() {
            Ok(result) => result,
            Err(panic) => caught(operation, || std::panic::resume_unwind(panic)),
        };
        started.into_iter().map(end).collect()
    })
}

/// Starts a thread for one replica.
pub(super) fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    operation: &'static str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<thread::ScopedJoinHandle<'scope, T>, Failure> {
    thread::Builder::new().name("lightrft-replica".into()).spawn_scoped(scope, work).map_err(|source| {
        Failure::Failed(Error::Backend { engine: "data parallel", operation, source: Box::new(source) })
    })
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}
