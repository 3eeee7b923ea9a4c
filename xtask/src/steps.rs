//! Runs a list of steps one after the other, says what it does and how long it took, and stops at the first failure.

use std::fmt::Display;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// One thing to do, with the command line that repeats it alone.
pub(crate) struct Step<'a> {
    pub(crate) name: &'static str,
    pub(crate) commands: Vec<Action<'a>>,
}

/// A part of a step.
pub(crate) enum Action<'a> {
    /// Another program; its output goes straight to the terminal.
    Run(Command),
    /// Our own code, with the command line that repeats it; the error is printed.
    Call(&'static str, Box<dyn FnOnce() -> Result<(), String> + 'a>),
}

/// Runs the steps of `task` in order. Ends with one line that says how it went; after a failure, also with the command
/// that failed, so that nobody has to search for it.
pub(crate) fn run(task: &str, steps: Vec<Step<'_>>) -> ExitCode {
    let start = Instant::now();
    let count = steps.len();
    for (index, step) in steps.into_iter().enumerate() {
        let step_start = Instant::now();
        let several = step.commands.len() > 1;
        eprintln!("── {task} {}/{count}: {}", index + 1, step.name);
        for action in step.commands {
            let line = action.line();
            if several {
                eprintln!("   {line}");
            }
            if let Err(why) = action.perform() {
                eprintln!("{why}");
                eprintln!(
                    "{task}: FAILED at {} ({} of {count}) after {}; repeat with\n    {line}",
                    step.name,
                    index + 1,
                    seconds(start.elapsed())
                );
                return ExitCode::FAILURE;
            }
        }
        eprintln!("   {} ok, {}", step.name, seconds(step_start.elapsed()));
    }
    eprintln!("{task}: ok, {count} steps in {}", seconds(start.elapsed()));
    ExitCode::SUCCESS
}

impl Action<'_> {
    fn line(&self) -> String {
        match self {
            Self::Run(command) => command_line(command),
            Self::Call(line, _) => (*line).to_owned(),
        }
    }

    fn perform(self) -> Result<(), String> {
        match self {
            Self::Run(mut command) => match command.status() {
                Ok(status) if status.success() => Ok(()),
                Ok(status) => Err(format!("{}: {status}", command_line(&command))),
                Err(error) => Err(format!("{}: cannot run: {error}", command_line(&command))),
            },
            Self::Call(_, call) => call(),
        }
    }
}

/// The command as one would type it at the root of the workspace.
pub(crate) fn command_line(command: &Command) -> String {
    let mut words = Vec::new();
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            words.push(format!("{}={}", name.to_string_lossy(), quoted(&value.to_string_lossy())));
        }
    }
    let program = std::path::Path::new(command.get_program());
    words.push(program.file_name().unwrap_or_default().to_string_lossy().into_owned());
    words.extend(command.get_args().map(|arg| quoted(&arg.to_string_lossy())));
    words.join(" ")
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=/.,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{word}'") }
}

pub(crate) fn seconds(time: Duration) -> impl Display {
    format!("{:.1} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_can_be_pasted_into_a_shell() {
        let mut command = Command::new("/somewhere/bin/cargo");
        command.env("RUSTDOCFLAGS", "-D warnings").args(["doc", "--no-deps"]);
        assert_eq!(command_line(&command), "RUSTDOCFLAGS='-D warnings' cargo doc --no-deps");
    }

    #[test]
    fn the_first_failure_stops_the_rest() {
        let ran = std::cell::RefCell::new(Vec::new());
        let step = |name, result: Result<(), String>| Step {
            name,
            commands: vec![Action::Call("", {
                let ran = &ran;
                Box::new(move || {
                    ran.borrow_mut().push(name);
                    result
                })
            })],
        };
        let code = run("try", vec![step("a", Ok(())), step("b", Err("no".into())), step("c", Ok(()))]);
        assert_eq!(*ran.borrow(), ["a", "b"]);
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::FAILURE));
    }

    #[test]
    fn a_program_that_fails_or_does_not_exist_is_an_error() {
        assert!(Action::Run(Command::new("true")).perform().is_ok());
        assert!(Action::Run(Command::new("false")).perform().is_err());
        assert!(Action::Run(Command::new("no-such-program-anywhere")).perform().is_err());
    }
}
