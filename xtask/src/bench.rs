//! `cargo xtask bench`: builds a crate's bench with optimisation and becomes it.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use crate::USAGE;
use crate::steps::command_line;
use crate::workspace::Workspace;

/// What can be measured, the package whose bench of that name measures it, and what cargo is told beside: without its
/// features a bench would leave rows out and not say so.
const BENCHES: [(&str, &str, &[&str]); 5] = [
    ("ckpt", "lightrft-ckpt", &[]),
    ("collectives", "lightrft-collectives", &[]),
    ("data", "lightrft-data", &["--all-features"]),
    ("engine", "lightrft-engine", &["--all-features"]),
    ("sharding", "lightrft-sharding", &[]),
];

/// Runs the bench named by the first argument; the rest are its own. Its exit code is ours.
pub(crate) fn run(workspace: &Workspace, args: &[OsString]) -> ExitCode {
    let found = args.first().and_then(|name| package_of(name));
    let Some((bench, package, features)) = found else {
        let known: Vec<_> = BENCHES.iter().map(|(bench, ..)| *bench).collect();
        eprintln!("xtask: `bench` takes what to measure, one of: {}", known.join(", "));
        return ExitCode::from(USAGE);
    };
    let mut cargo = workspace.cargo();
    cargo.args(["bench", "-p", package, "--bench", bench]).args(features).arg("--").args(&args[1..]);
    // Cargo runs a bench in its package's folder; files named on the command line are meant from here.
    if let Ok(here) = std::env::current_dir() {
        cargo.env("LIGHTRFT_BENCH_FOLDER", here);
    }
    eprintln!("bench: {}", command_line(&cargo));
    let error = cargo.exec();
    eprintln!("bench: cannot run cargo: {error}");
    ExitCode::FAILURE
}

fn package_of(bench: &OsStr) -> Option<(&'static str, &'static str, &'static [&'static str])> {
    BENCHES.into_iter().find(|(name, ..)| bench == *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bench_is_found_by_its_name_alone() {
        assert_eq!(
            package_of(OsStr::new("collectives")),
            Some(("collectives", "lightrft-collectives", &[][..]))
        );
        assert_eq!(package_of(OsStr::new("collective")), None);
        assert!(package_of(OsStr::new("data")).is_some_and(|(.., more)| more == ["--all-features"]));
    }
}
