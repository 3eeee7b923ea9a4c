//! Builds examples, asks cargo where they lie, and runs the numbered ones, each within a deadline.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::steps::{command_line, seconds};

/// A numbered example shows one idea on a laptop: one that needs longer than this hangs, or shows too much.
const DEADLINE: Duration = Duration::from_secs(120);

/// An example, or another program, that cargo has built.
#[derive(Debug, PartialEq)]
pub(crate) struct Example {
    pub(crate) name: String,
    pub(crate) executable: PathBuf,
}

/// Runs `build`, a `cargo build` with its progress on the terminal, and returns the examples it made or found fresh.
pub(crate) fn built_examples(build: Command) -> Result<Vec<Example>, String> {
    let all = built_executables(build)?.into_iter().filter(|(kind, _)| kind == "example");
    Ok(all.map(|(_, example)| example).collect())
}

/// As [`built_examples`], for all executables, each with the kind of its target: `example`, `test`, `lib` for a library's
/// unit tests.
pub(crate) fn built_executables(mut build: Command) -> Result<Vec<(String, Example)>, String> {
    let line = command_line(&build);
    build.arg("--message-format=json-render-diagnostics").stdout(Stdio::piped());
    let mut child = build.spawn().map_err(|error| format!("{line}: cannot run: {error}"))?;
    let mut examples = Vec::new();
    if let Some(messages) = child.stdout.take() {
        for message in BufReader::new(messages).lines() {
            let message = message.map_err(|error| format!("{line}: {error}"))?;
            examples.extend(executable_of(&message));
        }
    }
    let status = child.wait().map_err(|error| format!("{line}: {error}"))?;
    if status.success() { Ok(examples) } else { Err(format!("{line}: {status}")) }
}

/// The kind and the executable that one of cargo's messages names; they are a JSON object per line.
fn executable_of(message: &str) -> Option<(String, Example)> {
    let target = &message[message.find(r#""target":{"#)?..];
    let kind = string_at(target, r#""kind":[""#)?;
    let name = string_at(target, r#""name":""#)?;
    let executable = string_at(message, r#""executable":""#)?;
    Some((kind, Example { name, executable: PathBuf::from(executable) }))
}

/// The JSON string that follows `key`, its escapes undone as far as they occur in names and Unix paths.
fn string_at(json: &str, key: &str) -> Option<String> {
    let mut chars = json[json.find(key)? + key.len()..].chars();
    let mut out = String::new();
    loop {
        match chars.next()? {
            '"' => return Some(out),
            '\\' => out.push(chars.next()?),
            c => out.push(c),
        }
    }
}

/// Whether the example is part of a crate's numbered course, as `1_all_reduce` is.
pub(crate) fn is_numbered(name: &str) -> bool {
    let digits = name.bytes().take_while(u8::is_ascii_digit).count();
    digits > 0 && name.as_bytes().get(digits) == Some(&b'_')
}

/// Runs one example without arguments; its output is shown only when it fails.
pub(crate) fn run(example: &Example) -> Result<Duration, String> {
    run_within(&mut Command::new(&example.executable), DEADLINE)
        .map_err(|why| format!("{}: {why}", example.name))
}

fn run_within(command: &mut Command, deadline: Duration) -> Result<Duration, String> {
    // Output goes to a file, not a pipe: nobody has to drain it, and an orphan that keeps it open blocks nobody.
    let path = std::env::temp_dir().join(format!("xtask-example-{}.log", std::process::id()));
    let log = std::fs::File::create(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let result = run_into(command, &log, deadline);
    let output = std::fs::read(&path).unwrap_or_default();
    // A leftover in the temporary folder harms nobody.
    let _ = std::fs::remove_file(&path);
    result.map_err(|why| format!("{why}\n{}", String::from_utf8_lossy(&output).trim_end()))
}

fn run_into(command: &mut Command, log: &std::fs::File, deadline: Duration) -> Result<Duration, String> {
    let output = || log.try_clone().map(Stdio::from).map_err(|error| error.to_string());
    command.stdin(Stdio::null()).stdout(output()?).stderr(output()?);
    let start = Instant::now();
    let mut child = command.spawn().map_err(|error| format!("cannot run: {error}"))?;
    loop {
        match child.try_wait().map_err(|error| error.to_string())? {
            Some(status) if status.success() => return Ok(start.elapsed()),
            Some(status) => return Err(status.to_string()),
            None if start.elapsed() > deadline => {
                // It may have ended by itself in this very moment; either way it is waited for.
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("still running after {}, killed", seconds(deadline)));
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargos_messages_name_examples_and_where_they_lie() {
        let message = r#"{"reason":"compiler-artifact","package_id":"p","target":{"kind":["example"],"crate_types":["bin"],"name":"1_all_reduce","src_path":"/s"},"filenames":[],"executable":"/t/a \"b\"/1_all_reduce","fresh":true}"#;
        let (kind, found) = executable_of(message).unwrap();
        assert_eq!(kind, "example");
        assert_eq!(found.name, "1_all_reduce");
        assert_eq!(found.executable, PathBuf::from("/t/a \"b\"/1_all_reduce"));
        assert_eq!(executable_of(r#"{"target":{"kind":["lib"],"name":"x"},"executable":null}"#), None);
        assert_eq!(executable_of(r#"{"target":{"kind":["example"],"name":"x"},"executable":null}"#), None);
    }

    #[test]
    fn a_numbered_name_begins_with_digits_and_an_underscore() {
        assert!(is_numbered("1_all_reduce") && is_numbered("12_more"));
        assert!(!is_numbered("grpo_arithmetic") && !is_numbered("1all") && !is_numbered("_1"));
    }

    #[test]
    fn an_example_that_fails_or_hangs_is_an_error_with_its_output() {
        let shell = |script: &str, deadline| {
            run_within(Command::new("sh").args(["-c", script]), Duration::from_millis(deadline))
        };
        assert!(shell("echo fine", 30_000).is_ok());
        let failed = shell("echo out; echo err >&2; exit 3", 30_000).unwrap_err();
        assert!(failed.contains('3') && failed.contains("out") && failed.contains("err"), "{failed}");
        let start = Instant::now();
        assert!(shell("exec sleep 600", 50).is_err());
        assert!(start.elapsed() < Duration::from_secs(60));
    }
}
