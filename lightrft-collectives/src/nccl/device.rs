//! Streams, events and memory of a GPU, for tests and for programs that bring no CUDA library of their own
//!
//! A program that has candle or another library passes that library's streams and addresses instead.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cuda::Gpu;
use crate::buffer::{Buffer, BufferMut, Host, HostMut, element_bytes};
use crate::device::{Device, DeviceMut, StreamHandle};
use crate::error::{Error, Result};
use crate::op::{Dtype, Element};

/// How long to sleep between two looks at an event.
const LOOK: Duration = Duration::from_micros(50);

/// Number of GPUs that this process sees.
///
/// # Errors
/// [`Error::Library`] if there is no CUDA driver or it does not start.
pub fn count() -> Result<usize> {
    Gpu::count()
}

#[derive(Debug)]
struct SharedStream {
    gpu: Arc<Gpu>,
    raw: usize,
    owner: Owner,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Us,
    /// Another library, which destroys it.
    Another,
}

impl Drop for SharedStream {
    fn drop(&mut self) {
        if self.owner == Owner::Us {
            // SAFETY: made by `Stream::new`; this is its last user.
            unsafe { self.gpu.destroy_stream(self.raw) };
        }
    }
}

/// A queue of work on one GPU. Clones are the same stream; it goes when the last of them, and of the memory allocated on
/// it, has gone.
#[derive(Clone, Debug)]
pub struct Stream(Arc<SharedStream>);

impl Stream {
    /// A new stream on the GPU with this ordinal, independent of the default stream.
    ///
    /// # Errors
    /// [`Error::Library`] without a CUDA driver, [`Error::Cuda`] without such a GPU.
    pub fn new(ordinal: usize) -> Result<Self> {
        let gpu = Gpu::get(ordinal)?;
        let raw = gpu.create_stream()?;
        Ok(Stream(Arc::new(SharedStream { gpu, raw, owner: Owner::Us })))
    }

    /// A stream that another library has made and will destroy.
    ///
    /// # Errors
    /// As [`new`](Stream::new).
    ///
    /// # Safety
    /// `handle` is a stream of the primary context of GPU `ordinal`, or one of the default streams, and lives longer than this
    /// value, its clones and the memory allocated on them.
    pub unsafe fn from_raw(ordinal: usize, handle: StreamHandle) -> Result<Self> {
        Ok(Stream(Arc::new(SharedStream { gpu: Gpu::get(ordinal)?, raw: handle.0, owner: Owner::Another })))
    }

    /// Its GPU, as the driver knows it. Not part of this crate's promises.
    #[doc(hidden)]
    pub fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }

    pub(super) fn shared_gpu(&self) -> Arc<Gpu> {
        self.0.gpu.clone()
    }

    /// The GPU's ordinal among those that this process sees.
    pub fn ordinal(&self) -> usize {
        self.0.gpu.ordinal()
    }

    /// The `CUstream`.
    pub fn handle(&self) -> StreamHandle {
        StreamHandle(self.0.raw)
    }

    /// An event that comes when the stream has done all that it has been given so far.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn record(&self) -> Result<Event> {
        let event = Event::new(&self.0.gpu)?;
        // SAFETY: both are live and of this GPU.
        unsafe { self.0.gpu.record(event.raw, self.0.raw)? };
        Ok(event)
    }

    /// Lets what this stream is given from now on wait for `event`. The calling thread does not wait.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        // SAFETY: both are live.
        unsafe { self.0.gpu.stream_wait(self.0.raw, event.raw) }
    }

    /// Waits until the stream has done all that it has been given, `limit` at most; returns whether it has.
    ///
    /// After a collective that failed this comes too, for its kernel is told to end: ask the communicator's
    /// [`health`](super::Nccl::health) before the results are used.
    ///
    /// # Errors
    /// [`Error::Cuda`], also for what failed on the GPU before.
    pub fn wait(&self, limit: Duration) -> Result<bool> {
        self.record()?.wait(limit)
    }

    /// Waits until the stream has done all that it has been given, `limit` at most, and then gives the system back what was
    /// freed on it; returns whether it has.
    ///
    /// Memory that is freed goes to a pool of this process first. Before this, other processes cannot have it, nor does it
    /// count as free: give it back before an inference server wakes.
    ///
    /// # Errors
    /// [`Error::Cuda`], also for what failed on the GPU before.
    pub fn give_back(&self, limit: Duration) -> Result<bool> {
        if !self.wait(limit)? {
            return Ok(false);
        }
        // SAFETY: the stream is live, and has nothing left to do.
        unsafe { self.0.gpu.trim(self.0.raw)? };
        Ok(true)
    }
}

/// A point in the work of a stream.
#[derive(Debug)]
pub struct Event {
    gpu: Arc<Gpu>,
    pub(super) raw: usize,
}

impl Event {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        Ok(Event { gpu: gpu.clone(), raw: gpu.create_event()? })
    }

    /// Whether the stream has come this far.
    ///
    /// # Errors
    /// [`Error::Cuda`], also for what failed on the GPU before.
    pub fn has_passed(&self) -> Result<bool> {
        // SAFETY: the event is live.
        unsafe { self.gpu.has_passed(self.raw) }
    }

    /// Waits until the stream has come this far, `limit` at most; returns whether it has.
    ///
    /// # Errors
    /// As [`has_passed`](Event::has_passed).
    pub fn wait(&self, limit: Duration) -> Result<bool> {
        let begin = Instant::now();
        loop {
            if self.has_passed()? {
                return Ok(true);
            }
            match begin.elapsed() {
                // A short call is over before a sleep would be.
                early if early < LOOK => std::hint::spin_loop(),
                late if late >= limit => return Ok(false),
                _ => std::thread::sleep(LOOK),
            }
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody else destroys it.
        unsafe { self.gpu.destroy_event(self.raw) };
    }
}

/// Elements in a GPU's memory, allocated and freed in the order of a stream: dropping it never waits, and what the stream
/// was given before still finds it.
#[derive(Debug)]
pub struct DeviceMemory {
    stream: Stream,
    dtype: Dtype,
    pointer: u64,
    bytes: usize,
}

impl DeviceMemory {
    /// `len` zeroes of type `T`.
    ///
    /// # Errors
    /// [`Error::Cuda`], if there is too little memory for instance.
    pub fn zeroed<T: Element>(stream: &Stream, len: usize) -> Result<Self> {
        let memory = Self::unset(stream, T::DTYPE, len)?;
        if memory.bytes > 0 {
            // SAFETY: just allocated on this stream.
            unsafe { stream.0.gpu.fill(memory.pointer, 0, memory.bytes, stream.0.raw)? };
        }
        Ok(memory)
    }

    /// A copy of `data`, which may be reused at once.
    ///
    /// # Errors
    /// As [`zeroed`](DeviceMemory::zeroed).
    pub fn upload<T: Element>(stream: &Stream, data: &[T]) -> Result<Self> {
        Self::copy_from(stream, Host::new(data))
    }

    /// As [`upload`](DeviceMemory::upload), of a type known at run time.
    ///
    /// # Errors
    /// As [`zeroed`](DeviceMemory::zeroed).
    pub fn copy_from(stream: &Stream, data: Host<'_>) -> Result<Self> {
        let memory = Self::unset(stream, data.dtype(), data.len())?;
        if memory.bytes > 0 {
            // SAFETY: just allocated on this stream, with as many bytes.
            unsafe { stream.0.gpu.upload(memory.pointer, data.bytes(), stream.0.raw)? };
        }
        Ok(memory)
    }

    /// `len` elements of any value.
    ///
    /// # Errors
    /// As [`zeroed`](DeviceMemory::zeroed).
    pub fn unset(stream: &Stream, dtype: Dtype, len: usize) -> Result<Self> {
        let bytes = len.checked_mul(element_bytes(dtype)).ok_or_else(|| Error::Cuda {
            doing: "allocate memory",
            ordinal: stream.ordinal(),
            code: 2,
            message: format!("{len} elements of {dtype:?} have no size in bytes"),
        })?;
        let pointer = match bytes {
            0 => 0,
            // SAFETY: the stream is live.
            _ => unsafe { stream.0.gpu.allocate(bytes, stream.0.raw)? },
        };
        Ok(DeviceMemory { stream: stream.clone(), dtype, pointer, bytes })
    }

    /// Waits, `limit` at most, until the stream has come here, and copies the elements to the host.
    ///
    /// # Errors
    /// [`Error::Buffer`] if they are not of type `T`; [`Error::Cuda`], with CUDA's code for a timeout if the limit was reached.
    pub fn download<T: Element>(&self, limit: Duration) -> Result<Vec<T>> {
        let mut data = vec![<T as bytemuck::Zeroable>::zeroed(); self.len()];
        self.copy_to(HostMut::new(&mut data), limit)?;
        Ok(data)
    }

    /// As [`download`](DeviceMemory::download), into memory that is there.
    ///
    /// # Errors
    /// As there, and [`Error::Buffer`] for another number of elements.
    pub fn copy_to(&self, mut to: HostMut<'_>, limit: Duration) -> Result<()> {
        if self.dtype != to.dtype() || self.len() != to.len() {
            return Err(Error::Buffer {
                dtype: to.dtype(),
                bytes: self.bytes,
                address: self.pointer as usize,
            });
        }
        if self.bytes == 0 {
            return Ok(());
        }
        let (gpu, doing) = (&self.stream.0.gpu, "copy from the GPU");
        // The copy itself cannot be given up.
        if !self.stream.wait(limit)? {
            let message = format!("the stream was busy for {limit:?}");
            return Err(Error::Cuda { doing, ordinal: gpu.ordinal(), code: 909, message });
        }
        // SAFETY: as many bytes of ours, whose uses are enqueued on this stream.
        unsafe { gpu.download(to.bytes_mut(), self.pointer, self.stream.0.raw) }
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes / element_bytes(self.dtype)
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The address on the GPU; 0 if there is no element.
    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    /// The elements as a call reads them.
    pub fn as_buffer(&self) -> Buffer<'_> {
        self.buffer(0..self.len())
    }

    /// The elements of `range` as a call reads them; empty if they are not all there.
    pub fn buffer(&self, range: Range<usize>) -> Buffer<'_> {
        let (pointer, len) = self.part(range);
        let (ordinal, stream) = (self.stream.ordinal(), self.stream.handle());
        // SAFETY: memory of this GPU, freed on this stream after what the call enqueues there, and aligned by the driver.
        unsafe { Device::from_raw(self.dtype, ordinal, pointer, len, stream) }.into()
    }

    /// The elements as a call writes them.
    pub fn as_buffer_mut(&mut self) -> BufferMut<'_> {
        self.buffer_mut(0..self.len())
    }

    /// The elements of `range` as a call writes them; empty if they are not all there.
    pub fn buffer_mut(&mut self, range: Range<usize>) -> BufferMut<'_> {
        let (pointer, len) = self.part(range);
        let (ordinal, stream) = (self.stream.ordinal(), self.stream.handle());
        // SAFETY: as above; whoever else uses it is enqueued on this stream before or after.
        unsafe { DeviceMut::from_raw(self.dtype, ordinal, pointer, len, stream) }.into()
    }

    /// Where a range begins and how many elements it has.
    fn part(&self, range: Range<usize>) -> (u64, usize) {
        let whole = range.start <= range.end && range.end <= self.len();
        let range = if whole { range } else { 0..0 };
        (self.pointer + (range.start * element_bytes(self.dtype)) as u64, range.len())
    }

    /// The stream in whose order it is used and freed.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated by us; whoever was lent it has enqueued its uses on this stream.
            unsafe { self.stream.0.gpu.free(self.pointer, self.stream.0.raw) };
        }
    }
}
