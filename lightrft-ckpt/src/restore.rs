//! Reading a checkpoint into memory in one pass: verified on the way, by all ranks or by none.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::error::Error as StdError;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use crate::agreement::Agreement;
use crate::catalog::Skipped;
use crate::checkpoint::{Checkpoint, difference};
use crate::error::{Error, Mismatch, Result};
use crate::reader::{Checkpoints, Which};
use crate::region::Span;
use crate::search::{Candidate, Tried, same_everywhere, search, tell};
use crate::wanted::Wanted;

/// What to restore, and how exactly it must fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restore<'a> {
    /// Which checkpoint.
    pub which: Which<'a>,
    /// What if it has not the tensors that are wanted, or others.
    pub strictness: Strictness,
    /// How the names begin of saved tensors that may go unwanted: `&["optimizer."]` restores a model without its
    /// optimizer. One that is wanted all the same is read.
    pub leave_out: &'a [&'a str],
}

/// What becomes of tensors that only one side knows. A tensor that both know must have the same dtype and shape in any
/// case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strictness {
    /// They are an error, all of them named, before anything is read: every wanted tensor must have been saved, and every
    /// saved one must be wanted by some rank or be left out.
    #[default]
    Strict,
    /// They are reported. What was not saved keeps its destination untouched.
    Lenient,
}

/// What was restored, the same on every rank. The lists are in the order of the names.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RestoreReport {
    /// The tag of the checkpoint taken.
    pub tag: String,
    /// Its step.
    pub step: u64,
    /// What was looked at before and refused, and why: damaged or incomplete directories, and `latest` where it
    /// names none.
    pub skipped: Vec<Skipped>,
    /// Tensors that some rank wanted and that were not saved: their destinations are as they were.
    pub missing: Vec<String>,
    /// Tensors that were saved, that no rank wanted, and that [`Restore::leave_out`] does not name.
    pub unexpected: Vec<String>,
    /// Tensors that were saved, that no rank wanted, and that [`Restore::leave_out`] names.
    pub left_out: Vec<String>,
}

/// Why the caller does not want a checkpoint: any error.
type Reason = Box<dyn StdError + Send + Sync>;

/// A tensor that a rank wants elements of.
type Asked = BTreeSet<(String, Dtype, Vec<usize>)>;

/// What a rank says after it has looked at a checkpoint.
#[derive(Serialize, Deserialize)]
enum Said {
    Asks {
        identity: String,
        asked: Asked,
        /// Tensors of a checkpoint that failed, whose elements this one would leave in this rank's destinations.
        leaves: BTreeSet<String>,
    },
    /// The caller or its request is wrong: another checkpoint would not help.
    Refuses(String),
}

impl Checkpoints {
    /// Reads a checkpoint into the memory of every rank of a group: each byte once, verified while it is read.
    ///
    /// For each checkpoint that is tried, `wanted` is called with `context` and the checkpoint, and says what this rank
    /// wants of it and where it shall go (names and shapes that it borrows are part of `context` too); it can also look
    /// at the saved state first and refuse, which ends the restore on every rank. Damage that any rank meets makes all
    /// take the next older checkpoint, into the same destinations: what was asked of the damaged one must be asked of
    /// the older one too, and be there, or the restore ends. When this returns `Ok`, every rank's destinations hold one
    /// and the same checkpoint's elements.
    ///
    /// That a rank may not read a file, or has no more files or memory, is no damage: no older one is taken then.
    ///
    /// What no rank asks for is not verified, apart from the files' headers and lengths.
    ///
    /// ```
    /// # use lightrft_ckpt::{Alone, Part, Rotation, Saver, Snapshot};
    /// use lightrft_ckpt::{Checkpoints, Region, Restore, Wanted};
    /// # let dir = tempfile::tempdir()?;
    /// # let dir = dir.path();
    /// # let mut snapshot = Snapshot::of_step(7);
    /// # snapshot.parts.push(Part::new("w", &[2, 2][..], Region::Whole, &[1.0f32, 2.0, 3.0, 4.0]));
    /// # snapshot.parts.push(Part::new("optimizer.exp_avg.w", &[2, 2][..], Region::Whole, &[0.0f32; 4]));
    /// # Saver::open(dir, &Alone)?.save(&Alone, &snapshot, &Rotation::default())?;
    ///
    /// // The second row of `w`; the optimizer's state is not wanted.
    /// let mut row = [0.0f32; 2];
    /// let how = Restore { leave_out: &["optimizer."], ..Restore::default() };
    /// let (checkpoint, report) = Checkpoints::open(dir).restore(&Alone, &how, &mut row, |row, _| {
    ///     Ok(vec![Wanted::new("w", &[2, 2][..], Region::Flat(2..4), row)])
    /// })?;
    /// assert_eq!((checkpoint.step(), row), (7, [3.0, 4.0]));
    /// assert_eq!(report.left_out, ["optimizer.exp_avg.w"]);
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Spoilt`] with the cause when destinations were written to, on this rank or another, also when an older
    /// checkpoint would overwrite only some of them; with any other error they were not: [`Error::NoCheckpoint`] with all that was refused; [`Error::NoTag`], or a tag's own
    /// damage, when a tag was asked for; [`Error::Mismatch`]; [`Error::Request`] when a region does not lie in its
    /// tensor or a destination has another length; [`Error::Io`] as said; [`Error::Refused`]; [`Error::Rank`] with another rank's failure;
    /// [`Error::Agreement`].
    pub fn restore<C: ?Sized>(
        &self,
        group: &dyn Agreement,
        how: &Restore<'_>,
        context: &mut C,
        mut wanted: impl for<'c> FnMut(&'c mut C, &Checkpoint) -> Result<Vec<Wanted<'c>>, Reason>,
    ) -> Result<(Checkpoint, RestoreReport)> {
        let touched = RefCell::new(None);
        let restored = search(self, group, how.which, |candidate| {
            self.try_restore(group, how, candidate, &touched, |checkpoint| wanted(context, checkpoint))
        });
        match restored {
            Ok(((checkpoint, fit), skipped)) => {
                let (tag, step) = (checkpoint.tag().to_owned(), checkpoint.step());
                let Fit { missing, unexpected, left_out, .. } = fit;
                Ok((checkpoint, RestoreReport { tag, step, skipped, missing, unexpected, left_out }))
            }
            Err(source) if touched.borrow().is_some() => Err(Error::Spoilt { source: Box::new(source) }),
            Err(error) => Err(error),
        }
    }

    /// Tries one checkpoint. Fills `touched` before any rank may have begun to write to a destination.
    fn try_restore<'w>(
        &self,
        group: &dyn Agreement,
        how: &Restore<'_>,
        candidate: &Candidate,
        touched: &RefCell<Option<Written>>,
        wanted: impl FnOnce(&Checkpoint) -> Result<Vec<Wanted<'w>>, Reason>,
    ) -> Result<Tried<(Checkpoint, Fit)>> {
        let opened = self.open_one(candidate).map(|checkpoint| {
            let refuse = |source| Error::Refused { tag: checkpoint.tag().to_owned(), source };
            let mine = wanted(&checkpoint).map_err(refuse).and_then(|wanted| Ok((asked(&wanted)?, wanted)));
            (checkpoint, mine)
        });
        let said = match &opened {
            Ok((checkpoint, Ok((asked, wanted)))) => {
                let leaves =
                    touched.borrow().as_ref().map(|before| before.beyond(&Written::by(wanted, checkpoint)));
                let (identity, asked) = (checkpoint.identity(), asked.clone());
                Ok(Said::Asks { identity, asked, leaves: leaves.unwrap_or_default() })
            }
            Ok((_, Err(e))) => Ok(Said::Refuses(e.to_string())),
            Err(e) => Err(e),
        };
        let (checkpoint, mut wanted, asked) = match (tell(group, "opening", said)?, opened) {
            (Ok(_), Ok((_, Err(own)))) => return Err(own),
            (Ok(all), Ok((checkpoint, Ok((_, wanted))))) => {
                let (identities, asked, leaves) = join(all)?;
                if let Err(told) = same_everywhere(&identities) {
                    return Tried::refused("opening", told, None);
                }
                if let Some(first) = leaves.first() {
                    return Err(mixed(first, leaves.len() - 1, checkpoint.tag()));
                }
                (checkpoint, wanted, asked)
            }
            (Err(told), opened) => return Tried::refused("opening", told, opened.err()),
            (Ok(_), Err(own)) => return Err(own),
        };
        let fit = Fit::of(&checkpoint, &asked, how.leave_out);
        fit.check(&checkpoint, how.strictness)?;

        wanted.retain(|w| checkpoint.tensor(&w.name).is_some());
        touched.borrow_mut().get_or_insert_default().join(Written::by(&wanted, &checkpoint));
        let read = checkpoint
            .verify_headers(group.rank(), group.world_size())
            .and_then(|()| checkpoint.read_many(&mut wanted));
        match tell(group, "reading", read.as_ref().copied())? {
            Ok(_) => read.map(|()| Tried::Took((checkpoint, fit))),
            Err(told) => Tried::refused("reading", told, read.err()),
        }
    }
}

/// What is asked for, once per tensor. Fails where a request contradicts itself.
fn asked(wanted: &[Wanted<'_>]) -> Result<Asked> {
    wanted.iter().try_for_each(|w| w.span().map(drop))?;
    Ok(wanted.iter().map(|w| (w.name.as_ref().to_owned(), w.dtype, w.shape.to_vec())).collect())
}

/// What all ranks found and what they ask for together.
fn join(said: Vec<Said>) -> Result<(Vec<String>, Asked, BTreeSet<String>)> {
    let (mut identities, mut together, mut left) = (Vec::new(), Asked::new(), BTreeSet::new());
    for (rank, said) in said.into_iter().enumerate() {
        match said {
            Said::Asks { identity, asked, leaves } => {
                identities.push(identity);
                together.extend(asked);
                left.extend(leaves);
            }
            Said::Refuses(reason) => return Err(Error::Rank { rank, during: "opening", reason }),
        }
    }
    Ok((identities, together, left))
}

/// An older checkpoint would leave elements of the one that failed beside its own.
fn mixed(name: &str, others: usize, tag: &str) -> Error {
    let reason = format!(
        "it (and {others} more) was read from a checkpoint that turned out to be damaged, and the next one, `{tag}`, \
         does not have it or was not asked for it: there would be elements of both"
    );
    Error::Request { name: name.to_owned(), reason }
}

/// What this rank's destinations hold of checkpoints whose reading failed: of which tensors which elements, each so
/// many times as it was asked for. The same elements of the same tensor are taken to go to the same destination.
#[derive(Debug, Default)]
struct Written(HashMap<(String, Span), usize>);

impl Written {
    /// What reading all that is wanted writes to.
    fn by(wanted: &[Wanted<'_>], checkpoint: &Checkpoint) -> Written {
        let mut written = Written::default();
        for w in wanted.iter().filter(|w| checkpoint.tensor(&w.name).is_some()) {
            // That the spans are sound was seen before.
            if let Ok((span, _)) = w.span() {
                *written.0.entry((w.name.as_ref().to_owned(), span)).or_default() += 1;
            }
        }
        written
    }

    fn join(&mut self, more: Written) {
        for (what, times) in more.0 {
            let known = self.0.entry(what).or_default();
            *known = times.max(*known);
        }
    }

    /// The names of what `other` does not overwrite.
    fn beyond(&self, other: &Written) -> BTreeSet<String> {
        let left = self.0.iter().filter(|(what, times)| other.0.get(what).is_none_or(|again| again < times));
        left.map(|((name, _), _)| name.clone()).collect()
    }
}

/// How what all ranks want together lies to what was saved.
#[derive(Debug, Default)]
struct Fit {
    missing: Vec<String>,
    unexpected: Vec<String>,
    left_out: Vec<String>,
    differing: BTreeMap<String, (Dtype, Vec<usize>)>,
}

impl Fit {
    fn of(checkpoint: &Checkpoint, asked: &Asked, leave_out: &[&str]) -> Fit {
        let mut fit = Fit::default();
        let names: BTreeSet<&str> = asked.iter().map(|(name, ..)| name.as_str()).collect();
        fit.missing.extend(names.iter().filter(|n| checkpoint.tensor(n).is_none()).map(|n| (*n).to_owned()));
        for (name, ..) in checkpoint.tensors().filter(|(name, ..)| !names.contains(name)) {
            let left_out = leave_out.iter().any(|prefix| name.starts_with(prefix));
            if left_out { &mut fit.left_out } else { &mut fit.unexpected }.push(name.to_owned());
        }
        for (name, dtype, shape) in asked {
            if checkpoint.tensor(name).is_some_and(|saved| saved != (*dtype, shape.as_slice())) {
                fit.differing.insert(name.clone(), (*dtype, shape.clone()));
            }
        }
        fit
    }

    fn check(&self, checkpoint: &Checkpoint, strictness: Strictness) -> Result<()> {
        let one_sided = !self.missing.is_empty() || !self.unexpected.is_empty();
        if self.differing.is_empty() && (strictness == Strictness::Lenient || !one_sided) {
            return Ok(());
        }
        let differing = self.differing.iter().filter_map(|(name, (dtype, shape))| {
            difference(name, checkpoint.tensor(name), (*dtype, shape.as_slice()))
        });
        Err(Error::Mismatch(Box::new(Mismatch {
            tag: checkpoint.tag().to_owned(),
            missing: self.missing.clone(),
            unexpected: self.unexpected.clone(),
            differing: differing.collect(),
        })))
    }
}
