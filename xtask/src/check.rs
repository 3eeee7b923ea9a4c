//! `cargo xtask check`: everything that can be judged without running a test, cheapest first.

use std::process::{Command, ExitCode};

use crate::steps::{self, Action, Step};
use crate::tidy;
use crate::workspace::{Member, Workspace};

pub(crate) fn run(workspace: &Workspace) -> ExitCode {
    let members = match workspace.members() {
        Ok(members) => members,
        Err(error) => {
            eprintln!("check: {error}");
            return ExitCode::FAILURE;
        }
    };
    let cargo = |args: &[&str]| {
        let mut command = workspace.cargo();
        command.args(args);
        command
    };
    let mut docs = cargo(&["doc", "--workspace", "--no-deps", "--all-features"]);
    docs.env("RUSTDOCFLAGS", "-Dwarnings");
    let clippy = cargo(&["clippy", "--workspace", "--all-targets", "--all-features", "--", "-Dwarnings"]);
    let tidy = Action::Call("cargo xtask tidy", Box::new(|| tidy::check(workspace)));
    steps::run(
        "check",
        vec![
            Step { name: "format", commands: vec![Action::Run(cargo(&["fmt", "--all", "--", "--check"]))] },
            Step { name: "tidy", commands: vec![tidy] },
            Step { name: "clippy", commands: vec![Action::Run(clippy)] },
            Step { name: "documentation", commands: vec![Action::Run(docs)] },
            Step { name: "feature sets", commands: feature_sets(workspace, &members) },
        ],
    )
}

/// Every published crate by itself: without features and with each feature alone. Built together, crates lend each
/// other their features, and one that forgot to ask for what it needs goes unnoticed until a stranger takes it alone.
fn feature_sets<'a>(workspace: &Workspace, members: &[Member]) -> Vec<Action<'a>> {
    let mut commands = Vec::new();
    for member in members.iter().filter(|m| m.is_published()) {
        let alone = |feature: Option<&str>| {
            let mut command: Command = workspace.cargo();
            command.args(["check", "--quiet", "--lib", "--no-default-features", "-p", member.name()]);
            command.args(feature.map(|name| ["--features", name]).into_iter().flatten());
            Action::Run(command)
        };
        commands.push(alone(None));
        commands.extend(member.features().into_iter().map(|feature| alone(Some(feature))));
    }
    commands
}
