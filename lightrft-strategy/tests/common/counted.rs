//! A group that writes down what is sent over it and over the groups that are made of it.
#![allow(dead_code, clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use lightrft_collectives::testing::Intercepted;
use lightrft_collectives::{Communicator, Dtype, Elements as _, Operation};

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

impl Call {
    fn of(operation: &Operation<'_>, ranks: usize) -> Option<Self> {
        let (sent, dtype) = match operation {
            Operation::AllGather { input, .. } => (Sent::AllGather, input.dtype()),
            Operation::AllGatherInPlace { data } => (Sent::AllGather, data.dtype()),
            Operation::ReduceScatter { input, .. } => (Sent::ReduceScatter, input.dtype()),
            Operation::ReduceScatterInPlace { data, .. } => (Sent::ReduceScatter, data.dtype()),
            Operation::AllGatherV { input, .. } => (Sent::AllGather, input.dtype()),
            Operation::AllReduce { data, .. } => (Sent::AllReduce, data.dtype()),
            Operation::AllReduceInto { input, .. } => (Sent::AllReduce, input.dtype()),
            _ => return None,
        };
        matches!(dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16).then_some(Self { sent, dtype, ranks })
    }
}

/// A group, and the calls on it.
pub(crate) struct Counted {
    /// To be used in the place of the group.
    pub(crate) comm: Arc<dyn Communicator>,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Counted {
    pub(crate) fn new(inner: Arc<dyn Communicator>) -> Self {
        let calls = Arc::<Mutex<Vec<Call>>>::default();
        let list = Arc::clone(&calls);
        let comm = Intercepted::new(inner, move |comm, operation, timeout| {
            list.lock().unwrap().extend(Call::of(&operation, comm.world_size()));
            comm.run_within(operation, timeout)
        });
        Self { comm: Arc::new(comm), calls }
    }

    /// What was sent since the last call.
    pub(crate) fn take(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}
