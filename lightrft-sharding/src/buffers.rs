//! Full-size buffers: handed out, counted while they live, and reused.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of whole units and whole gradients, which live only while they are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransientBytes {
    /// Bytes held at this moment, buffers kept for reuse included.
    pub now: usize,
    /// The most that were held at once since the count began or was [reset](crate::ShardedUnits::reset_peak).
    pub peak: usize,
}

/// Counts bytes; shared by everything that holds some.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    now: AtomicUsize,
    peak: AtomicUsize,
}

impl Meter {
    fn add(&self, bytes: usize) {
        let now = self.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(now, Ordering::Relaxed);
    }

    fn subtract(&self, bytes: usize) {
        self.now.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> TransientBytes {
        TransientBytes { now: self.now.load(Ordering::Relaxed), peak: self.peak.load(Ordering::Relaxed) }
    }

    pub(crate) fn reset_peak(&self) {
        self.peak.store(self.now.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Counts `bytes` until the lease is dropped.
    pub(crate) fn lease(self: &Arc<Self>, bytes: usize) -> Lease {
        self.add(bytes);
        Lease { meter: Arc::clone(self), bytes }
    }
}

/// Stands for the bytes of a buffer that was handed out; they count as transient until this is dropped.
#[derive(Debug)]
pub struct Lease {
    meter: Arc<Meter>,
    bytes: usize,
}

impl Lease {
    /// The bytes it stands for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.meter.subtract(self.bytes);
    }
}

/// A whole unit: its values, and the lease that counts their bytes.
///
/// The values are an owned `Vec`, so that a tensor library can take them without a copy
/// ([`into_parts`](Self::into_parts)); the lease then lives as long as the tensor does.
#[derive(Debug)]
pub struct FullUnit {
    values: Vec<f32>,
    lease: Lease,
}

impl FullUnit {
    pub(crate) fn new(values: Vec<f32>, meter: &Arc<Meter>) -> Self {
        let lease = meter.lease(size_of_val(values.as_slice()));
        Self { values, lease }
    }

    /// The unit's values, padding at the end; parameters lie where [`FlatParam::range`](crate::FlatParam::range) says.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    pub(crate) fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// The values and their lease, to be held apart.
    pub fn into_parts(self) -> (Vec<f32>, Lease) {
        (self.values, self.lease)
    }
}

/// Buffers that were given back and wait for their next use.
#[derive(Debug)]
pub(crate) struct Pool {
    idle: Vec<(Vec<f32>, Lease)>,
    meter: Arc<Meter>,
}

/// A gathered unit and a gradient: what one stage holds at a time.
const MAX_IDLE: usize = 2;

impl Pool {
    pub(crate) fn new(meter: Arc<Meter>) -> Self {
        Self { idle: Vec::new(), meter }
    }

    /// A buffer of `elems` elements with unspecified (initialised) contents.
    pub(crate) fn take(&mut self, elems: usize) -> Vec<f32> {
        match self.pop(elems) {
            Some(mut values) => {
                values.resize(elems, 0.0);
                values
            }
            None => vec![0.0; elems],
        }
    }

    /// A buffer of `elems` zeros. A fresh one comes zeroed from the allocator, which costs nothing until touched.
    pub(crate) fn take_zeroed(&mut self, elems: usize) -> Vec<f32> {
        match self.pop(elems) {
            Some(mut values) => {
                values.clear();
                values.resize(elems, 0.0);
                values
            }
            None => vec![0.0; elems],
        }
    }

    /// The smallest idle buffer that holds `elems` elements; idle buffers that are all too small are dropped, since
    /// the run has moved on to larger units.
    fn pop(&mut self, elems: usize) -> Option<Vec<f32>> {
        let fits = self.idle.iter().enumerate().filter(|(_, (values, _))| values.capacity() >= elems);
        let best = fits.min_by_key(|(_, (values, _))| values.capacity()).map(|(index, _)| index);
        match best {
            Some(index) => Some(self.idle.swap_remove(index).0),
            None => {
                self.idle.clear();
                None
            }
        }
    }

    pub(crate) fn put(&mut self, values: Vec<f32>) {
        if self.idle.len() < MAX_IDLE && values.capacity() > 0 {
            let lease = self.meter.lease(values.capacity() * size_of::<f32>());
            self.idle.push((values, lease));
        }
    }

    pub(crate) fn clear(&mut self) {
        self.idle = Vec::new();
    }
}
