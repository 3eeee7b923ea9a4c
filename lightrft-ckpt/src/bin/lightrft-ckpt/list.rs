//! `list`: the checkpoints of a directory, and what is wrong with any.

use std::error::Error;
use std::io::Write;
use std::path::Path;

use lightrft_ckpt::{Checkpoints, Listed, Survey};
use serde_json::json;

use crate::Outcome;
use crate::args::{Form, List};
use crate::show::{Align, rfc3339, size, table, time};

pub(crate) fn run(list: &List, out: &mut dyn Write) -> Result<Outcome, Box<dyn Error>> {
    exists(&list.dir)?;
    let checkpoints = Checkpoints::open(&list.dir);
    let Survey { checkpoints: listed, refused, .. } = checkpoints.survey()?;
    let mut found: Vec<(Listed, Option<String>)> = Vec::new();
    for listed in listed {
        // Opening finds out whether the manifest is whole and the files are there, and reads none of them.
        match look(&checkpoints, listed, |listed| checkpoints.open_listed(listed))? {
            Look::Whole(listed, _) => found.push((listed, None)),
            Look::Failed(listed, e) => found.push((listed, Some(e.to_string()))),
            Look::Removed => {}
        }
    }
    // What `latest` names may be gone, or no name at all.
    let (latest, mut wrong_latest) = match checkpoints.latest() {
        Ok(latest) => (latest, None),
        Err(e) => (None, Some(e.to_string())),
    };
    if let Some(tag) = &latest
        && !found.iter().any(|(listed, _)| listed.tag == *tag)
    {
        let refused = refused.iter().any(|s| s.name == *tag);
        let what = if refused { "is no complete checkpoint" } else { "is not there" };
        wrong_latest = Some(format!("`latest` names `{tag}`, which {what}"));
    }
    match list.form {
        Form::Json => {
            let one = |(l, problem): &(Listed, Option<String>)| {
                json!({
                    "tag": l.tag, "step": l.step, "ranks": l.world_size, "bytes": l.bytes, "saved": rfc3339(l.saved),
                    "latest": latest.as_ref() == Some(&l.tag), "problem": problem,
                })
            };
            let refused: Vec<_> =
                refused.iter().map(|s| json!({"name": s.name, "problem": s.reason})).collect();
            let all = json!({
                "checkpoints": found.iter().map(one).collect::<Vec<_>>(), "refused": refused,
                "latest": latest, "latest_problem": wrong_latest,
            });
            writeln!(out, "{all:#}")?;
        }
        Form::Text if found.is_empty() && refused.is_empty() => {
            writeln!(out, "no checkpoint in `{}`", list.dir.display())?;
            if let Some(wrong) = &wrong_latest {
                writeln!(out, "{wrong}")?;
            }
        }
        Form::Text => {
            let mut rows: Vec<Vec<String>> = Vec::new();
            for (l, problem) in &found {
                let mut state = problem.clone().unwrap_or_else(|| "complete".into());
                if latest.as_ref() == Some(&l.tag) {
                    state.push_str(", latest");
                }
                let numbers = [l.step.to_string(), l.world_size.to_string(), size(l.bytes), time(l.saved)];
                rows.push([l.tag.clone()].into_iter().chain(numbers).chain([state]).collect());
            }
            for s in &refused {
                let none = || "-".to_owned();
                rows.push(vec![s.name.clone(), none(), none(), none(), none(), s.reason.clone()]);
            }
            let right = Align::Right;
            let columns = [
                ("tag", Align::Left),
                ("step", right),
                ("ranks", right),
                ("size", right),
                ("saved (UTC)", Align::Left),
                ("state", Align::Left),
            ];
            table(out, &columns, &rows)?;
            if let Some(wrong) = &wrong_latest {
                writeln!(out, "{wrong}")?;
            }
        }
    }
    let whole = refused.is_empty() && found.iter().all(|(_, problem)| problem.is_none());
    Ok(if whole && wrong_latest.is_none() { Outcome::Fine } else { Outcome::Damaged })
}

/// What came of looking at a checkpoint.
pub(crate) enum Look<T> {
    Whole(Listed, T),
    Failed(Listed, lightrft_ckpt::Error),
    /// A running job has let it go.
    Removed,
}

/// How often a checkpoint is looked at that is saved again meanwhile.
const LOOKS: usize = 3;

/// Looks at a checkpoint. When that fails, a running job may have removed it, or saved it again, since it was listed:
/// then it is not the checkpoint that is at fault.
pub(crate) fn look<T>(
    checkpoints: &Checkpoints,
    mut listed: Listed,
    with: impl Fn(&Listed) -> lightrft_ckpt::Result<T>,
) -> lightrft_ckpt::Result<Look<T>> {
    let mut looks = 1;
    loop {
        let error = match with(&listed) {
            Ok(found) => return Ok(Look::Whole(listed, found)),
            Err(e) => e,
        };
        let Survey { checkpoints: again, refused, .. } = checkpoints.survey()?;
        match again.into_iter().find(|now| now.tag == listed.tag) {
            Some(now) if now != listed && looks < LOOKS => listed = now,
            None if !refused.iter().any(|s| s.name == listed.tag) => return Ok(Look::Removed),
            _ => return Ok(Look::Failed(listed, error)),
        }
        looks += 1;
    }
}

/// A directory that is not there holds no checkpoints, but is more likely a slip of the pen.
pub(crate) fn exists(dir: &Path) -> Result<(), Box<dyn Error>> {
    match std::fs::metadata(dir) {
        Ok(about) if about.is_dir() => Ok(()),
        Ok(_) => Err(format!("`{}` is no directory", dir.display()).into()),
        Err(e) => Err(format!("`{}`: {e}", dir.display()).into()),
    }
}

#[cfg(test)]
mod tests {
    use lightrft_ckpt::{Alone, Rotation, Saver, Snapshot};

    use super::*;

    #[test]
    fn what_a_running_job_removes_or_saves_again_is_not_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let saver = Saver::open(dir.path(), &Alone).unwrap();
        let save = |step| saver.save(&Alone, &Snapshot::of_step(step), &Rotation::KEEP_ALL).unwrap();
        save(1);
        let checkpoints = Checkpoints::open(dir.path());
        let listed = checkpoints.list().unwrap().remove(0);
        let manifest = dir.path().join("global_step1/manifest.json");
        // Saved again under the eyes of the first look.
        let again = look(&checkpoints, listed.clone(), |l| {
            if *l == listed {
                std::thread::sleep(std::time::Duration::from_millis(2));
                save(1);
                std::fs::rename(&manifest, dir.path().join("global_step1/gone")).unwrap();
                let opened = checkpoints.open_listed(l);
                std::fs::rename(dir.path().join("global_step1/gone"), &manifest).unwrap();
                return opened;
            }
            checkpoints.open_listed(l)
        });
        assert!(matches!(again.unwrap(), Look::Whole(now, _) if now != listed));
        let removed = look(&checkpoints, listed, |l| {
            let _once = std::fs::remove_dir_all(dir.path().join("global_step1"));
            checkpoints.open_listed(l)
        });
        assert!(matches!(removed.unwrap(), Look::Removed));
    }
}
