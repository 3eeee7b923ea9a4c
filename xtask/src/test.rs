//! `cargo xtask test`: all tests that need no GPU and no Python, then the numbered examples, and one line of totals.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use crate::examples::{built_examples, is_numbered, run as run_example};
use crate::steps::{command_line, seconds};
use crate::workspace::Workspace;

pub(crate) fn run(workspace: &Workspace) -> ExitCode {
    let start = Instant::now();
    // Those for devices too: what needs one is ignored, and the rest is tested here alone.
    let cargo = |args: &[&str]| {
        let mut command = workspace.cargo();
        command.args(args).args(["--workspace", "--all-features"]);
        command
    };
    // All targets' failures in one run: each costs a build to see.
    let mut tests = cargo(&["test", "--no-fail-fast"]);
    let line = command_line(&tests);
    eprintln!("── test 1/2: {line}");
    let mut totals = Totals::default();
    let mut failures = Vec::new();
    if let Err(why) = run_tests(&mut tests, &mut totals, std::io::stdout().lock()) {
        failures.push(format!("{why}; repeat with\n    {line}"));
    }

    eprintln!("── test 2/2: numbered examples");
    let mut examples = 0;
    match built_examples(cargo(&["build", "--examples"])) {
        Ok(built) => {
            for example in built.iter().filter(|example| is_numbered(&example.name)) {
                match run_example(example) {
                    Ok(time) => {
                        examples += 1;
                        println!("example {} ... ok, {}", example.name, seconds(time));
                    }
                    Err(why) => failures.push(format!("example {why}")),
                }
            }
        }
        Err(why) => failures.push(why),
    }

    for failure in &failures {
        eprintln!("{failure}");
    }
    println!(
        "test: {}: {} passed, {} failed, {} ignored in {} test programs; {examples} examples ran; {}",
        if failures.is_empty() { "ok" } else { "FAILED" },
        totals.passed,
        totals.failed,
        totals.ignored,
        totals.programs,
        seconds(start.elapsed())
    );
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What the test programs said about themselves.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Totals {
    pub(crate) programs: u64,
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) ignored: u64,
}

impl Totals {
    /// Adds a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out`.
    pub(crate) fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        self.programs += 1;
        let counts = result.split_once(". ").map_or("", |(_, counts)| counts);
        for part in counts.split(';') {
            let Some((number, what)) = part.trim().split_once(' ') else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

/// Runs cargo's tests, passes their output on to `terminal` line by line, and counts.
fn run_tests(command: &mut Command, totals: &mut Totals, mut terminal: impl Write) -> Result<(), String> {
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|error| format!("cannot run: {error}"))?;
    if let Some(output) = child.stdout.take() {
        let mut lines = BufReader::new(output);
        let mut line = Vec::new();
        // Bytes, not text: a test may print what it likes.
        while lines.read_until(b'\n', &mut line).map_err(|error| error.to_string())? > 0 {
            terminal.write_all(&line).map_err(|error| error.to_string())?;
            totals.add(String::from_utf8_lossy(&line).trim_end());
            line.clear();
        }
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("tests: {status}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn totals_add_up_over_programs() {
        let mut totals = Totals::default();
        totals.add("running 3 tests");
        totals.add(
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        );
        totals.add("test result: FAILED. 10 passed; 2 failed; 0 ignored; 0 measured; 5 filtered out");
        assert_eq!(totals, Totals { programs: 2, passed: 13, failed: 2, ignored: 1 });
    }

    #[test]
    fn a_failing_test_program_is_an_error_and_still_counted() {
        let mut totals = Totals::default();
        let script = "echo 'test result: FAILED. 1 passed; 1 failed; 0 ignored'; exit 101";
        let mut shown = Vec::new();
        assert!(run_tests(Command::new("sh").args(["-c", script]), &mut totals, &mut shown).is_err());
        assert_eq!((totals.passed, totals.failed), (1, 1));
        assert!(shown.starts_with(b"test result: FAILED") && shown.ends_with(b"\n"));
    }
}
