//! What a run tells: one JSON object per step, kept consistent with the checkpoint a run resumes from.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};

/// `metrics.jsonl`: a line for each step, appended and flushed as the step ends.
#[derive(Debug)]
pub struct MetricsLog {
    file: File,
    path: PathBuf,
}

impl MetricsLog {
    /// Begins a new file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(Error::io(path))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Goes on after `step`: lines of later steps, which the run will do again, are taken out and returned. A last
    /// line that was cut short by a crash is dropped.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn resume(path: &Path, step: u64) -> Result<(Self, Vec<Value>)> {
        let text = read_text(path)?;
        // Written beside and renamed, so that a crash here loses neither; kept lines stay as they are, byte for byte.
        let staged = path.with_extension("jsonl.tmp");
        let mut log = Self::create(&staged)?;
        let mut again = Vec::new();
        for (line, value) in parse(&text) {
            if value["step"].as_u64().unwrap_or(0) <= step {
                log.write(line)?;
            } else {
                again.push(value);
            }
        }
        std::fs::rename(&staged, path).map_err(Error::io(path))?;
        log.path = path.to_owned();
        Ok((log, again))
    }

    /// The objects of a metrics file; none where there is no file. A line that is no JSON, as a crash may leave one at
    /// the end, is skipped.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(path: &Path) -> Result<Vec<Value>> {
        Ok(parse(&read_text(path)?).map(|(_, value)| value).collect())
    }

    /// Appends one object.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn append(&mut self, line: &Value) -> Result<()> {
        self.write(&line.to_string())
    }

    fn write(&mut self, line: &str) -> Result<()> {
        // One write for the whole line: a reader never sees the half of one.
        self.file.write_all(format!("{line}\n").as_bytes()).map_err(Error::io(&self.path))
    }
}

fn read_text(path: &Path) -> Result<String> {
    match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        other => other.map_err(Error::io(path)),
    }
}

fn parse(text: &str) -> impl Iterator<Item = (&str, Value)> {
    text.lines().filter_map(|line| Some((line, serde_json::from_str(line).ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn resuming_takes_out_the_steps_that_are_done_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut log = MetricsLog::create(&path).unwrap();
        for step in 1..=5 {
            log.append(&json!({ "step": step })).unwrap();
        }
        log.file.write_all(b"{\"step\": 6, \"rew").unwrap();
        let (mut log, again) = MetricsLog::resume(&path, 3).unwrap();
        assert_eq!(again, [json!({ "step": 4 }), json!({ "step": 5 })]);
        log.append(&json!({ "step": 4, "second": true })).unwrap();
        let lines = MetricsLog::read(&path).unwrap();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[3]["second"], true);
    }
}
