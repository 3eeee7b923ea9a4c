//! As much of the CUDA driver as communicators and sharded units need: one function for each foreign call, over a table of
//! our own
//!
//! Not a CUDA binding crate: these few functions have been the same since CUDA 11, whatever version the driver has, and
//! a table that is looked up by name says "no driver here" as an error. Addresses, streams, events, contexts and kernels are
//! integers of a pointer's size, as other CUDA libraries hand them out.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::library::symbols;
use crate::error::{Error, Result};

/// `CUresult`.
type Code = c_int;
/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: Code = 600;
/// `CU_POINTER_ATTRIBUTE_MEMORY_TYPE`.
const MEMORY_TYPE: c_int = 2;
/// `CU_STREAM_NON_BLOCKING`: does not wait for the legacy default stream.
const NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DISABLE_TIMING`.
const NO_TIMING: c_uint = 2;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`.
const COMPUTE_CAPABILITY: [c_int; 2] = [75, 76];

symbols! {
    /// The functions of libcuda.
    pub(super) struct Driver("the CUDA driver");
    fn init = "cuInit"(c_uint) -> Code;
    fn get_version = "cuDriverGetVersion"(*mut c_int) -> Code;
    fn device_get_count = "cuDeviceGetCount"(*mut c_int) -> Code;
    fn device_get = "cuDeviceGet"(*mut c_int, c_int) -> Code;
    fn device_get_uuid = "cuDeviceGetUuid_v2"(*mut [u8; 16], c_int) -> Code;
    fn primary_retain = "cuDevicePrimaryCtxRetain"(*mut usize, c_int) -> Code;
    fn push_current = "cuCtxPushCurrent_v2"(usize) -> Code;
    fn pop_current = "cuCtxPopCurrent_v2"(*mut usize) -> Code;
    fn stream_create = "cuStreamCreate"(*mut usize, c_uint) -> Code;
    fn stream_destroy = "cuStreamDestroy_v2"(usize) -> Code;
    fn stream_synchronize = "cuStreamSynchronize"(usize) -> Code;
    fn stream_wait_event = "cuStreamWaitEvent"(usize, usize, c_uint) -> Code;
    fn stream_is_capturing = "cuStreamIsCapturing"(usize, *mut c_int) -> Code;
    fn event_create = "cuEventCreate"(*mut usize, c_uint) -> Code;
    fn event_destroy = "cuEventDestroy_v2"(usize) -> Code;
    fn event_record = "cuEventRecord"(usize, usize) -> Code;
    fn event_query = "cuEventQuery"(usize) -> Code;
    fn mem_alloc_async = "cuMemAllocAsync"(*mut u64, usize, usize) -> Code;
    fn mem_free_async = "cuMemFreeAsync"(u64, usize) -> Code;
    fn mem_alloc = "cuMemAlloc_v2"(*mut u64, usize) -> Code;
    fn mem_free = "cuMemFree_v2"(u64) -> Code;
    fn ipc_mem_handle = "cuIpcGetMemHandle"(*mut [u8; 64], u64) -> Code;
    fn memset_async = "cuMemsetD8Async"(u64, u8, usize, usize) -> Code;
    fn upload_async = "cuMemcpyHtoDAsync_v2"(u64, *const c_void, usize, usize) -> Code;
    fn download_async = "cuMemcpyDtoHAsync_v2"(*mut c_void, u64, usize, usize) -> Code;
    fn copy_async = "cuMemcpyDtoDAsync_v2"(u64, u64, usize, usize) -> Code;
    fn pointer_get_attribute = "cuPointerGetAttribute"(*mut c_void, c_int, u64) -> Code;
    fn mem_get_info = "cuMemGetInfo_v2"(*mut usize, *mut usize) -> Code;
    fn default_pool = "cuDeviceGetDefaultMemPool"(*mut usize, c_int) -> Code;
    fn pool_trim = "cuMemPoolTrimTo"(usize, usize) -> Code;
    fn host_alloc = "cuMemHostAlloc"(*mut *mut c_void, usize, c_uint) -> Code;
    fn host_free = "cuMemFreeHost"(*mut c_void) -> Code;
    fn device_get_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int) -> Code;
    fn module_load_data = "cuModuleLoadData"(*mut usize, *const c_void) -> Code;
    fn module_get_function = "cuModuleGetFunction"(*mut usize, usize, *const c_char) -> Code;
    fn launch_kernel = "cuLaunchKernel"(
        usize, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, usize, *mut *mut c_void, *mut *mut c_void
    ) -> Code;
    fn get_error_name = "cuGetErrorName"(Code, *mut *const c_char) -> Code;
    fn get_error_string = "cuGetErrorString"(Code, *mut *const c_char) -> Code;
}

impl Driver {
    /// The driver of this machine, looked for and initialised once.
    fn get() -> Result<&'static Driver> {
        static LIBRARY: OnceLock<Result<Driver>> = OnceLock::new();
        let load = || {
            let driver = Driver::load(&["libcuda.so.1".into(), "libcuda.so".into()])?;
            // SAFETY: may be called any number of times, from any thread.
            let code = unsafe { (driver.init)(0) };
            if code == 0 {
                return Ok(driver);
            }
            Err(Error::Library { library: "the CUDA driver", reason: driver.message(code) })
        };
        LIBRARY.get_or_init(load).as_ref().map_err(Clone::clone)
    }

    fn message(&self, code: Code) -> String {
        let text = |get: unsafe extern "C" fn(Code, *mut *const c_char) -> Code| {
            let mut text = std::ptr::null();
            // SAFETY: writes a pointer to a constant string, or null for a code that it does not know.
            unsafe {
                get(code, &mut text);
                if text.is_null() {
                    String::new()
                } else {
                    CStr::from_ptr(text).to_string_lossy().into_owned()
                }
            }
        };
        format!("{}, {}", text(self.get_error_name), text(self.get_error_string))
    }
}

/// The version of CUDA that this machine's driver is of, 12080 for 12.8; `None` without one.
pub(super) fn driver_version() -> Option<i32> {
    let (driver, mut version) = (Driver::get().ok()?, 0);
    // SAFETY: writes one int.
    let code = unsafe { (driver.get_version)(&mut version) };
    (code == 0).then_some(version)
}

/// One GPU of this process: its ordinal and primary context, which is that of the CUDA runtime and so of NCCL too.
#[derive(Debug)]
pub struct Gpu {
    driver: &'static Driver,
    ordinal: usize,
    /// Retained and never released: communicators that are still being destroyed may outlive all else.
    context: usize,
    /// The same in every process that sees this GPU.
    pub(super) uuid: [u8; 16],
    /// Major and minor number of what its processors can do.
    capability: [c_int; 2],
    /// What allocations on streams come from.
    pool: usize,
}

/// While this lives, the GPU's context is the calling thread's current one. Not to be sent to another thread.
#[derive(Debug)]
pub struct Current<'a> {
    gpu: &'a Gpu,
    _this_thread: std::marker::PhantomData<*const ()>,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        // SAFETY: takes off what `Gpu::enter` put on this thread's stack of contexts.
        unsafe { (self.gpu.driver.pop_current)(&mut 0) };
    }
}

impl Gpu {
    /// The GPU with this ordinal among those that the process sees.
    pub(super) fn get(ordinal: usize) -> Result<Arc<Gpu>> {
        static GPUS: OnceLock<Mutex<HashMap<usize, Arc<Gpu>>>> = OnceLock::new();
        let mut gpus = GPUS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gpu) = gpus.get(&ordinal) {
            return Ok(gpu.clone());
        }
        let gpu = Arc::new(Gpu::open(ordinal)?);
        gpus.insert(ordinal, gpu.clone());
        Ok(gpu)
    }

    fn open(ordinal: usize) -> Result<Gpu> {
        let driver = Driver::get()?;
        let gpu = Gpu { driver, ordinal, context: 0, uuid: [0; 16], capability: [0; 2], pool: 0 };
        let mut count = 0;
        // SAFETY: each writes one value of its type.
        gpu.check("count the GPUs", unsafe { (driver.device_get_count)(&mut count) })?;
        let number = match c_int::try_from(ordinal) {
            Ok(number) if number < count => number,
            _ => {
                let message = format!("this process sees {count} GPUs");
                return Err(Error::Cuda { doing: "find a device", ordinal, code: 101, message });
            }
        };
        let mut device = 0;
        // SAFETY: as above.
        gpu.check("find a device", unsafe { (driver.device_get)(&mut device, number) })?;
        let mut uuid = [0; 16];
        // SAFETY: as above; the device is the one just found.
        gpu.check("read the UUID", unsafe { (driver.device_get_uuid)(&mut uuid, device) })?;
        let mut capability = [0; 2];
        for (number, attribute) in capability.iter_mut().zip(COMPUTE_CAPABILITY) {
            // SAFETY: as above.
            let code = unsafe { (driver.device_get_attribute)(number, attribute, device) };
            gpu.check("ask a device what it can do", code)?;
        }
        let mut pool = 0;
        // SAFETY: as above.
        gpu.check("find the memory pool", unsafe { (driver.default_pool)(&mut pool, device) })?;
        let mut context = 0;
        // SAFETY: as above.
        gpu.check("make a context", unsafe { (driver.primary_retain)(&mut context, device) })?;
        Ok(Gpu { context, uuid, capability, pool, ..gpu })
    }

    /// The same in every process that sees this GPU.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// Number of GPUs that this process sees; an error where there is no driver.
    pub(super) fn count() -> Result<usize> {
        let (driver, mut count) = (Driver::get()?, 0);
        // SAFETY: writes one int.
        let code = unsafe { (driver.device_get_count)(&mut count) };
        if code != 0 {
            return Err(Error::Library { library: "the CUDA driver", reason: driver.message(code) });
        }
        Ok(count as usize)
    }

    pub(super) fn ordinal(&self) -> usize {
        self.ordinal
    }

    fn check(&self, doing: &'static str, code: Code) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        Err(Error::Cuda { doing, ordinal: self.ordinal, code, message: self.driver.message(code) })
    }

    /// Makes this GPU's context the current one of this thread, until the guard is dropped.
    pub fn enter(&self) -> Result<Current<'_>> {
        // SAFETY: the context is retained for as long as the process lives.
        self.check("enter the context", unsafe { (self.driver.push_current)(self.context) })?;
        Ok(Current { gpu: self, _this_thread: std::marker::PhantomData })
    }

    pub(super) fn create_stream(&self) -> Result<usize> {
        let _current = self.enter()?;
        let mut stream = 0;
        // SAFETY: writes one handle.
        self.check("make a stream", unsafe { (self.driver.stream_create)(&mut stream, NON_BLOCKING) })?;
        Ok(stream)
    }

    /// Returns at once; the stream goes when its work is done. An error is of no use to anyone.
    ///
    /// # Safety
    /// `stream` was made by [`create_stream`](Self::create_stream) and is not used again.
    pub(super) unsafe fn destroy_stream(&self, stream: usize) {
        // SAFETY: the caller's promise.
        unsafe { (self.driver.stream_destroy)(stream) };
    }

    pub(super) fn create_event(&self) -> Result<usize> {
        let _current = self.enter()?;
        let mut event = 0;
        // SAFETY: writes one handle.
        self.check("make an event", unsafe { (self.driver.event_create)(&mut event, NO_TIMING) })?;
        Ok(event)
    }

    /// # Safety
    /// `event` was made by [`create_event`](Self::create_event) and is not used again.
    pub(super) unsafe fn destroy_event(&self, event: usize) {
        // SAFETY: the caller's promise. An event that is still to come is freed when it has come.
        unsafe { (self.driver.event_destroy)(event) };
    }

    /// # Safety
    /// `event` and `stream` are live and of this GPU.
    pub(super) unsafe fn record(&self, event: usize, stream: usize) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: the caller's promise.
        self.check("record an event", unsafe { (self.driver.event_record)(event, stream) })
    }

    /// Whether the stream has passed the event.
    ///
    /// # Safety
    /// `event` is live and of this GPU.
    pub(super) unsafe fn has_passed(&self, event: usize) -> Result<bool> {
        // SAFETY: the caller's promise.
        match unsafe { (self.driver.event_query)(event) } {
            NOT_READY => Ok(false),
            code => self.check("query an event", code).map(|()| true),
        }
    }

    /// # Safety
    /// `stream` and `event` are live.
    pub(super) unsafe fn stream_wait(&self, stream: usize, event: usize) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: the caller's promise.
        self.check("make a stream wait", unsafe { (self.driver.stream_wait_event)(stream, event, 0) })
    }

    /// Whether work enqueued on the stream goes into a graph that is being captured.
    ///
    /// # Safety
    /// `stream` is live and of this GPU.
    pub(super) unsafe fn is_capturing(&self, stream: usize) -> Result<bool> {
        let mut status = 0;
        // SAFETY: the caller's promise; writes one int.
        let code = unsafe { (self.driver.stream_is_capturing)(stream, &mut status) };
        self.check("ask a stream for its capture", code)?;
        Ok(status != 0)
    }

    /// # Safety
    /// `stream` is live and of this GPU.
    pub unsafe fn allocate(&self, bytes: usize, stream: usize) -> Result<u64> {
        let _current = self.enter()?;
        let mut pointer = 0;
        // SAFETY: the caller's promise; writes one address.
        let code = unsafe { (self.driver.mem_alloc_async)(&mut pointer, bytes, stream) };
        self.check("allocate memory", code)?;
        Ok(pointer)
    }

    /// Frees memory when the stream has come here. An error is of no use to anyone.
    ///
    /// # Safety
    /// `pointer` is of [`allocate`](Self::allocate), its uses are over or enqueued on `stream` before.
    pub unsafe fn free(&self, pointer: u64, stream: usize) {
        let Ok(_current) = self.enter() else { return };
        // SAFETY: the caller's promise.
        unsafe { (self.driver.mem_free_async)(pointer, stream) };
    }

    /// Memory apart from the pool, which other processes may be let into.
    pub(super) fn allocate_apart(&self, bytes: usize) -> Result<u64> {
        let _current = self.enter()?;
        let mut pointer = 0;
        // SAFETY: writes one address.
        self.check("allocate memory", unsafe { (self.driver.mem_alloc)(&mut pointer, bytes) })?;
        Ok(pointer)
    }

    /// Frees memory once what uses it is done. An error is of no use to anyone.
    ///
    /// # Safety
    /// `pointer` is of [`allocate_apart`](Self::allocate_apart), and nothing that uses it is enqueued any more.
    pub(super) unsafe fn free_apart(&self, pointer: u64) {
        let Ok(_current) = self.enter() else { return };
        // SAFETY: the caller's promise.
        unsafe { (self.driver.mem_free)(pointer) };
    }

    /// What another process opens an allocation by.
    ///
    /// # Safety
    /// `pointer` is of [`allocate_apart`](Self::allocate_apart).
    pub(super) unsafe fn export(&self, pointer: u64) -> Result<[u8; 64]> {
        let _current = self.enter()?;
        let mut handle = [0; 64];
        // SAFETY: the caller's promise; writes one handle.
        self.check("export memory", unsafe { (self.driver.ipc_mem_handle)(&mut handle, pointer) })?;
        Ok(handle)
    }

    /// # Safety
    /// `bytes` bytes at `pointer` are ours to write on `stream`.
    pub unsafe fn fill(&self, pointer: u64, byte: u8, bytes: usize, stream: usize) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: the caller's promise.
        self.check("fill memory", unsafe { (self.driver.memset_async)(pointer, byte, bytes, stream) })
    }

    /// Copies to the GPU. `from` may be reused on return: the driver stages memory that is not pinned, and for memory that
    /// is this waits until the stream has come past the copy.
    ///
    /// # Safety
    /// As many bytes at `pointer` are ours to write on `stream`.
    pub unsafe fn upload(&self, pointer: u64, from: &[u8], stream: usize) -> Result<()> {
        let _current = self.enter()?;
        let source = from.as_ptr().cast();
        // SAFETY: the caller's promise; the source is a slice, which is borrowed for as long as it is read.
        self.check("copy to the GPU", unsafe {
            (self.driver.upload_async)(pointer, source, from.len(), stream)
        })?;
        self.finish(source, stream)
    }

    /// Copies from the GPU, and returns when that is done, whether `to` is pinned or not.
    ///
    /// # Safety
    /// As many bytes at `pointer` are ours to read on `stream`.
    pub unsafe fn download(&self, to: &mut [u8], pointer: u64, stream: usize) -> Result<()> {
        let _current = self.enter()?;
        let target = to.as_mut_ptr().cast::<c_void>();
        // SAFETY: the caller's promise; the target is a slice, which is borrowed for as long as it is written.
        let code = unsafe { (self.driver.download_async)(target, pointer, to.len(), stream) };
        self.check("copy from the GPU", code)?;
        self.finish(target, stream)
    }

    /// Waits for a copy from or to memory of the host that the GPU reaches by itself. With other memory the driver is done
    /// when it returns.
    fn finish(&self, host: *const c_void, stream: usize) -> Result<()> {
        let mut kind: c_uint = 0;
        // SAFETY: writes one number. Any address may be asked about; for one that the driver does not know this fails.
        let code = unsafe {
            (self.driver.pointer_get_attribute)((&raw mut kind).cast(), MEMORY_TYPE, host.addr() as u64)
        };
        if code != 0 {
            return Ok(());
        }
        // SAFETY: the stream is live, by the promise of who enqueued the copy.
        self.check("wait for a stream", unsafe { (self.driver.stream_synchronize)(stream) })
    }

    /// Copies between two places of this GPU.
    ///
    /// # Safety
    /// `bytes` bytes at `to` are ours to write on `stream`, as many at `from` to read; they do not overlap.
    pub unsafe fn copy(&self, to: u64, from: u64, bytes: usize, stream: usize) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: the caller's promise.
        self.check("copy on the GPU", unsafe { (self.driver.copy_async)(to, from, bytes, stream) })
    }

    /// Bytes of this GPU's memory that nobody has.
    pub fn free_bytes(&self) -> Result<usize> {
        let _current = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        self.check("ask for its memory", unsafe { (self.driver.mem_get_info)(&mut free, &mut total) })?;
        Ok(free)
    }

    /// Gives back to the system what was freed on `stream`. The pool looks for what it can give when a stream is
    /// synchronised; to see an event pass is not enough. Waits for the stream: ask for that before, with a deadline.
    ///
    /// # Safety
    /// `stream` is live and of this GPU.
    pub unsafe fn trim(&self, stream: usize) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: the caller's promise.
        self.check("wait for a stream", unsafe { (self.driver.stream_synchronize)(stream) })?;
        // SAFETY: the pool is the device's own.
        self.check("give memory back", unsafe { (self.driver.pool_trim)(self.pool, 0) })
    }

    /// Major and minor number of what its processors can do, as in `sm_90`.
    pub fn capability(&self) -> [i32; 2] {
        self.capability
    }

    /// Memory of the host that the GPU can copy from and to by itself. `bytes` is not 0.
    pub fn allocate_pinned(&self, bytes: usize) -> Result<*mut c_void> {
        let _current = self.enter()?;
        let mut address = std::ptr::null_mut();
        // SAFETY: writes one address.
        let code = unsafe { (self.driver.host_alloc)(&mut address, bytes, 0) };
        self.check("allocate pinned memory", code)?;
        Ok(address)
    }

    /// Frees pinned memory. An error is of no use to anyone.
    ///
    /// # Safety
    /// `address` is of [`allocate_pinned`](Self::allocate_pinned); nobody uses it any more, no stream either.
    pub unsafe fn free_pinned(&self, address: *mut c_void) {
        let Ok(_current) = self.enter() else { return };
        // SAFETY: the caller's promise.
        unsafe { (self.driver.host_free)(address) };
    }

    /// Enqueues a copy from pinned memory.
    ///
    /// # Safety
    /// `bytes` bytes at `to` are ours to write on `stream`; as many at `from` are pinned, and stay until it is done.
    pub unsafe fn upload_pinned(
        &self,
        to: u64,
        from: *const c_void,
        bytes: usize,
        stream: usize,
    ) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: the caller's promise.
        self.check("copy to the GPU", unsafe { (self.driver.upload_async)(to, from, bytes, stream) })
    }

    /// Enqueues a copy to pinned memory.
    ///
    /// # Safety
    /// `bytes` bytes at `from` are ours to read on `stream`; as many at `to` are pinned, and nobody else uses them until
    /// it is done.
    pub unsafe fn download_pinned(
        &self,
        to: *mut c_void,
        from: u64,
        bytes: usize,
        stream: usize,
    ) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: the caller's promise.
        self.check("copy from the GPU", unsafe { (self.driver.download_async)(to, from, bytes, stream) })
    }

    /// Loads compiled kernels, which stay as long as the process.
    ///
    /// # Safety
    /// `image` is a whole cubin, fatbin or PTX text that ends with a zero byte.
    pub unsafe fn load_module(&self, image: &[u8]) -> Result<usize> {
        let _current = self.enter()?;
        let mut module = 0;
        // SAFETY: the caller's promise; writes one handle.
        let code = unsafe { (self.driver.module_load_data)(&mut module, image.as_ptr().cast()) };
        self.check("load kernels", code)?;
        Ok(module)
    }

    /// The kernel called `name`.
    ///
    /// # Safety
    /// `module` is of [`load_module`](Self::load_module).
    pub unsafe fn kernel(&self, module: usize, name: &CStr) -> Result<usize> {
        let _current = self.enter()?;
        let mut kernel = 0;
        // SAFETY: the caller's promise; writes one handle.
        let code = unsafe { (self.driver.module_get_function)(&mut kernel, module, name.as_ptr()) };
        self.check("find a kernel", code)?;
        Ok(kernel)
    }

    /// Enqueues `blocks` blocks of `threads` threads of a kernel.
    ///
    /// # Safety
    /// `kernel` is of [`kernel`](Self::kernel) of this GPU, `stream` a live stream of it; `arguments` point to values of the
    /// kernel's parameter types, in their order and all of them, and what the kernel does with them on `stream` is allowed.
    pub unsafe fn launch(
        &self,
        kernel: usize,
        blocks: u32,
        threads: u32,
        stream: usize,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let _current = self.enter()?;
        let (arguments, extra) = (arguments.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: the caller's promise; the driver copies the arguments before it returns.
        let code = unsafe {
            (self.driver.launch_kernel)(kernel, blocks, 1, 1, threads, 1, 1, 0, stream, arguments, extra)
        };
        self.check("launch a kernel", code)
    }
}
