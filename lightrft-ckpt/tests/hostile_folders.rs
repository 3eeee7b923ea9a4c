//! Folders that vanish, move, fill up or turn read-only under a save, on real file systems: an error, and nothing else lost.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lightrft_ckpt::testing::Observed;
use lightrft_ckpt::{
    Alone, Checkpoints, Error, OsFileSystem, Part, Region, Result, Rotation, SaveReport, Saver, Snapshot,
    Verify, Which,
};

const KEEP_TWO: Rotation = Rotation { max_num: 2, ..Rotation::KEEP_ALL };

fn content(step: u64, elements: usize) -> Vec<u64> {
    (0..elements as u64).map(|i| step * 1_000_000 + i).collect()
}

fn save_elements(saver: &Saver, step: u64, elements: usize, limits: &Rotation) -> Result<SaveReport> {
    let weight = content(step, elements);
    let mut snapshot = Snapshot::of_step(step);
    snapshot.parts.push(Part::new("w", vec![elements], Region::Whole, &weight));
    saver.save(&Alone, &snapshot, limits)
}

fn save(saver: &Saver, step: u64) -> Result<SaveReport> {
    save_elements(saver, step, 100, &KEEP_TWO)
}

/// The step that loads, verified; 0 when there is none.
fn newest(dir: &Path) -> u64 {
    match Checkpoints::open(dir).load(Which::Newest, Verify::Everything) {
        Ok((checkpoint, _)) => {
            let weight: Vec<u64> = checkpoint.read_vec("w", &Region::Whole).unwrap();
            assert_eq!(weight, content(checkpoint.step(), weight.len()));
            checkpoint.step()
        }
        Err(Error::NoCheckpoint { skipped, .. }) => {
            assert_eq!(skipped, []);
            0
        }
        Err(e) => panic!("{e}"),
    }
}

/// A folder where syncing is quick, if there is one.
fn quick() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Runs `act` just before operation `n` of the save of step 3 after steps 1 and 2, for every n, and `check` after it.
fn before_every_operation(
    act: impl Fn(&Path) + Send + Sync + 'static,
    mut check: impl FnMut(&Path, Result<SaveReport>, Moment),
) {
    let act = Arc::new(act);
    let operations =
        disturbed(&act, u64::MAX, &mut |dir, told, _| assert_eq!((told.unwrap().step, newest(dir)), (3, 3)));
    assert!(operations > 10, "{operations} operations");
    for n in 0..operations {
        disturbed(&act, n, &mut check);
    }
}

/// When the folder was disturbed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Moment {
    BeforeTheCommit,
    AfterIt,
}

/// One of these; returns the operations of the save.
fn disturbed(
    act: &Arc<impl Fn(&Path) + Send + Sync + 'static>,
    n: u64,
    check: &mut impl FnMut(&Path, Result<SaveReport>, Moment),
) -> u64 {
    let scratch = quick();
    let dir = scratch.path().join("actor");
    let (done, at) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(u64::MAX)));
    let (counter, chosen, acts, there) = (done.clone(), at.clone(), act.clone(), dir.clone());
    let renamed = Arc::new(AtomicU64::new(u64::MAX));
    let rename = renamed.clone();
    let watched = Observed::new(OsFileSystem::new(), move |operation| {
        let this = counter.fetch_add(1, Ordering::SeqCst);
        if operation.kind == "rename" && operation.path.to_string_lossy().contains("global_step3.tmp-") {
            rename.store(this, Ordering::SeqCst);
        }
        if this == chosen.load(Ordering::SeqCst) {
            acts(&there);
        }
        Ok(())
    });
    let saver = Saver::open_on(Arc::new(watched), &dir, &Alone).unwrap();
    save(&saver, 1).unwrap();
    save(&saver, 2).unwrap();
    // Another model beside it, which is nobody's business.
    let other = scratch.path().join("critic");
    save(&Saver::open(&other, &Alone).unwrap(), 7).unwrap();
    let begin = done.load(Ordering::SeqCst);
    at.store(begin.saturating_add(n), Ordering::SeqCst);
    let told = save(&saver, 3);
    let operations = done.load(Ordering::SeqCst) - begin;
    if let Err(e) = &told {
        assert!(e.to_string().contains(&scratch.path().display().to_string()), "operation {n}: {e}");
    }
    drop(saver);
    // One that never came to the rename to its tag was disturbed before it.
    let before = begin.saturating_add(n) <= renamed.load(Ordering::SeqCst);
    check(&dir, told, if before { Moment::BeforeTheCommit } else { Moment::AfterIt });
    assert_eq!(newest(&other), 7, "operation {n}");
    // Whoever starts again goes on.
    save(&Saver::open(&dir, &Alone).unwrap(), 9).unwrap();
    assert_eq!(newest(&dir), 9, "operation {n}");
    operations
}

#[test]
fn a_folder_deleted_in_mid_save_is_an_error_and_the_next_start_makes_it_anew() {
    before_every_operation(
        |dir| fs::remove_dir_all(dir).unwrap(),
        |dir, told, moment| {
            // When all was published before, the report stands, and the deletion came after.
            assert!(told.is_err() || moment == Moment::AfterIt, "{told:?}");
            assert_eq!(newest(dir), 0);
        },
    );
}

#[test]
fn a_folder_renamed_away_in_mid_save_keeps_what_it_held() {
    let away = |dir: &Path| dir.with_file_name("elsewhere");
    before_every_operation(
        move |dir| fs::rename(dir, dir.with_file_name("elsewhere")).unwrap(),
        move |dir, told, _| {
            let found = newest(&away(dir));
            assert!(found == 3 || (found == 2 && told.is_err()), "{found}, told {told:?}");
        },
    );
}

#[test]
fn a_staging_folder_cleaned_away_in_mid_save_is_an_error_and_the_old_ones_stay() {
    let clean = |dir: &Path| {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            if entry.file_name().to_string_lossy().starts_with("global_step3.tmp-") {
                fs::remove_dir_all(entry.path()).unwrap();
            }
        }
    };
    before_every_operation(clean, |dir, told, _| {
        let found = newest(dir);
        assert!(found == 3 || (found == 2 && told.is_err()), "{found}, told {told:?}");
    });
}

#[test]
fn shards_cleaned_away_in_mid_save_are_noticed_before_the_old_ones_are_let_go() {
    let clean = |dir: &Path| {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            if entry.file_name().to_string_lossy().starts_with("global_step3.tmp-") {
                for file in fs::read_dir(entry.path()).unwrap().map(Result::unwrap) {
                    fs::remove_file(file.path()).unwrap();
                }
            }
        }
    };
    let mut unseen = 0;
    before_every_operation(clean, |dir, told, _| {
        let (checkpoint, report) = Checkpoints::open(dir).load(Which::Newest, Verify::Everything).unwrap();
        let found = checkpoint.step();
        assert!([2, 3].contains(&found));
        unseen += u64::from(found == 2 && told.is_ok() && report.skipped.is_empty());
    });
    // After the last file was opened come three operations: its length, the look at the tag's place, and the rename.
    assert!(unseen <= 3, "{unseen} times the save of an empty folder was called a success");
}

#[test]
fn a_file_where_the_folder_should_be_is_an_error_and_stays() {
    let scratch = quick();
    let file = scratch.path().join("file");
    fs::write(&file, "mine").unwrap();
    for dir in [file.clone(), file.join("below")] {
        let Err(Error::Io { path, .. }) = Saver::open(&dir, &Alone) else { panic!("it was opened") };
        assert!(path.starts_with(&file), "{}", path.display());
        assert!(Checkpoints::open(&dir).load(Which::Newest, Verify::Everything).is_err());
    }
    assert_eq!(fs::read(&file).unwrap(), b"mine");

    // The same for the tag's folder.
    let dir = scratch.path().join("checkpoints");
    let saver = Saver::open(&dir, &Alone).unwrap();
    save(&saver, 1).unwrap();
    fs::write(dir.join("global_step2"), "mine").unwrap();
    assert!(matches!(save(&saver, 2), Err(Error::Foreign { .. })));
    assert_eq!((newest(&dir), fs::read(dir.join("global_step2")).unwrap()), (1, b"mine".to_vec()));
}

#[test]
fn a_folder_behind_a_link_is_as_good_as_any() {
    let scratch = quick();
    let (dir, link) = (scratch.path().join("real"), scratch.path().join("link"));
    fs::create_dir(&dir).unwrap();
    symlink(&dir, &link).unwrap();
    let saver = Saver::open(&link, &Alone).unwrap();
    for step in 1..=3 {
        save(&saver, step).unwrap();
    }
    assert_eq!((newest(&link), newest(&dir)), (3, 3));
    // It is the same folder: one saver at a time.
    assert!(matches!(Saver::open(&dir, &Alone), Err(Error::Busy { .. })));

    let nowhere = scratch.path().join("dangling");
    symlink(scratch.path().join("nothing"), &nowhere).unwrap();
    assert!(matches!(Saver::open(&nowhere, &Alone), Err(Error::Io { .. })));
}

#[test]
fn a_link_where_a_tag_should_be_is_neither_followed_nor_removed() {
    let scratch = quick();
    let (dir, target) = (scratch.path().join("checkpoints"), scratch.path().join("target"));
    save(&Saver::open(&target, &Alone).unwrap(), 2).unwrap();
    let saver = Saver::open(&dir, &Alone).unwrap();
    symlink(target.join("global_step2"), dir.join("global_step2")).unwrap();
    assert!(matches!(save(&saver, 2), Err(Error::Foreign { .. })));
    for step in [1, 3, 4] {
        save(&saver, step).unwrap();
    }
    assert!(dir.join("global_step2").is_symlink());
    assert_eq!(newest(&target), 2);
}

#[test]
fn a_folder_called_latest_is_told_and_the_checkpoint_is_safe() {
    let scratch = quick();
    let dir = scratch.path();
    let saver = Saver::open(dir, &Alone).unwrap();
    fs::create_dir(dir.join("latest")).unwrap();
    fs::write(dir.join("latest/notes"), "mine").unwrap();
    let told = save(&saver, 1).unwrap().latest_not_moved.unwrap();
    assert!(told.contains("cannot rename") && told.contains("latest.tmp-"), "{told}");
    assert_eq!(newest(dir), 1);
    let (checkpoint, report) = Checkpoints::open(dir).load(Which::Latest, Verify::Everything).unwrap();
    assert_eq!((checkpoint.step(), report.skipped[0].name.as_str()), (1, "latest"));
    assert_eq!(fs::read(dir.join("latest/notes")).unwrap(), b"mine");
    assert_eq!(fs::read_dir(dir).unwrap().filter(|e| name_of(e).contains(".tmp-")).count(), 0);
    // Old ones are let go all the same: the disk must not fill.
    assert_eq!(save(&saver, 2).unwrap().removed, [""; 0]);
    assert_eq!(save(&saver, 3).unwrap().removed, ["global_step1"]);
    // Once it is out of the way, all is as ever.
    fs::remove_dir_all(dir.join("latest")).unwrap();
    assert_eq!(save(&saver, 4).unwrap().latest_not_moved, None);
    assert_eq!(saver.checkpoints().latest().unwrap().as_deref(), Some("global_step4"));
}

#[test]
fn a_checkpoint_that_is_open_is_read_on_when_its_folder_is_deleted() {
    let dir = quick();
    save_elements(&Saver::open(dir.path(), &Alone).unwrap(), 1, 1 << 20, &KEEP_TWO).unwrap();
    let (checkpoint, _) = Checkpoints::open(dir.path()).load(Which::Newest, Verify::WhileReading).unwrap();
    let first: Vec<u64> = checkpoint.read_vec("w", &Region::Flat(0..1)).unwrap();
    assert_eq!(first, content(1, 1));
    fs::remove_dir_all(dir.path()).unwrap();
    let all: Vec<u64> = checkpoint.read_vec("w", &Region::Whole).unwrap();
    assert!(all == content(1, 1 << 20), "what was saved");
}

fn name_of(entry: &io::Result<fs::DirEntry>) -> String {
    entry.as_ref().unwrap().file_name().to_string_lossy().into_owned()
}

#[test]
fn a_broken_latest_is_told_passed_over_and_written_anew() {
    for broken in [&b""[..], b"\xff\xfe", b"../outside", b"global_step99", b"a\nb", &[b'x'; 10_000]] {
        let scratch = quick();
        let saver = Saver::open(scratch.path(), &Alone).unwrap();
        save(&saver, 1).unwrap();
        fs::write(scratch.path().join("latest"), broken).unwrap();
        let at = saver.checkpoints();
        let (checkpoint, report) = at.load(Which::Latest, Verify::Everything).unwrap();
        assert_eq!((checkpoint.step(), report.skipped.len()), (1, 1), "{broken:?}");
        save(&saver, 2).unwrap();
        assert_eq!(at.latest().unwrap().as_deref(), Some("global_step2"));
        assert_eq!(at.load(Which::Latest, Verify::Everything).unwrap().0.step(), 2);
    }
}

const MOUNTED: &str = "LIGHTRFT_CKPT_TEST_MOUNTED";

/// Runs one of the tests below again, in a process with mounts of its own and a tmpfs of 2 MiB.
fn on_a_file_system_of_its_own(test: &str) {
    let dir = quick();
    let own = std::env::current_exe().unwrap();
    let run = |flags: &str, script: &str| {
        Command::new("unshare")
            .args([flags, "sh", "-c", script, "sh"])
            .arg(dir.path())
            .arg(&own)
            .args(["--exact", test, "--nocapture"])
            .env(MOUNTED, dir.path())
            .output()
    };
    let mount = "mount -t tmpfs -o size=2m tmpfs \"$1\"";
    // Either as root of a user namespace, or as root.
    let possible = |flags: &&&str| run(flags, mount).is_ok_and(|tried| tried.status.success());
    let Some(flags) = ["-rm", "-m"].iter().find(possible) else {
        // What `eprintln` prints is swallowed when a test passes.
        #[allow(clippy::explicit_write)]
        writeln!(io::stderr(), "SKIPPED: {test}: no mounts of our own are allowed here").unwrap();
        return;
    };
    let ran = run(flags, &format!("{mount} && shift && exec \"$@\"")).unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success() && said.contains("1 passed"), "{said}");
}

fn mounted() -> Option<PathBuf> {
    std::env::var_os(MOUNTED).map(PathBuf::from)
}

fn of_kind(error: &Error, kind: io::ErrorKind, below: &Path) -> bool {
    matches!(error, Error::Io { path, source, .. } if source.kind() == kind && path.starts_with(below))
}

#[test]
fn a_full_disk_is_told_and_room_made_is_room_used() {
    let Some(dir) = mounted() else {
        return on_a_file_system_of_its_own("a_full_disk_is_told_and_room_made_is_room_used");
    };
    // 2 MiB hold two of 800 kB and not three.
    let elements = 100_000;
    let saver = Saver::open(&dir, &Alone).unwrap();
    save_elements(&saver, 1, elements, &Rotation::KEEP_ALL).unwrap();
    save_elements(&saver, 2, elements, &Rotation::KEEP_ALL).unwrap();
    for _ in 0..3 {
        let told = save_elements(&saver, 3, elements, &KEEP_TWO).unwrap_err();
        assert!(of_kind(&told, io::ErrorKind::StorageFull, &dir), "{told}");
        assert_eq!(newest(&dir), 2);
        assert_eq!(saver.checkpoints().list().unwrap().len(), 2, "rotation came before the save");
        let left = fs::read_dir(&dir).unwrap().filter(|e| name_of(e).contains(".tmp-")).count();
        assert_eq!(left, 0, "what was half written still takes room");
    }
    let limits = Rotation { max_num: 1, ..Rotation::KEEP_ALL };
    assert_eq!(saver.rotate(&Alone, &limits).unwrap().removed, ["global_step1"]);
    save_elements(&saver, 3, elements, &limits).unwrap();
    assert_eq!(newest(&dir), 3);
}

#[test]
fn a_disk_full_of_what_a_crash_left_is_swept_at_the_next_start() {
    let Some(dir) = mounted() else {
        return on_a_file_system_of_its_own("a_disk_full_of_what_a_crash_left_is_swept_at_the_next_start");
    };
    let staging = dir.join("global_step1.tmp-0123456789abcdef");
    fs::create_dir(&staging).unwrap();
    let mut filler = fs::File::create(staging.join("rank-00000.safetensors")).unwrap();
    let full = loop {
        if let Err(e) = filler.write_all(&[1; 4096]) {
            break e;
        }
    };
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    drop(filler);
    let saver = Saver::open(&dir, &Alone).unwrap();
    assert!(!staging.exists());
    save(&saver, 1).unwrap();
}

#[test]
fn a_read_only_file_system_is_told_and_still_read() {
    let Some(dir) = mounted() else {
        return on_a_file_system_of_its_own("a_read_only_file_system_is_told_and_still_read");
    };
    let remount = |how: &str| {
        let done = Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(&dir).status();
        assert!(done.unwrap().success());
    };
    {
        let saver = Saver::open(&dir, &Alone).unwrap();
        save(&saver, 1).unwrap();
    }
    remount("ro");
    let told = Saver::open(&dir, &Alone).unwrap_err();
    assert!(of_kind(&told, io::ErrorKind::ReadOnlyFilesystem, &dir), "{told}");
    assert_eq!(newest(&dir), 1);
    remount("rw");
    let saver = Saver::open(&dir, &Alone).unwrap();
    save(&saver, 2).unwrap();
    drop(saver);
    assert_eq!(newest(&dir), 2);
}
