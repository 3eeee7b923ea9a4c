//! CUDA C compiled by NVRTC when the program runs, and its kernels enqueued
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

use super::device::Stream;
use super::library::{symbols, toolkit};
use crate::error::{Error, Result};

/// `nvrtcResult`.
type Code = c_int;

symbols! {
    /// The functions of libnvrtc.
    struct Nvrtc("NVRTC");
    fn create = "nvrtcCreateProgram"(
        *mut *mut c_void, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
    ) -> Code;
    fn compile = "nvrtcCompileProgram"(*mut c_void, c_int, *const *const c_char) -> Code;
    fn log_size = "nvrtcGetProgramLogSize"(*mut c_void, *mut usize) -> Code;
    fn log = "nvrtcGetProgramLog"(*mut c_void, *mut c_char) -> Code;
    fn cubin_size = "nvrtcGetCUBINSize"(*mut c_void, *mut usize) -> Code;
    fn cubin = "nvrtcGetCUBIN"(*mut c_void, *mut c_char) -> Code;
    fn destroy = "nvrtcDestroyProgram"(*mut *mut c_void) -> Code;
    fn error_string = "nvrtcGetErrorString"(Code) -> *const c_char;
}

impl Nvrtc {
    /// The compiler of this machine, looked for once: `$NVRTC_LIB`, or by the names that its versions have.
    fn get() -> Result<&'static Nvrtc> {
        static LIBRARY: OnceLock<Result<Nvrtc>> = OnceLock::new();
        LIBRARY.get_or_init(|| Nvrtc::load(&toolkit("NVRTC_LIB", "libnvrtc"))).as_ref().map_err(Clone::clone)
    }

    fn check(&self, code: Code, log: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: returns a constant string, also for a code that it does not know.
        let text = unsafe { CStr::from_ptr((self.error_string)(code)) };
        let reason = format!("{} {log}", text.to_string_lossy());
        Err(Error::Library { library: "NVRTC", reason: reason.trim_end().to_owned() })
    }
}

/// Machine code for processors of `capability` (major, minor), of CUDA C without headers, with further `options` of the
/// compiler (`--fmad=false`, `-DNAME=VALUE`).
///
/// # Errors
/// [`Error::Library`] without NVRTC, and with its words about the source.
pub fn compile(source: &str, capability: [i32; 2], options: &[&str]) -> Result<Vec<u8>> {
    let nvrtc = Nvrtc::get()?;
    let text = |text: String| {
        let with_zero = |_| Error::Library { library: "NVRTC", reason: "a zero byte".to_owned() };
        CString::new(text).map_err(with_zero)
    };
    let source = text(source.to_owned())?;
    let [major, minor] = capability;
    let target = std::iter::once(format!("--gpu-architecture=sm_{major}{minor}"));
    let options = target.chain(options.iter().map(|option| (*option).to_owned()));
    let options: Vec<CString> = options.map(text).collect::<Result<_>>()?;
    let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: a string that ends with zero, no headers; writes one handle.
    let created = unsafe {
        let (name, none) = (c"lightrft".as_ptr(), std::ptr::null());
        (nvrtc.create)(&mut program, source.as_ptr(), name, 0, none, none)
    };
    nvrtc.check(created, "")?;
    let compiled = cubin(nvrtc, program, &options);
    // SAFETY: made above, and not used again.
    unsafe { (nvrtc.destroy)(&mut program) };
    compiled
}

fn cubin(nvrtc: &Nvrtc, program: *mut c_void, options: &[*const c_char]) -> Result<Vec<u8>> {
    // SAFETY: the program lives, as do the options.
    let code = unsafe { (nvrtc.compile)(program, options.len() as c_int, options.as_ptr()) };
    if code != 0 {
        let mut size = 0;
        // SAFETY: the program lives; as many bytes are written as it has said.
        let log = unsafe {
            (nvrtc.log_size)(program, &mut size);
            let mut log = vec![0u8; size];
            (nvrtc.log)(program, log.as_mut_ptr().cast());
            log
        };
        return nvrtc.check(code, &String::from_utf8_lossy(&log)).map(|()| Vec::new());
    }
    let mut size = 0;
    // SAFETY: writes one number.
    nvrtc.check(unsafe { (nvrtc.cubin_size)(program, &mut size) }, "")?;
    let mut image = vec![0u8; size];
    // SAFETY: writes as many bytes as it has said.
    nvrtc.check(unsafe { (nvrtc.cubin)(program, image.as_mut_ptr().cast()) }, "")?;
    Ok(image)
}

/// Kernels compiled for one GPU. They stay for as long as the process.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    ordinal: usize,
    module: usize,
}

/// One of a program's kernels.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    ordinal: usize,
    handle: usize,
}

/// What a kernel is given: an address, a number, or plain data by value.
#[derive(Debug)]
pub struct Argument<'a>(*mut c_void, std::marker::PhantomData<&'a ()>);

impl<'a> Argument<'a> {
    /// The value, which is copied at the launch. Of the kernel's parameter's type and layout.
    pub fn new<T: Copy>(value: &'a T) -> Self {
        Argument(std::ptr::from_ref(value).cast_mut().cast(), std::marker::PhantomData)
    }
}

impl Program {
    /// Compiles `source` for the GPU of `stream`, with further `options` of the compiler.
    ///
    /// # Errors
    /// [`Error::Library`] without NVRTC, or with its words about the source; [`Error::Cuda`].
    pub fn new(stream: &Stream, source: &str, options: &[&str]) -> Result<Self> {
        let image = compile(source, stream.gpu().capability(), options)?;
        // SAFETY: a whole cubin, which NVRTC has just made.
        let module = unsafe { stream.gpu().load_module(&image)? };
        Ok(Self { ordinal: stream.ordinal(), module })
    }

    /// The kernel called `name`.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn kernel(&self, stream: &Stream, name: &CStr) -> Result<Kernel> {
        same_gpu(self.ordinal, stream)?;
        // SAFETY: the module is loaded on this GPU, and stays.
        let handle = unsafe { stream.gpu().kernel(self.module, name)? };
        Ok(Kernel { ordinal: self.ordinal, handle })
    }
}

impl Kernel {
    /// Enqueues it on `stream`.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    ///
    /// # Safety
    /// `arguments` are of the kernel's parameter types, in their order and all of them; what it does with them, in its
    /// turn on `stream`, is allowed.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        blocks: u32,
        threads: u32,
        arguments: &mut [Argument<'_>],
    ) -> Result<()> {
        same_gpu(self.ordinal, stream)?;
        let mut arguments: Vec<*mut c_void> = arguments.iter().map(|argument| argument.0).collect();
        // SAFETY: the kernel is of this GPU; the rest is the caller's promise.
        unsafe { stream.gpu().launch(self.handle, blocks, threads, stream.handle().0, &mut arguments) }
    }
}

fn same_gpu(ordinal: usize, stream: &Stream) -> Result<()> {
    if ordinal == stream.ordinal() {
        return Ok(());
    }
    let message = format!("the stream is on GPU {}", stream.ordinal());
    Err(Error::Cuda { doing: "use kernels", ordinal, code: 1, message })
}
