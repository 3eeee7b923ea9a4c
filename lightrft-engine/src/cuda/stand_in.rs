//! A GPU for tests that have none: memory that a stand-in of a server finds by its handle.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use lightrft_collectives::Device;

use super::{Card, GpuMemory};
use crate::{Error, Result};

pub(crate) const UUID: [u8; 16] = [0xab; 16];

/// What lies in the GPU's memory, by handle.
pub(crate) type Shared = Arc<Mutex<BTreeMap<Vec<u8>, Vec<u8>>>>;

/// Memory that the server finds by its handle, as long as it lives, and that notes what becomes of it.
#[derive(Debug, Default)]
pub(crate) struct StandIn {
    pub(crate) shared: Shared,
    made: AtomicU8,
    /// What happened, in order, with the number of the buffer.
    pub(crate) log: Arc<Mutex<Vec<(&'static str, u8)>>>,
}

#[derive(Debug)]
struct Buffer {
    shared: Shared,
    log: Arc<Mutex<Vec<(&'static str, u8)>>>,
    number: u8,
    /// Not there for others before it has settled.
    pending: Vec<(usize, Vec<u8>)>,
    bytes: usize,
}

impl Card for StandIn {
    fn uuid(&self) -> [u8; 16] {
        UUID
    }

    fn allocate(&self, bytes: usize) -> Result<Box<dyn GpuMemory>> {
        let number = self.made.fetch_add(1, Ordering::SeqCst);
        let (shared, log) = (self.shared.clone(), self.log.clone());
        shared.lock().unwrap().insert(vec![number; 64], vec![0; bytes]);
        log.lock().unwrap().push(("made", number));
        Ok(Box::new(Buffer { shared, log, number, pending: Vec::new(), bytes }))
    }
}

impl GpuMemory for Buffer {
    fn uuid(&self) -> [u8; 16] {
        UUID
    }

    fn handle(&self) -> [u8; 64] {
        [self.number; 64]
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn upload(&mut self, at: usize, from: &[u8]) -> Result<()> {
        // What the last one was taken from is worth nothing from now on.
        if self.pending.is_empty() {
            self.shared.lock().unwrap().get_mut(&vec![self.number; 64]).unwrap().fill(0xee);
        }
        self.pending.push((at, from.to_vec()));
        Ok(())
    }

    fn copy(&mut self, _: usize, _: &Device<'_>) -> Result<()> {
        Err(Error::Source("there is no GPU".into()))
    }

    fn settle(&mut self) -> Result<()> {
        let mut shared = self.shared.lock().unwrap();
        let memory = shared.get_mut(&vec![self.number; 64]).unwrap();
        for (at, from) in self.pending.drain(..) {
            memory[at..at + from.len()].copy_from_slice(&from);
        }
        self.log.lock().unwrap().push(("settled", self.number));
        Ok(())
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.shared.lock().unwrap().remove(&vec![self.number; 64]);
        self.log.lock().unwrap().push(("freed", self.number));
    }
}
