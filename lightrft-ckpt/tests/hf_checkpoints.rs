//! From a checkpoint of any world to a Hugging Face folder and back: the same numbers, and nothing half-written.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io;
use std::path::Path;
use std::sync::Arc;

use half::bf16;
use lightrft_ckpt::testing::{Crash, SimulatedDisk, run_ranks};
use lightrft_ckpt::{
    Alone, Checkpoint, Checkpoints, Dtype, Entry, Error, ExportTensors, FileSystem, Floats, HfFolder,
    HfOptions, HfReport, HfWriter, Lock, Part, ReadFile, Region, Result, Rotation, Saver, Snapshot,
    TensorSpec, Verify, Which, WriteFile, export_hf, export_hf_on,
};
use serde_json::{Value, json};

/// Names, shapes and a number that tells the values apart.
const SAVED: [(&str, &[usize], usize); 7] = [
    ("model.embed_tokens.weight", &[6, 5], 1),
    ("model.layers.2.w", &[5, 5], 2),
    ("model.layers.10.w", &[5, 5], 3),
    ("model.norm.weight", &[5], 4),
    ("optimizer.exp_avg.model.layers.2.w", &[5, 5], 5),
    ("ema.model.layers.2.w", &[5, 5], 6),
    ("ema.model.norm.weight", &[5], 7),
];

fn values(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| seed as f32 * 10.0 + i as f32 / 7.0).collect()
}

/// Saves all tensors as `world_size` ranks that each hold an uneven share.
fn save(dir: &Path, world_size: usize) -> Checkpoint {
    run_ranks(world_size, |group| {
        let rank = lightrft_ckpt::Agreement::rank(&group);
        let saver = Saver::open(dir, &group).unwrap();
        let mut snapshot = Snapshot::of_step(7);
        let all: Vec<Vec<f32>> =
            SAVED.iter().map(|(_, shape, seed)| values(*seed, shape.iter().product())).collect();
        for ((name, shape, _), values) in SAVED.iter().zip(&all) {
            let at = |rank: usize| values.len() * rank * rank / (world_size * world_size);
            let mine = at(rank)..at(rank + 1);
            snapshot.parts.push(Part::new(*name, *shape, Region::Flat(mine.clone()), &values[mine]));
        }
        snapshot.shared = json!({"consumed": 12});
        snapshot.rank_state = json!({ "rng": rank });
        saver.save(&group, &snapshot, &Rotation::KEEP_ALL).unwrap();
    });
    newest(dir)
}

fn newest(dir: &Path) -> Checkpoint {
    Checkpoints::open(dir).load(Which::Newest, Verify::Everything).unwrap().0
}

fn read(folder: &HfFolder, name: &str) -> Vec<f32> {
    let mut into = vec![0.0; folder.tensor(name).unwrap().shape.iter().product()];
    folder.read_f32(name, &Region::Whole, &mut into).unwrap();
    into
}

#[test]
fn a_checkpoint_of_any_world_is_exported_without_its_optimizer() {
    for world_size in [1, 3] {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = save(&dir.path().join("c"), world_size);
        let path = dir.path().join("model");
        for floats in [Floats::F32, Floats::Bf16] {
            let options = HfOptions { floats, ..HfOptions::default() };
            let report = export_hf(&checkpoint, &path, ExportTensors::Model, &options).unwrap();
            assert_eq!((report.shards, report.tensors), (1, 4));
            let folder = HfFolder::open(&path).unwrap();
            let names: Vec<&str> = folder.tensors().map(|t| t.name.as_str()).collect();
            assert_eq!(names, SAVED[..4].iter().map(|t| t.0).collect::<Vec<_>>(), "by number, not by digit");
            for (name, shape, seed) in &SAVED[..4] {
                let mut expected = values(*seed, shape.iter().product());
                if floats == Floats::Bf16 {
                    expected.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
                }
                assert_eq!(read(&folder, name), expected, "{name}");
            }
        }
    }
}

#[test]
fn the_average_takes_the_place_of_what_it_is_of() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = save(&dir.path().join("c"), 2);
    let path = dir.path().join("model");
    export_hf(&checkpoint, &path, ExportTensors::Average, &HfOptions::default()).unwrap();
    let folder = HfFolder::open(&path).unwrap();
    assert_eq!(folder.tensors().count(), 4);
    assert_eq!(read(&folder, "model.layers.2.w"), values(6, 25));
    assert_eq!(read(&folder, "model.layers.10.w"), values(3, 25));
    assert_eq!(read(&folder, "model.norm.weight"), values(7, 5));

    let saver = Saver::open(dir.path().join("d"), &Alone).unwrap();
    let mut snapshot = Snapshot::of_step(1);
    snapshot.parts.push(Part::new("w", vec![1], Region::Whole, &[1f32]));
    saver.save(&Alone, &snapshot, &Rotation::KEEP_ALL).unwrap();
    let told =
        export_hf(&newest(&dir.path().join("d")), &path, ExportTensors::Average, &HfOptions::default());
    assert!(matches!(told, Err(Error::Request { .. })));
    assert_eq!(HfFolder::open(&path).unwrap().tensors().count(), 4);
}

#[test]
fn a_folder_becomes_a_checkpoint_of_any_world_and_a_folder_again() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hf_tiny_qwen2");
    let folder = HfFolder::open(&golden).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for world_size in [1, 3] {
        let into = dir.path().join(format!("c{world_size}"));
        run_ranks(world_size, |group| {
            let saver = Saver::open(&into, &group).unwrap();
            let snapshot = folder.share(0, lightrft_ckpt::Agreement::rank(&group), world_size).unwrap();
            saver.save(&group, &snapshot, &Rotation::KEEP_ALL).unwrap();
        });
        let checkpoint = newest(&into);
        assert_eq!((checkpoint.step(), checkpoint.world_size()), (0, world_size));
        assert_eq!(checkpoint.tensors().len(), folder.tensors().count());
        for floats in [Floats::AsGiven, Floats::F32] {
            let path = dir.path().join("again");
            let options = HfOptions { source: Some(golden.clone()), floats, ..HfOptions::default() };
            export_hf(&checkpoint, &path, ExportTensors::Model, &options).unwrap();
            let again = HfFolder::open(&path).unwrap();
            let dtype = if floats == Floats::F32 { Dtype::F32 } else { Dtype::BF16 };
            for spec in folder.tensors() {
                assert_eq!(again.tensor(&spec.name).unwrap().dtype, dtype);
                assert_eq!(read(&again, &spec.name), read(&folder, &spec.name), "{}", spec.name);
            }
            assert_eq!(read(&again, "lm_head.weight"), read(&folder, "lm_head.weight"));
        }
    }
    assert!(matches!(folder.share(0, 2, 2), Err(Error::Request { .. })));
}

#[test]
fn a_checkpoint_is_written_anew_for_any_number_of_ranks_with_its_states() {
    let dir = tempfile::tempdir().unwrap();
    let old = save(&dir.path().join("old"), 3);
    for world_size in [1, 4] {
        let into = dir.path().join(format!("new{world_size}"));
        run_ranks(world_size, |group| {
            let saver = Saver::open(&into, &group).unwrap();
            let snapshot = old.share(lightrft_ckpt::Agreement::rank(&group), world_size).unwrap();
            saver.save(&group, &snapshot, &Rotation::KEEP_ALL).unwrap();
        });
        let new = newest(&into);
        assert_eq!((new.tag(), new.step(), new.world_size()), (old.tag(), 7, world_size));
        assert_eq!(new.shared(), old.shared());
        for (rank, state) in new.rank_states().iter().enumerate() {
            assert_eq!(*state, if rank < 3 { json!({ "rng": rank }) } else { Value::Null });
        }
        for (name, shape, seed) in SAVED {
            let read: Vec<f32> = new.read_vec(name, &Region::Whole).unwrap();
            assert_eq!((new.tensor(name), read), (old.tensor(name), values(seed, shape.iter().product())));
        }
    }
}

/// A disk on which two directories cannot be exchanged, as on some network file systems.
#[derive(Debug)]
struct WithoutExchange(SimulatedDisk);

impl FileSystem for WithoutExchange {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.0.create_dir_all(path)
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.0.create_dir(path)
    }
    fn create(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn WriteFile>> {
        self.0.create(path, bytes)
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadFile>> {
        self.0.open(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.0.list(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.0.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.0.remove_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.0.sync_dir(path)
    }
    fn try_lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        self.0.try_lock(path)
    }
}

const MODEL: &str = "/out/model";

/// Writes a model whose every element is `value`, in one file or in two.
fn write(fs: &Arc<dyn FileSystem>, value: u8, max_shard_bytes: u64) -> Result<HfReport> {
    let specs = ["a", "b"].map(|name| TensorSpec::new(name, Dtype::U8, [900]));
    let config = json!({ "value": value }).as_object().cloned();
    let options = HfOptions { max_shard_bytes, config, ..HfOptions::default() };
    let mut writer = HfWriter::create_on(fs.clone(), MODEL, specs, &options)?;
    for name in ["a", "b"] {
        writer.push(name, &[value; 900])?;
    }
    writer.finish()
}

/// The value of the model under its name, all of it.
fn found(fs: &dyn FileSystem, path: &str) -> Option<u8> {
    if !fs.list(Path::new("/out")).ok()?.iter().any(|e| Path::new("/out").join(&e.name) == Path::new(path)) {
        return None;
    }
    let folder = HfFolder::open_on(fs, path).unwrap();
    let value = folder.config().unwrap().unwrap()["value"].as_u64().unwrap() as u8;
    for name in ["a", "b"] {
        let mut bytes = [0; 900];
        folder.read(name, &Region::Whole, &mut bytes).unwrap();
        assert_eq!(bytes, [value; 900]);
    }
    Some(value)
}

/// Crashes before every operation of an export over another one, and looks at what is there.
fn crash_everywhere(seam: fn(SimulatedDisk) -> Arc<dyn FileSystem>, old: Option<(u8, u64)>, exchanges: bool) {
    let prepared = || {
        let disk = SimulatedDisk::new();
        if let Some((value, shards)) = old {
            write(&seam(disk.clone()), value, shards).unwrap();
        }
        disk
    };
    let whole = prepared();
    let begin = whole.operations();
    write(&seam(whole.clone()), 2, 1000).unwrap();
    let operations = whole.operations() - begin;
    assert!(operations > 10, "{operations}");
    for n in 0..=operations {
        let disk = prepared();
        disk.crash_before(begin + n);
        let told = write(&seam(disk.clone()), 2, 1000);
        assert!(n < operations || told.is_ok());
        for crash in
            [Crash::LoseAll, Crash::KeepAll].into_iter().chain((0..6).map(|i| Crash::Tear(n * 6 + i)))
        {
            let left = seam(disk.after(crash));
            let old = old.map(|(value, _)| value);
            let now = found(left.as_ref(), MODEL);
            let right = now == Some(2) || (now == old && told.is_err()) || (!exchanges && now.is_none());
            assert!(right, "before operation {n} of {operations}, {crash:?}, told {told:?}: {now:?}");
            // Where two renames were needed, the old one may have stepped aside, whole.
            if now.is_none() && old.is_some() {
                let names: Vec<String> =
                    left.list(Path::new("/out")).unwrap().into_iter().map(|e| e.name).collect();
                let aside = names.iter().find(|name| name.starts_with("model.replaced-")).unwrap();
                assert_eq!(found(left.as_ref(), &format!("/out/{aside}")), old);
            }
            // The next export tidies up, whether it comes to its end or not.
            if let Ok(writer) = HfWriter::create_on(
                left.clone(),
                MODEL,
                [TensorSpec::new("a", Dtype::U8, [1])],
                &HfOptions::default(),
            ) {
                drop(writer);
            }
            assert_eq!(found(left.as_ref(), MODEL).is_some(), now.is_some() || old.is_some());
            write(&left, 3, 1).unwrap();
            assert_eq!(found(left.as_ref(), MODEL), Some(3));
            let names: Vec<String> =
                left.list(Path::new("/out")).unwrap().into_iter().map(|e| e.name).collect();
            assert_eq!(names, ["model"], "before operation {n}, {crash:?}");
        }
    }
}

#[test]
fn a_crash_in_the_first_export_leaves_nothing_or_all_of_it() {
    crash_everywhere(|disk| Arc::new(disk), None, true);
}

#[test]
fn a_crash_in_an_export_over_another_leaves_the_old_one_or_the_new() {
    crash_everywhere(|disk| Arc::new(disk), Some((1, 5000)), true);
    crash_everywhere(|disk| Arc::new(disk), Some((1, 1)), true);
}

#[test]
fn where_nothing_can_be_exchanged_the_old_one_may_have_stepped_aside_and_comes_back() {
    crash_everywhere(|disk| Arc::new(WithoutExchange(disk)), Some((1, 5000)), false);
}

#[test]
fn an_error_of_any_operation_leaves_a_whole_folder_and_no_other() {
    let seams: [fn(SimulatedDisk) -> Arc<dyn FileSystem>; 2] =
        [|disk| Arc::new(disk), |disk| Arc::new(WithoutExchange(disk))];
    for seam in seams {
        let whole = SimulatedDisk::new();
        write(&seam(whole.clone()), 1, 5000).unwrap();
        let begin = whole.operations();
        write(&seam(whole.clone()), 2, 1000).unwrap();
        for n in 0..whole.operations() - begin {
            let disk = SimulatedDisk::new();
            let fs = seam(disk.clone());
            write(&fs, 1, 5000).unwrap();
            disk.fail_at(disk.operations() + n, io::ErrorKind::StorageFull);
            let told = write(&fs, 2, 1000);
            let now = found(fs.as_ref(), MODEL);
            assert!(
                now == Some(2) || (now == Some(1) && told.is_err()),
                "operation {n}, told {told:?}: {now:?}"
            );
            write(&fs, 3, 1).unwrap();
            assert_eq!(fs.list(Path::new("/out")).unwrap().len(), 1, "operation {n}, told {told:?}");
        }
    }
}

#[test]
fn rot_in_the_checkpoint_fails_the_export_and_leaves_the_old_folder() {
    let dir = tempfile::tempdir().unwrap();
    save(&dir.path().join("c"), 1);
    let path = dir.path().join("model");
    let open =
        || Checkpoints::open(dir.path().join("c")).load(Which::Newest, Verify::WhileReading).unwrap().0;
    export_hf(&open(), &path, ExportTensors::Model, &HfOptions::default()).unwrap();
    let shard = dir.path().join("c/global_step7/rank-00000.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[4096..].iter_mut().for_each(|b| *b ^= 1);
    std::fs::write(&shard, bytes).unwrap();
    let fs: Arc<dyn FileSystem> = Arc::new(lightrft_ckpt::OsFileSystem::new());
    let told = export_hf_on(fs, &open(), &path, ExportTensors::Model, &HfOptions::default());
    assert!(matches!(told, Err(Error::Damaged { .. })));
    assert_eq!(read(&HfFolder::open(&path).unwrap(), "model.norm.weight"), values(4, 5));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}
