//! What a saver promises its ranks, and what it refuses.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io;
use std::sync::Arc;

use lightrft_ckpt::testing::{Crash, Observed, SimulatedDisk, run_ranks};
use lightrft_ckpt::{
    Agreement, Alone, Checkpoints, Dtype, Error, FileSystem as _, Part, Region, Result, Rotation, SaveReport,
    Saver, Snapshot, Verify, Which,
};

const KEEP: Rotation = Rotation { max_num: 2, max_mem_gib: 1.0, ..Rotation::KEEP_ALL };

fn save(saver: &Saver, group: &dyn Agreement, step: u64) -> Result<SaveReport> {
    save_tagged(saver, group, &format!("global_step{step}"), step)
}

fn save_tagged(saver: &Saver, group: &dyn Agreement, tag: &str, step: u64) -> Result<SaveReport> {
    let mine = [step as f32; 3];
    let (rank, world) = (group.rank(), group.world_size());
    let mut snapshot = Snapshot { tag: tag.into(), ..Snapshot::of_step(step) };
    snapshot.parts.push(Part::new("w", vec![3 * world], Region::Flat(3 * rank..3 * (rank + 1)), &mine));
    saver.save(group, &snapshot, &KEEP)
}

fn names(dir: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.filter(|name| !name.starts_with(".lightrft")).collect();
    names.sort();
    names
}

fn tags(at: &Checkpoints) -> Vec<String> {
    at.list().unwrap().into_iter().map(|l| l.tag).collect()
}

#[test]
fn after_a_save_the_newest_are_kept_and_latest_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let saver = Saver::open(dir.path(), &Alone).unwrap();
    let removed: Vec<Vec<String>> = (1..=4).map(|step| save(&saver, &Alone, step).unwrap().removed).collect();
    assert_eq!(removed, [vec![], vec![], vec!["global_step1".to_owned()], vec!["global_step2".to_owned()]]);
    assert_eq!(names(dir.path()), ["global_step3", "global_step4", "latest"]);
    assert_eq!(std::fs::read_to_string(dir.path().join("latest")).unwrap(), "global_step4");
}

#[test]
fn steps_count_not_the_order_of_saves() {
    let dir = tempfile::tempdir().unwrap();
    let saver = Saver::open(dir.path(), &Alone).unwrap();
    for step in [9, 8, 7] {
        save(&saver, &Alone, step).unwrap();
    }
    // The highest step and the one just saved both stay.
    assert_eq!(tags(&saver.checkpoints()), ["global_step9", "global_step7"]);
    let (newest, _) = saver.checkpoints().load(Which::Newest, Verify::Everything).unwrap();
    let (latest, _) = saver.checkpoints().load(Which::Latest, Verify::Everything).unwrap();
    assert_eq!((newest.step(), latest.step()), (9, 7));
}

#[test]
fn a_tag_saved_again_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let saver = Saver::open(dir.path(), &Alone).unwrap();
    save_tagged(&saver, &Alone, "best", 1).unwrap();
    let report = save_tagged(&saver, &Alone, "best", 5).unwrap();
    assert!(report.replaced && report.removed.is_empty() && report.not_removed.is_empty());
    let (best, _) = saver.checkpoints().load(Which::Tag("best"), Verify::Everything).unwrap();
    assert_eq!(best.read_vec::<f32>("w", &Region::Whole).unwrap(), [5.0; 3]);
    assert_eq!(names(dir.path()), ["best", "latest"]);
}

#[test]
fn what_is_not_ours_is_neither_counted_nor_touched() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    for foreign in ["wandb", "run.tmp-1", "global_step0_hf", ".trash-mine"] {
        std::fs::create_dir(at.join(foreign)).unwrap();
        std::fs::write(at.join(foreign).join("note.txt"), "keep me").unwrap();
    }
    std::fs::write(at.join("rank-00000.safetensors"), "not in a checkpoint").unwrap();
    let saver = Saver::open(at, &Alone).unwrap();
    (1..=4).for_each(|step| drop(save(&saver, &Alone, step).unwrap()));
    assert_eq!(tags(&saver.checkpoints()), ["global_step4", "global_step3"]);
    for foreign in ["wandb", "run.tmp-1", "global_step0_hf", ".trash-mine"] {
        assert_eq!(std::fs::read_to_string(at.join(foreign).join("note.txt")).unwrap(), "keep me");
    }
    assert!(at.join("rank-00000.safetensors").exists());

    // A directory of that name that is not a checkpoint is in the way, and stays.
    let refused = save_tagged(&saver, &Alone, "wandb", 9);
    assert!(matches!(&refused, Err(Error::Foreign { found, .. }) if found == "note.txt"), "{refused:?}");
    // Somebody's file in a checkpoint keeps it from rotation.
    std::fs::write(at.join("global_step3").join("note.txt"), "keep me").unwrap();
    (5..=7).for_each(|step| drop(save(&saver, &Alone, step).unwrap()));
    assert_eq!(tags(&saver.checkpoints()), ["global_step7", "global_step3"]);
}

#[test]
fn leftovers_of_a_crash_are_swept_at_the_next_start_but_not_what_lies_among_them() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let (plain, mixed) = ("global_step5.tmp-0123456789abcdef", "global_step6.tmp-0123456789abcdef");
    for staging in [plain, mixed] {
        std::fs::create_dir(at.join(staging)).unwrap();
        std::fs::write(at.join(staging).join("rank-00000.safetensors"), "half").unwrap();
    }
    std::fs::write(at.join(mixed).join("mine.txt"), "keep me").unwrap();
    std::fs::write(at.join("latest.tmp-0123456789abcdef"), "x").unwrap();
    let saver = Saver::open(at, &Alone).unwrap();
    assert_eq!(names(at), [mixed]);
    assert_eq!(names(&at.join(mixed)), ["mine.txt", "rank-00000.safetensors"]);
    assert_eq!(saver.left_by_sweep()[0].name, mixed);
}

#[test]
fn a_second_saver_of_the_directory_is_refused_and_sweeps_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let first = Saver::open(dir.path(), &Alone).unwrap();
    let staging = dir.path().join("global_step5.tmp-0123456789abcdef");
    std::fs::create_dir(&staging).unwrap();
    assert!(matches!(Saver::open(dir.path(), &Alone), Err(Error::Busy { .. })));
    assert!(staging.exists());
    drop(first);
    Saver::open(dir.path(), &Alone).unwrap();
    assert!(!staging.exists());
}

#[test]
fn a_failure_on_any_rank_fails_all_with_its_reason_and_leaves_nothing() {
    for failing in 0..3 {
        let disk = SimulatedDisk::new();
        let told = run_ranks(3, |group| {
            let saver = Saver::open_on(Arc::new(disk.clone()), "/c", &group).unwrap();
            save(&saver, &group, 1).unwrap();
            let rank = group.rank();
            drop(saver);
            let faulty = Observed::new(disk.clone(), move |operation| {
                let hit = rank == failing
                    && operation.kind == "sync"
                    && operation.path.ends_with(format!("rank-0000{rank}.safetensors"));
                if hit { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
            });
            let saver = Saver::open_on(Arc::new(faulty), "/c", &group).unwrap();
            save(&saver, &group, 2)
        });
        for (rank, told) in told.into_iter().enumerate() {
            let text = match told {
                Err(Error::Io { source, .. }) if rank == failing => source.kind().to_string(),
                Err(Error::Rank { rank, reason, .. }) if rank == failing => reason,
                other => panic!("rank {rank}: {other:?}"),
            };
            assert!(text.contains(&io::ErrorKind::StorageFull.to_string()), "{text}");
        }
        let left: Vec<String> = disk.list("/c".as_ref()).unwrap().into_iter().map(|e| e.name).collect();
        assert_eq!(left, ["global_step1", "latest"], "rank {failing} failed");
    }
}

#[test]
fn ranks_that_disagree_are_told_before_anything_is_written() {
    let refused = |spoil: &(dyn Fn(usize, &mut Snapshot<'_>) + Sync)| -> String {
        let disk = SimulatedDisk::new();
        let told = run_ranks(2, |group| {
            let mine = [1.0f32; 4];
            let rank = group.rank();
            let mut snapshot = Snapshot::of_step(1);
            snapshot.parts.push(Part::new("w", vec![8], Region::Flat(4 * rank..4 * rank + 4), &mine));
            spoil(rank, &mut snapshot);
            let saver = Saver::open_on(Arc::new(disk.clone()), "/c", &group).unwrap();
            saver.save(&group, &snapshot, &KEEP).unwrap_err().to_string()
        });
        assert_eq!(disk.list("/c".as_ref()).unwrap(), [], "{told:?}");
        told[0].clone()
    };
    let text = refused(&|rank, s| s.step += rank as u64);
    assert!(text.contains("step 1") && text.contains("step 2"), "{text}");
    let text = refused(&|rank, s| s.shared = rank.into());
    assert!(text.contains("rank 1"), "{text}");
    let text = refused(&|_, s| s.parts[0].region = Region::Flat(2..6));
    assert!(text.contains("`w`"), "{text}");
    let text = refused(&|rank, s| {
        if rank == 1 {
            s.parts.clear()
        }
    });
    assert!(text.contains("`w`") && text.contains("[8]") && text.contains('4'), "{text}");
    let text = refused(&|rank, s| {
        if rank == 1 {
            s.parts[0].dtype = Dtype::I32
        }
    });
    assert!(text.contains("F32") && text.contains("I32"), "{text}");
    let nested = |depth| (0..depth).fold(1.into(), |inner, _| serde_json::json!([inner]));
    let text = refused(&|rank, s| s.rank_state = nested(if rank == 1 { 130 } else { 1 }));
    assert!(text.contains("rank 1 failed while planning") && text.contains("`rank_state`"), "{text}");
    let text = refused(&|_, s| s.shared = nested(101));
    assert!(text.contains("`shared`") && text.contains("100"), "{text}");
    let text = refused(&|rank, s| {
        let clash = Part::new("w@0..4", &[1][..], Region::Whole, &[1u8]);
        s.parts.extend((rank == 0).then_some(clash));
    });
    assert!(text.contains("`w@0..4`"), "{text}");
    let text = refused(&|_, s| s.parts[0].region = Region::Flat(0..9));
    assert!(text.contains("0..9") && text.contains("[8]"), "{text}");
}

#[test]
fn tags_that_could_escape_or_collide_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let saver = Saver::open(dir.path(), &Alone).unwrap();
    for tag in [
        "",
        ".",
        "..",
        "../up",
        "a/b",
        "latest",
        ".hidden",
        "a\0b",
        "step 1 ",
        " step 1",
        "x.tmp-0123456789abcdef",
        &"t".repeat(300),
    ] {
        let refused = save_tagged(&saver, &Alone, tag, 1);
        assert!(matches!(refused, Err(Error::Snapshot { .. })), "{tag:?}: {refused:?}");
    }
    assert_eq!(names(dir.path()), [""; 0]);
    let refused = saver.save(
        &Alone,
        &Snapshot::of_step(1),
        &Rotation { max_num: 0, max_mem_gib: 1.0, ..Rotation::default() },
    );
    assert!(matches!(refused, Err(Error::Rotation { field: "max_num", .. })));
}

#[test]
fn another_models_checkpoint_is_told_by_its_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let saver = Saver::open(dir.path(), &Alone).unwrap();
    let (w, b) = ([0.0f32; 6], [0u8; 2]);
    let mut snapshot = Snapshot::of_step(1);
    snapshot.parts.push(Part::new("w", vec![2, 3], Region::Whole, &w));
    snapshot.parts.push(Part::new("b", vec![2], Region::Whole, &b));
    saver.save(&Alone, &snapshot, &KEEP).unwrap();
    let (checkpoint, _) = saver.checkpoints().load(Which::Newest, Verify::Everything).unwrap();
    checkpoint.check_against([("w", Dtype::F32, &[2, 3][..]), ("b", Dtype::U8, &[2])]).unwrap();
    let Err(Error::Mismatch(told)) =
        checkpoint.check_against([("w", Dtype::F32, &[3, 2][..]), ("c", Dtype::U8, &[2])])
    else {
        panic!("another model passed");
    };
    assert_eq!((&told.missing[..], &told.unexpected[..]), (&["c".to_owned()][..], &["b".to_owned()][..]));
    assert_eq!(told.differing[0].name, "w");
    let text = told.to_string();
    assert!(text.contains("[2, 3]") && text.contains("[3, 2]"), "{text}");
}

#[test]
fn requests_that_do_not_fit_are_errors() {
    let disk = SimulatedDisk::new();
    let saver = Saver::open_on(Arc::new(disk), "/c", &Alone).unwrap();
    save(&saver, &Alone, 1).unwrap();
    let at = saver.checkpoints();
    let (checkpoint, _) = at.load(Which::Newest, Verify::Everything).unwrap();
    assert!(matches!(checkpoint.read_vec::<f32>("v", &Region::Whole), Err(Error::NoTensor { .. })));
    assert!(matches!(checkpoint.read_vec::<u32>("w", &Region::Whole), Err(Error::Request { .. })));
    assert!(matches!(checkpoint.read_vec::<f32>("w", &Region::Flat(0..4)), Err(Error::Request { .. })));
    assert!(matches!(
        checkpoint.read_into("w", &Region::Whole, &mut [0.0f32; 2]),
        Err(Error::Request { .. })
    ));
    let told = at.load(Which::Tag("global_step7"), Verify::Everything).unwrap_err();
    assert!(matches!(&told, Error::NoTag { present, .. } if present == &["global_step1"]), "{told}");
    let nowhere = Checkpoints::open("/nowhere/at/all");
    assert!(matches!(nowhere.load(Which::Newest, Verify::Everything), Err(Error::NoCheckpoint { .. })));
}

#[test]
fn a_lost_rank_is_an_error_for_the_others_not_a_wait() {
    let disk = SimulatedDisk::new();
    let told = run_ranks(2, |group| {
        let saver = Saver::open_on(Arc::new(disk.clone()), "/c", &group).unwrap();
        if group.rank() == 1 { None } else { Some(save(&saver, &group, 1)) }
    });
    assert!(matches!(told[0], Some(Err(Error::Agreement { during: "planning", .. }))), "{told:?}");
}

#[test]
fn of_several_that_stepped_aside_the_newest_whole_one_gets_the_tag_back() {
    let (low, high) = ("best.replaced-0000000000000000", "best.replaced-ffffffffffffffff");
    // In whichever order they are listed, and when the newest of them is damaged.
    for (of_step_1, of_step_2, damaged, expected) in
        [(low, high, None, 2.0), (high, low, None, 2.0), (low, high, Some(high), 1.0)]
    {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        for (step, aside) in [(1, of_step_1), (2, of_step_2)] {
            save_tagged(&Saver::open(at, &Alone).unwrap(), &Alone, "best", step).unwrap();
            std::fs::rename(at.join("best"), at.join("aside")).unwrap();
            std::fs::create_dir_all(at.join("kept")).unwrap();
            std::fs::rename(at.join("aside"), at.join("kept").join(aside)).unwrap();
        }
        for aside in [low, high] {
            std::fs::rename(at.join("kept").join(aside), at.join(aside)).unwrap();
        }
        std::fs::remove_dir(at.join("kept")).unwrap();
        if let Some(damaged) = damaged {
            std::fs::remove_file(at.join(damaged).join("rank-00000.safetensors")).unwrap();
        }
        let saver = Saver::open(at, &Alone).unwrap();
        let (best, _) = saver.checkpoints().load(Which::Tag("best"), Verify::Everything).unwrap();
        assert_eq!(best.read_vec::<f32>("w", &Region::Whole).unwrap(), [expected; 3]);
        assert_eq!((names(at), saver.left_by_sweep()), (vec!["best".into(), "latest".into()], &[][..]));
    }
}

#[test]
fn what_stepped_aside_and_is_all_there_is_stays_while_it_cannot_be_read() {
    let disk = SimulatedDisk::new();
    let saver = Saver::open_on(Arc::new(disk.clone()), "/c", &Alone).unwrap();
    save_tagged(&saver, &Alone, "best", 1).unwrap();
    drop(saver);
    let aside = "best.replaced-0123456789abcdef";
    disk.rename("/c/best".as_ref(), format!("/c/{aside}").as_ref()).unwrap();
    let faulty = Observed::new(disk.clone(), |operation| {
        let hit = operation.kind == "open" && operation.path.ends_with("manifest.json");
        if hit { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
    });
    let saver = Saver::open_on(Arc::new(faulty), "/c", &Alone).unwrap();
    assert_eq!(saver.left_by_sweep()[0].name, aside);
    drop(saver);
    let saver = Saver::open_on(Arc::new(disk), "/c", &Alone).unwrap();
    assert_eq!((saver.left_by_sweep(), tags(&saver.checkpoints())), (&[][..], vec!["best".to_owned()]));
}

#[test]
fn what_an_earlier_save_replaced_and_left_goes_with_the_next_rotation() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let saver = Saver::open(at, &Alone).unwrap();
    save_tagged(&saver, &Alone, "best", 1).unwrap();
    std::fs::rename(at.join("best"), at.join("best.replaced-0123456789abcdef")).unwrap();
    // Nothing else has its tag: it stays.
    assert_eq!(save(&saver, &Alone, 2).unwrap().removed, [""; 0]);
    assert_eq!(names(at), ["best.replaced-0123456789abcdef", "global_step2", "latest"]);
    save_tagged(&saver, &Alone, "best", 3).unwrap();
    assert_eq!(names(at), ["best", "global_step2", "latest"]);
}

#[test]
fn a_latest_that_cannot_be_moved_is_told_on_every_rank_and_rotation_goes_on() {
    let disk = SimulatedDisk::new();
    let told = run_ranks(2, |group| {
        let faulty = Observed::new(disk.clone(), |operation| {
            let hit = operation.kind == "create" && operation.path.to_string_lossy().contains("latest.tmp-");
            if hit { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        });
        let open = |fs| Saver::open_on(fs, "/c", &group).unwrap();
        save(&open(Arc::new(disk.clone())), &group, 1).unwrap();
        let saver = open(Arc::new(faulty));
        (2..=4).map(|step| save(&saver, &group, step).unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(told[0], told[1]);
    for report in &told[0] {
        let reason = report.latest_not_moved.as_deref().unwrap();
        assert!(reason.contains("latest.tmp-"), "{reason}");
    }
    // What the old `latest` names stays.
    let removed: Vec<String> = told[0].iter().flat_map(|report| report.removed.clone()).collect();
    assert_eq!(removed, ["global_step2", "global_step3"]);
    let left: Vec<String> = disk.list("/c".as_ref()).unwrap().into_iter().map(|e| e.name).collect();
    assert_eq!(left, ["global_step1", "global_step4", "latest"]);
}

#[test]
fn shards_without_a_manifest_are_somebodys_and_an_empty_folder_is_nobodys() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let saver = Saver::open(at, &Alone).unwrap();
    let copied = at.join("global_step1");
    std::fs::create_dir(&copied).unwrap();
    std::fs::write(copied.join("rank-00000.safetensors"), "being copied").unwrap();
    let refused = save(&saver, &Alone, 1);
    assert!(
        matches!(&refused, Err(Error::Foreign { found, .. }) if found == "rank-00000.safetensors"),
        "{refused:?}"
    );
    assert_eq!(std::fs::read(copied.join("rank-00000.safetensors")).unwrap(), b"being copied");
    assert_eq!(names(at), ["global_step1"]);

    std::fs::remove_file(copied.join("rank-00000.safetensors")).unwrap();
    assert!(!save(&saver, &Alone, 1).unwrap().replaced);
    assert_eq!(names(at), ["global_step1", "latest"]);
    // A damaged one of ours is replaced as ever.
    std::fs::write(copied.join("manifest.json"), "rotten").unwrap();
    assert!(save(&saver, &Alone, 1).unwrap().replaced);
    assert_eq!(tags(&saver.checkpoints()), ["global_step1"]);
}

#[test]
fn a_directory_that_somebody_else_just_made_is_durable_after_the_first_save() {
    let disk = SimulatedDisk::new();
    disk.create_dir_all("/run".as_ref()).unwrap();
    disk.create_dir("/run/c".as_ref()).unwrap();
    let saver = Saver::open_on(Arc::new(disk.clone()), "/run/c", &Alone).unwrap();
    save(&saver, &Alone, 1).unwrap();
    let left = Checkpoints::open_on(Arc::new(disk.after(Crash::LoseAll)), "/run/c");
    assert_eq!(tags(&left), ["global_step1"]);
}

#[test]
fn states_nested_as_deep_as_allowed_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let saver = Saver::open(dir.path(), &Alone).unwrap();
    let deep = (0..100).fold(serde_json::json!(0.1), |inner, _| serde_json::json!({ "in": inner }));
    let mut snapshot = Snapshot::of_step(1);
    (snapshot.shared, snapshot.rank_state) = (deep.clone(), deep.clone());
    saver.save(&Alone, &snapshot, &KEEP).unwrap();
    let (checkpoint, _) = saver.checkpoints().load(Which::Newest, Verify::Everything).unwrap();
    assert_eq!((checkpoint.shared(), checkpoint.rank_states()), (&deep, &[deep.clone()][..]));
}
