//! A flat buffer in a GPU's memory, or for a while in pinned memory of the host
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fmt;
use std::ops::Range;

use lightrft_collectives::nccl::{DeviceMemory, Stream};
use lightrft_collectives::{Device, DeviceMut, Dtype, Error as CollectiveError, Result as GroupResult};

use super::kernels::Run;
use crate::memory::Values;
use crate::precision::Precision;

/// The values of a whole unit, or of a shard, in a GPU's memory.
///
/// It is used in the order of the [compute stream](super::Gpu::compute) of its [`Gpu`](super::Gpu), and freed or reused in
/// that order when it is dropped or given back: a model that uses it on other streams lets the compute stream wait for
/// them before.
#[derive(Debug)]
pub struct GpuValues {
    /// `None` while the values lie in pinned memory.
    memory: Option<DeviceMemory>,
    /// Where they lie while they are away. Kept when they have come back, since to pin memory takes far longer than to
    /// copy to it, and they will go again.
    pinned: Option<Pinned>,
    precision: Precision,
    /// Elements that count; the memory may have more.
    elems: usize,
    stream: Stream,
}

/// The element type's name in the collectives.
pub(super) fn dtype(precision: Precision) -> Dtype {
    match precision {
        Precision::F32 => Dtype::F32,
        Precision::Bf16 => Dtype::BF16,
        Precision::F16 => Dtype::F16,
    }
}

/// The precision of elements of `dtype`, if units can be of it.
pub(super) fn precision(dtype: Dtype) -> Option<Precision> {
    match dtype {
        Dtype::F32 => Some(Precision::F32),
        Dtype::BF16 => Some(Precision::Bf16),
        Dtype::F16 => Some(Precision::F16),
        _ => None,
    }
}

impl GpuValues {
    /// `elems` elements of any value.
    pub(super) fn unset(stream: &Stream, precision: Precision, elems: usize) -> GroupResult<Self> {
        let memory = DeviceMemory::unset(stream, dtype(precision), elems)?;
        Ok(Self { memory: Some(memory), pinned: None, precision, elems, stream: stream.clone() })
    }

    /// The type of the elements.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.elems
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.elems == 0
    }

    /// The GPU's ordinal in this process.
    pub fn ordinal(&self) -> usize {
        self.stream.ordinal()
    }

    /// All elements to read, on the compute stream: an address that a tensor library can take over without a copy, as long
    /// as these values live.
    pub fn as_device(&self) -> Device<'_> {
        self.device(0..self.elems)
    }

    /// The elements of `range` to read; empty if they are not all there.
    pub fn device(&self, range: Range<usize>) -> Device<'_> {
        let (address, elems) = self.part(range);
        let (dtype, ordinal) = (dtype(self.precision), self.ordinal());
        // SAFETY: memory of this GPU, which is freed on this stream after what is enqueued there.
        unsafe { Device::from_raw(dtype, ordinal, address, elems, self.stream.handle()) }
    }

    /// All elements to overwrite, on the compute stream.
    pub fn as_device_mut(&mut self) -> DeviceMut<'_> {
        self.device_mut(0..self.elems)
    }

    /// The elements of `range` to overwrite; empty if they are not all there.
    pub fn device_mut(&mut self, range: Range<usize>) -> DeviceMut<'_> {
        let (address, elems) = self.part(range);
        let (dtype, ordinal) = (dtype(self.precision), self.ordinal());
        // SAFETY: as above; whoever else uses it is enqueued there before or after.
        unsafe { DeviceMut::from_raw(dtype, ordinal, address, elems, self.stream.handle()) }
    }

    /// Where a range lies and how many elements it has: none where they are not all there.
    fn part(&self, range: Range<usize>) -> (u64, usize) {
        match &self.memory {
            Some(memory) if range.start <= range.end && range.end <= self.elems => {
                (memory.pointer() + (range.start * self.precision.bytes()) as u64, range.len())
            }
            _ => (0, 0),
        }
    }

    /// The elements of `range`, for a kernel or a call.
    ///
    /// # Errors
    /// If they are not all there, or not on the GPU at this time.
    pub(super) fn run(&self, range: Range<usize>) -> GroupResult<Run> {
        let (address, elems) = self.part(range.clone());
        if elems != range.len() {
            let there = self.memory.as_ref().map_or(0, |_| self.elems);
            let message = format!("elements {range:?} of {there} were asked for");
            let ordinal = self.ordinal();
            return Err(CollectiveError::Cuda { doing: "use a buffer", ordinal, code: 1, message });
        }
        Ok(Run { precision: self.precision, address, elems })
    }

    /// Enqueues a copy to pinned memory, where they are not there.
    pub(super) fn begin_eviction(&mut self) -> GroupResult<()> {
        let bytes = self.elems * self.precision.bytes();
        let Some(memory) = self.memory.as_ref().filter(|_| bytes > 0) else { return Ok(()) };
        let pinned = match self.pinned.take() {
            Some(pinned) if pinned.bytes == bytes => pinned,
            _ => Pinned::new(&self.stream, bytes)?,
        };
        let address = self.pinned.insert(pinned).address;
        let (gpu, stream) = (self.stream.gpu(), self.stream.handle().0);
        // SAFETY: as many bytes on both sides; nobody uses the pinned ones before the stream has come here, which whoever
        // calls this waits for, or has them kept for ever.
        unsafe { gpu.download_pinned(address, memory.pointer(), bytes, stream) }
    }

    /// Memory of the GPU for what lies in pinned memory, with a copy of that on its way there.
    pub(super) fn begin_restoration(&self) -> GroupResult<Option<DeviceMemory>> {
        let Some(pinned) = self.pinned.as_ref().filter(|_| self.memory.is_none()) else { return Ok(None) };
        let memory = DeviceMemory::unset(&self.stream, dtype(self.precision), self.elems)?;
        let (gpu, stream) = (self.stream.gpu(), self.stream.handle().0);
        // SAFETY: as many bytes on both sides; the pinned ones stay until the stream has come here, as above.
        unsafe { gpu.upload_pinned(memory.pointer(), pinned.address, pinned.bytes, stream)? };
        Ok(Some(memory))
    }

    /// Gives up the memory of the GPU, once the pinned memory has the values. The bytes that are given up.
    pub(super) fn leave(&mut self) -> usize {
        let bytes = self.capacity_bytes();
        if bytes > 0 {
            self.memory = None;
        }
        bytes
    }

    /// The values are in `memory`. The bytes that are taken.
    pub(super) fn come_back(&mut self, memory: DeviceMemory) -> usize {
        self.memory = Some(memory);
        self.capacity_bytes()
    }

    /// The GPU may be at work on the pinned memory, and nobody knows until when: it is never freed.
    pub(super) fn keep_pinned_for_ever(&mut self) {
        if let Some(pinned) = &mut self.pinned {
            pinned.is_free = false;
        }
    }

    /// The f32 values while they lie in pinned memory.
    pub(super) fn on_host(&self) -> Option<&[f32]> {
        let pinned = self.pinned.as_ref().filter(|_| self.memory.is_none());
        pinned.map(|pinned| bytemuck::cast_slice(pinned.bytes()))
    }

    /// As [`on_host`](Self::on_host), to be overwritten.
    pub(super) fn on_host_mut(&mut self) -> Option<&mut [f32]> {
        let pinned = self.pinned.as_mut().filter(|_| self.memory.is_none());
        pinned.map(|pinned| bytemuck::cast_slice_mut(pinned.bytes_mut()))
    }
}

impl Values for GpuValues {
    fn precision(&self) -> Precision {
        self.precision
    }

    fn len(&self) -> usize {
        self.elems
    }

    fn capacity_bytes(&self) -> usize {
        self.memory.as_ref().map_or(0, |memory| memory.len() * self.precision.bytes())
    }

    fn resize(&mut self, elems: usize) {
        self.elems = elems.min(self.capacity_bytes() / self.precision.bytes());
    }
}

/// Memory of the host that the GPU copies from and to by itself.
struct Pinned {
    address: *mut c_void,
    bytes: usize,
    /// Whether no copy can be under way any more when it is dropped.
    is_free: bool,
    stream: Stream,
}

// SAFETY: plain memory with one owner, which may be freed from any thread.
unsafe impl Send for Pinned {}
// SAFETY: it is read through shared references alone.
unsafe impl Sync for Pinned {}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinned").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Pinned {
    fn new(stream: &Stream, bytes: usize) -> GroupResult<Self> {
        let address = stream.gpu().allocate_pinned(bytes)?;
        Ok(Self { address, bytes, is_free: true, stream: stream.clone() })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: `bytes` bytes of ours, aligned to pages, and any bytes are bytes. The owner has them once the copies to
        // them are done.
        unsafe { std::slice::from_raw_parts(self.address.cast(), self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.is_free {
            // SAFETY: allocated by `new`; copies from and to it are over.
            unsafe { self.stream.gpu().free_pinned(self.address) };
        }
    }
}
