//! A save in the background: what the call waits for, what it does not, and who learns of a failure when.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use lightrft_ckpt::testing::{Observed, Operation, SimulatedDisk, run_ranks};
use lightrft_ckpt::{
    Agreement, Alone, BackgroundSaver, Checkpoints, Error, FileSystem, Part, Phase, Region, Rotation, Saver,
    Snapshot, Verify, Which,
};

const KEEP: Rotation = Rotation::KEEP_ALL;
const PAGE: u64 = 4096;
/// Three pages and a bit.
const ELEMENTS: usize = 3_500;

/// One rank's share of a step. It owns its bytes.
fn snapshot(step: u64, group: &dyn Agreement, all: &[f32]) -> Snapshot<'static> {
    let (rank, world) = (group.rank(), group.world_size());
    let mine = all.len() * rank / world..all.len() * (rank + 1) / world;
    let part = Part::new("w", vec![all.len()], Region::Flat(mine.clone()), &all[mine]);
    let mut snapshot = Snapshot::of_step(step);
    snapshot.parts.push(Part {
        name: "w".into(),
        dtype: part.dtype,
        shape: vec![all.len()].into(),
        region: part.region,
        bytes: part.bytes.into_owned().into(),
    });
    snapshot.shared = serde_json::json!({ "step": step });
    snapshot.rank_state = rank.into();
    snapshot
}

fn content(step: u64) -> Vec<f32> {
    (0..ELEMENTS).map(|i| step as f32 + i as f32 / 4096.0).collect()
}

fn saver_on(fs: impl FileSystem + 'static) -> BackgroundSaver {
    let saver = Saver::open_on(Arc::new(fs), "/c", &Alone).unwrap();
    BackgroundSaver::new(saver.with_writers(1).with_block_bytes(4096), Arc::new(Alone)).unwrap()
}

fn is_data(operation: &Operation) -> bool {
    operation.kind == "write" && operation.path.extension().is_some_and(|e| e == "safetensors")
}

/// A disk that stops at every write to a rank's file, says so, and goes on when told.
struct Gate {
    arrived: Receiver<()>,
    go_on: Sender<()>,
}

const LONG: Duration = Duration::from_secs(20);

fn gated(disk: SimulatedDisk) -> (impl FileSystem + 'static, Gate) {
    let (say, arrived) = channel();
    let (go_on, told) = channel();
    let (say, told) = (Mutex::new(say), Mutex::new(told));
    let fs = Observed::new(disk, move |operation| {
        if is_data(operation) {
            say.lock().unwrap().send(()).ok();
            // Whoever holds the gate is gone at the latest when the test has failed.
            let _ = told.lock().unwrap().recv_timeout(LONG);
        }
        Ok(())
    });
    (fs, Gate { arrived, go_on })
}

fn loaded(disk: &SimulatedDisk, which: Which<'_>) -> (u64, Vec<f32>) {
    let checkpoints = Checkpoints::open_on(Arc::new(disk.clone()), "/c");
    let (checkpoint, report) = checkpoints.load(which, Verify::Everything).unwrap();
    assert_eq!(report.skipped, []);
    (checkpoint.step(), checkpoint.read_vec("w", &Region::Whole).unwrap())
}

#[test]
fn what_is_written_is_what_a_blocking_save_writes_to_the_byte() {
    for world in [1, 2] {
        let disks = [SimulatedDisk::new(), SimulatedDisk::new()];
        run_ranks(world, |group| {
            let group = Arc::new(group);
            let open = |disk: &SimulatedDisk| Saver::open_on(Arc::new(disk.clone()), "/c", &*group).unwrap();
            let all = content(1);
            open(&disks[0]).save(&*group, &snapshot(1, &*group, &all), &KEEP).unwrap();
            for block_bytes in [4096, 1 << 20] {
                let saver = open(&disks[1]).with_block_bytes(block_bytes);
                let mut saver = BackgroundSaver::new(saver, group.clone()).unwrap();
                assert_eq!(saver.save(&snapshot(1, &*group, &all), &KEEP).unwrap(), None);
                assert_eq!(saver.finish().unwrap().unwrap().tag, "global_step1");
                assert_eq!(saver.finish().unwrap(), None);
                let file = format!("/c/global_step1/rank-{:05}.safetensors", group.rank());
                assert!(disks[0].content(&file).unwrap() == disks[1].content(&file).unwrap(), "{file}");
            }
        });
        let checkpoints = Checkpoints::open_on(Arc::new(disks[1].clone()), "/c");
        let (checkpoint, _) = checkpoints.load(Which::Newest, Verify::Everything).unwrap();
        assert_eq!(checkpoint.read_vec::<f32>("w", &Region::Whole).unwrap(), content(1));
        assert_eq!(checkpoint.shared()["step"], 1);
    }
}

#[test]
fn the_call_returns_before_the_disk_writes_and_the_tensors_may_change_then() {
    let disk = SimulatedDisk::new();
    let (fs, gate) = gated(disk.clone());
    let mut saver = saver_on(fs);
    let mut weight = content(1);
    let mut step_1 = Snapshot::of_step(1);
    step_1.parts.push(Part::new("w", vec![ELEMENTS], Region::Whole, &weight));
    assert_eq!(saver.save(&step_1, &KEEP).unwrap(), None);
    assert!(saver.is_in_flight());
    assert_eq!(saver.progress().unwrap().phase, Phase::Writing);
    assert!(Checkpoints::open_on(Arc::new(disk.clone()), "/c").list().unwrap().is_empty());
    weight.fill(-1.0);
    drop(gate);
    assert_eq!(saver.finish().unwrap().unwrap().step, 1);
    assert!(!saver.is_in_flight());
    assert_eq!(loaded(&disk, Which::Newest), (1, content(1)));
}

#[test]
fn a_second_save_waits_for_the_first_and_reports_it() {
    let disk = SimulatedDisk::new();
    let (fs, gate) = gated(disk.clone());
    let begun = Arc::new(Mutex::new(Vec::new()));
    let fs = Observed::new(fs, {
        let begun = begun.clone();
        move |operation| {
            let path = operation.path.to_string_lossy().into_owned();
            if operation.kind == "create_dir" || path.contains("latest") {
                begun.lock().unwrap().push(path);
            }
            Ok(())
        }
    });
    let mut saver = saver_on(fs);
    saver.save(&snapshot(1, &Alone, &content(1)), &KEEP).unwrap();
    gate.arrived.recv_timeout(LONG).unwrap();
    let (done, second) = channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            let report = saver.save(&snapshot(2, &Alone, &content(2)), &KEEP).unwrap();
            done.send(report.map(|report| report.step)).unwrap();
            saver.finish().unwrap();
        });
        // A save that did not wait would be through in this time, and begun before the first one is over.
        assert!(second.recv_timeout(Duration::from_millis(300)).is_err(), "it did not wait");
        drop(gate);
        assert_eq!(second.recv_timeout(LONG).unwrap(), Some(1));
    });
    let begun = begun.lock().unwrap();
    let place = |what: &str| begun.iter().position(|path| path.contains(what)).unwrap();
    assert!(place("latest") < place("global_step2.tmp-"), "{begun:?}");
    assert_eq!(loaded(&disk, Which::Tag("global_step1")), (1, content(1)));
    assert_eq!(loaded(&disk, Which::Newest), (2, content(2)));
}

#[test]
fn progress_goes_up_to_the_total() {
    let disk = SimulatedDisk::new();
    let (fs, gate) = gated(disk.clone());
    let mut saver = saver_on(fs);
    assert_eq!(saver.progress(), None);
    assert!(!saver.is_in_flight());
    saver.save(&snapshot(7, &Alone, &content(7)), &KEEP).unwrap();
    // The header's page, three of data, and the rest of it with the checksums.
    for written in 0..5 {
        gate.arrived.recv_timeout(LONG).unwrap();
        let now = saver.progress().unwrap();
        assert_eq!((now.written_bytes, now.phase), (written * PAGE, Phase::Writing));
        assert!(now.written_bytes < now.total_bytes && now.tag == "global_step7");
        gate.go_on.send(()).unwrap();
    }
    saver.finish().unwrap();
    let end = saver.progress().unwrap();
    let bytes = disk.content("/c/global_step7/rank-00000.safetensors").unwrap().len() as u64;
    assert_eq!((end.written_bytes, end.total_bytes, end.phase), (bytes, bytes, Phase::Over));
}

#[test]
fn dropping_waits_for_what_is_in_flight() {
    let disk = SimulatedDisk::new();
    let (fs, gate) = gated(disk.clone());
    let mut saver = saver_on(fs);
    saver.save(&snapshot(1, &Alone, &content(1)), &KEEP).unwrap();
    gate.arrived.recv_timeout(LONG).unwrap();
    let (done, dropped) = channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            drop(saver);
            done.send(()).unwrap();
        });
        assert!(dropped.recv_timeout(Duration::from_millis(300)).is_err(), "it did not wait");
        drop(gate);
        dropped.recv_timeout(LONG).unwrap();
    });
    assert_eq!(loaded(&disk, Which::Newest), (1, content(1)));
    // The directory is free again.
    Saver::open_on(Arc::new(disk), "/c", &Alone).unwrap();
}

#[test]
fn a_failure_is_told_once_by_the_next_call_which_begins_nothing() {
    for ask in ["save", "finish"] {
        let disk = SimulatedDisk::new();
        let faulty = Observed::new(disk.clone(), |operation| {
            let hit = operation.kind == "sync" && operation.path.to_string_lossy().contains("step1.tmp-");
            if hit { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        });
        let mut saver = saver_on(faulty);
        let step_2 = snapshot(2, &Alone, &content(2));
        saver.save(&snapshot(1, &Alone, &content(1)), &KEEP).unwrap();
        let told = if ask == "save" { saver.save(&step_2, &KEEP) } else { saver.finish() };
        assert!(
            matches!(&told, Err(Error::Io { op: "sync", source, .. }) if source.kind() == io::ErrorKind::StorageFull),
            "{told:?}"
        );
        assert_eq!(saver.finish().unwrap(), None);
        let names: Vec<String> = disk.list("/c".as_ref()).unwrap().into_iter().map(|e| e.name).collect();
        assert_eq!(names, [""; 0], "{ask}");
        assert_eq!(saver.save(&step_2, &KEEP).unwrap(), None);
        assert_eq!(saver.finish().unwrap().unwrap().step, 2);
        assert_eq!(loaded(&disk, Which::Newest), (2, content(2)));
    }
}

#[test]
fn a_snapshot_that_cannot_be_saved_is_refused_at_once_and_the_save_before_still_reported() {
    let disk = SimulatedDisk::new();
    let told = run_ranks(2, |group| {
        let group = Arc::new(group);
        let saver = Saver::open_on(Arc::new(disk.clone()), "/c", &*group).unwrap();
        let mut saver = BackgroundSaver::new(saver, group.clone()).unwrap();
        saver.save(&snapshot(1, &*group, &content(1)), &KEEP).unwrap();
        let mut wrong = snapshot(2, &*group, &content(2));
        wrong.parts[0].shape = vec![ELEMENTS + 1].into();
        let refused = saver.save(&wrong, &KEEP).unwrap_err();
        let before = saver.finish().unwrap().map(|report| report.step);
        (refused.to_string(), before, saver.finish().unwrap().is_none())
    });
    for (refused, before, nothing_more) in told {
        assert!(refused.contains("`w`"), "{refused}");
        assert_eq!((before, nothing_more), (Some(1), true));
    }
    let names: Vec<String> = disk.list("/c".as_ref()).unwrap().into_iter().map(|e| e.name).collect();
    assert_eq!(names, ["global_step1", "latest"]);
}

/// What `failing` does at one rank's write, told to all.
fn told_when_rank_1(failing: fn() -> io::Result<()>) -> Vec<Error> {
    let disk = SimulatedDisk::new();
    let told = run_ranks(3, |group| {
        let group = Arc::new(group);
        let rank = group.rank();
        let faulty = Observed::new(disk.clone(), move |operation| {
            let hit = rank == 1 && is_data(operation) && operation.path.to_string_lossy().contains("step1.");
            if hit { failing() } else { Ok(()) }
        });
        let saver = Saver::open_on(Arc::new(faulty), "/c", &*group).unwrap();
        let mut saver = BackgroundSaver::new(saver, group.clone()).unwrap();
        saver.save(&snapshot(1, &*group, &content(1)), &KEEP).unwrap();
        let told = saver.finish().unwrap_err();
        saver.save(&snapshot(2, &*group, &content(2)), &KEEP).unwrap();
        saver.finish().unwrap();
        told
    });
    let names: Vec<String> = disk.list("/c".as_ref()).unwrap().into_iter().map(|e| e.name).collect();
    assert_eq!(names, ["global_step2", "latest"]);
    assert_eq!(loaded(&disk, Which::Newest), (2, content(2)));
    told
}

#[test]
fn a_failure_on_one_rank_is_told_on_all_and_so_is_a_panic() {
    let told = told_when_rank_1(|| Err(io::ErrorKind::StorageFull.into()));
    assert!(matches!(told[1], Error::Io { op: "write", .. }), "{told:?}");
    for other in [&told[0], &told[2]] {
        assert!(matches!(other, Error::Rank { rank: 1, during: "writing", .. }), "{other}");
    }
    let told = told_when_rank_1(|| panic!("a defect"));
    assert!(matches!(&told[1], Error::Panicked { message, .. } if message == "a defect"), "{told:?}");
    for other in [&told[0], &told[2]] {
        assert!(
            matches!(other, Error::Rank { rank: 1, reason, .. } if reason.contains("a defect")),
            "{other}"
        );
    }
}

#[test]
fn a_panic_while_rank_0_publishes_is_told_on_all_and_saving_goes_on() {
    let disk = SimulatedDisk::new();
    let told = run_ranks(2, |group| {
        let group = Arc::new(group);
        let faulty = Observed::new(disk.clone(), |operation| {
            let hit = operation.kind == "rename" && operation.path.to_string_lossy().contains("step1.tmp-");
            if hit { panic!("a defect") } else { Ok(()) }
        });
        let saver = Saver::open_on(Arc::new(faulty), "/c", &*group).unwrap();
        let blocking = saver.save(&*group, &snapshot(1, &*group, &content(1)), &KEEP).unwrap_err();
        let mut saver = BackgroundSaver::new(saver, group.clone()).unwrap();
        saver.save(&snapshot(1, &*group, &content(1)), &KEEP).unwrap();
        let background = saver.finish().unwrap_err();
        saver.save(&snapshot(2, &*group, &content(2)), &KEEP).unwrap();
        saver.finish().unwrap();
        [blocking, background]
    });
    for told in &told[0] {
        assert!(matches!(told, Error::Panicked { during: "publishing", .. }), "{told}");
    }
    for told in &told[1] {
        let Error::Rank { rank: 0, during: "publishing", reason } = told else { panic!("{told}") };
        assert!(reason.contains("a defect"), "{reason}");
    }
    let names: Vec<String> = disk.list("/c".as_ref()).unwrap().into_iter().map(|e| e.name).collect();
    assert_eq!(names, ["global_step2", "latest"]);
}

/// A group of two whose other rank could not do what it was to do.
struct WithUnlucky;

impl Agreement for WithUnlucky {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        2
    }

    fn exchange(&self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(vec![mine, br#"{"Err":"no more threads"}"#.to_vec()])
    }
}

#[test]
fn a_thread_that_another_rank_cannot_start_is_told_before_the_first_save() {
    let disk = Arc::new(SimulatedDisk::new());
    let saver = Saver::open_on(disk.clone(), "/c", &Alone).unwrap();
    let told = BackgroundSaver::new(saver, Arc::new(WithUnlucky)).unwrap_err();
    assert!(matches!(&told, Error::Rank { rank: 1, reason, .. } if reason == "no more threads"), "{told}");
    // The directory is free again.
    Saver::open_on(disk, "/c", &Alone).unwrap();
}
