//! A communicator on device memory seen as one on the host: the suite's slices go there and come back around each call

use std::cell::RefCell;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::buffer::{Buffer, BufferMut, Host, HostMut};
use crate::communicator::{Communicator, GroupOptions};
use crate::error::{Error, Result};
use crate::op::BLOCK;
use crate::operation::{Call, Operation};
use crate::within::forward;

/// The memory of a device, as a test needs it.
pub trait Memory: fmt::Debug + Send + Sync {
    /// Copies elements to the device.
    ///
    /// # Errors
    /// The device's.
    fn upload(&self, data: Host<'_>) -> Result<Box<dyn Block>>;
}

/// Elements on a device.
pub trait Block {
    /// The elements as a call reads them.
    fn buffer(&self) -> Buffer<'_>;
    /// The elements as a call writes them.
    fn buffer_mut(&mut self) -> BufferMut<'_>;
    /// Waits for the calls on them and copies them to the host.
    ///
    /// # Errors
    /// The device's.
    fn download(&self, to: HostMut<'_>) -> Result<()>;
}

/// A communicator whose calls on host memory are made on a device's: each slice is copied there, the call is made, and what it
/// writes is copied back. Barriers stay on the host, as do the blocks that calls made of several begin with.
#[derive(Debug)]
pub struct OnDevice {
    comm: Arc<dyn Communicator>,
    memory: Arc<dyn Memory>,
}

impl OnDevice {
    /// `comm` with calls on `memory`.
    pub fn new(comm: Arc<dyn Communicator>, memory: Arc<dyn Memory>) -> Self {
        OnDevice { comm, memory }
    }
}

impl Communicator for OnDevice {
    forward!(self => self.comm; name, rank, ranks, failure, poison);

    fn run_within(&self, operation: Operation<'_>, timeout: Option<Duration>) -> Result<()> {
        let call = operation.call();
        if operation.signature(self.world_size()).dtype == Some(BLOCK) {
            return self.comm.run_within(operation, timeout);
        }
        let twice = || Error::Place { call, got: "one of several", expected: "the only one of its kind" };
        let (mut input, mut output) = (None, None);
        {
            // A call reads one buffer and writes one, at most.
            let (read, written) = (RefCell::new(Some(&mut input)), RefCell::new(Some(&mut output)));
            let operation = operation.on_host()?.map(
                |host: Host<'_>| {
                    let block = read.take().ok_or_else(twice)?.insert(self.memory.upload(host)?);
                    Ok(block.buffer())
                },
                |host: HostMut<'_>| {
                    let block = self.memory.upload(Host::from_bytes(host.dtype(), host.bytes())?)?;
                    let (_, block) = written.take().ok_or_else(twice)?.insert((host, block));
                    Ok(block.buffer_mut())
                },
            )?;
            self.comm.run_within(operation, timeout)?;
        }
        if let Some((host, block)) = output {
            block.download(host)?;
        }
        // What has failed on the device shows only now.
        self.comm.failure(call).map_or(Ok(()), Err)
    }

    fn subgroup_with(
        &self,
        ranks: &[usize],
        options: &GroupOptions,
    ) -> Result<Option<Arc<dyn Communicator>>> {
        let group = self.comm.subgroup_with(ranks, options)?;
        Ok(group
            .map(|comm| Arc::new(OnDevice { comm, memory: self.memory.clone() }) as Arc<dyn Communicator>))
    }

    fn rebuild(&self, timeout: Duration) -> Result<Arc<dyn Communicator>> {
        let comm = self.comm.rebuild(timeout)?;
        Ok(Arc::new(OnDevice { comm, memory: self.memory.clone() }))
    }
}

#[cfg(feature = "nccl")]
mod nccl {
    use super::*;
    use crate::nccl::{DeviceMemory, Stream};

    /// How long a test waits for a stream.
    const LIMIT: Duration = Duration::from_secs(60);

    impl Memory for Stream {
        fn upload(&self, data: Host<'_>) -> Result<Box<dyn Block>> {
            Ok(Box::new(DeviceMemory::copy_from(self, data)?))
        }
    }

    impl Block for DeviceMemory {
        fn buffer(&self) -> Buffer<'_> {
            self.as_buffer()
        }

        fn buffer_mut(&mut self) -> BufferMut<'_> {
            self.as_buffer_mut()
        }

        fn download(&self, to: HostMut<'_>) -> Result<()> {
            self.copy_to(to, LIMIT)
        }
    }
}
