//! Errors: the caller's mistake, a mismatch between ranks, a lost peer, a deadline

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::op::{Dtype, ReduceOp};
use crate::operation::{Call, Signature};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// How a rank was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Loss {
    /// Its process ended, or its connection broke, without a goodbye.
    Died,
    /// It dropped its communicator while others still needed it.
    Left,
    /// As [`Left`](Loss::Left), since rank `lost` of the world, which need not be in this group, had been lost: the end of
    /// that rank is the cause.
    #[allow(missing_docs)]
    LeftAfter { lost: usize },
    /// Its function returned an error or panicked (ranks as threads), or a call failed on its side alone.
    Failed,
    /// It is on another machine and has given no sign of life for seconds.
    Silent,
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Loss::Died => f.write_str("died"),
            Loss::Left => f.write_str("left the group"),
            Loss::LeftAfter { lost } => write!(f, "left the group after rank {lost} was lost"),
            Loss::Failed => f.write_str("failed"),
            Loss::Silent => f.write_str("does not answer"),
        }
    }
}

/// An entry of a list or map that not all ranks gave alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Differing {
    /// Its key, or its place.
    pub key: String,
    /// What it was there: operation, type and length.
    pub form: String,
    /// The ranks of the world that gave it in this form.
    pub ranks: Vec<usize>,
}

/// The first few of `differing`, for a message.
fn list(differing: &[Differing]) -> String {
    const SHOWN: usize = 8;
    let shown = differing.iter().take(SHOWN);
    let mut text: Vec<String> =
        shown.map(|d| format!("`{}` ({}) on ranks {:?}", d.key, d.form, d.ranks)).collect();
    if differing.len() > SHOWN {
        text.push(format!("and {} more", differing.len() - SHOWN));
    }
    text.join(", ")
}

/// What can go wrong between ranks.
///
/// Errors of the first kind are the caller's mistakes: nothing was sent and the group stays usable. After
/// [`Mismatch`](Error::Mismatch), [`PeerLost`](Error::PeerLost) or [`Timeout`](Error::Timeout) the ranks are out of
/// step: the group is poisoned, and every later call on it returns the same error at once.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer has the wrong number of elements.
    #[error("{call} on `{group}`: {what} has {got} elements, expected {expected}")]
    #[allow(missing_docs)]
    Length { call: Call, group: String, what: &'static str, got: usize, expected: usize },
    /// A buffer cannot be cut into one equal part per rank.
    #[error("{call} on `{group}`: {what} has {got} elements, expected a multiple of the {world} ranks")]
    #[allow(missing_docs)]
    Uneven { call: Call, group: String, what: &'static str, got: usize, world: usize },
    /// A root, sender, receiver or member that is no rank of the group.
    #[error("{call} on `{group}`: {what} is rank {rank}, expected less than {world}")]
    #[allow(missing_docs)]
    Rank { call: Call, group: String, what: &'static str, rank: usize, world: usize },
    /// A rank that sends to, or receives from, itself.
    #[error("{call} on `{group}`: rank {rank} cannot be its own peer")]
    #[allow(missing_docs)]
    OwnRank { call: Call, group: String, rank: usize },
    /// The members of a new group are none, or one is named twice.
    #[error("subgroup of `{group}`: ranks {ranks:?}, expected at least one and each once")]
    #[allow(missing_docs)]
    Members { group: String, ranks: Vec<usize> },
    /// Input and output have different element types.
    #[error("{call} on `{group}`: input is {input:?} but output is {output:?}")]
    #[allow(missing_docs)]
    Dtypes { call: Call, group: String, input: Dtype, output: Dtype },
    /// A reduce operation that is not defined on the element type.
    #[error("{call} on `{group}`: {op} is not defined on {dtype:?}")]
    #[allow(missing_docs)]
    Unsupported { call: Call, group: String, op: ReduceOp, dtype: Dtype },
    /// Bytes that are no whole, aligned elements, or of a type that does not travel.
    #[error("{bytes} bytes at {address:#x} are no whole, aligned elements of {dtype:?}")]
    #[allow(missing_docs)]
    Buffer { dtype: Dtype, bytes: usize, address: usize },
    /// A buffer is where this group, or this call's other buffers, are not.
    #[error("{call}: a buffer is {got}, expected {expected}")]
    #[allow(missing_docs)]
    Place { call: Call, got: &'static str, expected: &'static str },
    /// A mesh that cannot be, or an axis or rank that it does not have.
    #[error("mesh: {got}, expected {expected}")]
    #[allow(missing_docs)]
    Mesh { got: String, expected: String },
    /// An argument that must be given on the root (and only there) was not.
    #[error("{call} on `{group}`: rank {rank} gave {got}, expected {expected}")]
    #[allow(missing_docs)]
    Argument { call: Call, group: String, rank: usize, got: String, expected: String },

    /// Ranks gave lists or maps with different entries. All ranks get this before anything is reduced.
    #[error("{call} on `{group}`: not the same on all ranks: {}", list(differing))]
    #[allow(missing_docs)]
    Entries { call: Call, group: String, differing: Vec<Differing> },
    /// A result was asked for again after it had been taken.
    #[error("the result of this call was taken before")]
    Taken,

    /// Two ranks made different calls. Ranks are those of the world.
    #[error("on `{group}`, rank {rank} called {mine} but rank {other} called {theirs}")]
    #[allow(missing_docs)]
    Mismatch { group: String, rank: usize, mine: Box<Signature>, other: usize, theirs: Box<Signature> },
    /// A rank of the world is gone.
    #[error("{call} on `{group}`: rank {rank} (pid {pid} on {host}) {how}")]
    #[allow(missing_docs)]
    PeerLost { call: Call, group: String, rank: usize, pid: u32, host: String, how: Loss },
    /// The deadline passed before these ranks of the world had come. The report says what they did instead, as far as
    /// that could be found out.
    #[error("{call} on `{group}`: waited {waited:?} for ranks {missing:?}; {report}")]
    #[allow(missing_docs)]
    Timeout { call: Call, group: String, waited: Duration, missing: Vec<usize>, report: String },
    /// A group cannot be made anew from its survivors: by this backend, or once more.
    #[error("`{group}` cannot be rebuilt: {why}")]
    #[allow(missing_docs)]
    NoRebuild { group: String, why: &'static str },
    /// The function of a rank (a thread) panicked.
    #[error("rank {rank} panicked: {message}")]
    #[allow(missing_docs)]
    Panicked { rank: usize, message: String },

    /// An object could not be written as MessagePack.
    #[error("{call} on `{group}`: cannot encode the object of rank {rank}")]
    #[allow(missing_docs)]
    Encode { call: Call, group: String, rank: usize, source: Arc<rmp_serde::encode::Error> },
    /// An object of another rank could not be read: the ranks use different types.
    #[error("{call} on `{group}`: cannot decode the object of rank {rank}")]
    #[allow(missing_docs)]
    Decode { call: Call, group: String, rank: usize, source: Arc<rmp_serde::decode::Error> },

    /// A variable of the environment is missing, malformed or contradicts another.
    #[error("environment variable {variable}: {got}, expected {expected}")]
    #[allow(missing_docs)]
    Environment { variable: &'static str, got: String, expected: String },
    /// A URL that says nowhere to meet, or contradicts what else is known.
    #[error("`{url}` has {what}, expected {expected}")]
    #[allow(missing_docs)]
    Url { url: String, what: String, expected: &'static str },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    #[allow(missing_docs)]
    Bind { address: SocketAddr, source: Arc<io::Error> },
    /// The store does not answer, or not in its protocol.
    #[error("store at {store}: {doing} failed: {source}")]
    #[allow(missing_docs)]
    Store { store: String, doing: &'static str, source: Arc<io::Error> },
    /// Keys were not set in time.
    #[error("store at {store}: waited {waited:?} for {keys:?}")]
    #[allow(missing_docs)]
    StoreTimeout { store: String, keys: Vec<String>, waited: Duration },
    /// A rank, or the store, does not know the token that this rank knows, or one of the two has none.
    #[error("{peer} did not prove the job's token, expected the same LIGHTRFT_TOKEN on all ranks")]
    #[allow(missing_docs)]
    Token { peer: String },
    /// An operating-system call failed.
    #[error("cannot {doing}: {source}")]
    #[allow(missing_docs)]
    Io { doing: String, source: Arc<io::Error> },
    /// A shared library that a GPU needs is not on this machine, or too old.
    #[error("cannot use {library}: {reason}")]
    #[allow(missing_docs)]
    Library { library: &'static str, reason: String },
    /// The CUDA driver refused; `code` is its `CUresult`.
    #[error("cannot {doing} on GPU {ordinal}: {message} (CUDA error {code})")]
    #[allow(missing_docs)]
    Cuda { doing: &'static str, ordinal: usize, code: i32, message: String },
    /// NCCL, or a GPU below it, failed on a rank of the world; `code` is NCCL's `ncclResult_t`. Poisons every group on GPUs.
    #[error("{call} on `{group}`: rank {rank}: {message}")]
    #[allow(missing_docs)]
    Nccl { call: Call, group: String, rank: usize, code: i32, message: String },
    /// A member of the world sent bytes that are not this library's protocol, or not this version of it.
    #[error("rank {rank} sent {got}, expected {expected}")]
    #[allow(missing_docs)]
    Protocol { rank: usize, got: String, expected: String },
}
