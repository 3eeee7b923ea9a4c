//! Enqueued work that is recorded once and enqueued again at once: CUDA graphs
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::sync::OnceLock;

use lightrft_collectives::nccl::Stream;
use lightrft_collectives::nccl::driver::symbols;
use lightrft_collectives::{Error as DriverError, Result as DriverResult};

/// `CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`: what other threads do meanwhile is their own affair.
const THREAD_LOCAL: c_int = 1;

symbols! {
    /// The functions of libcuda that graphs need.
    struct Library("the CUDA driver");
    fn begin_capture = "cuStreamBeginCapture_v2"(usize, c_int) -> c_int;
    fn end_capture = "cuStreamEndCapture"(usize, *mut usize) -> c_int;
    fn instantiate = "cuGraphInstantiateWithFlags"(*mut usize, usize, u64) -> c_int;
    fn destroy = "cuGraphDestroy"(usize) -> c_int;
    fn launch = "cuGraphLaunch"(usize, usize) -> c_int;
    fn destroy_executable = "cuGraphExecDestroy"(usize) -> c_int;
}

/// What was recorded.
#[derive(Debug)]
pub(super) struct Graph {
    library: &'static Library,
    executable: usize,
    stream: Stream,
}

fn check(stream: &Stream, doing: &'static str, code: c_int) -> DriverResult<()> {
    if code == 0 {
        return Ok(());
    }
    Err(DriverError::Cuda { doing, ordinal: stream.ordinal(), code, message: "the driver refused".into() })
}

impl Graph {
    /// Records what `work` enqueues on the stream; none of it is done.
    ///
    /// # Safety
    /// Whatever `work` enqueues may be enqueued as often as the graph is.
    pub(super) unsafe fn record(
        stream: &Stream,
        work: impl FnOnce() -> DriverResult<()>,
    ) -> DriverResult<Self> {
        static LIBRARY: OnceLock<DriverResult<Library>> = OnceLock::new();
        let load = || Library::load(&["libcuda.so.1".into(), "libcuda.so".into()]);
        let library = LIBRARY.get_or_init(load).as_ref().map_err(Clone::clone)?;
        let _current = stream.gpu().enter()?;
        let (raw, mut graph, mut executable) = (stream.handle().0, 0, 0);
        // SAFETY: the stream is live, and nothing is being recorded on it.
        check(stream, "record work", unsafe { (library.begin_capture)(raw, THREAD_LOCAL) })?;
        let worked = work();
        // SAFETY: ends what was begun above, whatever became of it; writes one handle.
        let ended = check(stream, "record work", unsafe { (library.end_capture)(raw, &mut graph) });
        if graph != 0 {
            // SAFETY: writes one handle, made of the graph, which is not used again.
            let code = unsafe {
                let code = (library.instantiate)(&mut executable, graph, 0);
                (library.destroy)(graph);
                code
            };
            let made = check(stream, "make recorded work ready", code).map(|()| Self {
                library,
                executable,
                stream: stream.clone(),
            });
            // A graph that is not wanted any more is freed by its drop.
            return worked.and(ended).and(made);
        }
        worked.and(ended)?;
        check(stream, "record work", -1).map(|()| Self { library, executable, stream: stream.clone() })
    }

    /// Enqueues all of it.
    ///
    /// # Safety
    /// What it uses is there, and may be used in turn on its stream.
    pub(super) unsafe fn launch(&self) -> DriverResult<()> {
        let _current = self.stream.gpu().enter()?;
        // SAFETY: the executable is live; the rest is the caller's promise.
        let code = unsafe { (self.library.launch)(self.executable, self.stream.handle().0) };
        check(&self.stream, "enqueue recorded work", code)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Ok(_current) = self.stream.gpu().enter() {
            // SAFETY: made by `record` and not used again. Where it is at work it is freed after that.
            unsafe { (self.library.destroy_executable)(self.executable) };
        }
    }
}
