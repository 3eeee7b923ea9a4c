//! Several models of one run, each with a directory of its own: a step that all of them have is never lost.

use std::path::Path;

use crate::agreement::{Agreement, agree};
use crate::catalog::{Scan, Skipped, scan};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::reader::{Checkpoints, LoadReport, Verify, Which};
use crate::rotation::{Rotated, Rotation};
use crate::saver::{SaveReport, Saver};
use crate::snapshot::Snapshot;

/// Saves a step of several models, each by its own saver: first all of them, then, and only then, lets old ones go in
/// each. So a crash at any operation leaves a step that all of them have, which [`load_newest_common`] finds. Every rank
/// of the group calls this, with the models in the same order.
///
/// A step may be left that only some have, by a crash or a failure in between; it counts towards the limits of those, and
/// goes when later steps push it out. When a tag is saved again, a crash between two models leaves the new content in
/// one and the old in the other: a run that goes back and must tell them apart gives other tags.
///
/// With a [`BackgroundSaver`](crate::BackgroundSaver) for each model the same is had by saving with
/// [`Rotation::KEEP_ALL`] and rotating each when all have finished.
///
/// ```
/// use lightrft_ckpt::{
///     Alone, Part, Region, Rotation, Saver, Snapshot, Verify, load_newest_common, save_together,
/// };
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
///
/// let actor = Saver::open(dir.join("_actor"), &Alone)?;
/// let critic = Saver::open(dir.join("_critic"), &Alone)?;
/// let limits = Rotation { max_num: 1, ..Rotation::default() };
/// for step in [10, 20] {
///     let (weight, value) = ([step as f32; 6], [step as f32; 2]);
///     let mut of_actor = Snapshot::of_step(step);
///     of_actor.parts.push(Part::new("weight", &[2, 3][..], Region::Whole, &weight));
///     let mut of_critic = Snapshot::of_step(step);
///     of_critic.parts.push(Part::new("value", &[2][..], Region::Whole, &value));
///     save_together(&Alone, &[(&actor, &of_actor), (&critic, &of_critic)], &limits)?;
/// }
///
/// // Whoever resumes takes the newest step that both have.
/// let both = [actor.checkpoints(), critic.checkpoints()];
/// let (loaded, report) = load_newest_common(&Alone, &both, Verify::Everything)?;
/// assert_eq!((report.step, loaded[1].read_vec::<f32>("value", &Region::Whole)?), (20, vec![20.0; 2]));
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Snapshot`] when the snapshots are not of one tag and step, or not as many on every rank, and [`Error::Rotation`], before anything is
/// written; those of [`Saver::save`], of the first model that could not be saved: those before it have the step, and
/// nothing was let go.
pub fn save_together(
    group: &dyn Agreement,
    models: &[(&Saver, &Snapshot<'_>)],
    limits: &Rotation,
) -> Result<Vec<SaveReport>> {
    // A rank that refused by itself would leave the others waiting for it.
    let mine = limits.check().and_then(|()| of_one_step(models)).map(|()| models.len());
    let counts = agree(group, "planning", mine)?;
    if let Some((rank, count)) = counts.iter().enumerate().find(|(_, count)| **count != counts[0]) {
        let tag = models.first().map(|(_, snapshot)| snapshot.tag.clone()).unwrap_or_default();
        let reason = format!("rank 0 saves {} models together, rank {rank} saves {count}", counts[0]);
        return Err(Error::Snapshot { tag, reason });
    }
    let mut reports = Vec::with_capacity(models.len());
    for (saver, snapshot) in models {
        reports.push(saver.save(group, snapshot, &Rotation::KEEP_ALL)?);
    }
    for ((saver, _), report) in models.iter().zip(&mut reports) {
        let rotated = match saver.rotate(group, limits) {
            Err(lost @ Error::Agreement { .. }) => return Err(lost),
            // All is saved. That room could not be made is worth telling, and no reason to call it unsaved.
            Err(e) => Rotated::nothing(saver.dir(), &e),
            Ok(rotated) => rotated,
        };
        report.removed = rotated.removed;
        report.not_removed.extend(rotated.not_removed);
    }
    Ok(reports)
}

fn of_one_step(models: &[(&Saver, &Snapshot<'_>)]) -> Result<()> {
    let Some((_, first)) = models.first() else { return Ok(()) };
    match models.iter().find(|(_, other)| (&other.tag, other.step) != (&first.tag, first.step)) {
        None => Ok(()),
        Some((_, other)) => Err(Error::Snapshot {
            tag: other.tag.clone(),
            reason: format!(
                "it is of step {}, and saved together with `{}` of step {}: models saved together share tag and step",
                other.step, first.tag, first.step
            ),
        }),
    }
}

/// Opens the newest checkpoint that all of several directories have complete, of one tag and step, on every rank of a
/// group: one [`Checkpoint`] for each directory, in their order. One that any rank finds damaged in any directory is
/// passed over in all. See [`save_together`].
///
/// A tag that is saved again while it is looked at is looked for anew, so that all are of the step that the report gives.
/// That a rank may not read a file, or has no more files or memory, is no damage: all fail.
///
/// # Errors
/// [`Error::NoCommonCheckpoint`] with all that was refused; [`Error::Agreement`]; [`Error::Rank`]; [`Error::Io`].
pub fn load_newest_common(
    group: &dyn Agreement,
    all: &[Checkpoints],
    verify: Verify,
) -> Result<(Vec<Checkpoint>, LoadReport)> {
    let mut last = Vec::new();
    for _ in 0..MAX_LOOKS {
        let mine = if group.rank() == 0 { common(all).map(Some) } else { Ok(None) };
        let found = agree(group, "looking for checkpoints", mine)?.into_iter().next().flatten();
        match load_common(group, all, verify, found.unwrap_or_default())? {
            Tried::Took(loaded) => return Ok(loaded),
            Tried::Refused { skipped, moved } => {
                last = skipped;
                if !moved {
                    break;
                }
            }
        }
    }
    let dirs = all.iter().map(|at| at.dir.clone()).collect();
    Err(Error::NoCommonCheckpoint { dirs, skipped: last })
}

/// So often a running job may save the tags again that are looked at.
const MAX_LOOKS: usize = 8;

enum Tried {
    Took((Vec<Checkpoint>, LoadReport)),
    Refused {
        skipped: Vec<Skipped>,
        /// Whether it was of another step than a moment before.
        moved: bool,
    },
}

/// Tries what rank 0 found. What comes of it is the same on every rank.
fn load_common(
    group: &dyn Agreement,
    all: &[Checkpoints],
    verify: Verify,
    (tags, mut skipped): Common,
) -> Result<Tried> {
    'tags: for (tag, step) in tags {
        let mut checkpoints = Vec::with_capacity(all.len());
        for at in all {
            match at.load_together(group, Which::Tag(&tag), verify) {
                Ok((checkpoint, _)) if checkpoint.step() == step => checkpoints.push(checkpoint),
                Ok((checkpoint, _)) => {
                    let name = named(&at.dir, &tag);
                    let reason = format!("it was of step {step}, and is of {} now", checkpoint.step());
                    skipped.push(Skipped { name, reason });
                    return Ok(Tried::Refused { skipped, moved: true });
                }
                Err(lost @ Error::Agreement { .. }) => return Err(lost),
                // Every rank is told of it, so all go on to the same one.
                Err(e) => {
                    let (name, reason) = (named(&at.dir, &tag), e.to_string());
                    agree(group, "opening", if e.is_of_reader() { Err(e) } else { Ok(()) })?;
                    tracing::warn!(name, reason, "checkpoint skipped");
                    skipped.push(Skipped { name, reason });
                    continue 'tags;
                }
            }
        }
        return Ok(Tried::Took((checkpoints, LoadReport { tag, step, skipped })));
    }
    Ok(Tried::Refused { skipped, moved: false })
}

type Common = (Vec<(String, u64)>, Vec<Skipped>);

/// Tags and steps that all directories list, newest first, and those that not all do or that are damaged.
fn common(all: &[Checkpoints]) -> Result<Common> {
    let (mut tags, mut skipped) = Common::default();
    let mut lists = Vec::with_capacity(all.len());
    for at in all {
        let Scan { found, skipped: refused } = scan(at.fs.as_ref(), &at.dir)?;
        let listed = found.into_iter().map(|f| (f.tag, f.summary.step));
        lists.push((&at.dir, listed.collect::<Vec<(String, u64)>>()));
        let named = |s: Skipped| Skipped { name: named(&at.dir, &s.name), ..s };
        skipped.extend(refused.into_iter().map(named));
    }
    for (i, (dir, list)) in lists.iter().enumerate() {
        for known in list {
            match lists.iter().find(|(_, other)| !other.contains(known)) {
                Some((without, _)) => skipped.push(Skipped {
                    name: named(dir, &known.0),
                    reason: format!("`{}` has none of that tag and step {}", without.display(), known.1),
                }),
                None if i == 0 => tags.push(known.clone()),
                None => {}
            }
        }
    }
    Ok((tags, skipped))
}

fn named(dir: &Path, tag: &str) -> String {
    dir.join(tag).display().to_string()
}
