//! Manifests that are made up, and what is believed of them.

use std::path::Path;

use safetensors::Dtype;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::manifest::*;

/// One file of 4096 bytes of header and a tensor of 6 floats, cut in two, with two checksums.
fn manifest() -> Manifest {
    let region = |start: usize, end: usize| RegionRecord {
        place: Place::Flat([start, end]),
        file: 0,
        offset: 4096 + 4 * start as u64,
        bytes: 4 * (end - start) as u64,
        first_sum: 0,
    };
    Manifest {
        summary: Summary {
            tag: "global_step1".into(),
            step: 1,
            world_size: 1,
            saved_unix_ms: 0,
            data_bytes: 4096 + 24 + 16,
            ..Summary::default()
        },
        block_bytes: BLOCK_BYTES,
        files: vec![FileRecord {
            name: rank_file(0),
            bytes: 4096 + 24 + 16,
            header_bytes: 4096,
            header_xxh3: hex_sum(b""),
            sums_xxh3: hex_sum(b""),
            sums: 2,
        }],
        tensors: vec![TensorRecord {
            name: "w".into(),
            dtype: Dtype::F32,
            shape: vec![2, 3],
            regions: vec![region(0, 2), region(2, 6)],
        }],
        shared: Value::Null,
        ranks: vec![Value::Null],
    }
}

/// Makes the header so much longer.
fn shift(manifest: &mut Manifest, bytes: u64) {
    manifest.files[0].header_bytes += bytes;
    manifest.files[0].bytes += bytes;
    manifest.summary.data_bytes += bytes;
    manifest.tensors[0].regions.iter_mut().for_each(|region| region.offset += bytes);
}

fn parsed(manifest: &Manifest) -> Result<Manifest> {
    Manifest::from_bytes(&manifest.to_bytes().unwrap(), Path::new("manifest.json"))
}

#[test]
fn what_is_written_is_read() {
    let read = parsed(&manifest()).unwrap();
    assert_eq!(read.to_bytes().unwrap(), manifest().to_bytes().unwrap());
}

#[test]
fn the_longest_header_of_the_format_is_believed() {
    let mut longest = manifest();
    shift(&mut longest, 100_000_008 - 4096);
    parsed(&longest).unwrap();
}

#[test]
fn checkpoints_that_differ_in_their_step_alone_are_told_apart() {
    let mut later = manifest();
    later.summary.step += 1;
    let [one, same, later] = [manifest(), manifest(), later].map(|m| parsed(&m).unwrap().summary);
    assert_eq!((&one.manifest_xxh3, &one.xxh3), (&later.manifest_xxh3, &same.xxh3));
    assert_ne!(one.xxh3, later.xxh3);
}

/// The checksum is right in all of these: they are made up, not rotten.
#[test]
fn a_made_up_manifest_is_refused() {
    type Lie = (&'static str, fn(&mut Manifest));
    let lies: [Lie; 24] = [
        ("a file outside", |m| m.files[0].name = "../rank-00000.safetensors".into()),
        ("an absolute file", |m| m.files[0].name = "/etc/passwd".into()),
        ("the manifest as a file", |m| m.files[0].name = MANIFEST.into()),
        ("a file twice", |m| m.files.push(m.files[0].clone())),
        ("a tag outside", |m| m.summary.tag = "../up".into()),
        ("no ranks", |m| m.summary.world_size = 0),
        ("more ranks than states", |m| m.summary.world_size = usize::MAX),
        ("a huge shape", |m| m.tensors[0].shape = vec![usize::MAX, 3]),
        ("a huge shape with a zero", |m| m.tensors[0].shape = vec![usize::MAX, 0]),
        ("a shape too large for its regions", |m| m.tensors[0].shape = vec![2, 4]),
        ("a region outside", |m| m.tensors[0].regions[1].place = Place::Flat([4, 8])),
        ("regions that overlap", |m| m.tensors[0].regions[1].place = Place::Flat([1, 5])),
        ("a region too few", |m| drop(m.tensors[0].regions.pop())),
        ("a length that is not its extent's", |m| m.tensors[0].regions[0].bytes = u64::MAX),
        ("a file that is not there", |m| m.tensors[0].regions[0].file = 7),
        ("an offset beyond", |m| m.tensors[0].regions[0].offset = u64::MAX),
        ("too few checksums", |m| m.block_bytes = 4),
        ("no block size", |m| m.block_bytes = 0),
        ("a huge block size", |m| m.block_bytes = usize::MAX),
        ("a header longer than its file", |m| m.files[0].header_bytes = u64::MAX),
        ("a header longer than any", |m| shift(m, 100_000_000)),
        ("more checksums than memory, of a file full of holes", |m| {
            let elements = 1 << 38;
            m.block_bytes = 1;
            m.tensors[0].shape = vec![elements];
            let last = &mut m.tensors[0].regions[1];
            last.place = Place::Flat([2, elements]);
            last.bytes = 4 * (elements as u64 - 2);
            m.files[0].bytes = 4096 + 9 * 4 * elements as u64;
            m.summary.data_bytes = m.files[0].bytes;
        }),
        ("bytes that no checksum covers", |m| {
            m.files[0].bytes += 1;
            m.summary.data_bytes += 1;
        }),
        ("a tensor twice", |m| m.tensors.push(m.tensors[0].clone())),
    ];
    for (lie, tell) in lies {
        let mut made_up = manifest();
        tell(&mut made_up);
        assert!(matches!(parsed(&made_up), Err(Error::Damaged { .. })), "{lie}");
    }
}
