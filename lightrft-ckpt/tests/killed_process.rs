//! A real process killed with SIGKILL while it saves leaves a checkpoint that loads, on a real file system.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use lightrft_ckpt::testing::Observed;
use lightrft_ckpt::{
    Alone, Checkpoints, Error, OsFileSystem, Part, Region, Rotation, Saver, Snapshot, Verify, Which,
};

const DIR_VARIABLE: &str = "LIGHTRFT_CKPT_TEST_SAVES_INTO";
const KILLS: u64 = 20;

fn content(step: u64) -> Vec<u64> {
    (0..20_000).map(|i| step * 1_000_000 + i).collect()
}

/// Not a test by itself: the process that is killed. Saves one step after the other, telling every operation.
#[test]
fn child_that_saves_until_it_is_killed() {
    let Some(dir) = std::env::var_os(DIR_VARIABLE) else { return };
    let told = Observed::new(OsFileSystem::new(), |operation| {
        // A parent that is gone must not leave its child behind.
        writeln!(std::io::stdout(), "operation {}", operation.kind)
    });
    let saver = Saver::open_on(Arc::new(told), &dir, &Alone).unwrap();
    let begin = saver.checkpoints().list().unwrap().first().map_or(1, |newest| newest.step + 1);
    for step in begin..begin + 10_000 {
        let weight = content(step);
        let mut snapshot = Snapshot::of_step(step);
        snapshot.parts.push(Part::new("w", vec![weight.len()], Region::Whole, &weight));
        saver.save(&Alone, &snapshot, &Rotation { max_num: 2, max_mem_gib: 1.0 }).unwrap();
        if writeln!(std::io::stdout(), "saved {step}").is_err() {
            return;
        }
    }
}

/// Starts the child, kills it after it has begun so many operations, and returns the last step it said was saved.
fn killed_after(operations: u64, dir: &Path) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_saves_until_it_is_killed", "--nocapture", "--test-threads=1"])
        .env(DIR_VARIABLE, dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let (mut begun, mut saved) = (0, 0);
    let mut note = |line: &str| {
        begun += u64::from(line.contains("operation "));
        if let Some((_, step)) = line.split_once("saved ") {
            saved = step.trim().parse().unwrap();
        }
        begun
    };
    while note(&lines.next().expect("the child ended by itself")) < operations {}
    child.kill().unwrap();
    // What it said before it died counts.
    for line in lines {
        note(&line);
    }
    child.wait().unwrap();
    saved
}

#[test]
fn a_killed_save_leaves_a_checkpoint_that_loads() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("checkpoints");
    let mut found_before = 0;
    for kill in 0..KILLS {
        // An odd stride through the operations of about three saves, so that the kills fall everywhere.
        let said = killed_after(10 + kill * 7 % 60, &dir);
        match Checkpoints::open(&dir).load(Which::Newest, Verify::Everything) {
            Ok((checkpoint, report)) => {
                assert_eq!(report.skipped, []);
                assert!(checkpoint.step() >= said.max(found_before), "{} after {said}", checkpoint.step());
                let weight: Vec<u64> = checkpoint.read_vec("w", &Region::Whole).unwrap();
                assert_eq!(weight, content(checkpoint.step()));
                found_before = checkpoint.step();
            }
            Err(Error::NoCheckpoint { skipped, .. }) => {
                assert_eq!((skipped, said, found_before), (vec![], 0, 0));
            }
            Err(e) => panic!("kill {kill}: {e}"),
        }
    }
    assert!(found_before > KILLS / 2, "the kills left no room to save: step {found_before}");

    let saver = Saver::open(&dir, &Alone).unwrap();
    assert_eq!(saver.left_by_sweep(), []);
    let left: Vec<String> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    assert!(left.iter().all(|name| !name.contains(".tmp-") && !name.contains(".trash-")), "{left:?}");
}
