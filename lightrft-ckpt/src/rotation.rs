//! Which checkpoints to let go, by count and by bytes. Decides, deletes nothing.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::catalog::Skipped;
use crate::error::{Error, Result};

/// How many checkpoints, and how many bytes of them, a directory keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rotation {
    /// Checkpoints kept, counted after a save. At least 1.
    pub max_num: usize,
    /// GiB kept (2^30 bytes). When reached exactly, nothing goes. The newest checkpoint stays, however large.
    pub max_mem_gib: f64,
    /// Which checkpoints those bytes are of.
    pub mem_counts: MemCounts,
}

/// Which checkpoints [`Rotation::max_mem_gib`] limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemCounts {
    /// All of them: the limit holds after every save.
    #[default]
    All,
    /// All but the one saved last. So LightRFT counts, which looks at the limit before it saves: one checkpoint more is
    /// kept, and the directory may hold that much more than the limit.
    AllBeforeSave,
}

impl Default for Rotation {
    /// LightRFT's limits, 3 checkpoints and 1000 GiB, the latter counted with all checkpoints.
    fn default() -> Self {
        Rotation { max_num: 3, max_mem_gib: 1000.0, mem_counts: MemCounts::All }
    }
}

impl Rotation {
    /// Nothing ever goes.
    pub const KEEP_ALL: Rotation =
        Rotation { max_num: usize::MAX, max_mem_gib: f64::INFINITY, mem_counts: MemCounts::All };

    /// LightRFT's decisions, save by save, wherever those lose nothing. Here as everywhere a checkpoint goes only after
    /// the next one is durable, by step instead of modification time, and directories that are no checkpoints neither
    /// count nor go.
    pub const fn lightrft(max_num: usize, max_mem_gib: f64) -> Rotation {
        Rotation { max_num, max_mem_gib, mem_counts: MemCounts::AllBeforeSave }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |field, value: String, expected| Err(Error::Rotation { field, value, expected });
        if self.max_num == 0 {
            return wrong("max_num", "0".into(), "at least 1: the checkpoint just saved is kept");
        }
        if self.max_mem_gib.is_nan() || self.max_mem_gib < 0.0 {
            return wrong("max_mem_gib", self.max_mem_gib.to_string(), "a number of GiB, zero or more");
        }
        Ok(())
    }

    fn max_bytes(&self) -> u64 {
        // The conversion saturates: infinity is every byte there can be.
        (self.max_mem_gib * (1u64 << 30) as f64) as u64
    }
}

/// What a rotation did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Rotated {
    /// Checkpoints that were removed, oldest first.
    pub removed: Vec<String>,
    /// What should have been removed and could not, and why.
    pub not_removed: Vec<Skipped>,
}

impl Rotated {
    /// A rotation of `dir` that failed as a whole.
    pub(crate) fn nothing(dir: &Path, error: &Error) -> Rotated {
        let name = dir.display().to_string();
        tracing::warn!(name, %error, "rotation failed");
        Rotated { removed: Vec::new(), not_removed: vec![Skipped { name, reason: error.to_string() }] }
    }
}

/// A complete checkpoint, as rotation sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) name: String,
    pub(crate) step: u64,
    /// Tells apart checkpoints of the same step.
    pub(crate) saved_unix_ms: u64,
    pub(crate) bytes: u64,
    /// It was saved last.
    pub(crate) saved_last: bool,
    /// `latest` names it, it was just saved, or somebody keeps own files in it.
    pub(crate) protected: bool,
}

impl Candidate {
    /// The bytes that count against the limit.
    fn counted(&self, limits: &Rotation) -> u64 {
        match limits.mem_counts {
            MemCounts::AllBeforeSave if self.saved_last => 0,
            _ => self.bytes,
        }
    }
}

/// The names to let go, oldest first. The newest by step and the protected ones stay, also when the limits are then
/// exceeded.
pub(crate) fn choose(candidates: &[Candidate], limits: &Rotation) -> Vec<String> {
    let mut oldest_first: Vec<&Candidate> = candidates.iter().collect();
    oldest_first.sort_by_key(|c| (c.step, c.saved_unix_ms, &c.name));
    let mut count = candidates.len();
    let mut bytes = candidates.iter().fold(0u64, |sum, c| sum.saturating_add(c.counted(limits)));
    oldest_first.pop(); // The newest is not up for decision.
    let mut gone = Vec::new();
    for candidate in oldest_first.into_iter().filter(|c| !c.protected) {
        if count <= limits.max_num && bytes <= limits.max_bytes() {
            break;
        }
        count -= 1;
        bytes -= candidate.counted(limits).min(bytes);
        gone.push(candidate.name.clone());
    }
    gone
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        prop::collection::vec((0u64..6, 0u64..3, 0u64..(3 << 30), prop::bool::weighted(0.2)), 0..9).prop_map(
            |all| {
                let named = |(i, (step, saved_unix_ms, bytes, protected)): (usize, (u64, u64, u64, bool))| {
                    Candidate {
                        name: format!("c{i}"),
                        step,
                        saved_unix_ms,
                        bytes,
                        saved_last: i == 0,
                        protected,
                    }
                };
                all.into_iter().enumerate().map(named).collect()
            },
        )
    }

    fn limits() -> impl Strategy<Value = Rotation> {
        let mem_counts = prop_oneof![Just(MemCounts::All), Just(MemCounts::AllBeforeSave)];
        (1usize..6, 0.0f64..8.0, mem_counts).prop_map(|(max_num, max_mem_gib, mem_counts)| Rotation {
            max_num,
            max_mem_gib,
            mem_counts,
        })
    }

    fn newest(all: &[Candidate]) -> Option<&Candidate> {
        all.iter().max_by_key(|c| (c.step, c.saved_unix_ms, &c.name))
    }

    proptest! {
        #[test]
        fn the_newest_and_the_protected_never_go(all in candidates(), limits in limits()) {
            let gone = choose(&all, &limits);
            for c in all.iter().filter(|c| c.protected).chain(newest(&all)) {
                prop_assert!(!gone.contains(&c.name));
            }
        }

        #[test]
        fn what_stays_is_within_the_limits_or_may_not_go(all in candidates(), limits in limits()) {
            let gone = choose(&all, &limits);
            let stay: Vec<_> = all.iter().filter(|c| !gone.contains(&c.name)).collect();
            let bytes: u64 = stay.iter().map(|c| c.counted(&limits)).sum();
            let within = stay.len() <= limits.max_num && bytes <= limits.max_bytes();
            prop_assert!(within || stay.iter().all(|c| c.protected || Some(*c) == newest(&all)));
        }

        #[test]
        fn nothing_goes_that_the_limits_would_let_stay(all in candidates(), limits in limits()) {
            let gone = choose(&all, &limits);
            if let Some(last) = gone.last() {
                // Put the last one back: the limits are exceeded.
                let stay: Vec<_> = all.iter().filter(|c| !gone.contains(&c.name) || c.name == *last).collect();
                let bytes: u64 = stay.iter().map(|c| c.counted(&limits)).sum();
                prop_assert!(stay.len() > limits.max_num || bytes > limits.max_bytes());
            }
        }

        #[test]
        fn an_older_one_goes_before_a_newer_one(all in candidates(), limits in limits()) {
            let gone = choose(&all, &limits);
            let age = |name: &String| all.iter().find(|c| c.name == *name).map(|c| (c.step, c.saved_unix_ms));
            prop_assert!(gone.windows(2).all(|pair| age(&pair[0]) <= age(&pair[1])));
            let youngest_gone = gone.last().and_then(age);
            for c in all.iter().filter(|c| !c.protected && !gone.contains(&c.name)) {
                prop_assert!(youngest_gone <= Some((c.step, c.saved_unix_ms)) || gone.is_empty());
            }
        }

        #[test]
        fn deciding_twice_lets_nothing_more_go(all in candidates(), limits in limits()) {
            let gone = choose(&all, &limits);
            let stay: Vec<_> = all.into_iter().filter(|c| !gone.contains(&c.name)).collect();
            prop_assert!(choose(&stay, &limits).is_empty());
        }
    }

    proptest! {
        #[test]
        fn what_lightrft_counts_keeps_as_much_or_more(all in candidates(), limits in limits()) {
            let all_counted = choose(&all, &Rotation { mem_counts: MemCounts::All, ..limits });
            let fewer = choose(&all, &Rotation { mem_counts: MemCounts::AllBeforeSave, ..limits });
            prop_assert!(fewer.iter().all(|name| all_counted.contains(name)));
        }
    }

    #[test]
    fn limits_that_would_delete_everything_are_refused() {
        assert!(Rotation { max_num: 0, ..Rotation::default() }.check().is_err());
        assert!(Rotation { max_mem_gib: -1.0, ..Rotation::default() }.check().is_err());
        assert!(Rotation { max_mem_gib: f64::NAN, ..Rotation::default() }.check().is_err());
        assert!(Rotation { max_mem_gib: 1e8, ..Rotation::default() }.check().is_ok());
        assert!(Rotation::KEEP_ALL.check().is_ok());
        assert_eq!(Rotation::KEEP_ALL.max_bytes(), u64::MAX);
    }
}
