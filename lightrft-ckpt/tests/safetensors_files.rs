//! Single safetensors files: the format's own reader reads ours, ours reads its, and neither is ever half-written.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use lightrft_ckpt::testing::{Crash, SimulatedDisk};
use lightrft_ckpt::{
    Alone, Dtype, Error, Part, Region, Rotation, SafetensorsFile, SafetensorsWriter, Saver, Snapshot,
    TensorSpec, write_safetensors,
};
use safetensors::SafeTensors;

fn metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
}

#[test]
fn the_formats_own_reader_reads_what_we_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let (w, b): (Vec<u8>, [u8; 2]) = ((0..24).collect(), [7, 8]);
    let tensors =
        [(TensorSpec::new("w", Dtype::F32, [2, 3]), &w[..]), (TensorSpec::new("b", Dtype::U8, [2]), &b[..])];
    write_safetensors(&path, tensors, &metadata()).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(
        (read.tensor("w").unwrap().shape(), read.tensor("w").unwrap().data()),
        (&[2usize, 3][..], &w[..])
    );
    assert_eq!(read.tensor("b").unwrap().data(), b);
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["model.safetensors"]);
}

#[test]
fn we_read_what_the_format_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let view =
        safetensors::tensor::TensorView::new(Dtype::F32, vec![3, 4], bytemuck::cast_slice(&values)).unwrap();
    safetensors::serialize_to_file([("w", view)], Some(metadata().into_iter().collect()), &path).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    assert_eq!(file.tensor("w"), Some(&TensorSpec::new("w", Dtype::F32, [3, 4])));
    assert_eq!(file.metadata(), &metadata());
    let mut column = [0.0f32; 3];
    file.read_into("w", &Region::Box { start: vec![0, 2], extent: vec![3, 1] }, &mut column).unwrap();
    assert_eq!(column, [2.0, 6.0, 10.0]);
    let mut middle = [0.0f32; 2];
    file.read_into("w", &Region::Flat(5..7), &mut middle).unwrap();
    assert_eq!(middle, [5.0, 6.0]);
    assert!(matches!(file.read_into("w", &Region::Whole, &mut [0u32; 12]), Err(Error::Request { .. })));
    assert!(matches!(file.read("x", &Region::Whole, &mut []), Err(Error::NoTensor { .. })));
}

#[test]
fn a_ranks_shard_is_a_safetensors_file_with_aligned_data() {
    let dir = tempfile::tempdir().unwrap();
    let saver = Saver::open(dir.path(), &Alone).unwrap();
    let (a, b) = ([1u8; 3], [2.0f64; 2]);
    let mut snapshot = Snapshot::of_step(1);
    snapshot.parts.push(Part::new("a", vec![3], Region::Whole, &a));
    snapshot.parts.push(Part::new("b", vec![2, 1], Region::Whole, &b));
    saver.save(&Alone, &snapshot, &Rotation::KEEP_ALL).unwrap();
    let bytes = std::fs::read(dir.path().join("global_step1/rank-00000.safetensors")).unwrap();
    let (header, _) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!((8 + header) % 4096, 0);
    let read = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(read.tensor("b").unwrap().shape(), [2, 1]);
    assert_eq!(read.tensor("b").unwrap().data(), bytemuck::cast_slice::<f64, u8>(&b));
}

#[test]
fn an_unfinished_file_leaves_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, "old").unwrap();
    let specs = [TensorSpec::new("a", Dtype::U8, [2]), TensorSpec::new("b", Dtype::U8, [2])];
    let mut writer = SafetensorsWriter::create(&path, specs.clone(), &metadata()).unwrap();
    assert!(matches!(writer.push("b", &[1, 2]), Err(Error::Request { .. })));
    assert!(matches!(writer.push("a", &[1, 2, 3]), Err(Error::Request { .. })));
    writer.push("a", &[1, 2]).unwrap();
    assert!(matches!(writer.finish(), Err(Error::Request { name, .. }) if name == "b"));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let twice = [specs[0].clone(), specs[0].clone()];
    assert!(matches!(SafetensorsWriter::create(&path, twice, &metadata()), Err(Error::Request { .. })));
}

#[test]
fn a_crash_while_a_file_is_written_leaves_the_old_one_or_the_new() {
    let write = |disk: &SimulatedDisk, value: u8| {
        let specs = [TensorSpec::new("a", Dtype::U8, [2000])];
        let mut writer = SafetensorsWriter::create_on(Arc::new(disk.clone()), "/m", specs, &metadata())?;
        writer.push("a", &[value; 2000])?;
        writer.finish()
    };
    let read = |disk: &SimulatedDisk| {
        let mut bytes = [0; 2000];
        SafetensorsFile::open_on(disk, Path::new("/m"))
            .unwrap()
            .read("a", &Region::Whole, &mut bytes)
            .unwrap();
        assert!(bytes.iter().all(|&b| b == bytes[0]));
        bytes[0]
    };
    let prepared = || {
        let disk = SimulatedDisk::new();
        write(&disk, 1).unwrap();
        disk
    };
    let begin = prepared().operations();
    for n in 0..=begin {
        let disk = prepared();
        disk.crash_before(begin + n);
        let told = write(&disk, 2);
        for crash in [Crash::LoseAll, Crash::KeepAll, Crash::Tear(1), Crash::Tear(2), Crash::Tear(3)] {
            let found = read(&disk.after(crash));
            assert!(found == 2 || (found == 1 && told.is_err()), "operation {n}, {crash:?}: {found}");
        }
    }
}

#[test]
fn headers_that_lie_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let with =
        |header: &str, data: &[u8]| [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
    let files: Vec<Vec<u8>> = vec![
        vec![],
        vec![0; 7],
        u64::MAX.to_le_bytes().to_vec(),
        with("{", &[]),
        with(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, &[0; 3]),
        with(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, &[0; 5]),
        with(r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}"#, &[0; 4]),
        with(r#"{"a":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,4]}}"#, &[0; 4]),
        with(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}"#, &[0; 4]),
    ];
    for (i, content) in files.iter().enumerate() {
        std::fs::write(&path, content).unwrap();
        assert!(matches!(SafetensorsFile::open(&path), Err(Error::Damaged { .. })), "file {i}");
    }
}

#[test]
fn a_tensor_may_come_in_pieces_and_a_failed_write_is_never_named() {
    let disk = SimulatedDisk::new();
    let specs = [TensorSpec::new("a", Dtype::U8, [5]), TensorSpec::new("none", Dtype::F32, [0])];
    let writer =
        || SafetensorsWriter::create_on(Arc::new(disk.clone()), "/m", specs.clone(), &metadata()).unwrap();
    let mut whole = writer();
    for piece in [&[1u8, 2][..], &[], &[3], &[4, 5]] {
        whole.push_piece("a", piece).unwrap();
    }
    assert!(matches!(whole.push_piece("a", &[6]), Err(Error::Request { .. })));
    whole.push_piece("none", &[]).unwrap();
    whole.finish().unwrap();
    let read = SafetensorsFile::open_on(&disk, "/m").unwrap();
    let mut bytes = [0; 5];
    read.read("a", &Region::Whole, &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4, 5]);

    let mut short = writer();
    short.push_piece("a", &[9; 4]).unwrap();
    assert!(
        matches!(short.push("a", &[9; 5]), Err(Error::Request { .. })),
        "one too many with what is there"
    );
    assert!(matches!(short.finish(), Err(Error::Request { name, .. }) if name == "a"));
    let large = [TensorSpec::new("a", Dtype::U8, [9 << 20]), TensorSpec::new("b", Dtype::U8, [1])];
    let mut failed = SafetensorsWriter::create_on(Arc::new(disk.clone()), "/m", large, &metadata()).unwrap();
    disk.fail_at(disk.operations(), std::io::ErrorKind::StorageFull);
    assert!(matches!(failed.push("a", &vec![1; 9 << 20]), Err(Error::Io { .. })));
    assert!(matches!(failed.push("a", &vec![1; 9 << 20]), Err(Error::Io { .. })));
    assert!(matches!(failed.finish(), Err(Error::Request { .. } | Error::Io { .. })));
    read.read("a", &Region::Whole, &mut bytes).unwrap();
    assert_eq!(SafetensorsFile::open_on(&disk, "/m").unwrap().tensors().count(), 2);
}
