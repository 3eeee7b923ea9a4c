//! Every flipped bit, every lost or added byte of a checkpoint is found, and the checkpoint before it taken.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use lightrft_ckpt::testing::SimulatedDisk;
use lightrft_ckpt::{Alone, Checkpoints, Error, Part, Region, Rotation, Saver, Snapshot, Verify, Which};

const DIR: &str = "/checkpoints";
const SHARD: &str = "/checkpoints/global_step2/rank-00000.safetensors";
const MANIFEST: &str = "/checkpoints/global_step2/manifest.json";

fn disk() -> (SimulatedDisk, Checkpoints) {
    let disk = SimulatedDisk::new();
    let saver = Saver::open_on(Arc::new(disk.clone()), DIR, &Alone).unwrap();
    for step in [1, 2] {
        let mut snapshot = Snapshot::of_step(step);
        let (weight, bias) = ([step as f32 + 0.5; 24], [step as u8; 5]);
        snapshot.parts.push(Part::new("weight", vec![4, 6], Region::Whole, &weight));
        snapshot.parts.push(Part::new("bias", vec![5], Region::Whole, &bias));
        snapshot.shared = serde_json::json!({"lr": 3.0e-5, "name": "tiny", "list": [1, null, true]});
        saver.save(&Alone, &snapshot, &Rotation::default()).unwrap();
    }
    (disk, saver.checkpoints())
}

/// Tries every spoilt version of a file: loading by tag must fail, loading the newest must take step 1.
fn every_spoilt_version_is_found(
    path: &str,
    versions: impl Iterator<Item = Vec<u8>>,
    disk: &SimulatedDisk,
    at: &Checkpoints,
) {
    for (i, spoilt) in versions.enumerate() {
        disk.spoil(path, spoilt).unwrap();
        let by_tag = at.load(Which::Tag("global_step2"), Verify::Everything);
        assert!(matches!(by_tag, Err(Error::Damaged { .. })), "version {i} of {path}: {by_tag:?}");
        // The fall-back is the same for every version; looking at some is enough.
        if i % 64 == 0 {
            let (checkpoint, report) = at.load(Which::Newest, Verify::Everything).unwrap();
            assert_eq!((checkpoint.step(), report.skipped.len()), (1, 1));
            assert_eq!(report.skipped[0].name, "global_step2");
        }
    }
}

fn flips(content: Vec<u8>) -> impl Iterator<Item = Vec<u8>> {
    (0..content.len() * 8).map(move |bit| {
        let mut spoilt = content.clone();
        spoilt[bit / 8] ^= 1 << (bit % 8);
        spoilt
    })
}

fn lengths(content: Vec<u8>) -> impl Iterator<Item = Vec<u8>> {
    (0..content.len())
        .map(|len| content[..len].to_vec())
        .chain([[content.as_slice(), b" "].concat()])
        .collect::<Vec<_>>()
        .into_iter()
}

#[test]
fn every_bit_of_a_shard_is_guarded() {
    let (disk, at) = disk();
    let content = disk.content(SHARD).unwrap();
    every_spoilt_version_is_found(SHARD, flips(content), &disk, &at);
}

#[test]
fn every_bit_of_a_manifest_is_guarded() {
    let (disk, at) = disk();
    let content = disk.content(MANIFEST).unwrap();
    every_spoilt_version_is_found(MANIFEST, flips(content), &disk, &at);
}

#[test]
fn every_length_but_the_right_one_is_found() {
    let (disk, at) = disk();
    for path in [SHARD, MANIFEST] {
        let content = disk.content(path).unwrap();
        every_spoilt_version_is_found(path, lengths(content.clone()), &disk, &at);
        disk.spoil(path, content).unwrap();
    }
    at.load(Which::Tag("global_step2"), Verify::Everything).unwrap();
}

#[test]
fn rot_that_comes_after_opening_is_found_by_the_read_that_meets_it() {
    let (disk, at) = disk();
    let (checkpoint, _) = at.load(Which::Newest, Verify::Everything).unwrap();
    let mut content = disk.content(SHARD).unwrap();
    // The bias: bytes come after floats, and before the checksums of two blocks.
    let last = content.len() - 2 * 8 - 1;
    content[last] ^= 4;
    disk.spoil(SHARD, content).unwrap();
    assert_eq!(checkpoint.read_vec::<f32>("weight", &Region::Whole).unwrap(), [2.5; 24]);
    let read = checkpoint.read_vec::<u8>("bias", &Region::Flat(0..1));
    assert!(matches!(read, Err(Error::Damaged { .. })), "{read:?}");
}

#[test]
fn a_missing_shard_is_named() {
    use lightrft_ckpt::FileSystem as _;
    let (disk, at) = disk();
    disk.remove_file(SHARD.as_ref()).unwrap();
    let (checkpoint, report) = at.load(Which::Newest, Verify::WhileReading).unwrap();
    assert_eq!(checkpoint.step(), 1);
    assert!(report.skipped[0].reason.contains("rank-00000.safetensors"), "{:?}", report.skipped);
}

#[test]
fn a_file_that_is_not_a_manifest_is_an_error_and_no_allocation() {
    let (disk, at) = disk();
    let whole = String::from_utf8(disk.content(MANIFEST).unwrap()).unwrap();
    let (summary, rest) = whole.split_once('\n').unwrap();
    let garbage = [
        String::new(),
        "{}".into(),
        "\n".into(),
        summary.into(),
        rest.into(),
        format!("{summary}\n"),
        format!("{summary}\n{rest}{rest}"),
        format!("{summary}\n\n{rest}"),
        whole.replace("\"tag\":", "\"tag\": "),
        "\u{0}".repeat(100),
        "{".repeat(100_000),
    ];
    every_spoilt_version_is_found(MANIFEST, garbage.into_iter().map(String::into_bytes), &disk, &at);
    let not_utf8 = [vec![0xff; 100], vec![0xff; 100_000]];
    every_spoilt_version_is_found(MANIFEST, not_utf8.into_iter(), &disk, &at);
}
