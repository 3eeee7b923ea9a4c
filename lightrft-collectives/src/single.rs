//! A group of one rank: every call is a local copy, or nothing at all

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::communicator::{Communicator, GroupOptions};
use crate::error::Result;
use crate::group::check_members;
use crate::operation::Operation;

/// A group of one rank. Nothing is sent, nothing can be lost.
#[derive(Debug)]
pub struct Single {
    name: String,
    ranks: [usize; 1],
    groups: AtomicUsize,
}

impl Single {
    /// The world of a program that runs alone.
    pub fn world() -> Arc<dyn Communicator> {
        Single::group("world".into(), 0)
    }

    /// A group of one rank of a larger world.
    pub(crate) fn group(name: String, world_rank: usize) -> Arc<dyn Communicator> {
        Arc::new(Single { name, ranks: [world_rank], groups: AtomicUsize::new(0) })
    }
}

impl Communicator for Single {
    fn name(&self) -> &str {
        &self.name
    }

    fn rank(&self) -> usize {
        0
    }

    fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    fn run_within(&self, operation: Operation<'_>, _: Option<Duration>) -> Result<()> {
        operation.check(0, 1, &self.name)?;
        match operation.on_host()? {
            Operation::AllReduceInto { input, mut output, .. }
            | Operation::AllGather { input, mut output }
            | Operation::AllGatherV { input, mut output, .. }
            | Operation::ReduceScatter { input, mut output, .. }
            | Operation::Gather { input, mut output, .. }
            | Operation::Scatter { input, mut output, .. }
            | Operation::AllToAll { input, mut output }
            | Operation::AllToAllV { input, mut output, .. } => {
                output.bytes_mut().copy_from_slice(input.bytes())
            }
            Operation::AllReduce { .. }
            | Operation::ReduceScatterInPlace { .. }
            | Operation::AllGatherInPlace { .. }
            | Operation::Broadcast { .. }
            | Operation::Reduce { .. }
            | Operation::Barrier => {}
            // A group of one has no peer: `check` has refused these.
            Operation::Send { .. } | Operation::Recv { .. } => {}
        }
        Ok(())
    }

    fn subgroup_with(&self, ranks: &[usize], _: &GroupOptions) -> Result<Option<Arc<dyn Communicator>>> {
        check_members(self, ranks)?;
        let index = self.groups.fetch_add(1, Ordering::Relaxed);
        Ok(Some(Single::group(format!("{}/{index}", self.name), self.ranks[0])))
    }
}
