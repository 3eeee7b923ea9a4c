//! A communicator whose calls are made by the test: counted, held back, or changed

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::communicator::{Communicator, GroupOptions};
use crate::error::{Error, Result};
use crate::host::Beside;
use crate::memory::GroupMemory;
use crate::operation::{Call, Operation};
use crate::within::forward;

type Make = dyn Fn(&dyn Communicator, Operation<'_>, Option<Duration>) -> Result<()> + Send + Sync;
type Ask = dyn Fn(Call) + Send + Sync;

/// A group, and all groups that are made of it, whose calls go through a function.
///
/// ```
/// use std::sync::Arc;
/// use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
/// use lightrft_collectives::{Communicator, CommunicatorExt, local::World, testing::Intercepted};
///
/// let calls = World::run(2, |comm| {
///     let calls = Arc::new(AtomicUsize::new(0));
///     let counted = calls.clone();
///     let comm = Intercepted::new(comm, move |comm, operation, timeout| {
///         counted.fetch_add(1, Relaxed);
///         comm.run_within(operation, timeout)
///     });
///     comm.barrier()?;
///     comm.subgroup(&[1, 0])?.expect("both are in it").barrier()?;
///     Ok(calls.load(Relaxed))
/// })?;
/// assert_eq!(calls, [2, 2]);
/// # Ok::<_, lightrft_collectives::Error>(())
/// ```
#[derive(Clone)]
pub struct Intercepted {
    comm: Arc<dyn Communicator>,
    make: Arc<Make>,
    ask: Arc<Ask>,
}

impl Intercepted {
    /// `comm`, with `make` in the place of [`run_within`](Communicator::run_within): it is given the group that was asked (this
    /// one, or one made of it), the call, and its deadline, and does with them what it likes.
    pub fn new(
        comm: Arc<dyn Communicator>,
        make: impl Fn(&dyn Communicator, Operation<'_>, Option<Duration>) -> Result<()> + Send + Sync + 'static,
    ) -> Self {
        Intercepted { comm, make: Arc::new(make), ask: Arc::new(|_| {}) }
    }

    /// Also tells `ask` before the group is asked for memory or for a group of its members, which are calls too.
    #[must_use]
    pub fn and_before_others(self, ask: impl Fn(Call) + Send + Sync + 'static) -> Self {
        Intercepted { ask: Arc::new(ask), ..self }
    }

    fn around(&self, comm: Arc<dyn Communicator>) -> Arc<dyn Communicator> {
        Arc::new(Intercepted { comm, ..self.clone() })
    }
}

impl fmt::Debug for Intercepted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.comm.fmt(f)
    }
}

impl Communicator for Intercepted {
    forward!(self => self.comm; name, rank, ranks, world_size, failure, poison, beside);

    fn run_within(&self, operation: Operation<'_>, timeout: Option<Duration>) -> Result<()> {
        (self.make)(&*self.comm, operation, timeout)
    }

    fn alloc_bytes(&self, len: usize) -> Result<GroupMemory> {
        (self.ask)(Call::Alloc);
        self.comm.alloc_bytes(len)
    }

    fn subgroup_with(
        &self,
        ranks: &[usize],
        options: &GroupOptions,
    ) -> Result<Option<Arc<dyn Communicator>>> {
        (self.ask)(Call::Subgroup);
        let made = self.comm.subgroup_with(ranks, options)?;
        Ok(made.map(|comm| self.around(comm)))
    }

    fn rebuild(&self, timeout: Duration) -> Result<Arc<dyn Communicator>> {
        Ok(self.around(self.comm.rebuild(timeout)?))
    }
}
