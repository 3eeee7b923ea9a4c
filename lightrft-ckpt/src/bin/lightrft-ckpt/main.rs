//! The command `lightrft-ckpt`: looks into directories of checkpoints, verifies, exports and converts them.

mod args;
mod convert;
mod export;
mod inspect;
mod list;
mod show;
mod verify;

use std::error::Error;
use std::io::Write as _;
use std::process::ExitCode;

use args::Command;

/// What a command found out, besides errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Fine,
    /// It did what it should, and what it looked at is damaged.
    Damaged,
}

fn main() -> ExitCode {
    let command = match args::parse() {
        Ok(command) => command,
        Err(why) => {
            eprintln!("lightrft-ckpt: {why}\nlightrft-ckpt --help says more");
            return ExitCode::from(2);
        }
    };
    let mut out = std::io::stdout().lock();
    let done: Result<Outcome, Box<dyn Error>> = match &command {
        Command::Help(text) => writeln!(out, "{text}").map(|()| Outcome::Fine).map_err(Into::into),
        Command::List(list) => list::run(list, &mut out),
        Command::Inspect(inspect) => inspect::run(inspect, &mut out),
        Command::Verify(verify) => verify::run(verify, &mut out),
        Command::Export(export) => export::run(export, &mut out),
        Command::Convert(convert) => convert::run(convert, &mut out),
    };
    match done.and_then(|outcome| Ok(out.flush().map(|()| outcome)?)) {
        Ok(Outcome::Fine) => ExitCode::SUCCESS,
        Ok(Outcome::Damaged) => ExitCode::FAILURE,
        // Whoever reads the output has read enough.
        Err(e) if is_broken_pipe(e.as_ref()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("lightrft-ckpt: {e}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
