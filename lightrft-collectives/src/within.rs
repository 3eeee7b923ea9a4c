//! Communicators around others: references to them, and one with a deadline of its own

use std::sync::Arc;
use std::time::Duration;

use crate::communicator::{Communicator, GroupOptions};
use crate::error::{Error, Result};
use crate::host::Beside;
use crate::memory::GroupMemory;
use crate::operation::{Call, Operation};

/// The same group with another deadline for each call; see [`CommunicatorExt::within`](crate::CommunicatorExt::within).
///
/// Making a subgroup or a heap keeps the group's own deadline; a subgroup has the one of its options.
#[derive(Clone, Debug)]
pub struct Within<C> {
    comm: C,
    timeout: Duration,
}

impl<C: Communicator> Within<C> {
    /// `comm` with `timeout` as the deadline of each call that does not have one.
    pub fn new(comm: C, timeout: Duration) -> Self {
        Within { comm, timeout }
    }
}

/// What every wrapper passes on as it is.
macro_rules! forward {
    ($this:ident => $inner:expr) => {
        fn name(&$this) -> &str {
            $inner.name()
        }

        fn rank(&$this) -> usize {
            $inner.rank()
        }

        fn ranks(&$this) -> &[usize] {
            $inner.ranks()
        }

        fn world_size(&$this) -> usize {
            $inner.world_size()
        }

        fn alloc_bytes(&$this, len: usize) -> Result<GroupMemory> {
            $inner.alloc_bytes(len)
        }

        fn subgroup_with(
            &$this,
            ranks: &[usize],
            options: &GroupOptions,
        ) -> Result<Option<Arc<dyn Communicator>>> {
            $inner.subgroup_with(ranks, options)
        }

        fn rebuild(&$this, timeout: Duration) -> Result<Arc<dyn Communicator>> {
            $inner.rebuild(timeout)
        }

        fn failure(&$this, call: Call) -> Option<Error> {
            $inner.failure(call)
        }

        fn poison(&$this, error: &Error) {
            $inner.poison(error);
        }

        fn beside(&$this, line: u64, name: &str) -> Option<Beside> {
            $inner.beside(line, name)
        }
    };
}

impl<C: Communicator> Communicator for Within<C> {
    forward!(self => self.comm);

    fn run_within(&self, operation: Operation<'_>, timeout: Option<Duration>) -> Result<()> {
        self.comm.run_within(operation, timeout.or(Some(self.timeout)))
    }
}

impl<C: Communicator + ?Sized> Communicator for &C {
    forward!(self => (**self));

    fn run_within(&self, operation: Operation<'_>, timeout: Option<Duration>) -> Result<()> {
        (**self).run_within(operation, timeout)
    }
}

impl<C: Communicator + ?Sized> Communicator for Arc<C> {
    forward!(self => (**self));

    fn run_within(&self, operation: Operation<'_>, timeout: Option<Duration>) -> Result<()> {
        (**self).run_within(operation, timeout)
    }
}
