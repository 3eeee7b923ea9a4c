//! Matrix products by cuBLAS, which is looked for when the program runs
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use lightrft_collectives::nccl::Stream;
use lightrft_collectives::nccl::driver::{symbols, toolkit};
use lightrft_collectives::{Error as DriverError, Result as DriverResult};

use super::memory::Block;
use super::shape::Elements;

/// `cublasStatus_t`.
type Status = c_int;
/// `cublasHandle_t`.
type Handle = usize;

symbols! {
    /// The functions of libcublas.
    struct Library("cuBLAS");
    fn create = "cublasCreate_v2"(*mut Handle) -> Status;
    fn destroy = "cublasDestroy_v2"(Handle) -> Status;
    fn set_stream = "cublasSetStream_v2"(Handle, usize) -> Status;
    fn set_workspace = "cublasSetWorkspace_v2"(Handle, u64, usize) -> Status;
    fn set_math_mode = "cublasSetMathMode"(Handle, c_int) -> Status;
    fn gemm = "cublasGemmEx"(
        Handle, c_int, c_int, c_int, c_int, c_int, *const c_void, u64, c_int, c_int, u64, c_int, c_int, *const c_void,
        u64, c_int, c_int, c_int, c_int
    ) -> Status;
    fn status_string = "cublasGetStatusString"(Status) -> *const c_char;
}

/// `CUBLAS_OP_N` and `CUBLAS_OP_T`.
const AS_IS: c_int = 0;
const TRANSPOSED: c_int = 1;
/// `CUBLAS_DEFAULT_MATH`: f32 without TF32.
const DEFAULT_MATH: c_int = 0;
/// `CUDA_R_32F`, the type of every result.
const F32: c_int = 0;
/// `CUBLAS_COMPUTE_32F`.
const COMPUTE_F32: c_int = 68;
/// `CUBLAS_GEMM_DEFAULT`.
const DEFAULT_ALGORITHM: c_int = -1;

/// What NVIDIA recommends for Hopper, and enough for those before.
pub(super) const WORKSPACE_BYTES: u64 = 32 << 20;

/// Products of one engine, on its stream.
#[derive(Debug)]
pub(super) struct Blas {
    library: &'static Library,
    handle: Handle,
    stream: Stream,
}

/// `out[columns, rows] = x[columns, inner] weightᵀ`, or added to what `out` has, for a `weight` `[rows, inner]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) weight: u64,
    pub(super) x: u64,
    pub(super) out: u64,
    pub(super) rows: usize,
    pub(super) inner: usize,
    pub(super) columns: usize,
    /// Of the weight and `x`; the result is f32.
    pub(super) elements: Elements,
    pub(super) adds: bool,
}

impl Blas {
    /// # Errors
    /// [`DriverError::Library`] without cuBLAS: `$CUBLAS_LIB`, or by the names that its versions have.
    pub(super) fn new(stream: &Stream) -> DriverResult<Self> {
        static LIBRARY: OnceLock<DriverResult<Library>> = OnceLock::new();
        let load = || Library::load(&toolkit("CUBLAS_LIB", "libcublas"));
        let library = LIBRARY.get_or_init(load).as_ref().map_err(Clone::clone)?;
        let _current = stream.gpu().enter()?;
        let mut handle = 0;
        // SAFETY: writes one handle, of the context that is current.
        library.check(unsafe { (library.create)(&mut handle) })?;
        let blas = Self { library, handle, stream: stream.clone() };
        // SAFETY: the handle was just made, the stream lives as long.
        unsafe {
            library.check((library.set_stream)(handle, stream.handle().0))?;
            library.check((library.set_math_mode)(handle, DEFAULT_MATH))?;
        }
        Ok(blas)
    }

    /// Products use this memory from now on.
    ///
    /// # Safety
    /// It lives as long as products are enqueued.
    pub(super) unsafe fn use_workspace(&self, workspace: &Block) -> DriverResult<()> {
        let _current = self.stream.gpu().enter()?;
        let (address, bytes) = (workspace.address(), workspace.bytes() as usize);
        // SAFETY: memory of this GPU and stream; the rest is the caller's promise.
        self.library.check(unsafe { (self.library.set_workspace)(self.handle, address, bytes) })
    }

    /// Enqueues a product.
    ///
    /// # Safety
    /// The addresses are of memory of this GPU with as many elements as the product says, free to be used in turn on the
    /// stream.
    pub(super) unsafe fn multiply(&self, product: &Product) -> DriverResult<()> {
        let Product { weight, x, out, rows, inner, columns, elements, adds } = *product;
        let [m, n, k] = [rows, columns, inner].map(|number| c_int::try_from(number).unwrap_or(-1));
        let kind = match elements {
            Elements::F32 => F32,
            Elements::F16 => 2,
            Elements::Bf16 => 14,
        };
        let (one, kept) = (1f32, if adds { 1f32 } else { 0f32 });
        let (one, kept) = (std::ptr::from_ref(&one).cast(), std::ptr::from_ref(&kept).cast());
        let _current = self.stream.gpu().enter()?;
        // cuBLAS counts by columns: to it a row-major matrix is its transpose.
        // SAFETY: the caller's promise; the factors are read before the call returns.
        let status = unsafe {
            (self.library.gemm)(
                self.handle,
                TRANSPOSED,
                AS_IS,
                m,
                n,
                k,
                one,
                weight,
                kind,
                k,
                x,
                kind,
                k,
                kept,
                out,
                F32,
                m,
                COMPUTE_F32,
                DEFAULT_ALGORITHM,
            )
        };
        self.library.check(status)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if let Ok(_current) = self.stream.gpu().enter() {
            // SAFETY: made by `new` and not used again.
            unsafe { (self.library.destroy)(self.handle) };
        }
    }
}

impl Library {
    fn check(&self, status: Status) -> DriverResult<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: returns a constant string, also for a status that it does not know.
        let text = unsafe { CStr::from_ptr((self.status_string)(status)) };
        Err(DriverError::Library { library: "cuBLAS", reason: text.to_string_lossy().into_owned() })
    }
}
