//! A group that writes down what is asked of it and of the groups that are made of it.
#![allow(dead_code, unreachable_pub)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lightrft_collectives::{
    Communicator, Dtype, Elements as _, GroupOptions, Operation, Result as GroupResult,
};

/// One collective.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// `"gather"`, `"reduce"` (a reduce-scatter), `"all_reduce"` or `"other"`.
    pub op: &'static str,
    /// Elements that this rank gives.
    pub elems: usize,
    pub dtype: Dtype,
    /// Ranks of the group.
    pub ranks: usize,
}

#[derive(Debug)]
pub struct Counted {
    inner: Arc<dyn Communicator>,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Counted {
    pub fn new(inner: Arc<dyn Communicator>) -> Arc<Self> {
        Arc::new(Self { inner, calls: Arc::default() })
    }

    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    /// Their names alone.
    pub fn take_ops(&self) -> Vec<&'static str> {
        self.take().iter().map(|call| call.op).collect()
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
        let ranks = self.inner.world_size();
        let (op, elems, dtype) = match &operation {
            // The comparison of plans is of bytes.
            Operation::AllGather { input, .. } if input.dtype() != Dtype::U8 => {
                ("gather", input.count(), input.dtype())
            }
            Operation::AllGatherInPlace { data } => ("gather", data.count() / ranks, data.dtype()),
            Operation::ReduceScatter { input, .. } => ("reduce", input.count(), input.dtype()),
            Operation::ReduceScatterInPlace { data, .. } => ("reduce", data.count(), data.dtype()),
            Operation::AllReduce { data, .. } => ("all_reduce", data.count(), data.dtype()),
            _ => ("other", 0, Dtype::U8),
        };
        self.calls.lock().unwrap().push(Call { op, elems, dtype, ranks });
        self.inner.run_within(operation, timeout)
    }

    fn subgroup_with(
        &self,
        ranks: &[usize],
        options: &GroupOptions,
    ) -> GroupResult<Option<Arc<dyn Communicator>>> {
        let group = self.inner.subgroup_with(ranks, options)?;
        Ok(group
            .map(|inner| Arc::new(Self { inner, calls: Arc::clone(&self.calls) }) as Arc<dyn Communicator>))
    }
}
