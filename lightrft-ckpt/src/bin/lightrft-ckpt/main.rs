//! The command `lightrft-ckpt`: looks into directories of checkpoints, verifies, exports and converts them.

mod args;
mod convert;
mod export;
mod inspect;
mod list;
mod show;
mod verify;

use std::error::Error;
use std::fmt;
use std::io::{self, Write};
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
    let mut out = Output { to: std::io::stdout().lock(), read: true };
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
        Err(e) => {
            eprintln!("lightrft-ckpt: {e}");
            if e.is::<Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// A mistake in the command line that shows only when what it names was looked at.
#[derive(Debug)]
struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Usage {}

/// Standard output. When whoever reads it has read enough, the work is done all the same: its exit code counts.
struct Output<W> {
    to: W,
    read: bool,
}

impl<W: Write> Output<W> {
    fn unless_closed<T>(&mut self, done: io::Result<T>, instead: T) -> io::Result<T> {
        match done {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                self.read = false;
                Ok(instead)
            }
            done => done,
        }
    }
}

impl<W: Write> Write for Output<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let done = if self.read { self.to.write(bytes) } else { Ok(bytes.len()) };
        self.unless_closed(done, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let done = if self.read { self.to.flush() } else { Ok(()) };
        self.unless_closed(done, ())
    }
}
