//! A group that writes down what is asked of it and of the groups that are made of it.
#![allow(dead_code, unreachable_pub)]

use std::sync::{Arc, Mutex};

use lightrft_collectives::testing::Intercepted;
use lightrft_collectives::{Communicator, Dtype, Elements as _, Operation};

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

impl Call {
    fn of(operation: &Operation<'_>, ranks: usize) -> Self {
        let (op, elems, dtype) = match operation {
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
        Self { op, elems, dtype, ranks }
    }
}

/// A group, and the calls on it.
#[derive(Clone, Debug)]
pub struct Counted {
    /// To be used in the place of the group.
    pub comm: Arc<dyn Communicator>,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Counted {
    pub fn new(inner: Arc<dyn Communicator>) -> Self {
        let calls = Arc::<Mutex<Vec<Call>>>::default();
        let list = Arc::clone(&calls);
        let comm = Intercepted::new(inner, move |comm, operation, timeout| {
            list.lock().unwrap().push(Call::of(&operation, comm.world_size()));
            comm.run_within(operation, timeout)
        });
        Self { comm: Arc::new(comm), calls }
    }

    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    /// Their names alone.
    pub fn take_ops(&self) -> Vec<&'static str> {
        self.take().iter().map(|call| call.op).collect()
    }
}
