//! What can go wrong, by what the caller can do about it.

use std::any::Any;
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use rustix::io::Errno;
use safetensors::Dtype;

/// The result of every fallible function here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure to save, find or read a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file system refused an operation.
    #[error("cannot {op} `{}`: {source}", path.display())]
    Io {
        /// What was tried: `create`, `rename`, `sync`, ...
        op: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },

    /// The snapshot contradicts itself or another rank's, or what it says is more than a manifest holds. No checkpoint
    /// was written, and nothing of it is left.
    #[error("snapshot `{tag}` cannot be saved: {reason}")]
    Snapshot {
        /// The snapshot's tag.
        tag: String,
        /// Which part of it, and what was expected.
        reason: String,
    },

    /// The limits of rotation make no sense. Nothing was written.
    #[error("rotation: {field} = {value}, but it must be {expected}")]
    Rotation {
        /// `max_num` or `max_mem_gib`.
        field: &'static str,
        /// The value given.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },

    /// Another rank failed, so the operation failed on every rank. That rank returns its own error.
    #[error("rank {rank} failed while {during}: {reason}")]
    Rank {
        /// The first rank that failed.
        rank: usize,
        /// The phase: `opening`, `planning`, `writing`, `publishing`, `rotating` and others.
        during: &'static str,
        /// That rank's error, as text.
        reason: String,
    },

    /// The ranks could not speak to each other.
    #[error("the ranks could not agree while {during}: {source}")]
    Agreement {
        /// The phase.
        during: &'static str,
        /// What the transport said.
        source: Box<dyn StdError + Send + Sync>,
    },

    /// A save panicked: a defect of the file system's or the group's implementation, or of this crate. The other ranks
    /// are told like of any failure. The checkpoints that were there are still there.
    #[error("the save panicked while {during}: {message}")]
    Panicked {
        /// The phase.
        during: &'static str,
        /// The panic's message.
        message: String,
    },

    /// A second saver wants the same directory.
    #[error("`{}` is being saved to by another process (its lock is held)", dir.display())]
    Busy {
        /// The directory of checkpoints.
        dir: PathBuf,
    },

    /// The tag's directory holds something that this crate did not write, and would be lost.
    #[error("`{}` cannot be replaced: it holds `{found}`, which would be lost", path.display())]
    Foreign {
        /// The directory in the way.
        path: PathBuf,
        /// One entry that is not ours.
        found: String,
    },

    /// A file is not what it should be: torn, rotten, truncated or made up.
    #[error("`{}` is damaged: {reason}", path.display())]
    Damaged {
        /// The damaged file or directory.
        path: PathBuf,
        /// What was found and what was expected.
        reason: String,
    },

    /// There is nothing to load.
    #[error("no complete checkpoint in `{}`{}", dir.display(), list_skipped(skipped))]
    NoCheckpoint {
        /// Where it was looked for.
        dir: PathBuf,
        /// What was found and refused, and why.
        skipped: Vec<crate::Skipped>,
    },

    /// The directories of several models have no step in common.
    #[error("no checkpoint that is complete in all of {}{}", list_dirs(dirs), list_skipped(skipped))]
    NoCommonCheckpoint {
        /// Where it was looked for.
        dirs: Vec<PathBuf>,
        /// What was found and refused, and why.
        skipped: Vec<crate::Skipped>,
    },

    /// No checkpoint has that tag.
    #[error("no checkpoint `{tag}` in `{}`; present: {}", dir.display(), present.join(", "))]
    NoTag {
        /// Where it was looked for.
        dir: PathBuf,
        /// The tag asked for.
        tag: String,
        /// Tags that are there, newest first.
        present: Vec<String>,
    },

    /// The checkpoint or file has no such tensor.
    #[error("`{within}` has no tensor `{name}`")]
    NoTensor {
        /// The checkpoint or the file.
        within: String,
        /// The tensor asked for.
        name: String,
    },

    /// A request does not fit the tensor it is for.
    #[error("tensor `{name}`: {reason}")]
    Request {
        /// The tensor.
        name: String,
        /// The numbers that do not fit.
        reason: String,
    },

    /// The caller, shown the checkpoint before anything was read, did not want it.
    #[error("checkpoint `{tag}` was refused: {source}")]
    Refused {
        /// The checkpoint.
        tag: String,
        /// The caller's reason.
        source: Box<dyn StdError + Send + Sync>,
    },

    /// Reading failed on some rank after it had begun, and there is no other checkpoint to read instead: what the
    /// destinations hold now is neither what they held before nor what was saved.
    #[error("the destinations were written to in part and must not be used: {source}")]
    Spoilt {
        /// Why the reading failed.
        source: Box<Error>,
    },

    /// The checkpoint is of another model than the one expected.
    #[error("{0}")]
    Mismatch(Box<Mismatch>),
}

impl Error {
    pub(crate) fn io(op: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { op, path, source }
    }

    /// Whether this process has come to a limit of its own or of its machine, files or memory: then nothing is known of
    /// what it wanted to look at, and an older checkpoint is no answer.
    pub(crate) fn is_of_process(&self) -> bool {
        let Error::Io { source, .. } = self else { return false };
        source.kind() == io::ErrorKind::OutOfMemory
            || source.raw_os_error().is_some_and(|code| {
                [Errno::MFILE, Errno::NFILE, Errno::NOMEM].iter().any(|limit| limit.raw_os_error() == code)
            })
    }

    /// Whether it says nothing about what is on the disk, only about who reads it: a limit as above, or rights.
    pub(crate) fn is_of_reader(&self) -> bool {
        let forbidden =
            matches!(self, Error::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied);
        forbidden || self.is_of_process()
    }

    pub(crate) fn damaged(path: impl Into<PathBuf>, reason: impl Into<String>) -> Error {
        Error::Damaged { path: path.into(), reason: reason.into() }
    }
}

/// Makes an error of a panic, so that the other ranks are told of it, who wait for what this one says.
pub(crate) fn caught<T>(during: &'static str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    // Nothing that `run` may have left half-done is looked at afterwards but files, which no one counts on yet.
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Err(Error::Panicked { during, message: message_of(panic.as_ref()) }))
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

/// How a checkpoint's tensors differ from those a model expects.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Mismatch {
    /// The checkpoint.
    pub tag: String,
    /// Expected and not there.
    pub missing: Vec<String>,
    /// There and not expected.
    pub unexpected: Vec<String>,
    /// There with another dtype or shape.
    pub differing: Vec<Difference>,
}

/// One tensor that is there, but not as expected.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Difference {
    /// The tensor.
    pub name: String,
    /// Dtype and global shape in the checkpoint.
    pub saved: (Dtype, Vec<usize>),
    /// Dtype and global shape that the caller expects.
    pub expected: (Dtype, Vec<usize>),
}

/// A model of the wrong family differs in hundreds of tensors; the first few tell which it is.
const SHOWN: usize = 8;

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "checkpoint `{}` is of another model", self.tag)?;
        for (what, names) in [("missing", &self.missing), ("unexpected", &self.unexpected)] {
            if !names.is_empty() {
                let shown = &names[..names.len().min(SHOWN)];
                write!(f, "; {} {what}: {}", names.len(), shown.join(", "))?;
                if names.len() > SHOWN {
                    write!(f, ", ...")?;
                }
            }
        }
        if !self.differing.is_empty() {
            write!(f, "; {} differing:", self.differing.len())?;
            for d in self.differing.iter().take(SHOWN) {
                write!(
                    f,
                    " `{}` is {:?} {:?} and should be {:?} {:?};",
                    d.name, d.saved.0, d.saved.1, d.expected.0, d.expected.1
                )?;
            }
        }
        Ok(())
    }
}

fn list_dirs(dirs: &[PathBuf]) -> String {
    dirs.iter().map(|dir| format!("`{}`", dir.display())).collect::<Vec<_>>().join(", ")
}

fn list_skipped(skipped: &[crate::Skipped]) -> String {
    skipped.iter().map(|s| format!("; `{}` refused: {}", s.name, s.reason)).collect()
}
