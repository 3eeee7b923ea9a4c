//! GPU memory that another process may open, and copies between a GPU and the host for those who only borrow memory
//!
//! Memory of a stream's pool has no handle that other processes could open (`cuIpcGetMemHandle`), so this is allocated
//! apart from it, and is meant to be few and large buffers.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cuda::Gpu;
use super::device::{Event, Stream};
use crate::device::{Device, StreamHandle};
use crate::error::{Error, Result};

/// A buffer that is exported once, when it is made.
#[derive(Debug)]
pub struct ExportedMemory {
    stream: Stream,
    gpu: Arc<Gpu>,
    pointer: u64,
    bytes: usize,
    handle: [u8; 64],
    /// Where each stream that was given copies into it stood after the last of them.
    copied: BTreeMap<usize, Event>,
}

impl ExportedMemory {
    /// `bytes` bytes, of any value, on the stream's GPU; at least one.
    ///
    /// # Errors
    /// [`Error::Cuda`]: too little memory, or a system without CUDA IPC.
    pub fn new(stream: &Stream, bytes: usize) -> Result<Self> {
        let gpu = stream.shared_gpu();
        let bytes = bytes.max(1);
        let pointer = gpu.allocate_apart(bytes)?;
        let copied = BTreeMap::new();
        let mut this =
            ExportedMemory { stream: stream.clone(), gpu, pointer, bytes, handle: [0; 64], copied };
        // SAFETY: the beginning of an allocation made apart from the pool.
        this.handle = unsafe { this.gpu.export(pointer)? };
        Ok(this)
    }

    /// What another process opens it by (`CUipcMemHandle`). It names the whole buffer.
    pub fn handle(&self) -> [u8; 64] {
        self.handle
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Enqueues a copy from the host to offset `at`. `from` may be reused on return.
    ///
    /// # Errors
    /// [`Error::Buffer`] if it does not fit there, [`Error::Cuda`].
    pub fn upload(&mut self, at: usize, from: &[u8]) -> Result<()> {
        let to = self.place(at, from.len(), crate::Dtype::U8)?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: inside of the buffer, which `&mut self` says nobody of this process reads; who opened it elsewhere was
        // promised nothing while it is written.
        unsafe { self.gpu.upload(to, from, self.stream.handle().0) }
    }

    /// Enqueues a copy from the same GPU's memory to offset `at`, on the stream that uses that memory: what the stream was
    /// given before is in it, what it is given after may overwrite the source.
    ///
    /// # Errors
    /// [`Error::Buffer`] if it does not fit there or lies on another GPU, [`Error::Cuda`].
    pub fn copy(&mut self, at: usize, from: &Device<'_>) -> Result<()> {
        let to = self.place(at, from.bytes(), from.dtype())?;
        if from.ordinal() != self.gpu.ordinal() {
            let address = from.pointer() as usize;
            return Err(Error::Buffer { dtype: from.dtype(), bytes: from.bytes(), address });
        }
        if from.is_empty() {
            return Ok(());
        }
        let StreamHandle(stream) = from.stream();
        // SAFETY: the target as above; the source is live memory of this GPU, and its uses are enqueued on its stream, which
        // lives: `Device`'s own promise. The buffer is no part of it, since it is never lent as a `Device`.
        unsafe { self.gpu.copy(to, from.pointer(), from.bytes(), stream)? };
        let event = match self.copied.remove(&stream) {
            Some(event) => event,
            None => Event::new(&self.gpu)?,
        };
        // SAFETY: both are live.
        unsafe { self.gpu.record(event.raw, stream)? };
        self.copied.insert(stream, event);
        Ok(())
    }

    /// Waits until every copy into it is done, `limit` at most; returns whether they are.
    ///
    /// # Errors
    /// [`Error::Cuda`], also for what failed on the GPU before.
    pub fn wait(&mut self, limit: Duration) -> Result<bool> {
        let begin = Instant::now();
        for event in self.copied.values() {
            if !event.wait(limit.saturating_sub(begin.elapsed()))? {
                return Ok(false);
            }
        }
        self.copied.clear();
        self.stream.wait(limit.saturating_sub(begin.elapsed()))
    }

    fn place(&self, at: usize, bytes: usize, dtype: crate::Dtype) -> Result<u64> {
        match at.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(self.pointer + at as u64),
            _ => Err(Error::Buffer { dtype, bytes, address: at }),
        }
    }
}

impl Drop for ExportedMemory {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`. Freeing it waits for copies that are under way.
        unsafe { self.gpu.free_apart(self.pointer) };
    }
}

/// Copies a GPU's memory to the host once its stream has come here, `limit` at most.
///
/// # Errors
/// [`Error::Buffer`] if the lengths differ; [`Error::Cuda`], with CUDA's code for a timeout if the limit was reached.
pub fn download(from: &Device<'_>, to: &mut [u8], limit: Duration) -> Result<()> {
    if from.bytes() != to.len() {
        let (bytes, address) = (from.bytes(), from.pointer() as usize);
        return Err(Error::Buffer { dtype: from.dtype(), bytes, address });
    }
    if from.is_empty() {
        return Ok(());
    }
    // SAFETY: it lives for as long as the call, by `Device`'s own promise, and longer than this value.
    let stream = unsafe { Stream::from_raw(from.ordinal(), from.stream())? };
    if !stream.wait(limit)? {
        let message = format!("the stream was busy for {limit:?}");
        let (doing, ordinal) = ("copy from the GPU", from.ordinal());
        return Err(Error::Cuda { doing, ordinal, code: 909, message });
    }
    // SAFETY: as many bytes of that memory, whose uses are enqueued on this stream.
    unsafe { stream.gpu().download(to, from.pointer(), from.stream().0) }
}

#[cfg(test)]
mod tests {
    use super::super::device::DeviceMemory;
    use super::*;

    #[test]
    #[ignore = "needs GPUs: cargo xtask gpu test"]
    fn gpu_copies_of_pinned_memory_are_done_when_they_return() {
        let stream = Stream::new(0).expect("a GPU test on a machine without GPUs");
        let (gpu, bytes) = (stream.shared_gpu(), 64 << 20);
        let address = gpu.allocate_pinned(bytes).unwrap();
        // SAFETY: so many bytes of ours, which have values from the first line on.
        let pinned = unsafe {
            std::ptr::write_bytes(address.cast::<u8>(), 1, bytes);
            std::slice::from_raw_parts_mut(address.cast::<u8>(), bytes)
        };
        let mut memory = ExportedMemory::new(&stream, bytes).unwrap();
        let busy = DeviceMemory::unset(&stream, crate::Dtype::U8, 4 << 30).unwrap();
        let keep_busy = || {
            for _ in 0..50 {
                // SAFETY: just allocated on this stream, with as many bytes.
                unsafe { gpu.fill(busy.pointer(), 0, 4 << 30, stream.handle().0) }.unwrap();
            }
        };
        keep_busy();
        memory.upload(0, pinned).unwrap();
        pinned.fill(2);
        assert!(memory.wait(Duration::from_secs(60)).unwrap());
        let mut pageable = vec![0; bytes];
        // SAFETY: as many bytes, used on this stream alone.
        unsafe { gpu.download(&mut pageable, memory.pointer, stream.handle().0) }.unwrap();
        assert!(pageable.iter().all(|byte| *byte == 1), "what was there at the call");
        keep_busy();
        // SAFETY: as above.
        unsafe { gpu.download(pinned, memory.pointer, stream.handle().0) }.unwrap();
        assert!(pinned.iter().all(|byte| *byte == 1), "what is there now");
        // SAFETY: allocated above; no copy is under way.
        unsafe { gpu.free_pinned(address) };
    }
}
