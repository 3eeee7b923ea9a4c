//! Restoring in one pass: all ranks hold one checkpoint's elements afterwards, or are told that they do not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use lightrft_ckpt::testing::{Observed, Operation, SimulatedDisk, run_ranks};
use lightrft_ckpt::{
    Agreement, Alone, Checkpoint, Checkpoints, Dtype, Error, FileSystem as _, Part, Region, Restore,
    RestoreReport, Result, Rotation, Saver, Snapshot, Strictness, Wanted, Which,
};
use proptest::prelude::*;

const DIR: &str = "/c";
const SAVERS: usize = 3;
const READERS: usize = 2;
/// Rows and columns of the first tensor, and elements of the second: more than a block each.
const SHAPE: [usize; 2] = [60, 210];
const FLAT: usize = 12_000;
/// What destinations hold before.
const BEFORE: f32 = -1.0;

fn value(step: u64, tensor: u64, i: usize) -> f32 {
    (step * 1_000_000 + tensor * 100_000 + i as u64) as f32
}

/// Saves two tensors by `SAVERS` ranks, one cut flat and one by columns, and one that all have.
fn save(disk: &SimulatedDisk, tag: &str, step: u64, limits: &Rotation) {
    run_ranks(SAVERS, |group| {
        let rank = group.rank();
        let mine = FLAT * rank / SAVERS..FLAT * (rank + 1) / SAVERS;
        let flat: Vec<f32> = mine.clone().map(|i| value(step, 1, i)).collect();
        let columns = SHAPE[1] / SAVERS;
        let first = columns * rank;
        let boxed: Vec<f32> = (0..SHAPE[0] * SHAPE[1])
            .filter(|i| (first..first + columns).contains(&(i % SHAPE[1])))
            .map(|i| value(step, 0, i))
            .collect();
        let all = [value(step, 2, 0)];
        let mut snapshot = Snapshot { tag: tag.into(), ..Snapshot::of_step(step) };
        let region = Region::Box { start: vec![0, first], extent: vec![SHAPE[0], columns] };
        snapshot.parts.push(Part::new("model.boxed", SHAPE.to_vec(), region, &boxed));
        snapshot.parts.push(Part::new("optimizer.flat", vec![FLAT], Region::Flat(mine), &flat));
        snapshot.parts.push(Part::new("model.all", vec![1], Region::Whole, &all));
        snapshot.shared = serde_json::json!({ "step": step });
        let saver = Saver::open_on(Arc::new(disk.clone()), DIR, &group).unwrap();
        saver.save(&group, &snapshot, limits).unwrap();
    });
}

fn disk_with(steps: &[u64]) -> SimulatedDisk {
    let disk = SimulatedDisk::new();
    steps.iter().for_each(|&step| save(&disk, &format!("global_step{step}"), step, &Rotation::KEEP_ALL));
    disk
}

/// One reader's destinations.
#[derive(Debug, PartialEq)]
struct Destinations {
    rank: usize,
    boxed: Vec<f32>,
    flat: Vec<f32>,
    all: Vec<f32>,
}

impl Destinations {
    fn new(rank: usize) -> Self {
        let boxed = vec![BEFORE; SHAPE[0] / READERS * SHAPE[1]];
        Destinations { rank, boxed, flat: vec![BEFORE; FLAT / READERS], all: vec![BEFORE] }
    }

    /// Half of the rows, half of the elements, and what all have.
    fn wanted(&mut self) -> Vec<Wanted<'_>> {
        let Destinations { rank, boxed, flat, all } = self;
        let (rows, len) = (SHAPE[0] / READERS, FLAT / READERS);
        let region = Region::Box { start: vec![rows * *rank, 0], extent: vec![rows, SHAPE[1]] };
        let range = len * *rank..len * (*rank + 1);
        vec![
            Wanted::new("model.boxed", SHAPE.to_vec(), region, boxed),
            Wanted::new("optimizer.flat", vec![FLAT], Region::Flat(range), flat),
            Wanted::new("model.all", vec![1], Region::Whole, all),
        ]
    }

    fn of_step(rank: usize, step: u64) -> Self {
        let mut expected = Destinations::new(rank);
        let (rows, len) = (expected.boxed.len(), expected.flat.len());
        expected.boxed = (0..rows).map(|i| value(step, 0, rank * rows + i)).collect();
        expected.flat = (0..len).map(|i| value(step, 1, rank * len + i)).collect();
        expected.all = vec![value(step, 2, 0)];
        expected
    }
}

/// What a reader has after a restore.
type Told = (Result<(Checkpoint, RestoreReport)>, Destinations);

/// Restores on all readers, each with a file system of its own that `watch` sees, and with wishes of its own.
fn restore_with(
    disk: &SimulatedDisk,
    how: &Restore<'_>,
    watch: impl Fn(usize, &Operation) -> io::Result<()> + Send + Sync + Clone + 'static,
    wanted: impl for<'d> Fn(&'d mut Destinations) -> Vec<Wanted<'d>> + Sync,
) -> Vec<Told> {
    run_ranks(READERS, |group| {
        let (rank, watch) = (group.rank(), watch.clone());
        let watched = Observed::new(disk.clone(), move |operation| watch(rank, operation));
        let mut mine = Destinations::new(rank);
        // One thread, so that what happens at one operation is over before the next.
        let at = Checkpoints::open_on(Arc::new(watched), DIR).with_readers(NonZeroUsize::MIN);
        let told = at.restore(&group, how, &mut mine, |mine, _| Ok(wanted(mine)));
        (told, mine)
    })
}

fn restore(disk: &SimulatedDisk) -> Vec<Told> {
    restore_with(disk, &Restore::default(), |_, _| Ok(()), Destinations::wanted)
}

/// Asserts that all readers hold that step and were told the same; returns what.
#[track_caller]
fn all_hold(told: Vec<Told>, step: u64) -> RestoreReport {
    let mut reports = Vec::new();
    for (rank, (told, mine)) in told.into_iter().enumerate() {
        let (checkpoint, report) = told.unwrap();
        assert_eq!(
            (checkpoint.step(), report.step, &checkpoint.shared()["step"]),
            (step, step, &step.into())
        );
        assert!(mine == Destinations::of_step(rank, step), "rank {rank} holds something else");
        reports.push(report);
    }
    let first = reports.swap_remove(0);
    assert!(reports.iter().all(|other| *other == first));
    first
}

#[track_caller]
fn untouched(mine: &Destinations) {
    assert!(*mine == Destinations::new(mine.rank), "rank {} was written to", mine.rank);
}

#[test]
fn the_newest_is_restored_and_every_byte_read_once() {
    let disk = disk_with(&[1, 2]);
    let read = Arc::new(AtomicU64::new(0));
    let counter = read.clone();
    let watch = move |_: usize, operation: &Operation| {
        if operation.kind == "read" && operation.path.to_string_lossy().contains("rank-") {
            counter.fetch_add(operation.bytes, Ordering::Relaxed);
        }
        Ok(())
    };
    let report = all_hold(restore_with(&disk, &Restore::default(), watch, Destinations::wanted), 2);
    assert_eq!((report.tag.as_str(), report.skipped, report.unexpected), ("global_step2", vec![], vec![]));
    let shard =
        |rank| disk.content(format!("/c/global_step2/rank-{rank:05}.safetensors")).unwrap().len() as u64;
    let whole: u64 = (0..SAVERS).map(shard).sum();
    // Both readers have a table of checksums of each file, and both read the blocks that they share: here one of each
    // file's columns, one of the flat tensor, and the small tensor.
    let read = read.load(Ordering::Relaxed);
    assert!((whole..whole + 4 * (16 << 10) + 2000).contains(&read), "{read} of {whole}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn damage_anywhere_makes_all_take_the_one_before_it(rank in 0..SAVERS, place in 0.0..1.0, bit in 0..8u8) {
        let disk = disk_with(&[1, 2]);
        let path = format!("/c/global_step2/rank-{rank:05}.safetensors");
        let mut content = disk.content(&path).unwrap();
        let at = (place * content.len() as f64) as usize;
        content[at] ^= 1 << bit;
        disk.spoil(&path, content).unwrap();
        let report = all_hold(restore(&disk), 1);
        prop_assert_eq!(report.skipped.len(), 1);
        prop_assert_eq!(&report.skipped[0].name, "global_step2");
        prop_assert!(report.skipped[0].reason.contains(&path), "{}", report.skipped[0].reason);
    }
}

#[test]
fn when_none_is_whole_the_destinations_are_said_to_be_spoilt() {
    let disk = disk_with(&[1, 2]);
    for step in [1, 2] {
        let path = format!("/c/global_step{step}/rank-00001.safetensors");
        let mut content = disk.content(&path).unwrap();
        content[4096 + 10] ^= 1;
        disk.spoil(&path, content).unwrap();
    }
    for (told, _) in restore(&disk) {
        let Err(Error::Spoilt { source }) = told else { panic!("{told:?}") };
        let Error::NoCheckpoint { skipped, .. } = *source else { panic!("{source}") };
        let names: Vec<&str> = skipped.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names, ["global_step2", "global_step1"]);
    }
    // By its tag there is no other to take.
    let how = Restore { which: Which::Tag("global_step2"), ..Restore::default() };
    for (told, _) in restore_with(&disk, &how, |_, _| Ok(()), Destinations::wanted) {
        let Err(Error::Spoilt { source }) = told else { panic!("{told:?}") };
        assert!(matches!(*source, Error::Damaged { .. } | Error::Rank { during: "reading", .. }), "{source}");
    }
    // Nothing there is nothing touched.
    for (told, mine) in restore(&SimulatedDisk::new()) {
        assert!(matches!(told, Err(Error::NoCheckpoint { .. })), "{told:?}");
        untouched(&mine);
    }
}

/// Saves tensors of 4 elements each, all of them the step.
fn save_named(disk: &SimulatedDisk, step: u64, names: &[&str]) {
    let elements = [step as f32; 4];
    let mut snapshot = Snapshot::of_step(step);
    for name in names {
        snapshot.parts.push(Part::new(*name, vec![4], Region::Whole, &elements));
    }
    let saver = Saver::open_on(Arc::new(disk.clone()), DIR, &Alone).unwrap();
    saver.save(&Alone, &snapshot, &Rotation::KEEP_ALL).unwrap();
}

#[test]
fn what_an_older_checkpoint_would_leave_of_a_damaged_one_ends_the_restore_on_all() {
    // `a`, `b` and `c` are saved in this order. Rot is in the last, so that the others are written to before.
    let rotten = |steps: &[(u64, &[&str])]| {
        let disk = SimulatedDisk::new();
        steps.iter().for_each(|(step, names)| save_named(&disk, *step, names));
        let path = format!("/c/global_step{}/rank-00000.safetensors", steps.last().unwrap().0);
        let mut content = disk.content(&path).unwrap();
        let at = content.windows(4).rposition(|four| four == 20f32.to_le_bytes()).unwrap();
        content[at] ^= 1;
        disk.spoil(&path, content).unwrap();
        disk
    };
    // Rank 0 wants `a`, and rank 1 what `also` says, as far as the checkpoint has it where it does so `asking`.
    let run = |disk: &SimulatedDisk, strictness: Strictness, also: &[&'static str], asking: bool| {
        run_ranks(READERS, |group| {
            let mut mine: Vec<(&str, [f32; 4])> = match group.rank() {
                0 => vec![("a", [BEFORE; 4])],
                _ => also.iter().map(|name| (*name, [BEFORE; 4])).collect(),
            };
            let at = Checkpoints::open_on(Arc::new(disk.clone()), DIR).with_readers(NonZeroUsize::MIN);
            let how = Restore { strictness, ..Restore::default() };
            let told = at.restore(&group, &how, &mut mine, |mine, checkpoint| {
                let there = |name: &str| !asking || checkpoint.tensor(name).is_some();
                let mine = mine.iter_mut().filter(|(name, _)| there(name));
                Ok(mine.map(|(name, into)| Wanted::new(*name, vec![4], Region::Whole, into)).collect())
            });
            (told.map(|(_, report)| report.step), mine)
        })
    };
    for (strictness, asking) in [(Strictness::Lenient, false), (Strictness::Strict, true)] {
        // The older one has no `b`, of which rank 1 holds something: nobody may go on.
        let disk = rotten(&[(10, &["a"]), (20, &["a", "b", "c"])]);
        for (told, _) in run(&disk, strictness, &["b", "c"], asking) {
            let Err(Error::Spoilt { source }) = told else { panic!("{told:?}") };
            assert!(matches!(&*source, Error::Request { name, .. } if name == "b"), "{source}");
        }
        // It has all that was written to.
        let disk = rotten(&[(10, &["a", "b", "c"]), (20, &["a", "b", "c"])]);
        for (told, mine) in run(&disk, strictness, &["b", "c"], asking) {
            assert_eq!(told.unwrap(), 10);
            assert!(mine.iter().all(|(_, held)| *held == [10.0; 4]), "{mine:?}");
        }
    }
    // What neither has was not written to.
    let disk = rotten(&[(10, &["a", "c"]), (20, &["a", "c"])]);
    for (told, mine) in run(&disk, Strictness::Lenient, &["b", "c"], false) {
        assert_eq!(told.unwrap(), 10);
        assert!(mine.iter().all(|(name, held)| *held == [if *name == "b" { BEFORE } else { 10.0 }; 4]));
    }
}

#[test]
fn an_error_of_the_disk_on_one_rank_makes_all_take_the_one_before() {
    let disk = disk_with(&[1, 2]);
    let watch = |rank: usize, operation: &Operation| {
        let hit = rank == 1
            && operation.kind == "read"
            && operation.path.starts_with("/c/global_step2")
            && operation.path.ends_with("rank-00002.safetensors");
        if hit { Err(io::Error::other("the disk has a scratch")) } else { Ok(()) }
    };
    let report = all_hold(restore_with(&disk, &Restore::default(), watch, Destinations::wanted), 1);
    assert!(report.skipped[0].reason.contains("scratch"), "{report:?}");
}

#[test]
fn strictness_is_decided_by_what_all_ranks_want_together_before_anything_is_read() {
    let disk = disk_with(&[1]);
    let no_read = |_: usize, operation: &Operation| {
        let shard = operation.kind == "read" && operation.path.to_string_lossy().contains("rank-");
        if shard { Err(io::Error::other("read")) } else { Ok(()) }
    };
    // Rank 0 wants what is not there, nobody wants `model.all`, and rank 1 expects another shape.
    fn wanted(mine: &mut Destinations) -> Vec<Wanted<'_>> {
        let Destinations { rank, flat, all, .. } = mine;
        match rank {
            0 => vec![
                Wanted::new("model.gate", vec![1], Region::Whole, all),
                Wanted::new("optimizer.flat", vec![FLAT], Region::Flat(0..flat.len()), flat),
            ],
            _ => vec![Wanted::new("model.boxed", vec![SHAPE[1], SHAPE[0]], Region::Flat(0..1), all)],
        }
    }
    for strictness in [Strictness::Strict, Strictness::Lenient] {
        let how = Restore { strictness, ..Restore::default() };
        for (told, mine) in restore_with(&disk, &how, no_read, wanted) {
            let Err(Error::Mismatch(told)) = told else { panic!("{told:?}") };
            assert_eq!(
                (told.missing, told.unexpected),
                (vec!["model.gate".to_owned()], vec!["model.all".to_owned()])
            );
            assert_eq!(told.differing.len(), 1);
            assert_eq!(told.differing[0].expected, (Dtype::F32, vec![SHAPE[1], SHAPE[0]]));
            untouched(&mine);
        }
    }
}

#[test]
fn what_is_not_strict_is_reported_and_what_was_not_saved_keeps_its_destination() {
    let disk = disk_with(&[1]);
    fn wanted(mine: &mut Destinations) -> Vec<Wanted<'_>> {
        let Destinations { rank, boxed, all, .. } = mine;
        let region = Region::Flat(0..boxed.len());
        if *rank == 0 {
            vec![Wanted::new("model.boxed", SHAPE.to_vec(), region, boxed)]
        } else {
            vec![Wanted::new("model.gate", vec![1], Region::Whole, all)]
        }
    }
    let how = Restore { strictness: Strictness::Lenient, ..Restore::default() };
    for (rank, (told, mine)) in restore_with(&disk, &how, |_, _| Ok(()), wanted).into_iter().enumerate() {
        let (_, report) = told.unwrap();
        assert_eq!(report.missing, ["model.gate"]);
        assert_eq!(report.unexpected, ["model.all", "optimizer.flat"]);
        assert_eq!(report.left_out, [""; 0]);
        let expected = if rank == 0 {
            Destinations { boxed: Destinations::of_step(0, 1).boxed, ..Destinations::new(0) }
        } else {
            Destinations::new(1)
        };
        assert!(mine == expected, "rank {rank}");
    }
}

#[test]
fn a_model_is_restored_strictly_without_its_optimizer() {
    let disk = disk_with(&[1]);
    fn model_only(mine: &mut Destinations) -> Vec<Wanted<'_>> {
        let mut wanted = mine.wanted();
        wanted.retain(|w| w.name.starts_with("model."));
        wanted
    }
    for (told, _) in restore_with(&disk, &Restore::default(), |_, _| Ok(()), model_only) {
        assert!(matches!(told, Err(Error::Mismatch(_))), "{told:?}");
    }
    let how = Restore { leave_out: &["ema.", "optimizer."], ..Restore::default() };
    for (rank, (told, mine)) in restore_with(&disk, &how, |_, _| Ok(()), model_only).into_iter().enumerate() {
        let (_, report) = told.unwrap();
        assert_eq!((report.left_out, report.unexpected), (vec!["optimizer.flat".to_owned()], vec![]));
        assert!(
            mine == Destinations { flat: Destinations::new(rank).flat, ..Destinations::of_step(rank, 1) }
        );
    }
    // What is wanted is read, also when its name is among those that may be left out.
    let report = all_hold(restore_with(&disk, &how, |_, _| Ok(()), Destinations::wanted), 1);
    assert_eq!(report.left_out, [""; 0]);
}

#[test]
fn a_rank_that_refuses_or_asks_wrongly_ends_it_on_all_before_anything_is_read() {
    let disk = disk_with(&[1]);
    let told = run_ranks(READERS, |group| {
        let rank = group.rank();
        let mut mine = Destinations::new(rank);
        let at = Checkpoints::open_on(Arc::new(disk.clone()), DIR);
        let refused = at.restore(&group, &Restore::default(), &mut mine, |mine, checkpoint| {
            assert_eq!(checkpoint.shared()["step"], 1);
            if rank == 1 { Err("a seed of another run".into()) } else { Ok(mine.wanted()) }
        });
        let wrong = at.restore(&group, &Restore::default(), &mut mine, |mine, _| {
            let mut wanted = mine.wanted();
            if rank == 1 {
                wanted[1].region = Region::Flat(0..1);
            }
            Ok(wanted)
        });
        (refused, wrong, mine)
    });
    for (rank, (refused, wrong, mine)) in told.into_iter().enumerate() {
        match (rank, refused.unwrap_err(), wrong.unwrap_err()) {
            (0, Error::Rank { rank: 1, reason, .. }, Error::Rank { rank: 1, .. }) => {
                assert!(reason.contains("another run"), "{reason}");
            }
            (1, Error::Refused { .. }, Error::Request { .. }) => {}
            (_, refused, wrong) => panic!("rank {rank}: {refused}, {wrong}"),
        }
        untouched(&mine);
    }
}

/// Does something once, at the first operation that fits.
#[derive(Clone)]
struct Once<F>(Arc<(AtomicBool, F)>);

impl<F: Fn()> Once<F> {
    fn new(act: F) -> Self {
        Once(Arc::new((AtomicBool::new(false), act)))
    }

    fn now(&self) {
        if !self.0.0.swap(true, Ordering::SeqCst) {
            (self.0.1)();
        }
    }
}

#[test]
fn a_checkpoint_that_rotates_away_while_it_is_read_is_passed_over_for_the_one_that_came() {
    let disk = disk_with(&[1, 2]);
    let saver = disk.clone();
    let rotate = Once::new(move || {
        let one = Rotation { max_num: 1, ..Rotation::default() };
        (3..5).for_each(|step| save(&saver, &format!("global_step{step}"), step, &one));
    });
    // At the first read of a shard, before the others are opened.
    let watch = move |_: usize, operation: &Operation| {
        if operation.kind == "read" && operation.path.ends_with("global_step2/rank-00000.safetensors") {
            rotate.now();
        }
        Ok(())
    };
    let report = all_hold(restore_with(&disk, &Restore::default(), watch, Destinations::wanted), 4);
    assert_eq!(report.skipped.len(), 1, "{report:?}");
    assert!(report.skipped[0].reason.contains("removed or replaced"), "{report:?}");
}

#[test]
fn a_tag_that_is_saved_again_while_it_is_read_is_never_mixed() {
    for which in [Which::Newest, Which::Tag("best")] {
        let disk = SimulatedDisk::new();
        save(&disk, "best", 1, &Rotation::KEEP_ALL);
        let saver = disk.clone();
        let again = Once::new(move || save(&saver, "best", 2, &Rotation::KEEP_ALL));
        let watch = move |_: usize, operation: &Operation| {
            if operation.kind == "read" && operation.path.ends_with("best/rank-00001.safetensors") {
                again.now();
            }
            Ok(())
        };
        let how = Restore { which, ..Restore::default() };
        let told = restore_with(&disk, &how, watch, Destinations::wanted);
        // Whoever had all files open before goes on reading what they held; all have that, or all have the new one.
        let step = told[0].0.as_ref().unwrap().0.step();
        all_hold(told, step);
    }
}

#[test]
fn ranks_that_open_a_tag_before_and_after_it_is_saved_again_try_once_more() {
    let disk = SimulatedDisk::new();
    save(&disk, "best", 1, &Rotation::KEEP_ALL);
    let saver = disk.clone();
    let again = Once::new(move || save(&saver, "best", 2, &Rotation::KEEP_ALL));
    let opened = Arc::new((Mutex::new(false), Condvar::new()));
    let watch = move |rank: usize, operation: &Operation| {
        let (done, changed) = &*opened;
        if rank == 0 && operation.kind == "open" && operation.path.ends_with("best/rank-00002.safetensors") {
            *done.lock().unwrap() = true;
            changed.notify_all();
        }
        if rank == 1 && operation.kind == "open" && operation.path.ends_with("best/manifest.json") {
            let waited =
                changed.wait_timeout_while(done.lock().unwrap(), Duration::from_secs(10), |done| !*done);
            drop(waited.unwrap());
            again.now();
        }
        Ok(())
    };
    all_hold(restore_with(&disk, &Restore::default(), watch, Destinations::wanted), 2);
}

#[test]
fn restoring_changes_nothing_on_disk() {
    let disk = disk_with(&[1, 2]);
    let before = disk.operations();
    all_hold(restore(&disk), 2);
    assert_eq!(disk.operations(), before);
    assert_eq!(disk.list("/c/global_step2".as_ref()).unwrap().len(), SAVERS + 1);
}

#[test]
fn a_lost_rank_is_an_error_for_the_others_not_a_wait() {
    let disk = disk_with(&[1]);
    let told = run_ranks(READERS, |group| {
        let mut mine = Destinations::new(group.rank());
        let at = Checkpoints::open_on(Arc::new(disk.clone()), DIR);
        if group.rank() == 1 {
            // It is there for the first exchange only.
            return group.exchange(b"{\"Ok\":null}".to_vec()).map(|_| None).unwrap();
        }
        Some(at.restore(&group, &Restore::default(), &mut mine, |mine, _| Ok(mine.wanted())).map(|_| ()))
    });
    assert!(matches!(told[0], Some(Err(Error::Agreement { during: "opening", .. }))), "{told:?}");
}
