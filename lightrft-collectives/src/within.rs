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

/// The methods of a communicator around another that pass on what they are asked, as it is.
macro_rules! forward {
    ($this:ident => $inner:expr; $($method:ident),+) => {
        $(forward!(@$method $this $inner);)+
    };
    (@name $this:ident $inner:expr) => {
        fn name(&$this) -> &str {
            $inner.name()
        }
    };
    (@rank $this:ident $inner:expr) => {
        fn rank(&$this) -> usize {
            $inner.rank()
        }
    };
    (@ranks $this:ident $inner:expr) => {
        fn ranks(&$this) -> &[usize] {
            $inner.ranks()
        }
    };
    (@world_size $this:ident $inner:expr) => {
        fn world_size(&$this) -> usize {
            $inner.world_size()
        }
    };
    (@run_within $this:ident $inner:expr) => {
        fn run_within(&$this, operation: Operation<'_>, timeout: Option<Duration>) -> Result<()> {
            $inner.run_within(operation, timeout)
        }
    };
    (@alloc_bytes $this:ident $inner:expr) => {
        fn alloc_bytes(&$this, len: usize) -> Result<GroupMemory> {
            $inner.alloc_bytes(len)
        }
    };
    (@subgroup_with $this:ident $inner:expr) => {
        fn subgroup_with(
            &$this,
            ranks: &[usize],
            options: &GroupOptions,
        ) -> Result<Option<Arc<dyn Communicator>>> {
            $inner.subgroup_with(ranks, options)
        }
    };
    (@rebuild $this:ident $inner:expr) => {
        fn rebuild(&$this, timeout: Duration) -> Result<Arc<dyn Communicator>> {
            $inner.rebuild(timeout)
        }
    };
    (@failure $this:ident $inner:expr) => {
        fn failure(&$this, call: Call) -> Option<Error> {
            $inner.failure(call)
        }
    };
    (@poison $this:ident $inner:expr) => {
        fn poison(&$this, error: &Error) {
            $inner.poison(error);
        }
    };
    (@beside $this:ident $inner:expr) => {
        fn beside(&$this, line: u64, name: &str) -> Option<Beside> {
            $inner.beside(line, name)
        }
    };
}
pub(crate) use forward;

impl<C: Communicator> Communicator for Within<C> {
    forward!(self => self.comm; name, rank, ranks, world_size, alloc_bytes, subgroup_with, rebuild, failure, poison, beside);

    fn run_within(&self, operation: Operation<'_>, timeout: Option<Duration>) -> Result<()> {
        self.comm.run_within(operation, timeout.or(Some(self.timeout)))
    }
}

impl<C: Communicator + ?Sized> Communicator for &C {
    forward!(self => (**self); name, rank, ranks, world_size, run_within, alloc_bytes, subgroup_with, rebuild, failure, poison, beside);
}

impl<C: Communicator + ?Sized> Communicator for Arc<C> {
    forward!(self => (**self); name, rank, ranks, world_size, run_within, alloc_bytes, subgroup_with, rebuild, failure, poison, beside);
}
