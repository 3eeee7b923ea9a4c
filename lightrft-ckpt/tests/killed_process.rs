//! Real processes killed with SIGKILL while they save leave a checkpoint that loads, on a real file system.
//!
//! 40 are killed by custom, where possible in a folder in memory: what a killed process has written is there all the same,
//! and syncing is quick. `LIGHTRFT_CKPT_TEST_KILLS` says how many, then in the folder for temporary files.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use lightrft_ckpt::testing::Observed;
use lightrft_ckpt::{
    Alone, BackgroundSaver, Checkpoints, Error, OsFileSystem, Part, Region, Rotation, SaveReport, Saver,
    Snapshot, Verify, Which,
};

const DIR_VARIABLE: &str = "LIGHTRFT_CKPT_TEST_SAVES_INTO";
const KEPT_VARIABLE: &str = "LIGHTRFT_CKPT_TEST_KEEPS";
const BACKGROUND_VARIABLE: &str = "LIGHTRFT_CKPT_TEST_IN_BACKGROUND";
const KILLS_VARIABLE: &str = "LIGHTRFT_CKPT_TEST_KILLS";

fn content(save: u64) -> Vec<u64> {
    (0..20_000).map(|i| save * 1_000_000 + i).collect()
}

/// Every tag is saved twice, so that half of the saves replace one.
fn step_of(save: u64) -> u64 {
    save.div_ceil(2)
}

/// The number of the save that a loaded checkpoint is of; all of it must be.
fn save_loaded(dir: &Path) -> u64 {
    let at = Checkpoints::open(dir);
    let (checkpoint, report) = match at.load(Which::Newest, Verify::Everything) {
        Err(Error::NoCheckpoint { skipped, .. }) => {
            assert_eq!(skipped, []);
            return 0;
        }
        loaded => loaded.unwrap(),
    };
    assert_eq!(report.skipped, []);
    let save = checkpoint.shared().as_u64().unwrap();
    assert_eq!(checkpoint.step(), step_of(save));
    assert_eq!(checkpoint.read_vec::<u64>("w", &Region::Whole).unwrap(), content(save));
    for listed in at.list().unwrap() {
        at.load(Which::Tag(&listed.tag), Verify::Everything).unwrap();
    }
    save
}

/// Saves, and returns the report of a save that is done.
type SaveOne = dyn FnMut(&Snapshot<'_>) -> Option<SaveReport>;

/// Not a test by itself: the process that is killed. Saves one after the other, telling every operation.
#[test]
fn child_that_saves_until_it_is_killed() {
    let Some(dir) = std::env::var_os(DIR_VARIABLE) else { return };
    let max_num = std::env::var(KEPT_VARIABLE).unwrap().parse().unwrap();
    let told = Observed::new(OsFileSystem::new(), |operation| {
        // A parent that is gone must not leave its child behind.
        writeln!(std::io::stdout(), "operation {}", operation.kind)
    });
    // What the sweep does counts too: it is killed like all the rest.
    let saver = Saver::open_on(Arc::new(told), &dir, &Alone).unwrap();
    let begin = save_loaded(dir.as_ref()) + 1;
    let limits = Rotation { max_num, max_mem_gib: 1.0, ..Rotation::default() };
    let mut save: Box<SaveOne> = if std::env::var_os(BACKGROUND_VARIABLE).is_some() {
        let mut saver = BackgroundSaver::new(saver, Arc::new(Alone)).unwrap();
        Box::new(move |snapshot| saver.save(snapshot, &limits).unwrap())
    } else {
        Box::new(move |snapshot| Some(saver.save(&Alone, snapshot, &limits).unwrap()))
    };
    let mut done = begin - 1;
    for number in begin..begin + 10_000 {
        let weight = content(number);
        let mut snapshot = Snapshot::of_step(step_of(number));
        snapshot.parts.push(Part::new("w", vec![weight.len()], Region::Whole, &weight));
        snapshot.shared = number.into();
        // In the background it is the one before that is reported.
        if save(&snapshot).is_none() {
            continue;
        }
        done += 1;
        if writeln!(std::io::stdout(), "saved {done}").is_err() {
            return;
        }
    }
}

/// Starts the child, kills it after it has begun so many operations, and returns the last save it said was done.
fn killed_after(operations: u64, max_num: u64, background: bool, dir: &Path) -> u64 {
    let mut command = Command::new(std::env::current_exe().unwrap());
    if background {
        command.env(BACKGROUND_VARIABLE, "1");
    }
    let mut child = command
        .args(["--exact", "child_that_saves_until_it_is_killed", "--nocapture", "--test-threads=1"])
        .env(DIR_VARIABLE, dir)
        .env(KEPT_VARIABLE, max_num.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let (mut begun, mut saved) = (0, 0);
    let mut note = |line: &str| {
        begun += u64::from(line.contains("operation "));
        if let Some((_, save)) = line.split_once("saved ") {
            saved = save.trim().parse().unwrap();
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
    let (kills, dir) = match std::env::var(KILLS_VARIABLE) {
        Ok(kills) => (kills.parse().unwrap(), tempfile::tempdir()),
        Err(_) => (40, tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())),
    };
    let dir = dir.unwrap();
    let dir = dir.path().join("checkpoints");
    let mut found_before = 0;
    for kill in 0..kills {
        // An odd stride through the operations of about three saves, so that the kills fall everywhere.
        let said = killed_after(10 + kill * 7 % 90, 1 + kill % 3, kill % 4 == 3, &dir);
        let found = save_loaded(&dir);
        assert!(found >= said.max(found_before), "kill {kill}: {found} is there, {said} was said");
        found_before = found;
    }
    assert!(found_before > kills / 2, "the kills left no room to save: save {found_before}");

    let saver = Saver::open(&dir, &Alone).unwrap();
    assert_eq!(saver.left_by_sweep(), []);
    let left: Vec<String> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    let infixes = [".tmp-", ".trash-", ".replaced-"];
    assert!(left.iter().all(|name| infixes.iter().all(|infix| !name.contains(infix))), "{left:?}");
    eprintln!("{kills} processes killed, {found_before} saves");
}
