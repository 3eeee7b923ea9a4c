//! Several models of one run: whatever happens between their saves, there is a step that all of them have.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lightrft_ckpt::testing::{Crash, Observed, SimulatedDisk, run_ranks};
use lightrft_ckpt::{
    Agreement, Alone, BackgroundSaver, Checkpoints, Error, FileSystem, Part, Region, Result, Rotation,
    SaveReport, Saver, Snapshot, Verify, load_newest_common, save_together,
};

const MODELS: [&str; 2] = ["/run/_actor", "/run/_critic"];
const ONE: Rotation = Rotation { max_num: 1, ..Rotation::KEEP_ALL };

/// What model `model` holds at a step.
fn content(model: usize, step: u64, run: u64) -> [f32; 64] {
    std::array::from_fn(|i| (step * 10_000 + run * 1000 + model as u64 * 100) as f32 + i as f32)
}

/// This rank's parts of both models.
fn snapshots<'a>(
    weights: &'a [[f32; 64]; 2],
    group: &dyn Agreement,
    step: u64,
    run: u64,
) -> [Snapshot<'a>; 2] {
    let mine = 64 * group.rank() / group.world_size()..64 * (group.rank() + 1) / group.world_size();
    weights.each_ref().map(|weight| {
        let mut snapshot = Snapshot::of_step(step);
        snapshot.parts.push(Part::new("w", vec![64], Region::Flat(mine.clone()), &weight[mine.clone()]));
        snapshot.shared = serde_json::json!({ "run": run });
        snapshot
    })
}

fn open(fs: Arc<dyn FileSystem>, group: &dyn Agreement) -> Result<[Saver; 2]> {
    Ok([Saver::open_on(fs.clone(), MODELS[0], group)?, Saver::open_on(fs, MODELS[1], group)?])
}

fn save(fs: Arc<dyn FileSystem>, group: &dyn Agreement, step: u64, run: u64) -> Result<Vec<SaveReport>> {
    let weights = [content(0, step, run), content(1, step, run)];
    let [actor, critic] = open(fs, group)?;
    let [a, c] = snapshots(&weights, group, step, run);
    save_together(group, &[(&actor, &a), (&critic, &c)], &ONE)
}

fn disk_with(steps: &[u64]) -> SimulatedDisk {
    let disk = SimulatedDisk::new();
    for &step in steps {
        save(Arc::new(disk.clone()), &Alone, step, 0).unwrap();
    }
    disk
}

fn both(disk: &SimulatedDisk) -> [Checkpoints; 2] {
    MODELS.map(|dir| Checkpoints::open_on(Arc::new(disk.clone()), dir))
}

/// The newest step that both have, 0 for none, and the run that each is of.
fn common(disk: &SimulatedDisk) -> (u64, [u64; 2]) {
    match load_newest_common(&Alone, &both(disk), Verify::Everything) {
        Ok((loaded, report)) => {
            let runs = [0, 1].map(|model| {
                let checkpoint = &loaded[model];
                let run = checkpoint.shared()["run"].as_u64().unwrap();
                assert_eq!((checkpoint.step(), checkpoint.tag()), (report.step, &report.tag[..]));
                let weight = checkpoint.read_vec::<f32>("w", &Region::Whole).unwrap();
                assert_eq!(weight, content(model, report.step, run));
                run
            });
            (report.step, runs)
        }
        Err(Error::NoCommonCheckpoint { dirs, .. }) => {
            assert_eq!(dirs, MODELS.map(std::path::PathBuf::from));
            (0, [0, 0])
        }
        Err(e) => panic!("{e}"),
    }
}

/// Crashes before every operation of the save of `step` by run 1, and checks what both have.
fn crash_everywhere(steps: &[u64], step: u64) {
    let old = steps.last().copied().unwrap_or(0);
    let whole = disk_with(steps);
    let begin = whole.operations();
    save(Arc::new(whole.clone()), &Alone, step, 1).unwrap();
    let operations = whole.operations() - begin;
    for n in 0..=operations {
        let disk = disk_with(steps);
        disk.crash_before(disk.operations() + n);
        let told_ok = save(Arc::new(disk.clone()), &Alone, step, 1).is_ok();
        let torn = [Crash::Tear(n)];
        for crash in [Crash::LoseAll, Crash::KeepAll].into_iter().chain(torn) {
            let left = disk.after(crash);
            let found = common(&left);
            let case =
                format!("before operation {n} of {operations}, {crash:?}, told ok: {told_ok}: {found:?}");
            match found {
                (found, [1, 1]) => assert_eq!(found, step, "{case}"),
                (found, [0, 0]) => assert!(found == old && !told_ok, "{case}"),
                // Only a tag that is saved again can be of both runs.
                (found, _) => assert!(found == step && old == step && !told_ok, "{case}"),
            }
            // The run goes on from there, and what only one model had is gone with the next save.
            save(Arc::new(left.clone()), &Alone, 90, 0).unwrap();
            assert_eq!(common(&left), (90, [0, 0]), "{case}");
            for at in both(&left) {
                assert_eq!(at.list().unwrap().len(), 1, "{case}");
            }
        }
    }
}

#[test]
fn a_crash_in_the_first_save_of_both_leaves_nothing_or_it() {
    crash_everywhere(&[], 1);
}

#[test]
fn a_crash_in_a_save_of_both_leaves_a_step_that_both_have_though_only_one_is_kept() {
    crash_everywhere(&[1, 2], 3);
}

#[test]
fn a_crash_while_a_step_of_both_is_saved_again_leaves_that_step_in_both() {
    crash_everywhere(&[1, 2], 2);
}

#[test]
fn rotating_each_model_right_after_its_save_could_lose_the_common_step() {
    // What `save_together` is for: the same without it, crashed between the two saves.
    let disk = disk_with(&[1]);
    let [actor, _critic] = open(Arc::new(disk.clone()), &Alone).unwrap();
    let weights = [content(0, 2, 0), content(1, 2, 0)];
    let [a, _] = snapshots(&weights, &Alone, 2, 0);
    actor.save(&Alone, &a, &ONE).unwrap();
    assert_eq!(common(&disk.after(Crash::KeepAll)), (0, [0, 0]));
}

#[test]
fn an_error_at_any_operation_leaves_a_step_that_both_have() {
    let whole = disk_with(&[1, 2]);
    let begin = whole.operations();
    save(Arc::new(whole.clone()), &Alone, 3, 1).unwrap();
    for n in 0..whole.operations() - begin {
        let disk = disk_with(&[1, 2]);
        disk.fail_at(disk.operations() + n, io::ErrorKind::StorageFull);
        let told = save(Arc::new(disk.clone()), &Alone, 3, 1);
        let found = common(&disk);
        let right = found == (3, [1, 1]) || (found == (2, [0, 0]) && told.is_err());
        assert!(right, "operation {n}, told {told:?}: {found:?}");
        save(Arc::new(disk.clone()), &Alone, 4, 0).unwrap();
        assert_eq!(common(&disk), (4, [0, 0]));
    }
}

#[test]
fn a_step_damaged_in_one_model_is_passed_over_in_both_and_named() {
    let disk = SimulatedDisk::new();
    let savers = open(Arc::new(disk.clone()), &Alone).unwrap();
    for step in 1..=3 {
        let weights = [content(0, step, 0), content(1, step, 0)];
        let [a, c] = snapshots(&weights, &Alone, step, 0);
        save_together(&Alone, &[(&savers[0], &a), (&savers[1], &c)], &Rotation::KEEP_ALL).unwrap();
    }
    let shard = "/run/_critic/global_step3/rank-00000.safetensors";
    let file = disk.open(shard.as_ref()).unwrap();
    let mut bytes = vec![0; file.bytes().unwrap() as usize];
    file.read_exact_at(0, &mut bytes).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    disk.spoil(shard, bytes).unwrap();
    let (loaded, report) = load_newest_common(&Alone, &both(&disk), Verify::Everything).unwrap();
    assert_eq!((loaded.len(), report.step), (2, 2));
    assert_eq!(report.skipped.len(), 1);
    assert!(report.skipped[0].name.contains("_critic") && report.skipped[0].name.contains("global_step3"));
}

#[test]
fn a_step_that_one_model_lacks_is_named_with_who_lacks_it() {
    let disk = disk_with(&[1]);
    let [actor, critic] = open(Arc::new(disk.clone()), &Alone).unwrap();
    let weights = [content(0, 2, 0), content(1, 2, 0)];
    let [a, c] = snapshots(&weights, &Alone, 2, 0);
    actor.save(&Alone, &a, &Rotation::KEEP_ALL).unwrap();
    // The same tag of another step is another checkpoint.
    critic.save(&Alone, &Snapshot { step: 5, ..c }, &Rotation::KEEP_ALL).unwrap();
    let (_, report) = load_newest_common(&Alone, &both(&disk), Verify::Everything).unwrap();
    assert_eq!(report.step, 1);
    let told: Vec<_> =
        report.skipped.iter().map(|s| (s.name.as_str(), s.reason.contains("has none"))).collect();
    assert_eq!(told, [("/run/_actor/global_step2", true), ("/run/_critic/global_step2", true)]);
}

#[test]
fn a_tag_that_is_saved_again_while_the_first_model_is_verified_is_of_one_step_in_both() {
    let disk = SimulatedDisk::new();
    let best = |disk: &SimulatedDisk, step: u64| {
        let savers = open(Arc::new(disk.clone()), &Alone).unwrap();
        let weights = [content(0, step, 0), content(1, step, 0)];
        let both = snapshots(&weights, &Alone, step, 0).map(|s| Snapshot { tag: "best".into(), ..s });
        save_together(&Alone, &[(&savers[0], &both[0]), (&savers[1], &both[1])], &ONE).unwrap();
    };
    best(&disk, 10);
    let (again, saved) = (disk.clone(), AtomicBool::new(false));
    let fs = Arc::new(Observed::new(disk.clone(), move |operation| {
        // The critic is looked into after the actor was opened and verified.
        let critic =
            operation.kind == "open" && operation.path.ends_with("_critic/best/rank-00000.safetensors");
        if critic && !saved.swap(true, Ordering::SeqCst) {
            best(&again, 20);
        }
        Ok(())
    }));
    let all = MODELS.map(|dir| Checkpoints::open_on(fs.clone(), dir));
    let (loaded, report) = load_newest_common(&Alone, &all, Verify::Everything).unwrap();
    assert_eq!((report.step, loaded[0].step(), loaded[1].step()), (20, 20, 20));
}

#[test]
fn what_is_damaged_in_any_model_is_told_when_nothing_is_common() {
    let disk = disk_with(&[1]);
    disk.spoil("/run/_critic/global_step1/manifest.json", b"rotten".to_vec()).unwrap();
    let told = load_newest_common(&Alone, &both(&disk), Verify::Everything);
    let Err(Error::NoCommonCheckpoint { skipped, .. }) = told else { panic!("{told:?}") };
    let names: Vec<&str> = skipped.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["/run/_critic/global_step1", "/run/_actor/global_step1"]);
    assert!(skipped[0].reason.contains("manifest.json"), "{skipped:?}");
}

/// Loads on two ranks, of which the second cannot read the critic's newest.
fn load_where_reading_fails(kind: io::ErrorKind) -> Vec<Result<([u64; 2], usize)>> {
    let disk = SimulatedDisk::new();
    run_ranks(2, |group| {
        let savers = open(Arc::new(disk.clone()), &group).unwrap();
        for step in 1..=2 {
            let weights = [content(0, step, 0), content(1, step, 0)];
            let [a, c] = snapshots(&weights, &group, step, 0);
            save_together(&group, &[(&savers[0], &a), (&savers[1], &c)], &Rotation::KEEP_ALL).unwrap();
        }
        let rank = group.rank();
        let fs = Arc::new(Observed::new(disk.clone(), move |operation| {
            let unreadable = rank == 1 && operation.path.starts_with("/run/_critic/global_step2");
            if unreadable && operation.kind == "read" { Err(kind.into()) } else { Ok(()) }
        }));
        let all = MODELS.map(|dir| Checkpoints::open_on(fs.clone(), dir));
        let (loaded, report) = load_newest_common(&group, &all, Verify::Everything)?;
        Ok(([loaded[0].step(), loaded[1].step()], report.skipped.len()))
    })
}

#[test]
fn all_ranks_take_the_same_common_step_though_one_of_them_cannot_read_the_newest() {
    for told in load_where_reading_fails(io::ErrorKind::TimedOut) {
        assert_eq!(told.unwrap(), ([1, 1], 1));
    }
}

#[test]
fn what_one_rank_may_not_read_is_an_error_on_all_and_no_older_step() {
    let told = load_where_reading_fails(io::ErrorKind::PermissionDenied);
    assert!(matches!(told[..], [Err(Error::Rank { rank: 1, .. }), Err(Error::Io { .. })]), "{told:?}");
}

#[test]
fn models_of_different_steps_are_not_saved_together() {
    let disk = SimulatedDisk::new();
    let told = run_ranks(2, |group| {
        let [actor, critic] = open(Arc::new(disk.clone()), &group).unwrap();
        let weights = [content(0, 2, 0), content(1, 2, 0)];
        let [a, c] = snapshots(&weights, &group, 2, 0);
        // One rank alone gets it wrong.
        let c = Snapshot { step: 2 + group.rank() as u64, ..c };
        save_together(&group, &[(&actor, &a), (&critic, &c)], &ONE)
    });
    assert!(matches!(told[0], Err(Error::Rank { rank: 1, .. })), "{told:?}");
    assert!(matches!(told[1], Err(Error::Snapshot { .. })), "{told:?}");
    assert_eq!(common(&disk), (0, [0, 0]));
}

#[test]
fn models_saved_in_the_background_rotate_when_both_are_there() {
    let disk = SimulatedDisk::new();
    let mut savers = open(Arc::new(disk.clone()), &Alone)
        .unwrap()
        .map(|saver| BackgroundSaver::new(saver, Arc::new(Alone)).unwrap());
    for step in 1..=3 {
        let weights = [content(0, step, 0), content(1, step, 0)];
        let snapshots = snapshots(&weights, &Alone, step, 0);
        for (saver, snapshot) in savers.iter_mut().zip(&snapshots) {
            saver.save(snapshot, &Rotation::KEEP_ALL).unwrap();
        }
        for saver in &mut savers {
            assert!(saver.finish().unwrap().is_some());
        }
        for saver in &mut savers {
            assert_eq!(saver.rotate(&ONE).unwrap().removed.len(), usize::from(step > 1));
        }
        assert_eq!(common(&disk), (step, [0, 0]));
    }
}

#[test]
fn ranks_that_do_not_save_as_many_models_are_told_before_anything_is_written() {
    let disk = SimulatedDisk::new();
    let told = run_ranks(2, |group| {
        let weights = [content(0, 1, 0), content(1, 1, 0)];
        let [actor, critic] = open(Arc::new(disk.clone()), &group).unwrap();
        let [a, c] = snapshots(&weights, &group, 1, 0);
        let models = [(&actor, &a), (&critic, &c)];
        save_together(&group, &models[..2 - group.rank()], &ONE).unwrap_err().to_string()
    });
    assert!(told[0].contains("rank 0 saves 2 models") && told[0].contains("rank 1 saves 1"), "{told:?}");
    assert_eq!(told[0], told[1]);
    assert_eq!(common(&disk).0, 0);
}
