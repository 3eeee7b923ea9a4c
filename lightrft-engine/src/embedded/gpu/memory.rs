//! Memory of the GPU, and pinned memory of the host, with errors that say what to do.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fmt;
use std::time::{Duration, Instant};

use lightrft_collectives::Error as DriverError;
use lightrft_collectives::nccl::Stream;

use crate::{Error, Result};

/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: i32 = 2;
/// `CUDA_ERROR_TIMEOUT`.
const TIMEOUT: i32 = 909;

/// How long a step, or a copy of all weights, may take. Far longer than any does: only a GPU that hangs reaches it.
const LIMIT: Duration = Duration::from_secs(600);

/// For so long the thread that waits asks again and again: steps are shorter, and waking up from a sleep is not.
const SPIN: Duration = Duration::from_millis(50);

/// What became of something on the GPU of a stream.
pub(super) fn failed(stream: &Stream, doing: &'static str) -> impl Fn(DriverError) -> Error + use<> {
    let (stream, ordinal) = (stream.clone(), stream.ordinal());
    move |source| {
        let lost = is_lost(&source, || stream.record().map(drop));
        let source = Box::new(source);
        if lost {
            return Error::GpuLost { doing, ordinal, source };
        }
        let advice = "the GPU goes on: the call may be made again";
        Error::Gpu { doing, ordinal, advice, source }
    }
}

/// Whether a failure is for good: what a process's part of a GPU has come to, a wild access for instance, every later call
/// ends with as well. `next` is one that has no reason of its own to fail.
fn is_lost(error: &DriverError, next: impl FnOnce() -> Result<(), DriverError>) -> bool {
    match error {
        DriverError::Cuda { code: OUT_OF_MEMORY, .. } => false,
        DriverError::Cuda { code: TIMEOUT, .. } => true,
        _ => next().is_err(),
    }
}

/// Bytes of the GPU's memory that nobody has.
pub(super) fn free_bytes(stream: &Stream) -> Result<u64> {
    stream.gpu().free_bytes().map(|bytes| bytes as u64).map_err(failed(stream, "asking for free memory"))
}

/// Waits until the stream has done all that it was given.
pub(super) fn wait(stream: &Stream, operation: &'static str) -> Result<()> {
    let failed = failed(stream, operation);
    let event = stream.record().map_err(&failed)?;
    let begin = Instant::now();
    while !event.has_passed().map_err(&failed)? {
        let elapsed = begin.elapsed();
        if elapsed >= LIMIT {
            let (code, message) = (TIMEOUT, format!("the stream was busy for {LIMIT:?}"));
            let source =
                DriverError::Cuda { doing: "wait for a stream", ordinal: stream.ordinal(), code, message };
            return Err(failed(source));
        }
        if elapsed < SPIN {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

/// Gives the GPU back what was freed on the stream.
pub(super) fn give_back(stream: &Stream) -> Result<()> {
    wait(stream, "giving memory back")?;
    stream.give_back(LIMIT).map(drop).map_err(failed(stream, "giving memory back"))
}

/// Bytes of the GPU's memory, freed in the order of a stream.
#[derive(Debug)]
pub(super) struct Block {
    stream: Stream,
    address: u64,
    bytes: u64,
}

impl Block {
    /// Zeroes. `what` needs them.
    ///
    /// # Errors
    /// [`Error::GpuMemory`] where there is too little.
    pub(super) fn zeroed(stream: &Stream, bytes: u64, what: &'static str) -> Result<Self> {
        let (gpu, raw) = (stream.gpu(), stream.handle().0);
        let size = usize::try_from(bytes.max(1)).unwrap_or(usize::MAX);
        // SAFETY: the stream is live.
        let address = unsafe { gpu.allocate(size, raw) }.map_err(|error| match error {
            DriverError::Cuda { code: OUT_OF_MEMORY, ordinal, .. } => Error::GpuMemory {
                ordinal,
                what,
                needed_bytes: bytes,
                free_bytes: gpu.free_bytes().map_or(0, |bytes| bytes as u64),
            },
            other => failed(stream, "allocating memory")(other),
        })?;
        let block = Self { stream: stream.clone(), address, bytes };
        // SAFETY: just allocated on this stream.
        unsafe { gpu.fill(address, 0, size, raw) }.map_err(failed(stream, "clearing memory"))?;
        Ok(block)
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Overwrites the bytes from `at` on. `data` may be reused on return.
    pub(super) fn write(&mut self, at: u64, data: &[u8]) -> Result<()> {
        self.check(at, data.len(), "copying to the GPU")?;
        if data.is_empty() {
            return Ok(());
        }
        // SAFETY: so many bytes of ours, used on this stream alone.
        unsafe { self.stream.gpu().upload(self.address + at, data, self.stream.handle().0) }
            .map_err(failed(&self.stream, "copying to the GPU"))
    }

    /// Overwrites the first bytes with those of `pinned`, which is busy until the stream has come here.
    pub(super) fn write_pinned(&mut self, pinned: &mut Pinned, bytes: usize) -> Result<()> {
        self.check(0, if bytes <= pinned.bytes { bytes } else { usize::MAX }, "copying to the GPU")?;
        pinned.busy = true;
        let (gpu, raw) = (self.stream.gpu(), self.stream.handle().0);
        // SAFETY: so many bytes of ours on both sides; `busy` keeps the pinned ones until somebody has waited.
        unsafe { gpu.upload_pinned(self.address, pinned.address, bytes, raw) }
            .map_err(failed(&self.stream, "copying to the GPU"))
    }

    /// Enqueues a copy of the first bytes into `pinned` from `at` on, which is busy until the stream has come here.
    pub(super) fn read_pinned(&self, pinned: &mut Pinned, at: usize, bytes: usize) -> Result<()> {
        let fits = at.checked_add(bytes).is_some_and(|end| end <= pinned.bytes);
        self.check(0, if fits { bytes } else { usize::MAX }, "copying from the GPU")?;
        pinned.busy = true;
        let (gpu, raw) = (self.stream.gpu(), self.stream.handle().0);
        // SAFETY: so many bytes of ours on both sides; `busy` keeps the pinned ones until somebody has waited.
        unsafe { gpu.download_pinned(pinned.address.cast::<u8>().add(at).cast(), self.address, bytes, raw) }
            .map_err(failed(&self.stream, "copying from the GPU"))
    }

    /// All bytes, once the stream has come here.
    pub(super) fn read(&self, to: &mut [u8]) -> Result<()> {
        self.check(0, to.len(), "copying from the GPU")?;
        wait(&self.stream, "copying from the GPU")?;
        // SAFETY: so many bytes of ours, used on this stream alone.
        unsafe { self.stream.gpu().download(to, self.address, self.stream.handle().0) }
            .map_err(failed(&self.stream, "copying from the GPU"))
    }

    fn check(&self, at: u64, bytes: usize, operation: &'static str) -> Result<()> {
        if at.checked_add(bytes as u64).is_some_and(|end| end <= self.bytes) {
            return Ok(());
        }
        let message = format!("{bytes} bytes at {at} of {}", self.bytes);
        let (doing, ordinal) = ("use a buffer", self.stream.ordinal());
        Err(failed(&self.stream, operation)(DriverError::Cuda { doing, ordinal, code: 1, message }))
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated by us; its uses are enqueued on this stream.
        unsafe { self.stream.gpu().free(self.address, self.stream.handle().0) };
    }
}

/// Memory of the host that the GPU copies from and to by itself.
pub(super) struct Pinned {
    stream: Stream,
    address: *mut c_void,
    bytes: usize,
    /// A copy may be under way. Then it is never freed.
    busy: bool,
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
    pub(super) fn new(stream: &Stream, bytes: usize) -> Result<Self> {
        let bytes = bytes.max(8);
        let address =
            stream.gpu().allocate_pinned(bytes).map_err(failed(stream, "allocating pinned host memory"))?;
        let pinned = Self { stream: stream.clone(), address, bytes, busy: false };
        // SAFETY: so many bytes of ours. From now on they have values.
        unsafe { std::ptr::write_bytes(address.cast::<u8>(), 0, bytes) };
        Ok(pinned)
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether a copy may be under way.
    pub(super) fn is_busy(&self) -> bool {
        self.busy
    }

    /// Says that the stream has come past every copy.
    pub(super) fn settled(&mut self) {
        self.busy = false;
    }

    /// What it holds; nothing while a copy may be under way.
    pub(super) fn floats(&self) -> &[f32] {
        if self.busy {
            return &[];
        }
        // SAFETY: initialised bytes of ours, aligned to pages; any bits are an f32, and no copy is under way.
        unsafe { std::slice::from_raw_parts(self.address.cast(), self.bytes / size_of::<f32>()) }
    }

    /// The same words to be overwritten; none while a copy may be under way.
    pub(super) fn words_mut(&mut self) -> &mut [u32] {
        if self.busy {
            return &mut [];
        }
        // SAFETY: as above, and nobody else has a reference.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.bytes / size_of::<u32>()) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if !self.busy {
            // SAFETY: allocated by `new`; copies from and to it are over.
            unsafe { self.stream.gpu().free_pinned(self.address) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_lost_where_it_hangs_or_the_next_call_fails_too() {
        let error = |code| DriverError::Cuda { doing: "", ordinal: 0, code, message: String::new() };
        // An illegal address, a wrong argument, too little memory, a stream that never ends.
        for (code, lost_if_next_fails, lost_if_not) in
            [(700, true, false), (1, true, false), (OUT_OF_MEMORY, false, false), (TIMEOUT, true, true)]
        {
            assert_eq!(is_lost(&error(code), || Err(error(code))), lost_if_next_fails, "{code}");
            assert_eq!(is_lost(&error(code), || Ok(())), lost_if_not, "{code}");
        }
    }
}
