//! For tests, ours and our users': a disk that can crash, ranks as threads, and a file system that can be watched.

mod checksums;
mod disk;
mod observed;

pub use crate::ranks::{RankThread, run_ranks};
pub use checksums::WithoutChecksums;
pub use disk::{Crash, SimulatedDisk};
pub use observed::{Observed, Operation};
