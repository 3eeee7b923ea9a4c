//! Which checkpoint the ranks take: all try the best one, and the next best when any of them cannot have it.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::agreement::{Agreement, agree};
use crate::catalog::{Found, Skipped, scan};
use crate::error::{Error, Result};
use crate::manifest::Summary;
use crate::reader::{Checkpoints, Which};

/// Checkpoints that appear while others are tried, since a running job saves, are tried too, but not for ever.
const MAX_NEWCOMERS: usize = 16;

/// A checkpoint to try.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Candidate {
    /// The directory's name; differs from the tag while the tag is being saved again.
    pub(crate) dir: String,
    pub(crate) tag: String,
}

/// What came of trying one, the same on every rank.
pub(crate) enum Tried<T> {
    Took(T),
    /// Some rank cannot have it: the first one, and why.
    Refused {
        rank: usize,
        reason: String,
        /// The error that each rank returns when there is nothing else to try.
        error: Error,
    },
}

/// The first rank that failed, and why, as all ranks know it.
pub(crate) struct Told {
    pub(crate) rank: usize,
    pub(crate) reason: String,
    /// The rank may not, or can no more, read what is there: an older checkpoint is no answer.
    pub(crate) ends: bool,
}

impl<T> Tried<T> {
    /// `told` is what all ranks know, `own` is this rank's own error, if it has one. Fails on every rank where some
    /// rank's failure says nothing about the checkpoint.
    pub(crate) fn refused(during: &'static str, told: Told, own: Option<Error>) -> Result<Self> {
        let Told { rank, reason, ends } = told;
        let own = own.filter(|own| !ends || own.is_of_reader());
        let error = own.unwrap_or_else(|| Error::Rank { rank, during, reason: reason.clone() });
        if ends { Err(error) } else { Ok(Tried::Refused { rank, reason, error }) }
    }
}

/// Exchanges outcomes as news: that something failed on a rank is no failure of the exchange. Returns what all said,
/// or the first rank that failed and why; one that ends the search goes before others.
pub(crate) fn tell<T: Serialize + DeserializeOwned>(
    group: &dyn Agreement,
    during: &'static str,
    mine: Result<T, &Error>,
) -> Result<Result<Vec<T>, Told>> {
    let mine = mine.map_err(|e| (e.is_of_reader(), e.to_string()));
    let (mut all, mut failed) = (Vec::new(), None::<Told>);
    for (rank, said) in agree(group, during, Ok(mine))?.into_iter().enumerate() {
        match said {
            Ok(said) => all.push(said),
            Err((ends, reason)) => {
                if failed.as_ref().is_none_or(|first| ends && !first.ends) {
                    failed = Some(Told { rank, reason, ends });
                }
            }
        }
    }
    Ok(failed.map_or(Ok(all), Err))
}

/// A tag may be saved again while the ranks open it, one before and one after.
pub(crate) fn same_everywhere(identities: &[String]) -> Result<(), Told> {
    match identities.iter().position(|identity| *identity != identities[0]) {
        None => Ok(()),
        Some(rank) => {
            let reason = format!("rank {rank} and rank 0 found different checkpoints under its name");
            Err(Told { rank, reason, ends: false })
        }
    }
}

/// Lets the ranks try one checkpoint after the other, best first, until one is taken. Rank 0 looks again before each
/// try, so that what a running job saves and rotates meanwhile is taken into account.
pub(crate) fn search<T>(
    at: &Checkpoints,
    group: &dyn Agreement,
    which: Which<'_>,
    mut attempt: impl FnMut(&Candidate) -> Result<Tried<T>>,
) -> Result<(T, Vec<Skipped>)> {
    let mut memory = Memory::default();
    let mut last = None;
    loop {
        let mine = if group.rank() == 0 { memory.look(at, which).map(Some) } else { Ok(None) };
        let look = agree(group, "looking for checkpoints", mine)?.into_iter().next().flatten();
        let (next, skipped) = look.unwrap_or_default();
        let Some(next) = next else {
            return Err(match (which, last) {
                (Which::Tag(_), Some(error)) => error,
                _ => Error::NoCheckpoint { dir: at.dir.clone(), skipped },
            });
        };
        match attempt(&next)? {
            Tried::Took(taken) => return Ok((taken, skipped)),
            Tried::Refused { rank, reason, error } => {
                tracing::warn!(dir = next.dir, rank, reason, "checkpoint skipped");
                memory.refused_for = Some(reason);
                last = Some(error);
            }
        }
    }
}

/// What rank 0 knows of the tries so far.
#[derive(Default)]
struct Memory {
    /// The last one that was tried, and why it was refused.
    trying: Option<(String, Summary)>,
    refused_for: Option<String>,
    refused: Vec<(String, Summary)>,
    skipped: Vec<Skipped>,
    /// How many tries there may be.
    budget: Option<usize>,
}

impl Memory {
    /// The next one to try, and all that was passed over so far.
    fn look(&mut self, at: &Checkpoints, which: Which<'_>) -> Result<(Option<Candidate>, Vec<Skipped>)> {
        let scanned = scan(at.fs.as_ref(), &at.dir)?;
        let mut found = scanned.found;
        if let (Some((dir, summary)), Some(mut reason)) = (self.trying.take(), self.refused_for.take()) {
            if !found.iter().any(|f| (&f.dir, &f.summary) == (&dir, &summary)) {
                reason.push_str("; it was removed or replaced while it was read");
            }
            self.skipped.push(Skipped { name: dir.clone(), reason });
            self.refused.push((dir, summary));
        }
        let mut skipped = scanned.skipped;
        match which {
            Which::Newest => {}
            Which::Latest => match at.latest() {
                Ok(Some(tag)) if found.iter().any(|f| f.tag == tag) => found.sort_by_key(|f| f.tag != tag),
                Ok(None) => {}
                Ok(Some(tag)) => {
                    let reason = format!("it names `{tag}`, which is not there");
                    skipped.push(Skipped { name: "latest".into(), reason });
                }
                Err(e) => skipped.push(Skipped { name: "latest".into(), reason: e.to_string() }),
            },
            Which::Tag(tag) => {
                if let Some(damaged) = skipped.iter().find(|s| s.name == tag) {
                    return Err(Error::damaged(at.dir.join(tag), damaged.reason.clone()));
                }
                let present = found.iter().map(|f| f.tag.clone()).collect();
                found.retain(|f| f.tag == tag);
                skipped.clear();
                if found.is_empty() {
                    return Err(Error::NoTag { dir: at.dir.clone(), tag: tag.into(), present });
                }
            }
        }
        skipped.extend(self.skipped.iter().cloned());
        let budget = *self.budget.get_or_insert(found.len() + MAX_NEWCOMERS);
        let untried = |f: &Found| !self.refused.iter().any(|(dir, s)| (dir, s) == (&f.dir, &f.summary));
        let next = found.into_iter().find(untried).filter(|_| self.refused.len() < budget);
        self.trying = next.as_ref().map(|f| (f.dir.clone(), f.summary.clone()));
        Ok((next.map(|f| Candidate { dir: f.dir, tag: f.tag }), skipped))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_that_found_different_checkpoints_are_named() {
        let found = |all: [&str; 3]| same_everywhere(&all.map(str::to_owned)).err().map(|told| told.rank);
        assert_eq!(found(["a", "a", "a"]), None);
        assert_eq!(found(["a", "a", "b"]), Some(2));
        assert_eq!(found(["a", "b", "b"]), Some(1));
    }
}
