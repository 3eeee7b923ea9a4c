//! `cargo xtask live`: an engine's driver against real servers, on the CPU or on a GPU, in a folder that a script made ready.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::USAGE;
use crate::steps::command_line;
use crate::workspace::Workspace;

/// Servers that can be had, the features and the test program for each, and a file by which a folder is known to be ready.
const SERVERS: [(&str, &str, &str, &str); 4] = [
    ("vllm", "vllm,testing", "live_vllm", "models/vl-b/expected.json"),
    ("vllm-gpu", "vllm,cuda,testing", "live_vllm_gpu", "models/b/expected.json"),
    ("sglang", "sglang,testing", "live_sglang", "sg/sglang/__init__.py"),
    ("sglang-gpu", "sglang,cuda,testing", "live_sglang_gpu", "models/b/expected.json"),
];

/// Runs the tests of the server that the first argument names, in the folder that the second names. A folder that is
/// not ready is a failure: nobody shall take tests for passed that did not run.
pub(crate) fn run(workspace: &Workspace, args: &[OsString]) -> ExitCode {
    let found = args.first().and_then(|name| SERVERS.into_iter().find(|(server, ..)| name == server));
    let (Some((server, features, test, mark)), true) = (found, args.len() <= 2) else {
        let known: Vec<_> = SERVERS.iter().map(|(server, ..)| *server).collect();
        eprintln!(
            "xtask: `live` takes a server, one of: {}; and a folder, target/live by default",
            known.join(", ")
        );
        return ExitCode::from(USAGE);
    };
    // A path on the command line is meant from where we were called.
    let folder = match args.get(1) {
        Some(folder) => std::env::current_dir().unwrap_or_default().join(folder),
        None => workspace.root().join("target").join("live"),
    };
    if !folder.join(mark).exists() {
        eprintln!("live: SKIPPED, NOTHING WAS TESTED: {} is not ready. Make it so with", folder.display());
        eprintln!("    {}", setup_line(workspace, server, &folder));
        return ExitCode::FAILURE;
    }
    let mut cargo = workspace.cargo();
    cargo.args(["test", "-p", "lightrft-engine", "--features", features]);
    cargo.args(["--test", test, "--", "--ignored", "--nocapture", "--test-threads=1"]);
    cargo.env("LIGHTRFT_LIVE", &folder);
    eprintln!("live: {}", command_line(&cargo));
    match cargo.status() {
        Ok(status) if status.success() => {
            println!("live: ok: {server}");
            ExitCode::SUCCESS
        }
        Ok(status) => {
            eprintln!("live: FAILED: {server}: {status}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("live: cannot run cargo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn setup_line(workspace: &Workspace, server: &str, folder: &std::path::Path) -> String {
    let script: PathBuf = workspace.root().join("tools/live/setup.sh");
    format!("bash {} {server} {}", script.display(), folder.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_not_ready_is_a_failure() {
        let workspace = Workspace::of_this_build();
        let args = |args: &[&str]| args.iter().map(OsString::from).collect::<Vec<_>>();
        let failed = format!("{:?}", run(&workspace, &args(&["vllm", "/no/such/folder"])));
        assert_eq!(failed, format!("{:?}", ExitCode::FAILURE));
        let usage = format!("{:?}", ExitCode::from(USAGE));
        let failed_on_gpu = format!("{:?}", run(&workspace, &args(&["vllm-gpu", "/no/such/folder"])));
        assert_eq!(failed_on_gpu, failed);
        for bad in [&[][..], &["nosuch"], &["vllm", "a", "b"]] {
            assert_eq!(format!("{:?}", run(&workspace, &args(bad))), usage);
        }
    }

    #[test]
    fn the_script_that_makes_a_folder_ready_is_there() {
        assert!(Workspace::of_this_build().root().join("tools/live/setup.sh").exists());
    }
}
