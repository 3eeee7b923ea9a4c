//! `cargo xtask demo`: builds the main job in release and becomes it.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use crate::examples::built_examples;
use crate::steps::command_line;
use crate::workspace::Workspace;

const PACKAGE: &str = "lightrft-strategy";
const EXAMPLE: &str = "grpo_arithmetic";

/// Builds the program, then replaces this process by it with `args`: its exit code is ours, and a signal meant for the
/// one reaches the other.
pub(crate) fn run(workspace: &Workspace, args: &[OsString]) -> ExitCode {
    let mut build = workspace.cargo();
    build.args(["build", "--release", "-p", PACKAGE, "--example", EXAMPLE]);
    eprintln!("demo: {}", command_line(&build));
    // Cargo tells where the program is, so that any choice of target directory is honoured.
    let program = match built_examples(build) {
        Ok(built) => built.into_iter().find(|example| example.name == EXAMPLE),
        Err(why) => {
            eprintln!("demo: {why}");
            return ExitCode::FAILURE;
        }
    };
    let Some(program) = program else {
        eprintln!("demo: cargo built no example `{EXAMPLE}` in `{PACKAGE}`");
        return ExitCode::FAILURE;
    };
    let error = Command::new(&program.executable).args(args).exec();
    eprintln!("demo: cannot run {}: {error}", program.executable.display());
    ExitCode::FAILURE
}
