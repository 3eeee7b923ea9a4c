//! Full-size buffers: handed out, counted while they live, and reused.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::{bf16, f16};

use crate::precision::{Precision, UnitValues};

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

/// A whole unit in f32: its values, and the lease that counts their bytes.
///
/// The values are an owned `Vec`, so that a tensor library can take them without a copy
/// ([`into_parts`](Self::into_parts)); the lease then lives as long as the tensor does.
#[derive(Debug)]
pub struct FullUnit {
    values: Vec<f32>,
    lease: Lease,
}

impl FullUnit {
    pub(crate) fn new(whole: Whole) -> Self {
        Self { values: whole.values.into_f32(), lease: whole.lease }
    }

    /// The unit's values, padding at the end; parameters lie where [`FlatParam::range`](crate::FlatParam::range) says.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The values and their lease, to be held apart.
    pub fn into_parts(self) -> (Vec<f32>, Lease) {
        (self.values, self.lease)
    }
}

/// A full-size buffer of any precision, with the lease that counts it.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) values: UnitValues,
    pub(crate) lease: Lease,
}

/// Buffers that were given back and wait for their next use.
#[derive(Debug)]
pub(crate) struct Pool {
    meter: Arc<Meter>,
    /// Buffers of each type that are kept.
    most: usize,
    f32: Idle<f32>,
    bf16: Idle<bf16>,
    f16: Idle<f16>,
}

/// The idle buffers of one type.
#[derive(Debug)]
struct Idle<T>(Vec<(Vec<T>, Lease)>);

impl<T> Default for Idle<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy + Default> Idle<T> {
    /// `elems` elements of any value.
    fn take(&mut self, elems: usize) -> Vec<T> {
        match self.pop(elems) {
            Some(mut values) => {
                values.resize(elems, T::default());
                values
            }
            None => vec![T::default(); elems],
        }
    }

    /// `elems` zeros. A fresh buffer comes zeroed from the allocator, which costs nothing until touched.
    fn take_zeroed(&mut self, elems: usize) -> Vec<T> {
        match self.pop(elems) {
            Some(mut values) => {
                values.clear();
                values.resize(elems, T::default());
                values
            }
            None => vec![T::default(); elems],
        }
    }

    /// The smallest idle buffer that holds `elems` elements; idle buffers that are all too small are dropped, since
    /// the run has moved on to larger units.
    fn pop(&mut self, elems: usize) -> Option<Vec<T>> {
        if elems == 0 {
            return None;
        }
        let fits = self.0.iter().enumerate().filter(|(_, (values, _))| values.capacity() >= elems);
        let best = fits.min_by_key(|(_, (values, _))| values.capacity()).map(|(index, _)| index);
        match best {
            Some(index) => Some(self.0.swap_remove(index).0),
            None => {
                self.0 = Vec::new();
                None
            }
        }
    }

    fn put(&mut self, values: Vec<T>, most: usize, meter: &Arc<Meter>) {
        if self.0.len() < most && values.capacity() > 0 {
            let lease = meter.lease(values.capacity() * size_of::<T>());
            self.0.push((values, lease));
        }
    }
}

impl Pool {
    /// Keeps at most so many buffers of each type: those that are in use at once.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            meter: Arc::default(),
            most,
            f32: Idle::default(),
            bf16: Idle::default(),
            f16: Idle::default(),
        }
    }

    pub(crate) fn meter(&self) -> &Arc<Meter> {
        &self.meter
    }

    /// A buffer of `elems` elements with unspecified (initialised) contents.
    pub(crate) fn take(&mut self, precision: Precision, elems: usize) -> Whole {
        let values = match precision {
            Precision::F32 => UnitValues::F32(self.f32.take(elems)),
            Precision::Bf16 => UnitValues::Bf16(self.bf16.take(elems)),
            Precision::F16 => UnitValues::F16(self.f16.take(elems)),
        };
        self.whole(values)
    }

    /// A buffer of `elems` f32 zeros.
    pub(crate) fn take_zeroed(&mut self, elems: usize) -> Whole {
        let values = UnitValues::F32(self.f32.take_zeroed(elems));
        self.whole(values)
    }

    /// Counts a buffer that came from elsewhere.
    pub(crate) fn whole(&self, values: UnitValues) -> Whole {
        let lease = self.meter.lease(values.capacity_bytes());
        Whole { values, lease }
    }

    pub(crate) fn put(&mut self, values: UnitValues) {
        match values {
            UnitValues::F32(values) => self.f32.put(values, self.most, &self.meter),
            UnitValues::Bf16(values) => self.bf16.put(values, self.most, &self.meter),
            UnitValues::F16(values) => self.f16.put(values, self.most, &self.meter),
        }
    }

    pub(crate) fn put_whole(&mut self, whole: Whole) {
        let Whole { values, lease } = whole;
        drop(lease);
        self.put(values);
    }

    /// Frees all, and says how many bytes.
    pub(crate) fn clear(&mut self) -> usize {
        let before = self.meter.read().now;
        (self.f32, self.bf16, self.f16) = Default::default();
        before - self.meter.read().now
    }
}
