//! NCCL as its header declares it: types, and one function for each foreign call, its code turned into a `Result`
//!
//! Handles of NCCL and CUDA are passed as integers of a pointer's size: they are never dereferenced here, and an
//! integer may go to another thread. Declarations follow the public header of NCCL 2.28; every function is in 2.18
//! already.
#![allow(unsafe_code)]

use std::ffi::{CStr, OsString, c_char, c_int, c_uint};
use std::sync::OnceLock;

use super::library::symbols;
use crate::error::{Error, Result};
use crate::op::{Dtype, ReduceOp};

/// `ncclComm_t`.
pub(super) type CommHandle = usize;
/// `cudaStream_t`.
pub(super) type StreamHandle = usize;
/// `ncclResult_t`.
type Code = c_int;

/// `ncclInProgress`: not done yet, and no error.
const IN_PROGRESS: Code = 7;
/// `NCCL_SPLIT_NOCOLOR`: this rank is in no part of a split.
pub(super) const NO_COLOUR: c_int = -1;
/// `NCCL_CONFIG_UNDEF_INT`: NCCL's own choice.
const UNDEFINED: c_int = c_int::MIN;
/// The first version with everything we need of communicators that do not block: 2.18 brought `ncclCommSplit`.
const OLDEST: c_int = 21_800;

/// `ncclUniqueId`: where the ranks of a new communicator meet.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// `ncclConfig_t` of NCCL 2.28. `size` and `version` tell an older or newer library which fields are there.
#[derive(Debug)]
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    pub(super) blocking: c_int,
    cga_cluster_size: c_int,
    pub(super) min_ctas: c_int,
    pub(super) max_ctas: c_int,
    net_name: *const c_char,
    pub(super) split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
    channels_per_net_peer: c_int,
    nvlink_centric_sched: c_int,
}

/// Whether calls on a communicator block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Calls {
    /// A thread of NCCL's does each, and [`Nccl::async_error`] says when it has.
    Return = 0,
    /// The caller's thread does them.
    Block = 1,
}

impl Config {
    /// What `NCCL_CONFIG_INITIALIZER` is, but for two settings: whether calls block, and that a communicator made by a
    /// split shares nothing with its parent, so that the end of one is not the end of the other.
    pub(super) fn new(calls: Calls) -> Self {
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 22_809,
            blocking: calls as c_int,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: 0,
            traffic_class: UNDEFINED,
            comm_name: std::ptr::null(),
            collnet_enable: UNDEFINED,
            cta_policy: UNDEFINED,
            shrink_share: UNDEFINED,
            nvls_ctas: UNDEFINED,
            channels_per_net_peer: UNDEFINED,
            nvlink_centric_sched: UNDEFINED,
        }
    }
}

/// `ncclDataType_t` of a type that travels; `None` for one that does not.
pub(super) fn data_type(dtype: Dtype) -> Option<c_int> {
    Some(match dtype {
        Dtype::U8 => 1,
        Dtype::I32 => 2,
        Dtype::I64 => 4,
        Dtype::F16 => 6,
        Dtype::F32 => 7,
        Dtype::F64 => 8,
        Dtype::BF16 => 9,
        _ => return None,
    })
}

/// `ncclRedOp_t`.
pub(super) fn reduce_op(op: ReduceOp) -> c_int {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Product => 1,
        ReduceOp::Max => 2,
        ReduceOp::Min => 3,
        ReduceOp::Mean => 4,
    }
}

/// What NCCL said when it refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) code: i32,
    pub(super) message: String,
}

/// How far a call on a communicator that does not block has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    /// Ask [`Nccl::async_error`] until it is done; nothing else may be called on this communicator before.
    Running,
}

symbols! {
    /// The functions of libnccl.
    pub(super) struct Nccl("NCCL");
    fn get_version = "ncclGetVersion"(*mut c_int) -> Code;
    fn get_unique_id = "ncclGetUniqueId"(*mut UniqueId) -> Code;
    fn get_error_string = "ncclGetErrorString"(Code) -> *const c_char;
    fn get_last_error = "ncclGetLastError"(CommHandle) -> *const c_char;
    fn comm_init_rank_config = "ncclCommInitRankConfig"(*mut CommHandle, c_int, UniqueId, c_int, *mut Config) -> Code;
    fn comm_split = "ncclCommSplit"(CommHandle, c_int, c_int, *mut CommHandle, *mut Config) -> Code;
    fn comm_finalize = "ncclCommFinalize"(CommHandle) -> Code;
    fn comm_destroy = "ncclCommDestroy"(CommHandle) -> Code;
    fn comm_abort = "ncclCommAbort"(CommHandle) -> Code;
    fn comm_get_async_error = "ncclCommGetAsyncError"(CommHandle, *mut Code) -> Code;
    fn group_start = "ncclGroupStart"() -> Code;
    fn group_end = "ncclGroupEnd"() -> Code;
    fn all_reduce = "ncclAllReduce"(u64, u64, usize, c_int, c_int, CommHandle, StreamHandle) -> Code;
    fn all_gather = "ncclAllGather"(u64, u64, usize, c_int, CommHandle, StreamHandle) -> Code;
    fn reduce_scatter = "ncclReduceScatter"(u64, u64, usize, c_int, c_int, CommHandle, StreamHandle) -> Code;
    fn broadcast = "ncclBroadcast"(u64, u64, usize, c_int, c_int, CommHandle, StreamHandle) -> Code;
    fn reduce = "ncclReduce"(u64, u64, usize, c_int, c_int, c_int, CommHandle, StreamHandle) -> Code;
    fn send = "ncclSend"(u64, usize, c_int, c_int, CommHandle, StreamHandle) -> Code;
    fn recv = "ncclRecv"(u64, usize, c_int, c_int, CommHandle, StreamHandle) -> Code;
}

impl Nccl {
    /// The library of this process, looked for once: `$NCCL_LIB`, `libnccl.so.2`, `libnccl.so`.
    pub(super) fn get() -> Result<&'static Nccl> {
        static LIBRARY: OnceLock<Result<Nccl>> = OnceLock::new();
        let load = || {
            let mut names: Vec<OsString> = std::env::var_os("NCCL_LIB").into_iter().collect();
            names.extend(["libnccl.so.2", "libnccl.so"].map(OsString::from));
            let nccl = Nccl::load(&names)?;
            nccl.check_version()?;
            Ok(nccl)
        };
        LIBRARY.get_or_init(load).as_ref().map_err(Clone::clone)
    }

    fn check_version(&self) -> Result<()> {
        let wrong = |reason| Error::Library { library: "NCCL", reason };
        let version = self.version().map_err(|fault| wrong(fault.message))?;
        if version >= OLDEST {
            return Ok(());
        }
        Err(wrong(format!("version code {version}, expected {OLDEST} (2.18) or later")))
    }

    /// Success, or what NCCL has to say about `code`, its detail of the last error included.
    fn outcome(&self, code: Code) -> Result<Progress, Fault> {
        match code {
            0 => Ok(Progress::Done),
            IN_PROGRESS => Ok(Progress::Running),
            code => Err(self.fault(code)),
        }
    }

    fn done(&self, code: Code) -> Result<(), Fault> {
        self.outcome(code).map(drop)
    }

    fn fault(&self, code: Code) -> Fault {
        let text = |pointer: *const c_char| {
            if pointer.is_null() {
                return String::new();
            }
            // SAFETY: NCCL returns a string that ends with a zero and stays where it is: a constant, or a buffer of the
            // library that is never freed. Another thread's error may overwrite its text meanwhile, never its end.
            unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().to_owned()
        };
        // SAFETY: takes any code.
        let name = text(unsafe { (self.get_error_string)(code) });
        // SAFETY: takes no communicator, as the header allows.
        let detail = text(unsafe { (self.get_last_error)(0) });
        let detail = if detail.is_empty() { detail } else { format!(": {detail}") };
        Fault { code, message: format!("NCCL error {code}, {name}{detail}") }
    }

    /// `ncclGetVersion`: 22809 is 2.28.9.
    pub(super) fn version(&self) -> Result<i32, Fault> {
        let mut version = 0;
        // SAFETY: writes one int.
        self.done(unsafe { (self.get_version)(&mut version) })?;
        Ok(version)
    }

    /// `ncclGetUniqueId`: opens a listener on this host that the other ranks will connect to.
    pub(super) fn unique_id(&self) -> Result<UniqueId, Fault> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: writes one id.
        self.done(unsafe { (self.get_unique_id)(&mut id) })?;
        Ok(id)
    }

    /// `ncclCommInitRankConfig`: returns at once; the communicator is ready when [`async_error`](Self::async_error) says so.
    /// The device is the one whose context is current. Even after a fault there may be a handle, to abort.
    pub(super) fn init(
        &self,
        ranks: usize,
        id: UniqueId,
        rank: usize,
        config: &mut Config,
    ) -> (CommHandle, Result<Progress, Fault>) {
        let mut comm = 0;
        // SAFETY: writes one handle; the config is read during the call only.
        let code =
            unsafe { (self.comm_init_rank_config)(&mut comm, ranks as c_int, id, rank as c_int, config) };
        (comm, self.outcome(code))
    }

    /// `ncclCommSplit`: writes the new handle, 0 where this rank has [`NO_COLOUR`], to `new`. The *parent*'s
    /// progress says when that is done.
    ///
    /// # Safety
    /// `parent` is live, and `new` stays valid until the parent's progress is no longer `Running`.
    pub(super) unsafe fn split(
        &self,
        parent: CommHandle,
        colour: c_int,
        key: usize,
        new: *mut CommHandle,
        config: &mut Config,
    ) -> Result<Progress, Fault> {
        // SAFETY: the caller's promise.
        self.outcome(unsafe { (self.comm_split)(parent, colour, key as c_int, new, config) })
    }

    /// `ncclCommGetAsyncError`: how far the last call has come, or how the communicator has failed since.
    ///
    /// # Safety
    /// `comm` is live and no other thread calls anything on it meanwhile.
    pub(super) unsafe fn async_error(&self, comm: CommHandle) -> Result<Progress, Fault> {
        let mut state = 0;
        // SAFETY: the caller's promise; writes one code.
        self.done(unsafe { (self.comm_get_async_error)(comm, &mut state) })?;
        self.outcome(state)
    }

    /// `ncclCommFinalize`: flushes what was enqueued. Does not block.
    ///
    /// # Safety
    /// As [`async_error`](Self::async_error).
    pub(super) unsafe fn finalize(&self, comm: CommHandle) -> Result<Progress, Fault> {
        // SAFETY: the caller's promise.
        self.outcome(unsafe { (self.comm_finalize)(comm) })
    }

    /// `ncclCommDestroy`: frees the communicator. May block.
    ///
    /// # Safety
    /// As [`async_error`](Self::async_error); `comm` is not used again.
    pub(super) unsafe fn destroy(&self, comm: CommHandle) -> Result<(), Fault> {
        // SAFETY: the caller's promise.
        self.done(unsafe { (self.comm_destroy)(comm) })
    }

    /// `ncclCommAbort`: tells the kernels to end and frees the communicator. May block; between
    /// [`group_start`](Self::group_start) and [`group_end`](Self::group_end) it does the first at once and leaves the
    /// second to the end.
    ///
    /// # Safety
    /// `comm` is live. Another thread may be inside a call on it, but must have left it when it is freed; it
    /// is not used again.
    pub(super) unsafe fn abort(&self, comm: CommHandle) -> Result<(), Fault> {
        // SAFETY: the caller's promise.
        self.done(unsafe { (self.comm_abort)(comm) })
    }

    /// `ncclGroupStart`: calls of this thread are collected until [`group_end`](Self::group_end).
    pub(super) fn group_start(&self) -> Result<(), Fault> {
        // SAFETY: counts in this thread's own memory.
        self.done(unsafe { (self.group_start)() })
    }

    /// `ncclGroupEnd`: runs what was collected.
    ///
    /// # Safety
    /// The communicators that were called in between are live, and no other thread calls anything on them meanwhile.
    pub(super) unsafe fn group_end(&self) -> Result<Progress, Fault> {
        // SAFETY: the caller's promise.
        self.outcome(unsafe { (self.group_end)() })
    }
}

/// A communicator and a stream, to enqueue calls on.
#[derive(Clone, Copy)]
pub(super) struct Lane {
    nccl: &'static Nccl,
    comm: CommHandle,
    stream: StreamHandle,
}

impl Lane {
    /// # Safety
    /// As long as this value is used: `comm` is live and no other thread calls anything on it, `stream` is a stream of its
    /// device, and every address given is `count` elements of device memory that stay valid, and that nobody
    /// else writes, until the stream has passed the call.
    pub(super) unsafe fn new(nccl: &'static Nccl, comm: CommHandle, stream: StreamHandle) -> Self {
        Lane { nccl, comm, stream }
    }

    pub(super) fn all_reduce(
        &self,
        from: u64,
        to: u64,
        count: usize,
        dtype: c_int,
        op: c_int,
    ) -> Result<Progress, Fault> {
        // SAFETY: what `new` was promised.
        self.nccl
            .outcome(unsafe { (self.nccl.all_reduce)(from, to, count, dtype, op, self.comm, self.stream) })
    }

    /// `count` is that of one rank's part.
    pub(super) fn all_gather(
        &self,
        from: u64,
        to: u64,
        count: usize,
        dtype: c_int,
    ) -> Result<Progress, Fault> {
        // SAFETY: what `new` was promised.
        self.nccl.outcome(unsafe { (self.nccl.all_gather)(from, to, count, dtype, self.comm, self.stream) })
    }

    /// `count` is that of one rank's part.
    pub(super) fn reduce_scatter(
        &self,
        from: u64,
        to: u64,
        count: usize,
        dtype: c_int,
        op: c_int,
    ) -> Result<Progress, Fault> {
        // SAFETY: what `new` was promised.
        self.nccl.outcome(unsafe {
            (self.nccl.reduce_scatter)(from, to, count, dtype, op, self.comm, self.stream)
        })
    }

    pub(super) fn broadcast(
        &self,
        from: u64,
        to: u64,
        count: usize,
        dtype: c_int,
        root: usize,
    ) -> Result<Progress, Fault> {
        let root = root as c_int;
        // SAFETY: what `new` was promised.
        self.nccl
            .outcome(unsafe { (self.nccl.broadcast)(from, to, count, dtype, root, self.comm, self.stream) })
    }

    pub(super) fn reduce(
        &self,
        from: u64,
        to: u64,
        count: usize,
        dtype: c_int,
        op: c_int,
        root: usize,
    ) -> Result<Progress, Fault> {
        let root = root as c_int;
        // SAFETY: what `new` was promised.
        self.nccl
            .outcome(unsafe { (self.nccl.reduce)(from, to, count, dtype, op, root, self.comm, self.stream) })
    }

    pub(super) fn send(&self, from: u64, count: usize, dtype: c_int, peer: usize) -> Result<Progress, Fault> {
        // SAFETY: what `new` was promised.
        self.nccl
            .outcome(unsafe { (self.nccl.send)(from, count, dtype, peer as c_int, self.comm, self.stream) })
    }

    pub(super) fn recv(&self, to: u64, count: usize, dtype: c_int, peer: usize) -> Result<Progress, Fault> {
        // SAFETY: what `new` was promised.
        self.nccl
            .outcome(unsafe { (self.nccl.recv)(to, count, dtype, peer as c_int, self.comm, self.stream) })
    }

    /// Makes the calls of `body` as one.
    pub(super) fn fused(&self, body: impl FnOnce() -> Result<(), Fault>) -> Result<Progress, Fault> {
        self.nccl.group_start()?;
        let result = body();
        // SAFETY: what `new` was promised; only this communicator is called in between.
        let ended = unsafe { self.nccl.group_end() };
        // Also after a fault the group must be closed: it belongs to this thread.
        result.and(ended)
    }
}

#[cfg(test)]
mod tests {
    use std::mem::{align_of, offset_of, size_of};

    use super::*;

    #[test]
    fn the_config_lies_in_memory_as_the_header_lays_it_out() {
        assert_eq!((size_of::<Config>(), align_of::<Config>()), (80, 8));
        let offsets = [
            offset_of!(Config, magic),
            offset_of!(Config, blocking),
            offset_of!(Config, max_ctas),
            offset_of!(Config, net_name),
            offset_of!(Config, split_share),
            offset_of!(Config, comm_name),
            offset_of!(Config, collnet_enable),
            offset_of!(Config, nvlink_centric_sched),
        ];
        assert_eq!(offsets, [8, 16, 28, 32, 40, 48, 56, 76]);
        assert_eq!(size_of::<UniqueId>(), 128);
    }

    #[test]
    fn a_library_that_is_not_there_is_an_error_that_says_what_was_tried() {
        let error = Nccl::load(&["libnccl-that-is-not-there.so".into()]).unwrap_err();
        let Error::Library { library: "NCCL", reason } = error else { panic!("{error}") };
        assert!(reason.contains("libnccl-that-is-not-there.so"), "{reason}");
    }

    #[test]
    #[ignore = "needs libnccl, though no GPU"]
    fn nccl_loads_and_says_its_version_without_a_gpu() {
        assert!(Nccl::get().unwrap().version().unwrap() >= OLDEST);
    }

    #[test]
    fn a_library_without_its_functions_is_an_error_that_names_one() {
        let error = Nccl::load(&["libm.so.6".into()]).unwrap_err();
        assert!(matches!(&error, Error::Library { reason, .. } if reason.contains("nccl")), "{error}");
    }
}
