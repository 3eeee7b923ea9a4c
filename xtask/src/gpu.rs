//! `cargo xtask gpu build`, `gpu test [N]` and `gpu bench [N]`: what needs GPUs, built where there are none, run where there are.
//!
//! A test of this kind is ignored by default and has `gpu` in its name, `two_gpus` if one GPU is not enough; a measurement,
//! whose numbers nobody checks, has `_bench_` in its name. Programs load the driver's libraries when they run, so that any
//! machine can build them.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{fs, thread};

use crate::examples::built_executables;
use crate::steps::seconds;
use crate::test::Totals;
use crate::workspace::{Member, Workspace};

/// Features for devices. Members that have one have tests that need a GPU.
const DEVICE_FEATURES: [&str; 2] = ["cuda", "nccl"];

const USAGE: &str = "usage: cargo xtask gpu build | cargo xtask gpu test|bench [number of GPUs]";

/// In the folder of the built programs, their names, one a line: what `gpu test` runs.
const LIST: &str = "tests.list";

/// What measurements have in their names.
const BENCH: &str = "_bench_";

/// What is run of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Test,
    Bench,
}

impl Kind {
    fn named(name: &str) -> Option<Self> {
        match name {
            "test" => Some(Self::Test),
            "bench" => Some(Self::Bench),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Test => "test",
            Self::Bench => "bench",
        }
    }

    /// The arguments that choose what a program runs on so many GPUs.
    fn chosen(self, gpus: usize) -> Vec<&'static str> {
        let mut chosen = vec!["gpu", "--ignored"];
        if gpus == 1 {
            chosen.extend(["--skip", "two_gpus"]);
        }
        match self {
            Self::Test => chosen.extend(["--skip", BENCH]),
            Self::Bench => chosen[0] = BENCH,
        }
        chosen
    }
}

/// A program that takes longer hangs; it is killed, so that the others still run.
const DEADLINE: Duration = Duration::from_secs(480);

pub(crate) fn run(workspace: &Workspace, args: &[OsString]) -> ExitCode {
    let args: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
    let args: Vec<&str> = args.iter().map(|arg| &**arg).collect();
    let result = match args[..] {
        ["build"] => build(workspace).map(|folder| println!("gpu build: ok: {}", folder.display())),
        [what, ref gpus @ ..] if gpus.len() < 2 => {
            match (Kind::named(what), gpus.first().map(|gpus| gpus.parse())) {
                (None, _) => Err(USAGE.into()),
                (Some(kind), None) => {
                    folder_of_tests(workspace).and_then(|folder| run_all(kind, &folder, None))
                }
                (Some(kind), Some(Ok(gpus))) if gpus > 0 => {
                    folder_of_tests(workspace).and_then(|folder| run_all(kind, &folder, Some(gpus)))
                }
                (Some(_), Some(_)) => Err(format!("`{}` is no number of GPUs; {USAGE}", gpus[0])),
            }
        }
        _ => Err(USAGE.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("gpu: FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}

/// The crates that have a feature which needs a device.
fn device_crates(members: &[Member]) -> Vec<String> {
    let needs_one =
        |member: &&Member| member.features().into_iter().any(|name| DEVICE_FEATURES.contains(&name));
    members.iter().filter(needs_one).map(|member| member.name().to_owned()).collect()
}

/// Builds the test programs and this one, and puts them into `target/gpu/` without their symbols.
fn build(workspace: &Workspace) -> Result<PathBuf, String> {
    let members = workspace.members().map_err(|error| error.to_string())?;
    let folder = workspace.root().join("target").join("gpu");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut names = Vec::new();
    for name in device_crates(&members) {
        let mut cargo = workspace.cargo();
        cargo.args(["test", "--no-run", "--release", "--lib", "--test", "gpu_*", "-p", &name]);
        // What is on the device may be what another feature adds.
        cargo.arg("--all-features");
        // A crate's own programs are built along for its tests; they are no tests.
        let tests = built_executables(cargo)?.into_iter().filter(|(kind, _)| kind == "lib" || kind == "test");
        for (kind, program) in tests {
            let name = format!("{}-{kind}", program.name);
            put(&program.executable, &folder.join(&name))?;
            names.push(name);
        }
    }
    names.sort();
    let here = std::env::current_exe().map_err(|error| error.to_string())?;
    put(&here, &folder.join("xtask"))?;
    let list = names.iter().map(|name| format!("{name}\n")).collect::<String>();
    fs::write(folder.join(LIST), list).map_err(|error| format!("{}: {error}", folder.display()))?;
    Ok(folder)
}

fn put(from: &Path, to: &Path) -> Result<(), String> {
    fs::copy(from, to).map_err(|error| format!("{} to {}: {error}", from.display(), to.display()))?;
    // Symbols are most of it. A machine without `strip` carries them along.
    let _ = Command::new("strip").arg(to).stderr(Stdio::null()).status();
    Ok(())
}

/// Where the test programs are: beside this one, if it was carried here with them; else where they are built now.
fn folder_of_tests(workspace: &Workspace) -> Result<PathBuf, String> {
    let here = std::env::current_exe().map_err(|error| error.to_string())?;
    match here.parent() {
        Some(folder) if folder.join(LIST).exists() => Ok(folder.to_path_buf()),
        _ => build(workspace),
    }
}

/// GPUs of this machine, as the driver shows them.
fn count_gpus() -> usize {
    let is_gpu = |name: &str| {
        name.strip_prefix("nvidia").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    };
    let Ok(devices) = fs::read_dir("/dev") else { return 0 };
    devices.flatten().filter(|entry| is_gpu(&entry.file_name().to_string_lossy())).count()
}

fn run_all(kind: Kind, folder: &Path, gpus: Option<usize>) -> Result<(), String> {
    let start = Instant::now();
    let there = count_gpus();
    let gpus = gpus.unwrap_or(there);
    if gpus == 0 || gpus > there {
        return Err(format!("{} GPUs were asked for on a machine with {there}", gpus.max(1)));
    }
    let what = kind.name();
    let list = folder.join(LIST);
    let names = fs::read_to_string(&list).map_err(|error| format!("{}: {error}", list.display()))?;
    let (mut totals, mut failures) = (Totals::default(), Vec::new());
    for name in names.lines() {
        let program = folder.join(name);
        if kind == Kind::Bench && !has_any(&program, &kind.chosen(gpus))? {
            continue;
        }
        let mut command = Command::new(program);
        command.args(kind.chosen(gpus)).args(["--test-threads=1", "--nocapture"]);
        command.env("LIGHTRFT_GPUS", gpus.to_string());
        eprintln!("── gpu {what} on {gpus}: {name}");
        if let Err(why) = run_tests(&mut command, &mut totals, DEADLINE) {
            failures.push(format!("{name}: {why}"));
        }
    }
    if totals.passed == 0 {
        failures.push("no test ran".into());
    }
    if totals.ignored > 0 {
        failures.push(format!("{} tests were skipped", totals.ignored));
    }
    let only_one = if gpus == 1 { "; those that need two GPUs were not asked for" } else { "" };
    println!(
        "gpu {what}: {}: {} passed, {} failed in {} programs on {gpus} GPUs; {}{only_one}",
        if failures.is_empty() { "ok" } else { "FAILED" },
        totals.passed,
        totals.failed,
        totals.programs,
        seconds(start.elapsed())
    );
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}

/// Whether a program has tests of those that are chosen.
fn has_any(program: &Path, chosen: &[&str]) -> Result<bool, String> {
    let listed = Command::new(program).args(chosen).args(["--list", "--format=terse"]).output();
    let listed = listed.map_err(|error| format!("{}: {error}", program.display()))?;
    Ok(listed.stdout.split(|byte| *byte == b'\n').any(|line| line.ends_with(b": test")))
}

/// Runs a test program within `deadline`, passes its output on, and counts.
fn run_tests(command: &mut Command, totals: &mut Totals, deadline: Duration) -> Result<(), String> {
    let start = Instant::now();
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(|error| format!("cannot run: {error}"))?;
    let (lines, received) = mpsc::channel();
    if let Some(output) = child.stdout.take() {
        // Ends with the program's output, or with this one.
        thread::spawn(move || {
            let lines = BufReader::new(output)
                .split(b'\n')
                .map_while(Result::ok)
                .try_for_each(|line| lines.send(line));
            drop(lines);
        });
    }
    loop {
        match received.recv_timeout(deadline.saturating_sub(start.elapsed())) {
            Ok(line) => {
                let line = String::from_utf8_lossy(&line);
                println!("{line}");
                totals.add(&line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                // It may have ended by itself in this very moment; either way it is waited for.
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("still running after {}, killed", seconds(deadline)));
            }
        }
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    if status.success() { Ok(()) } else { Err(status.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Manifest;

    #[test]
    fn crates_with_a_device_feature_are_built() {
        let member = |text: &str| Member { folder: "x".to_owned(), manifest: Manifest::parse(text) };
        let members = [
            member("[package]\nname = \"a\"\n[features]\ndefault = []\nnccl = []\ntesting = []\n"),
            member("[package]\nname = \"b\"\n[features]\ntesting = []\n"),
        ];
        assert_eq!(device_crates(&members), ["a"]);
    }

    #[test]
    fn tests_and_measurements_are_apart() {
        assert_eq!(Kind::Test.chosen(2), ["gpu", "--ignored", "--skip", BENCH]);
        assert_eq!(Kind::Test.chosen(1), ["gpu", "--ignored", "--skip", "two_gpus", "--skip", BENCH]);
        assert_eq!(Kind::Bench.chosen(1), [BENCH, "--ignored", "--skip", "two_gpus"]);
        let here = std::env::current_exe().unwrap();
        let named = ["tests_and_measurements_are_apart"];
        assert_eq!(has_any(&here, &named), Ok(true));
        assert_eq!(has_any(&here, &["no_test_is_named_like_this"]), Ok(false));
    }

    #[test]
    fn a_program_that_fails_or_hangs_is_an_error_and_its_results_count() {
        let shell = |script: &str, totals: &mut Totals, deadline| {
            run_tests(Command::new("sh").args(["-c", script]), totals, Duration::from_millis(deadline))
        };
        let mut totals = Totals::default();
        assert!(shell("echo 'test result: ok. 2 passed; 0 failed; 0 ignored'", &mut totals, 30_000).is_ok());
        assert!(
            shell("echo 'test result: FAILED. 1 passed; 1 failed; 0 ignored'; exit 101", &mut totals, 30_000)
                .is_err()
        );
        assert_eq!((totals.passed, totals.failed), (3, 1));
        let start = Instant::now();
        assert!(shell("exec sleep 600", &mut totals, 50).is_err());
        assert!(start.elapsed() < Duration::from_secs(60));
    }
}
