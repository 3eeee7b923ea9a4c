//! Full-size buffers: handed out, counted while they live, and reused.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::Result;
use crate::host::HostMemory;
use crate::memory::{Memory, Values as _};
use crate::precision::Precision;

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

/// A whole unit or a whole gradient: its values, and the lease that counts their bytes.
///
/// On the host the values are an owned `Vec` of f32, so that a tensor library can take them without a copy
/// ([`into_parts`](Self::into_parts)); the lease then lives as long as the tensor does.
#[derive(Debug)]
pub struct FullUnit<Mem: Memory = HostMemory> {
    pub(crate) whole: Whole<Mem>,
}

impl<Mem: Memory> FullUnit<Mem> {
    pub(crate) fn new(whole: Whole<Mem>) -> Self {
        Self { whole }
    }
}

impl FullUnit {
    /// The unit's values, padding at the end; parameters lie where [`FlatParam::range`](crate::FlatParam::range) says.
    pub fn values(&self) -> &[f32] {
        self.whole.values.f32()
    }

    /// The values and their lease, to be held apart.
    pub fn into_parts(self) -> (Vec<f32>, Lease) {
        (self.whole.values.into_f32(), self.whole.lease)
    }
}

/// A full-size buffer of any precision, with the lease that counts it.
#[derive(Debug)]
pub(crate) struct Whole<Mem: Memory = HostMemory> {
    pub(crate) values: Mem::Values,
    pub(crate) lease: Lease,
}

/// Buffers that were given back and wait for their next use.
#[derive(Debug)]
pub(crate) struct Pool<Mem: Memory> {
    memory: Mem,
    meter: Arc<Meter>,
    /// Buffers of each type that are kept.
    most: usize,
    idle: Vec<Whole<Mem>>,
}

impl<Mem: Memory> Pool<Mem> {
    /// Keeps at most so many buffers of each type: those that are in use at once.
    pub(crate) fn new(memory: Mem, most: usize) -> Self {
        Self { memory, meter: Arc::default(), most, idle: Vec::new() }
    }

    pub(crate) fn meter(&self) -> &Arc<Meter> {
        &self.meter
    }

    /// A buffer of `elems` elements with unspecified contents.
    pub(crate) fn take(&mut self, precision: Precision, elems: usize) -> Result<Whole<Mem>> {
        let values = match self.pop(precision, elems) {
            Some(values) => values,
            None => self.memory.unset(precision, elems)?,
        };
        Ok(self.whole(values))
    }

    /// A buffer of `elems` f32 zeros. A fresh one on the host comes zeroed from the allocator, which costs nothing until
    /// touched.
    pub(crate) fn take_zeroed(&mut self, elems: usize) -> Result<Whole<Mem>> {
        let values = match self.pop(Precision::F32, elems) {
            Some(mut values) => {
                self.memory.zero(&mut values, 0..elems)?;
                values
            }
            None => self.memory.zeros(Precision::F32, elems)?,
        };
        Ok(self.whole(values))
    }

    /// The smallest idle buffer that holds `elems` elements, made as long; idle buffers of the type that are all too small
    /// are dropped, since the run has moved on to larger units.
    fn pop(&mut self, precision: Precision, elems: usize) -> Option<Mem::Values> {
        if elems == 0 {
            return None;
        }
        let of_type = |values: &Mem::Values| values.precision() == precision;
        let fits =
            |values: &Mem::Values| of_type(values) && values.capacity_bytes() >= elems * precision.bytes();
        let fitting = self.idle.iter().enumerate().filter(|(_, whole)| fits(&whole.values));
        let best = fitting.min_by_key(|(_, whole)| whole.values.capacity_bytes()).map(|(index, _)| index);
        match best {
            Some(index) => {
                let mut values = self.idle.swap_remove(index).values;
                values.resize(elems);
                Some(values)
            }
            None => {
                self.idle.retain(|whole| !of_type(&whole.values));
                None
            }
        }
    }

    /// Counts a buffer that came from elsewhere.
    pub(crate) fn whole(&self, values: Mem::Values) -> Whole<Mem> {
        let lease = self.meter.lease(values.capacity_bytes());
        Whole { values, lease }
    }

    pub(crate) fn put(&mut self, values: Mem::Values) {
        let of_type = self.idle.iter().filter(|idle| idle.values.precision() == values.precision()).count();
        if of_type < self.most && values.capacity_bytes() > 0 {
            let whole = self.whole(values);
            self.idle.push(whole);
        }
    }

    pub(crate) fn put_whole(&mut self, whole: Whole<Mem>) {
        let Whole { values, lease } = whole;
        drop(lease);
        self.put(values);
    }

    /// Frees all, and says how many bytes.
    pub(crate) fn clear(&mut self) -> usize {
        let before = self.meter.read().now;
        self.idle = Vec::new();
        before - self.meter.read().now
    }
}
