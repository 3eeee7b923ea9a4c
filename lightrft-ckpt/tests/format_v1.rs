//! A checkpoint of format version 1, written once by two ranks, is read for ever, element by element.
//!
//! `LIGHTRFT_CKPT_WRITE_FORMAT={folder} cargo test -p lightrft-ckpt --test format_v1` writes such a checkpoint into a
//! folder. The one in `tests/data/format_v1` is never written again: a new version of the format gets a folder beside it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use lightrft_ckpt::testing::run_ranks;
use lightrft_ckpt::{
    Agreement as _, Alone, Checkpoints, Dtype, Element, Error, Part, Region, Rotation, Saver, Snapshot,
    Verify, Which,
};
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_128;

const TAG: &str = "global_step7";

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/format_v1")
}

/// A type for which small whole numbers are exact.
trait Number: Element + PartialEq + std::fmt::Debug {
    fn from_small(n: u8) -> Self;
}

macro_rules! numbers {
    ($($rust:ty: $make:expr),* $(,)?) => {$(
        impl Number for $rust {
            fn from_small(n: u8) -> Self {
                $make(n)
            }
        }
    )*};
}

numbers! {
    u8: From::from, i8: |n| n as i8, u16: From::from, i16: From::from, u32: From::from, i32: From::from,
    u64: From::from, i64: From::from, f32: From::from, f64: From::from, f16: From::from,
    bf16: |n| bf16::from_f32(f32::from(n)),
}

/// Element `i` of a tensor: the formula that the fixture was filled by.
fn value<T: Number>(name: &str, i: usize) -> T {
    T::from_small(((i * 7 + name.len()) % 101) as u8)
}

/// How two ranks hold a tensor.
#[derive(Clone, Copy)]
enum Cut {
    /// Flat, in two ranges that meet here.
    At(usize),
    /// Columns of a matrix, in two boxes that meet here.
    Column(usize),
    /// Both have all of it.
    Replicated,
}

/// What is done with every tensor of the fixture.
trait Visit {
    fn tensor<T: Number>(&mut self, name: &str, shape: &[usize], cut: Cut);
}

fn visit_all(visit: &mut impl Visit) {
    // Two blocks and a piece of a third; the cut lies within the second.
    visit.tensor::<f32>("layers.0.weight", &[200, 100], Cut::At(12_345));
    visit.tensor::<f16>("layers.0.columns", &[6, 10], Cut::Column(4));
    visit.tensor::<bf16>("layers.0.norm", &[64], Cut::Replicated);
    visit.tensor::<f32>("empty", &[0, 3], Cut::At(0));
    visit.tensor::<i64>("scalar", &[], Cut::Replicated);
    visit.tensor::<f64>("second rank only", &[2, 2, 2], Cut::At(0));
    visit.tensor::<u8>("all.u8", &[5], Cut::At(2));
    visit.tensor::<i8>("all.i8", &[5], Cut::At(2));
    visit.tensor::<u16>("all.u16", &[5], Cut::At(2));
    visit.tensor::<i16>("all.i16", &[5], Cut::At(2));
    visit.tensor::<u32>("all.u32", &[5], Cut::At(2));
    visit.tensor::<i32>("all.i32", &[5], Cut::At(2));
    visit.tensor::<u64>("all.u64", &[5], Cut::At(2));
    visit.tensor::<i64>("all.i64", &[5], Cut::At(2));
    visit.tensor::<f16>("all.f16", &[5], Cut::At(2));
    visit.tensor::<bf16>("all.bf16", &[5], Cut::At(2));
    visit.tensor::<f32>("all.f32", &[5], Cut::At(2));
    visit.tensor::<f64>("all.f64", &[5], Cut::At(2));
}

fn shared() -> Value {
    json!({"consumed_samples": 896, "lr": 2.9999999999999997e-5, "name": "caf\u{e9} \"1\"", "none": null})
}

fn rank_state(rank: usize) -> Value {
    json!({"rank": rank, "generator": [u64::MAX, rank]})
}

/// Makes one rank's parts.
struct Write {
    rank: usize,
    parts: Vec<Part<'static>>,
}

impl Visit for Write {
    fn tensor<T: Number>(&mut self, name: &str, shape: &[usize], cut: Cut) {
        let total: usize = shape.iter().product();
        let (region, held): (Region, Vec<usize>) = match cut {
            Cut::Replicated => (Region::Whole, (0..total).collect()),
            Cut::At(at) => {
                let mine = if self.rank == 0 { 0..at } else { at..total };
                (Region::Flat(mine.clone()), mine.collect())
            }
            Cut::Column(at) => {
                let mine = if self.rank == 0 { 0..at } else { at..shape[1] };
                let region = Region::Box { start: vec![0, mine.start], extent: vec![shape[0], mine.len()] };
                (region, (0..total).filter(|i| mine.contains(&(i % shape[1]))).collect())
            }
        };
        let elements: Vec<T> = held.into_iter().map(|i| value(name, i)).collect();
        self.parts.push(Part {
            name: name.to_owned().into(),
            dtype: T::DTYPE,
            shape: shape.to_vec().into(),
            region,
            bytes: bytemuck::cast_slice(&elements).to_vec().into(),
        });
    }
}

/// Compares every element.
struct Compare {
    checkpoint: lightrft_ckpt::Checkpoint,
    tensors: usize,
}

impl Visit for Compare {
    fn tensor<T: Number>(&mut self, name: &str, shape: &[usize], _: Cut) {
        assert_eq!(self.checkpoint.tensor(name), Some((T::DTYPE, shape)), "{name}");
        let read: Vec<T> = self.checkpoint.read_vec(name, &Region::Whole).unwrap();
        let expected: Vec<T> = (0..shape.iter().product()).map(|i| value(name, i)).collect();
        assert!(read == expected, "{name}: {read:?}");
        self.tensors += 1;
    }
}

/// Asserts that a folder's checkpoint holds what the formula says.
fn compare(dir: &Path) {
    let (checkpoint, report) = Checkpoints::open(dir).load(Which::Tag(TAG), Verify::Everything).unwrap();
    assert_eq!(report.skipped, []);
    assert_eq!((checkpoint.step(), checkpoint.world_size()), (7, 2));
    assert_eq!(checkpoint.shared(), &shared());
    assert_eq!(checkpoint.rank_states(), [rank_state(0), rank_state(1)]);
    let mut compare = Compare { checkpoint, tensors: 0 };
    visit_all(&mut compare);
    assert_eq!(compare.checkpoint.tensors().len(), compare.tensors);
}

fn write(dir: &Path) {
    run_ranks(2, |group| {
        let mut write = Write { rank: group.rank(), parts: Vec::new() };
        visit_all(&mut write);
        let mut snapshot = Snapshot::of_step(7);
        snapshot.parts = write.parts;
        snapshot.shared = shared();
        snapshot.rank_state = rank_state(group.rank());
        let saver = Saver::open(dir, &group).unwrap();
        saver.save(&group, &snapshot, &Rotation::KEEP_ALL).unwrap();
    });
}

fn copy_of_the_fixture() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join(TAG)).unwrap();
    for entry in std::fs::read_dir(fixture().join(TAG)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(TAG).join(entry.file_name())).unwrap();
    }
    dir
}

#[test]
fn a_checkpoint_of_version_1_is_read() {
    compare(&fixture());
    let at = Checkpoints::open(fixture());
    assert_eq!(at.latest().unwrap().as_deref(), Some(TAG));
    let listed = at.list().unwrap();
    assert_eq!((listed.len(), listed[0].tag.as_str(), listed[0].step, listed[0].world_size), (1, TAG, 7, 2));
}

#[test]
fn what_is_written_today_holds_the_same() {
    let temporary = tempfile::tempdir().unwrap();
    let dir =
        std::env::var_os("LIGHTRFT_CKPT_WRITE_FORMAT").map_or(temporary.path().to_owned(), PathBuf::from);
    write(&dir);
    compare(&dir);
}

#[test]
fn its_shards_are_plain_safetensors_files() {
    let file =
        lightrft_ckpt::SafetensorsFile::open(fixture().join(TAG).join("rank-00000.safetensors")).unwrap();
    assert_eq!(file.tensor("layers.0.weight@0..12345").unwrap().shape, [12_345]);
    assert_eq!(file.tensor("layers.0.columns@[0, 0]+[6, 4]").unwrap().shape, [6, 4]);
    let mut columns = [f16::ZERO; 24];
    file.read_into("layers.0.columns@[0, 0]+[6, 4]", &Region::Whole, &mut columns).unwrap();
    assert_eq!(columns[4], value::<f16>("layers.0.columns", 10));
    let sums = file.tensors().last().unwrap();
    assert_eq!((sums.name.as_str(), sums.dtype, sums.shape[1]), ("lightrft-ckpt.xxh3", Dtype::U8, 8));
}

/// Writes a manifest's two objects with the checksums that belong to them.
fn sign(mut summary: Value, manifest: &Value) -> String {
    let manifest = manifest.to_string();
    summary["manifest_bytes"] = manifest.len().into();
    summary["manifest_xxh3"] = format!("{:032x}", xxh3_128(manifest.as_bytes())).into();
    let summary = summary.to_string();
    let sum = xxh3_128(summary.as_bytes());
    format!(
        "{{\"format\":\"lightrft-checkpoint\",\"version\":1,\"xxh3\":\"{sum:032x}\",\"summary\":{summary},\n\
         \"manifest\":{manifest}}}\n"
    )
}

#[test]
fn fields_that_later_programs_add_are_ignored() {
    let dir = copy_of_the_fixture();
    let path = dir.path().join(TAG).join("manifest.json");
    let whole: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let (mut summary, mut manifest) = (whole["summary"].clone(), whole["manifest"].clone());
    // Signing what was read changes nothing that matters.
    std::fs::write(&path, sign(summary.clone(), &manifest)).unwrap();
    compare(dir.path());

    let later = json!({"deep": [1, {"er": null}]});
    summary["later"] = later.clone();
    manifest["later"] = later.clone();
    for list in ["files", "tensors"] {
        manifest[list][0]["later"] = later.clone();
    }
    manifest["tensors"][0]["regions"][0]["later"] = later;
    std::fs::write(&path, sign(summary, &manifest)).unwrap();
    assert_eq!(Checkpoints::open(dir.path()).list().unwrap().len(), 1);
    compare(dir.path());
}

#[test]
fn a_later_version_is_refused_by_its_number_passed_over_and_never_deleted() {
    let dir = copy_of_the_fixture();
    let path = dir.path().join(TAG).join("manifest.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("\"version\":1,", "\"version\":2,", 1)).unwrap();
    let at = Checkpoints::open(dir.path());
    let refused = at.load(Which::Tag(TAG), Verify::Everything);
    assert!(
        matches!(&refused, Err(Error::Damaged { reason, .. }) if reason.contains("version `2`")),
        "{refused:?}"
    );
    assert_eq!(at.list().unwrap(), []);

    let saver = Saver::open(dir.path(), &Alone).unwrap();
    for step in 1..4 {
        saver
            .save(
                &Alone,
                &Snapshot::of_step(step),
                &Rotation { max_num: 1, max_mem_gib: 0.0, ..Rotation::default() },
            )
            .unwrap();
    }
    let (checkpoint, report) = at.load(Which::Newest, Verify::Everything).unwrap();
    assert_eq!((checkpoint.step(), report.skipped.len()), (3, 1));
    assert!(report.skipped[0].name == TAG && report.skipped[0].reason.contains("version `2`"), "{report:?}");
    assert!(path.exists());
}
