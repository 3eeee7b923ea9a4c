//! A crash before any operation of a save, of rotation and of the sweep leaves the old state or the new, never another.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::borrow::Cow;
use std::io;
use std::sync::Arc;

use lightrft_ckpt::testing::{Crash, SimulatedDisk, run_ranks};
use lightrft_ckpt::{
    Agreement, Alone, BackgroundSaver, Checkpoints, Dtype, Error, FileSystem as _, Part, Region, Result,
    Rotation, SaveReport, Saver, Snapshot, Verify, Which,
};

const DIR: &str = "/run/checkpoints";
/// Saves whose `run` is this or more are several blocks long, the others one.
const LONG: u64 = 10;
const LIMITS: Rotation = Rotation { max_num: 2, ..Rotation::KEEP_ALL };
/// Torn disks looked at after every crash, besides the one that lost all and the one that lost nothing.
const TEARS: u64 = 5;

/// What is saved at a step; `run` tells apart two saves of the same step.
fn content(step: u64, run: u64) -> Vec<f32> {
    let elements = if run >= LONG { 2_700 } else { 700 };
    (0..elements).map(|i| (step * 1000 + run * 10) as f32 + i as f32 / 1024.0).collect()
}

/// One rank's share of a step: its part of one tensor. It owns its bytes.
fn snapshot_of(group: &dyn Agreement, step: u64, run: u64) -> Snapshot<'static> {
    let (rank, world) = (group.rank(), group.world_size());
    let all = content(step, run);
    let mine = all.len() * rank / world..all.len() * (rank + 1) / world;
    let bytes = all[mine.clone()].iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut snapshot = Snapshot::of_step(step);
    snapshot.parts.push(Part {
        name: "w".into(),
        dtype: Dtype::F32,
        shape: vec![all.len()].into(),
        region: Region::Flat(mine),
        bytes: Cow::Owned(bytes),
    });
    snapshot.shared = serde_json::json!({ "run": run });
    snapshot
}

fn save_as(saver: &Saver, group: &dyn Agreement, step: u64, run: u64) -> Result<SaveReport> {
    saver.save(group, &snapshot_of(group, step, run), &LIMITS)
}

fn open_and_save(disk: &SimulatedDisk, step: u64, run: u64) -> Result<SaveReport> {
    let saver = Saver::open_on(Arc::new(disk.clone()), DIR, &Alone)?;
    save_as(&saver, &Alone, step, run)
}

fn disk_with(steps: &[u64]) -> SimulatedDisk {
    let disk = SimulatedDisk::new();
    for &step in steps {
        open_and_save(&disk, step, 0).unwrap();
    }
    disk
}

/// What loading finds: (step, run). It must be exactly what was saved, and nothing broken may lie about.
fn loaded(disk: &SimulatedDisk) -> Option<(u64, u64)> {
    let checkpoints = Checkpoints::open_on(Arc::new(disk.clone()), DIR);
    match checkpoints.load(Which::Newest, Verify::Everything) {
        Ok((checkpoint, report)) => {
            assert!(report.skipped.is_empty(), "{:?}", report.skipped);
            let (step, run) = (checkpoint.step(), checkpoint.shared()["run"].as_u64().unwrap());
            assert_eq!(checkpoint.read_vec::<f32>("w", &Region::Whole).unwrap(), content(step, run));
            for listed in checkpoints.list().unwrap() {
                checkpoints.load(Which::Tag(&listed.tag), Verify::Everything).unwrap();
            }
            Some((step, run))
        }
        Err(Error::NoCheckpoint { skipped, .. }) => {
            assert!(skipped.is_empty(), "{skipped:?}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// After a restart everything is tidy, the same checkpoint is found, `latest` names one that is there, and saving
/// goes on.
fn restarts(disk: &SimulatedDisk, found: Option<(u64, u64)>) {
    let saver = Saver::open_on(Arc::new(disk.clone()), DIR, &Alone).unwrap();
    assert_eq!(saver.left_by_sweep(), []);
    assert_eq!(loaded(disk), found);
    let tags: Vec<String> = saver.checkpoints().list().unwrap().into_iter().map(|l| l.tag).collect();
    for entry in disk.list(DIR.as_ref()).unwrap() {
        assert!(entry.name == "latest" || tags.contains(&entry.name), "left over: {}", entry.name);
    }
    if let Some(latest) = saver.checkpoints().latest().unwrap() {
        assert!(tags.contains(&latest), "latest names {latest}, there are {tags:?}");
    }
    save_as(&saver, &Alone, 90, 0).unwrap();
    assert_eq!(loaded(disk), Some((90, 0)));
    assert_eq!(saver.checkpoints().latest().unwrap().as_deref(), Some("global_step90"));
    assert!(saver.checkpoints().list().unwrap().len() <= 2);
}

/// Crashes before every operation of `act`, in so many ways, and checks what is found.
fn crash_everywhere(
    tears: u64,
    prepare: impl Fn() -> SimulatedDisk,
    act: impl Fn(&SimulatedDisk) -> Result<SaveReport>,
    old: Option<(u64, u64)>,
    new: (u64, u64),
) {
    let whole = prepare();
    let begin = whole.operations();
    act(&whole).unwrap();
    let operations = whole.operations() - begin;
    assert!(operations > 10, "{operations} operations: the save is not on this disk");
    for n in 0..=operations {
        let disk = prepare();
        disk.crash_before(disk.operations() + n);
        let told = act(&disk);
        let (told_ok, told_latest) =
            (told.is_ok(), told.is_ok_and(|report| report.latest_not_moved.is_none()));
        assert!(n < operations || told_latest);
        let torn = (0..tears).map(|i| Crash::Tear(n * TEARS + i));
        for crash in [Crash::LoseAll, Crash::KeepAll].into_iter().chain(torn) {
            let left = disk.after(crash);
            let found = loaded(&left);
            let right = found == Some(new) || (found == old && !told_ok);
            assert!(
                right,
                "before operation {n} of {operations}, {crash:?}, told ok: {told_ok}: found {found:?}"
            );
            if told_latest {
                let latest = Checkpoints::open_on(Arc::new(left.clone()), DIR).latest().unwrap();
                assert_eq!(latest, Some(format!("global_step{}", new.0)), "before operation {n}, {crash:?}");
            }
            restarts(&left, found);
        }
    }
}

#[test]
fn a_crash_in_the_first_save_leaves_nothing_or_it() {
    crash_everywhere(TEARS, SimulatedDisk::new, |disk| open_and_save(disk, 1, 0), None, (1, 0));
}

#[test]
fn a_crash_in_a_save_that_rotates_leaves_the_old_step_or_the_new() {
    crash_everywhere(TEARS, || disk_with(&[1, 2]), |disk| open_and_save(disk, 3, 0), Some((2, 0)), (3, 0));
}

#[test]
fn a_crash_while_a_tag_is_saved_again_leaves_the_old_content_or_the_new() {
    crash_everywhere(TEARS, || disk_with(&[1, 2]), |disk| open_and_save(disk, 2, 7), Some((2, 0)), (2, 7));
}

#[test]
fn a_crash_while_two_ranks_save_leaves_the_old_step_or_the_new() {
    let act = |disk: &SimulatedDisk| {
        let mut results = run_ranks(2, |group| {
            let saver = Saver::open_on(Arc::new(disk.clone()), DIR, &group)?;
            save_as(&saver, &group, 3, 0)
        });
        let (second, first) = (results.pop().unwrap(), results.pop().unwrap());
        assert_eq!(first.is_ok(), second.is_ok(), "{first:?} {second:?}");
        first
    };
    crash_everywhere(TEARS, || disk_with(&[1, 2]), act, Some((2, 0)), (3, 0));
}

#[test]
fn a_second_crash_while_the_first_is_swept_leaves_no_other_state() {
    // Saving the same tag again is the save with most steps in between.
    let whole = disk_with(&[1, 2]);
    let begin = whole.operations();
    open_and_save(&whole, 2, 7).unwrap();
    for n in 0..whole.operations() - begin {
        let crashed = || {
            let disk = disk_with(&[1, 2]);
            disk.crash_before(disk.operations() + n);
            let _ = open_and_save(&disk, 2, 7);
            disk.after(Crash::KeepAll)
        };
        let found = loaded(&crashed());
        crash_everywhere(1, crashed, |disk| open_and_save(disk, 3, 0), found, (3, 0));
    }
}

#[test]
fn an_error_of_any_operation_leaves_a_whole_state_and_a_saver_that_works() {
    let whole = disk_with(&[1, 2]);
    let saver = Saver::open_on(Arc::new(whole.clone()), DIR, &Alone).unwrap();
    let begin = whole.operations();
    save_as(&saver, &Alone, 3, 0).unwrap();
    for n in 0..whole.operations() - begin {
        let disk = disk_with(&[1, 2]);
        let saver = Saver::open_on(Arc::new(disk.clone()), DIR, &Alone).unwrap();
        disk.fail_at(disk.operations() + n, io::ErrorKind::StorageFull);
        let told = save_as(&saver, &Alone, 3, 0);
        let found = loaded(&disk);
        let right = found == Some((3, 0)) || (found == Some((2, 0)) && told.is_err());
        assert!(right, "operation {n} failed, told {told:?}: found {found:?}");
        let staged = disk.list(DIR.as_ref()).unwrap().into_iter().find(|e| e.name.contains("step3.tmp-"));
        assert_eq!(staged, None, "operation {n}: {told:?}");
        save_as(&saver, &Alone, 4, 0).unwrap();
        assert_eq!(loaded(&disk), Some((4, 0)));
    }
}

/// A saver whose files are several blocks, by two threads: they reach the disk in any order.
fn open_with_small_blocks(disk: &SimulatedDisk, group: &dyn Agreement) -> Result<Saver> {
    let saver = Saver::open_on(Arc::new(disk.clone()), DIR, group)?;
    Ok(saver.with_writers(2).with_block_bytes(4096))
}

fn open_behind(disk: &SimulatedDisk, group: Group) -> Result<BackgroundSaver> {
    BackgroundSaver::new(open_with_small_blocks(disk, &*group)?, group)
}

type Group = Arc<dyn Agreement + Send + Sync>;

/// A whole save in the background.
fn save_behind(disk: &SimulatedDisk, group: Group, step: u64, run: u64) -> Result<SaveReport> {
    let mut saver = open_behind(disk, group.clone())?;
    assert_eq!(saver.save(&snapshot_of(&*group, step, run), &LIMITS)?, None);
    Ok(saver.finish()?.expect("a save was begun"))
}

#[test]
fn a_crash_while_threads_write_blocks_leaves_the_old_step_or_the_new() {
    let act = |disk: &SimulatedDisk| save_as(&open_with_small_blocks(disk, &Alone)?, &Alone, 3, LONG);
    crash_everywhere(2, || disk_with(&[2]), act, Some((2, 0)), (3, LONG));
}

#[test]
fn a_crash_in_a_save_in_the_background_leaves_the_old_step_or_the_new() {
    let act = |disk: &SimulatedDisk| save_behind(disk, Arc::new(Alone), 3, LONG);
    crash_everywhere(2, || disk_with(&[1, 2]), act, Some((2, 0)), (3, LONG));
}

#[test]
fn a_crash_while_a_tag_is_saved_again_in_the_background_leaves_the_old_content_or_the_new() {
    let act = |disk: &SimulatedDisk| save_behind(disk, Arc::new(Alone), 2, LONG);
    crash_everywhere(2, || disk_with(&[2]), act, Some((2, 0)), (2, LONG));
}

#[test]
fn a_crash_while_two_ranks_save_in_the_background_leaves_the_old_step_or_the_new() {
    let act = |disk: &SimulatedDisk| {
        let mut results = run_ranks(2, |group| save_behind(disk, Arc::new(group), 3, LONG));
        let (second, first) = (results.pop().unwrap(), results.pop().unwrap());
        assert_eq!(first.is_ok(), second.is_ok(), "{first:?} {second:?}");
        first
    };
    crash_everywhere(2, || disk_with(&[1, 2]), act, Some((2, 0)), (3, LONG));
}

#[test]
fn a_crash_while_saves_follow_each_other_in_the_background_loses_none_that_was_reported() {
    /// The last step that was reported saved.
    fn act(disk: &SimulatedDisk) -> u64 {
        let mut told = 2;
        let mut report = |answer: Result<Option<SaveReport>>| {
            told = answer.ok().flatten().map_or(told, |report| report.step);
        };
        if let Ok(mut saver) = open_behind(disk, Arc::new(Alone)) {
            (3..5).for_each(|step| report(saver.save(&snapshot_of(&Alone, step, LONG), &LIMITS)));
            report(saver.finish());
        }
        told
    }
    let whole = disk_with(&[2]);
    let begin = whole.operations();
    assert_eq!(act(&whole), 4);
    for n in 0..=whole.operations() - begin {
        let disk = disk_with(&[2]);
        disk.crash_before(begin + n);
        let told = act(&disk);
        for crash in [Crash::LoseAll, Crash::KeepAll, Crash::Tear(n)] {
            let left = disk.after(crash);
            let found = loaded(&left).unwrap();
            assert!(
                found.0 >= told && (found.1 == LONG || found == (2, 0)),
                "before operation {n}, {crash:?}: {found:?}, told {told}"
            );
            restarts(&left, Some(found));
        }
    }
}

#[test]
fn an_error_of_any_operation_in_the_background_is_told_by_the_next_call_and_saving_goes_on() {
    let whole = disk_with(&[1, 2]);
    let mut saver = open_behind(&whole, Arc::new(Alone)).unwrap();
    let begin = whole.operations();
    saver.save(&snapshot_of(&Alone, 3, 0), &LIMITS).unwrap();
    saver.finish().unwrap();
    let mut told_late = 0;
    for n in 0..whole.operations() - begin {
        let disk = disk_with(&[1, 2]);
        let mut saver = open_behind(&disk, Arc::new(Alone)).unwrap();
        disk.fail_at(disk.operations() + n, io::ErrorKind::StorageFull);
        let begun = saver.save(&snapshot_of(&Alone, 3, 0), &LIMITS);
        // By turns the next call is one that saves, and one that only asks.
        let asked = match (&begun, n % 2) {
            (Err(_), _) => begun,
            (Ok(_), 0) => saver.save(&snapshot_of(&Alone, 4, 0), &LIMITS),
            (Ok(_), _) => saver.finish(),
        };
        let said_saved = matches!(&asked, Ok(Some(report)) if report.step == 3);
        assert!(said_saved || asked.is_err(), "operation {n} failed: told {asked:?}");
        told_late += u64::from(asked.is_err());
        let after = saver.finish().unwrap_or_else(|e| panic!("operation {n}: told again: {e}"));
        let expected = (said_saved && n % 2 == 0).then_some(4);
        assert_eq!(after.map(|report| report.step), expected, "operation {n}: {asked:?}");
        let found = loaded(&disk).map(|(step, _)| step);
        let right = match expected {
            Some(step) => found == Some(step),
            None => found == Some(3) || (found == Some(2) && asked.is_err()),
        };
        assert!(right, "operation {n} failed, told {asked:?}: found {found:?}");
        let staged = disk.list(DIR.as_ref()).unwrap().into_iter().find(|e| e.name.contains("step3.tmp-"));
        assert_eq!(staged, None, "operation {n}: {asked:?}");
        saver.save(&snapshot_of(&Alone, 5, 0), &LIMITS).unwrap();
        saver.finish().unwrap();
        assert_eq!(loaded(&disk), Some((5, 0)));
    }
    assert!(told_late > 10, "{told_late} of the operations mattered");
}

#[test]
fn a_crash_may_leave_a_file_with_the_length_that_was_set_aside_for_it() {
    let disk = SimulatedDisk::new();
    let file = disk.create("/file".as_ref(), 1000).unwrap();
    disk.sync_dir("/".as_ref()).unwrap();
    let after = |crash| disk.after(crash).content("/file").unwrap();
    assert_eq!((after(Crash::LoseAll), after(Crash::KeepAll)), (vec![], vec![0; 1000]));
    file.write_all_at(600, &[7; 400]).unwrap();
    assert_eq!(after(Crash::KeepAll), [vec![0; 600], vec![7; 400]].concat());
    let torn: Vec<usize> = (0..20).map(|seed| after(Crash::Tear(seed)).len()).collect();
    assert!(torn.contains(&0) && torn.contains(&1000), "{torn:?}");
}
