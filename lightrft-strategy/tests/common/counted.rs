//! A group that writes down what is sent over it and over the groups that are made of it.
#![allow(dead_code, clippy::unwrap_used)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lightrft_collectives::{
    Communicator, Dtype, Elements as _, GroupOptions, Operation, Result as GroupResult,
};

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Sent {
    AllGather,
    ReduceScatter,
    AllReduce,
}

/// One collective of floating-point numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Call {
    pub(crate) sent: Sent,
    pub(crate) dtype: Dtype,
    /// Ranks of the group.
    pub(crate) ranks: usize,
}

#[derive(Debug)]
pub(crate) struct Counted {
    inner: Arc<dyn Communicator>,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Counted {
    pub(crate) fn new(inner: Arc<dyn Communicator>) -> Arc<Self> {
        Arc::new(Self { inner, calls: Arc::default() })
    }

    /// What was sent since the last call.
    pub(crate) fn take(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl Communicator for Counted {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn ranks(&self) -> &[usize] {
        self.inner.ranks()
    }

    fn run_within(&self, operation: Operation<'_>, timeout: Option<Duration>) -> GroupResult<()> {
        let sent = match &operation {
            Operation::AllGather { input, .. } => Some((Sent::AllGather, input.dtype())),
            Operation::AllGatherInPlace { data } => Some((Sent::AllGather, data.dtype())),
            Operation::ReduceScatter { input, .. } => Some((Sent::ReduceScatter, input.dtype())),
            Operation::ReduceScatterInPlace { data, .. } => Some((Sent::ReduceScatter, data.dtype())),
            Operation::AllReduce { data, .. } => Some((Sent::AllReduce, data.dtype())),
            _ => None,
        };
        if let Some((sent, dtype @ (Dtype::F32 | Dtype::BF16 | Dtype::F16))) = sent {
            let ranks = self.inner.world_size();
            self.calls.lock().unwrap().push(Call { sent, dtype, ranks });
        }
        self.inner.run_within(operation, timeout)
    }

    fn subgroup_with(
        &self,
        ranks: &[usize],
        options: &GroupOptions,
    ) -> GroupResult<Option<Arc<dyn Communicator>>> {
        let group = self.inner.subgroup_with(ranks, options)?;
        let counted =
            |inner| Arc::new(Self { inner, calls: Arc::clone(&self.calls) }) as Arc<dyn Communicator>;
        Ok(group.map(counted))
    }
}
