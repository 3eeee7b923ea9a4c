//! `list`: the checkpoints of a directory, and what is wrong with any.

use std::error::Error;
use std::io::Write;
use std::path::Path;

use lightrft_ckpt::{Checkpoints, Listed, Verify, Which};
use serde_json::json;

use crate::Outcome;
use crate::args::{Form, List};
use crate::show::{Align, size, table, time};

pub(crate) fn run(list: &List, out: &mut dyn Write) -> Result<Outcome, Box<dyn Error>> {
    exists(&list.dir)?;
    let checkpoints = Checkpoints::open(&list.dir);
    let found: Vec<(Listed, Option<String>)> =
        checkpoints.list()?.into_iter().map(|listed| with_problem(&checkpoints, listed)).collect();
    let refused = checkpoints.refused()?;
    // What `latest` names may be gone, or no name at all.
    let (latest, mut wrong_latest) = match checkpoints.latest() {
        Ok(latest) => (latest, None),
        Err(e) => (None, Some(e.to_string())),
    };
    if let Some(tag) = &latest
        && !found.iter().any(|(listed, _)| listed.tag == *tag)
    {
        wrong_latest = Some(format!("`latest` names `{tag}`, which is not there"));
    }
    match list.form {
        Form::Json => {
            let one = |(l, problem): &(Listed, Option<String>)| {
                json!({
                    "tag": l.tag, "step": l.step, "ranks": l.world_size, "bytes": l.bytes, "saved": time(l.saved),
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

/// Opening finds out whether the manifest is whole and the files are there, and reads none of them.
fn with_problem(checkpoints: &Checkpoints, listed: Listed) -> (Listed, Option<String>) {
    let opened = checkpoints.load(Which::Tag(&listed.tag), Verify::WhileReading);
    let problem = opened.err().map(|e| e.to_string());
    (listed, problem)
}

/// A directory that is not there holds no checkpoints, but is more likely a slip of the pen.
pub(crate) fn exists(dir: &Path) -> Result<(), Box<dyn Error>> {
    match std::fs::metadata(dir) {
        Ok(about) if about.is_dir() => Ok(()),
        Ok(_) => Err(format!("`{}` is no directory", dir.display()).into()),
        Err(e) => Err(format!("`{}`: {e}", dir.display()).into()),
    }
}
