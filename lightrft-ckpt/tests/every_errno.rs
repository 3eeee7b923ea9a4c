//! A full disk, a broken one, a quota, a read-only mount, missing rights: at every operation, once or from then on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::error::Error as _;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lightrft_ckpt::testing::{Crash, Observed, SimulatedDisk, run_ranks};
use lightrft_ckpt::{
    Agreement, Alone, Checkpoints, Error, FileSystem, Part, Region, Result, Rotation, SaveReport, Saver,
    Snapshot, Verify, Which,
};
use rustix::io::Errno;

const DIR: &str = "/run/checkpoints";
const ELEMENTS: usize = 300;
const ERRORS: [Errno; 5] = [Errno::NOSPC, Errno::IO, Errno::ROFS, Errno::DQUOT, Errno::ACCESS];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Lasting {
    /// One operation fails.
    Once,
    /// It and all after it fail.
    ForGood,
}

/// What goes wrong, in which operation, and how many there were.
#[derive(Debug)]
struct Fault {
    errno: Errno,
    lasting: Lasting,
    at: AtomicU64,
    done: AtomicU64,
}

const NEVER: u64 = u64::MAX;

impl Fault {
    fn none() -> Arc<Fault> {
        Fault::new(Errno::IO, Lasting::Once, NEVER)
    }

    fn new(errno: Errno, lasting: Lasting, at: u64) -> Arc<Fault> {
        Arc::new(Fault { errno, lasting, at: AtomicU64::new(at), done: AtomicU64::new(0) })
    }

    /// The disk with this fault in it: every operation counts, those that only look too.
    fn on(self: &Arc<Self>, disk: &SimulatedDisk) -> Arc<dyn FileSystem> {
        let fault = self.clone();
        Arc::new(Observed::new(disk.clone(), move |_| {
            let (this, at) = (fault.done.fetch_add(1, Ordering::SeqCst), fault.at.load(Ordering::SeqCst));
            match this == at || (this > at && fault.lasting == Lasting::ForGood) {
                true => Err(io::Error::from_raw_os_error(fault.errno.raw_os_error())),
                false => Ok(()),
            }
        }))
    }

    /// Somebody made room, or mounted the disk again.
    fn mend(&self) {
        self.at.store(NEVER, Ordering::SeqCst);
    }
}

/// Every fault at every one of so many operations.
fn faults(operations: u64) -> impl Iterator<Item = (Errno, Lasting, u64)> {
    let once = ERRORS.into_iter().map(|errno| (errno, Lasting::Once));
    // What these say stays true until somebody does something about it.
    let for_good = [Errno::NOSPC, Errno::ROFS].into_iter().map(|errno| (errno, Lasting::ForGood));
    once.chain(for_good).flat_map(move |(e, l)| (0..operations).map(move |n| (e, l, n)))
}

fn content(step: u64, run: u64) -> Vec<f32> {
    (0..ELEMENTS).map(|i| (step * 1000 + run * 10) as f32 + i as f32 / 1024.0).collect()
}

const KEEP_TWO: Rotation = Rotation { max_num: 2, ..Rotation::KEEP_ALL };

fn save(saver: &Saver, group: &dyn Agreement, step: u64, run: u64) -> Result<SaveReport> {
    let all = content(step, run);
    let (rank, world) = (group.rank(), group.world_size());
    let mine = ELEMENTS * rank / world..ELEMENTS * (rank + 1) / world;
    let mut snapshot = Snapshot::of_step(step);
    snapshot.parts.push(Part::new("w", vec![ELEMENTS], Region::Flat(mine.clone()), &all[mine]));
    snapshot.shared = serde_json::json!({ "run": run });
    saver.save(group, &snapshot, &KEEP_TWO)
}

fn disk_with(steps: &[u64]) -> SimulatedDisk {
    let disk = SimulatedDisk::new();
    let saver = Saver::open_on(Arc::new(disk.clone()), DIR, &Alone).unwrap();
    for &step in steps {
        save(&saver, &Alone, step, 0).unwrap();
    }
    disk
}

/// Step and run of what loads; all that is listed must load.
fn loaded(disk: &SimulatedDisk) -> (u64, u64) {
    let at = Checkpoints::open_on(Arc::new(disk.clone()), DIR);
    let (checkpoint, report) = at.load(Which::Newest, Verify::Everything).unwrap();
    assert_eq!(report.skipped, []);
    let (step, run) = (checkpoint.step(), checkpoint.shared()["run"].as_u64().unwrap());
    assert_eq!(checkpoint.read_vec::<f32>("w", &Region::Whole).unwrap(), content(step, run));
    for listed in at.list().unwrap() {
        at.load(Which::Tag(&listed.tag), Verify::Everything).unwrap();
    }
    (step, run)
}

/// The error says what was tried, on what, and what the system said.
fn tells(error: &Error, errno: Errno) {
    let Error::Io { op, path, source } = error else { panic!("{error}") };
    assert!(!op.is_empty() && path.starts_with("/run"), "{error}");
    assert_eq!(source.raw_os_error(), Some(errno.raw_os_error()), "{error}");
    let text = error.to_string();
    assert!(text.contains(op) && text.contains(&path.display().to_string()), "{text}");
    assert!(error.source().is_some());
}

fn tidy(disk: &SimulatedDisk) {
    let saver = Saver::open_on(Arc::new(disk.clone()), DIR, &Alone).unwrap();
    assert_eq!(saver.left_by_sweep(), []);
    let tags: Vec<String> = saver.checkpoints().list().unwrap().into_iter().map(|l| l.tag).collect();
    for entry in disk.list(DIR.as_ref()).unwrap() {
        assert!(entry.name == "latest" || tags.contains(&entry.name), "left over: {}", entry.name);
    }
}

/// Saves step `step` of run 1 over steps 1 and 2, with every fault.
fn every_fault_in_a_save_of(step: u64) {
    let fault = Fault::none();
    let saver = Saver::open_on(fault.on(&disk_with(&[1, 2])), DIR, &Alone).unwrap();
    let begin = fault.done.load(Ordering::SeqCst);
    save(&saver, &Alone, step, 1).unwrap();
    let operations = fault.done.load(Ordering::SeqCst) - begin;
    assert!(operations > 20, "{operations} operations: the faults are not in this save");
    for (errno, lasting, n) in faults(operations) {
        let disk = disk_with(&[1, 2]);
        let fault = Fault::new(errno, lasting, NEVER);
        let saver = Saver::open_on(fault.on(&disk), DIR, &Alone).unwrap();
        fault.at.store(fault.done.load(Ordering::SeqCst) + n, Ordering::SeqCst);
        let told = save(&saver, &Alone, step, 1);
        fault.mend();
        let case = format!("{errno} {lasting:?} at operation {n} of {operations}, told {told:?}");
        let found = loaded(&disk);
        match &told {
            Ok(report) => {
                assert_eq!(found, (step, 1), "{case}");
                let latest = saver.checkpoints().latest().unwrap();
                let moved = latest == Some(report.tag.clone());
                assert!(moved || report.latest_not_moved.is_some(), "{case}: latest is {latest:?}");
                let why = report.latest_not_moved.iter().chain(report.not_removed.iter().map(|s| &s.reason));
                why.for_each(|why| assert!(why.contains(&io::Error::from(errno).to_string()), "{case}"));
            }
            Err(e) => {
                tells(e, errno);
                assert!([(2, 0), (step, 1)].contains(&found), "{case}: found {found:?}");
            }
        }
        // The same saver goes on as soon as the disk does.
        save(&saver, &Alone, 4, 0).unwrap();
        assert_eq!(loaded(&disk), (4, 0), "{case}");
        assert!(saver.checkpoints().list().unwrap().len() <= 2, "{case}");
        drop(saver);
        tidy(&disk);
    }
}

#[test]
fn an_error_anywhere_in_a_save_that_rotates_is_told_and_loses_nothing() {
    every_fault_in_a_save_of(3);
}

#[test]
fn an_error_anywhere_in_a_save_that_replaces_is_told_and_loses_nothing() {
    every_fault_in_a_save_of(2);
}

#[test]
fn an_error_anywhere_in_a_rotation_is_told_and_the_newest_stays() {
    let kept = Rotation { max_num: 1, ..Rotation::KEEP_ALL };
    let fault = Fault::none();
    let saver = Saver::open_on(fault.on(&disk_with(&[1, 2])), DIR, &Alone).unwrap();
    let begin = fault.done.load(Ordering::SeqCst);
    assert_eq!(saver.rotate(&Alone, &kept).unwrap().removed, ["global_step1"]);
    for (errno, lasting, n) in faults(fault.done.load(Ordering::SeqCst) - begin) {
        let disk = disk_with(&[1, 2]);
        let fault = Fault::new(errno, lasting, NEVER);
        let saver = Saver::open_on(fault.on(&disk), DIR, &Alone).unwrap();
        fault.at.store(fault.done.load(Ordering::SeqCst) + n, Ordering::SeqCst);
        let told = saver.rotate(&Alone, &kept);
        fault.mend();
        assert_eq!(loaded(&disk), (2, 0), "{errno} {lasting:?} at operation {n}: {told:?}");
        match told {
            Err(e) => tells(&e, errno),
            Ok(rotated) => {
                let left = saver.checkpoints().list().unwrap().len();
                let told_so = rotated.removed == ["global_step1"] || !rotated.not_removed.is_empty();
                assert!(told_so || left == 2, "operation {n}: {rotated:?}");
            }
        }
        saver.rotate(&Alone, &kept).unwrap();
        drop(saver);
        tidy(&disk);
        let left = Checkpoints::open_on(Arc::new(disk.clone()), DIR).list().unwrap();
        assert_eq!(left.len(), 1, "{errno} {lasting:?} at operation {n}");
    }
}

#[test]
fn a_rotation_that_cannot_read_latest_lets_nothing_go() {
    // A run that went back: `latest` names the lowest step, which only that protects.
    let disk = disk_with(&[9]);
    let saver = Saver::open_on(Arc::new(disk.clone()), DIR, &Alone).unwrap();
    save(&saver, &Alone, 7, 0).unwrap();
    drop(saver);
    let fs = Observed::new(disk.clone(), |operation| {
        let unreadable = operation.kind == "read" && operation.path.ends_with("latest");
        if unreadable { Err(Errno::IO.into()) } else { Ok(()) }
    });
    let saver = Saver::open_on(Arc::new(fs), DIR, &Alone).unwrap();
    let told = saver.rotate(&Alone, &Rotation { max_num: 1, ..Rotation::KEEP_ALL });
    tells(&told.unwrap_err(), Errno::IO);
    assert_eq!(saver.checkpoints().list().unwrap().len(), 2);
}

#[test]
fn an_error_anywhere_in_the_sweep_after_a_crash_is_told_and_loses_nothing() {
    // A crash between the two renames of a replacement leaves the most to do.
    let whole = disk_with(&[1, 2]);
    let saver = Saver::open_on(Arc::new(whole.clone()), DIR, &Alone).unwrap();
    let begin = whole.operations();
    save(&saver, &Alone, 2, 1).unwrap();
    let operations = whole.operations() - begin;
    for crash in 0..operations {
        let crashed = || {
            let disk = disk_with(&[1, 2]);
            let saver = Saver::open_on(Arc::new(disk.clone()), DIR, &Alone).unwrap();
            disk.crash_before(disk.operations() + crash);
            let _ = save(&saver, &Alone, 2, 1);
            disk.after(Crash::KeepAll)
        };
        let disk = crashed();
        let found = loaded(&disk);
        let fault = Fault::none();
        Saver::open_on(fault.on(&disk), DIR, &Alone).unwrap();
        for n in 0..fault.done.load(Ordering::SeqCst) {
            for lasting in [Lasting::Once, Lasting::ForGood] {
                let disk = crashed();
                let fault = Fault::new(Errno::IO, lasting, n);
                match Saver::open_on(fault.on(&disk), DIR, &Alone) {
                    Ok(saver) => drop(saver),
                    Err(e) => tells(&e, Errno::IO),
                }
                let case = format!("{lasting:?} at operation {n} of the sweep after a crash before {crash}");
                assert_eq!(loaded(&disk), found, "{case}");
                tidy(&disk);
                assert_eq!(loaded(&disk), found, "{case}");
            }
        }
    }
}

#[test]
fn an_error_anywhere_on_one_rank_is_an_error_on_all() {
    for failing in [0, 1] {
        let fault = Fault::none();
        let disk = disk_with(&[1, 2]);
        let count = run_ranks(2, |group| {
            let fs: Arc<dyn FileSystem> =
                if group.rank() == failing { fault.on(&disk) } else { Arc::new(disk.clone()) };
            let saver = Saver::open_on(fs, DIR, &group).unwrap();
            let begin = fault.done.load(Ordering::SeqCst);
            save(&saver, &group, 3, 1).unwrap();
            fault.done.load(Ordering::SeqCst) - begin
        })[failing];
        for n in 0..count {
            let disk = disk_with(&[1, 2]);
            let fault = Fault::new(Errno::NOSPC, Lasting::ForGood, NEVER);
            let told = run_ranks(2, |group| {
                let fs: Arc<dyn FileSystem> =
                    if group.rank() == failing { fault.on(&disk) } else { Arc::new(disk.clone()) };
                let saver = Saver::open_on(fs, DIR, &group).unwrap();
                if group.rank() == failing {
                    fault.at.store(fault.done.load(Ordering::SeqCst) + n, Ordering::SeqCst);
                }
                save(&saver, &group, 3, 1)
            });
            let found = loaded(&disk);
            match (&told[failing], &told[1 - failing]) {
                (Ok(mine), Ok(other)) => assert_eq!((mine, found), (other, (3, 1))),
                (Err(mine), Err(Error::Rank { rank, reason, .. })) => {
                    tells(mine, Errno::NOSPC);
                    assert_eq!((*rank, reason), (failing, &mine.to_string()));
                    assert!([(2, 0), (3, 1)].contains(&found), "operation {n}: found {found:?}");
                }
                other => panic!("operation {n} of rank {failing}: {other:?}"),
            }
            tidy(&disk);
        }
    }
}

#[test]
fn an_error_anywhere_in_a_load_brings_what_was_saved_or_an_error() {
    let disk = disk_with(&[1, 2]);
    let load = |fs: Arc<dyn FileSystem>| -> Result<(u64, Vec<f32>, usize)> {
        let (checkpoint, report) = Checkpoints::open_on(fs, DIR).load(Which::Newest, Verify::Everything)?;
        Ok((checkpoint.step(), checkpoint.read_vec("w", &Region::Whole)?, report.skipped.len()))
    };
    let fault = Fault::none();
    load(fault.on(&disk)).unwrap();
    for (errno, lasting, n) in faults(fault.done.load(Ordering::SeqCst)) {
        match load(Fault::new(errno, lasting, n).on(&disk)) {
            Ok((step, elements, skipped)) => {
                assert_eq!(elements, content(step, 0));
                assert!(step == 2 || skipped > 0, "operation {n}: the older one was taken silently");
            }
            Err(Error::NoCheckpoint { skipped, .. }) => assert!(!skipped.is_empty(), "operation {n}"),
            Err(e) => tells(&e, errno),
        }
    }
}
