//! Finding checkpoints while others rename, among what is not ours, and where a process comes to its limits.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use lightrft_ckpt::testing::{Observed, Operation, SimulatedDisk, run_ranks};
use lightrft_ckpt::{
    Agreement as _, Alone, Checkpoints, Error, FileSystem as _, Part, Region, Restore, Rotation, Saver,
    Snapshot, Verify, Wanted, Which,
};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::io::Errno;

const DIR: &str = "/c";
const ONE: Rotation = Rotation { max_num: 1, ..Rotation::KEEP_ALL };
const SHARD: &str = "rank-00000.safetensors";
const ASIDE: &str = "/c/best.replaced-";

fn save(disk: &SimulatedDisk, tag: &str, step: u64, limits: &Rotation) {
    let weight = [step; 8];
    let mut snapshot = Snapshot { tag: tag.into(), ..Snapshot::of_step(step) };
    snapshot.parts.push(Part::new("w", vec![8], Region::Whole, &weight));
    Saver::open_on(Arc::new(disk.clone()), DIR, &Alone).unwrap().save(&Alone, &snapshot, limits).unwrap();
}

fn watched(
    disk: &SimulatedDisk,
    watch: impl Fn(&Operation) -> io::Result<()> + Send + Sync + 'static,
) -> Checkpoints {
    Checkpoints::open_on(Arc::new(Observed::new(disk.clone(), watch)), DIR)
}

/// Looks at the disk while `act` is done once, just before the manifest of `tag` is opened.
fn disturbed(
    disk: &SimulatedDisk,
    tag: &str,
    act: impl Fn(&SimulatedDisk) + Send + Sync + 'static,
) -> Checkpoints {
    let (other, done) = (disk.clone(), AtomicBool::new(false));
    let manifest = Path::new(DIR).join(tag).join("manifest.json");
    watched(disk, move |operation| {
        if operation.kind == "open" && operation.path == manifest && !done.swap(true, Ordering::SeqCst) {
            act(&other);
        }
        Ok(())
    })
}

fn steps(at: &Checkpoints) -> Vec<u64> {
    at.list().unwrap().iter().map(|l| l.step).collect()
}

#[test]
fn one_that_rotates_away_while_the_directory_is_looked_at_leaves_the_one_that_came() {
    let disk = SimulatedDisk::new();
    save(&disk, "global_step1", 1, &ONE);
    let at = disturbed(&disk, "global_step1", |disk| save(disk, "global_step2", 2, &ONE));
    let (checkpoint, report) = at.load(Which::Newest, Verify::Everything).unwrap();
    assert_eq!((checkpoint.step(), report.skipped), (2, vec![]));
}

#[test]
fn a_tag_that_steps_aside_while_the_directory_is_looked_at_is_found_under_its_other_name() {
    let disk = SimulatedDisk::new();
    save(&disk, "best", 1, &ONE);
    let aside = format!("{ASIDE}0123456789abcdef");
    let at = disturbed(&disk, "best", move |disk| disk.rename("/c/best".as_ref(), aside.as_ref()).unwrap());
    let (checkpoint, _) = at.load(Which::Tag("best"), Verify::Everything).unwrap();
    assert_eq!((checkpoint.tag(), checkpoint.step()), ("best", 1));
}

#[test]
fn looking_ends_though_names_never_settle() {
    let disk = SimulatedDisk::new();
    save(&disk, "best", 1, &ONE);
    let other = disk.clone();
    // Whatever name it has, it has another one when it is opened.
    let at = watched(&disk, move |operation| {
        let (dir, name) = (operation.path.parent().unwrap(), operation.path.file_name().unwrap());
        if operation.kind == "open" && name == "manifest.json" {
            let [one, two] =
                ["0000000000000000", "ffffffffffffffff"].map(|suffix| format!("{ASIDE}{suffix}"));
            other.rename(dir, if dir == Path::new(&one) { two } else { one }.as_ref()).unwrap();
        }
        Ok(())
    });
    assert_eq!(steps(&at), [0; 0]);
}

#[test]
fn of_several_that_stepped_aside_the_newest_counts_and_comes_back() {
    for suffixes in [["0000000000000000", "ffffffffffffffff"], ["ffffffffffffffff", "0000000000000000"]] {
        let disk = SimulatedDisk::new();
        [1, 2].iter().for_each(|&step| save(&disk, &step.to_string(), step, &Rotation::KEEP_ALL));
        for (tag, suffix) in ["/c/1", "/c/2"].iter().zip(suffixes) {
            disk.rename(tag.as_ref(), format!("{ASIDE}{suffix}").as_ref()).unwrap();
        }
        assert_eq!(steps(&watched(&disk, |_| Ok(()))), [2]);
        // Whoever saves next gives it the tag, and lets the others go.
        let saver = Saver::open_on(Arc::new(disk.clone()), DIR, &Alone).unwrap();
        let (checkpoint, _) = saver.checkpoints().load(Which::Tag("best"), Verify::Everything).unwrap();
        assert_eq!((checkpoint.step(), checkpoint.path()), (2, Path::new("/c/best")));
        let left = disk.list(DIR.as_ref()).unwrap();
        assert!(left.iter().all(|entry| !entry.name.contains("replaced")), "{left:?}");
    }
}

#[test]
fn what_cannot_be_read_is_refused_only_if_it_is_ours() {
    let disk = SimulatedDisk::new();
    save(&disk, "global_step1", 1, &Rotation::KEEP_ALL);
    let whole = disk.content("/c/global_step1/manifest.json").unwrap();
    let no_head = [b"rotten", &whole[6..]].concat();
    let file = |path: String, content: &[u8]| {
        disk.create_dir_all(Path::new(&path).parent().unwrap()).unwrap();
        disk.create(path.as_ref(), content.len() as u64).unwrap().write_all_at(0, content).unwrap();
    };
    let of = |dir: &str| format!("{DIR}/{dir}/manifest.json");
    file(of("extension"), b"{\"name\": \"a browser's\"}");
    file(of("empty"), b"");
    disk.create_dir_all("/c/folder/manifest.json".as_ref()).unwrap();
    file(of("ours-torn"), &whole[..200]);
    file(of("ours-rotten"), &no_head);
    file(format!("{DIR}/ours-rotten/rank-00000.safetensors"), b"");
    file(of("lost+found"), b"");
    file(of("unlisted"), &whole);
    let at = watched(&disk, |operation| {
        let closed = operation.path.starts_with("/c/lost+found")
            || (operation.path.starts_with("/c/global_step1")
                && operation.path != Path::new("/c/global_step1"));
        let closed = closed || operation.path == Path::new("/c/unlisted/manifest.json");
        if closed { Err(Errno::ACCESS.into()) } else { Ok(()) }
    });
    let refused = || at.survey().unwrap().refused.into_iter().map(|s| s.name).collect::<Vec<_>>();
    // The shards of `global_step1` are seen, though none of its files can be read.
    assert_eq!(refused(), ["global_step1", "ours-rotten", "ours-torn"]);
    // Nobody else's directory is what `latest` names.
    disk.spoil("/c/latest", b"lost+found".to_vec()).unwrap();
    assert_eq!(refused(), ["global_step1", "lost+found", "ours-rotten", "ours-torn"]);
}

#[test]
fn where_a_pipe_lies_nobody_waits() {
    let dir = tempfile::tempdir().unwrap();
    let saver = Saver::open(dir.path(), &Alone).unwrap();
    let mut snapshot = Snapshot::of_step(1);
    snapshot.parts.push(Part::new("w", vec![1], Region::Whole, &[1.0f32]));
    saver.save(&Alone, &snapshot, &Rotation::KEEP_ALL).unwrap();
    let pipe = |path: &Path| mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    std::fs::remove_file(dir.path().join("latest")).unwrap();
    std::fs::create_dir(dir.path().join("other")).unwrap();
    std::fs::write(dir.path().join("other/rank-00000.safetensors"), "").unwrap();
    ["latest", "other/manifest.json"].iter().for_each(|name| pipe(&dir.path().join(name)));
    let (told, hear) = mpsc::channel();
    let at = saver.checkpoints();
    // Not joined: where it waits, it waits for ever.
    std::thread::spawn(move || {
        told.send(at.load(Which::Latest, Verify::Everything).map(|(_, report)| report))
    });
    let report = hear.recv_timeout(Duration::from_secs(60)).expect("it waits").unwrap();
    let names: Vec<&str> = report.skipped.iter().map(|s| s.name.as_str()).collect();
    assert_eq!((report.step, names), (1, vec!["other", "latest"]));
}

#[test]
fn who_may_not_or_can_no_more_open_files_is_told_and_not_given_an_older_checkpoint() {
    let disk = SimulatedDisk::new();
    (1..=2).for_each(|step| save(&disk, &format!("global_step{step}"), step, &Rotation::KEEP_ALL));
    for errno in [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::ACCESS] {
        for (name, kind) in [("manifest.json", "open"), (SHARD, "open"), (SHARD, "read")] {
            if (name, errno) == ("manifest.json", Errno::ACCESS) {
                continue; // How new it is, nobody knows: it is told and passed over.
            }
            // Rank 0 alone lists, and verifies the one block.
            let failing = usize::from((name, kind) == (SHARD, "open"));
            let told = run_ranks(2, |group| {
                let rank = group.rank();
                let at = watched(&disk, move |operation| {
                    let hit = rank == failing
                        && operation.kind == kind
                        && operation.path == Path::new(DIR).join("global_step2").join(name);
                    if hit { Err(errno.into()) } else { Ok(()) }
                });
                let loaded = at.load_together(&group, Which::Newest, Verify::Everything).map(|_| ());
                let mut weight = [0u64; 8];
                let restored = at.restore(&group, &Restore::default(), &mut weight, |weight, _| {
                    Ok(vec![Wanted::new("w", vec![8], Region::Whole, weight)])
                });
                match restored.map(|_| ()) {
                    Err(Error::Spoilt { source }) if kind == "read" => [loaded, Err(*source)],
                    restored => [loaded, restored],
                }
            });
            for (rank, told) in told.into_iter().enumerate() {
                for told in told {
                    let case = format!("{errno:?} at {kind} of {name}, rank {rank}: {told:?}");
                    match told.unwrap_err() {
                        Error::Io { source, .. } => {
                            assert_eq!(source.raw_os_error(), Some(errno.raw_os_error()))
                        }
                        Error::Rank { rank: first, .. } => {
                            assert!(first == failing && rank != failing, "{case}")
                        }
                        _ => panic!("{case}"),
                    }
                }
            }
        }
    }
}

#[test]
fn however_many_ranks_saved_few_files_are_open() {
    const RANKS: usize = 150;
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    run_ranks(RANKS, |group| {
        let (rank, mine) = (group.rank(), [group.rank() as u64; 2]);
        let mut snapshot = Snapshot::of_step(1);
        let region = Region::Flat(2 * rank..2 * rank + 2);
        snapshot.parts.push(Part::new("w", vec![2 * RANKS], region, &mine));
        Saver::open(dir.path(), &group).unwrap().save(&group, &snapshot, &Rotation::KEEP_ALL).unwrap();
    });
    let open = || {
        let all = std::fs::read_dir("/proc/self/fd").unwrap();
        all.filter(|fd| {
            std::fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|path| path.starts_with(dir.path()))
        })
        .count()
    };
    let (checkpoint, _) = Checkpoints::open(dir.path()).load(Which::Newest, Verify::Everything).unwrap();
    assert!((1..=64).contains(&open()), "{} are open", open());
    // What was closed is opened again.
    for _ in 0..2 {
        let weight: Vec<u64> = checkpoint.read_vec("w", &Region::Whole).unwrap();
        assert!(weight.iter().enumerate().all(|(i, w)| *w == i as u64 / 2));
        assert!(open() <= 64, "{} are open", open());
    }
}
