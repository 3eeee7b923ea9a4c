//! How a checkpoint is read: in few long reads, by as many threads as asked for, and not at all when it would be wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashSet;
use std::io;
use std::num::NonZeroUsize;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use lightrft_ckpt::testing::{Observed, Operation, SimulatedDisk};
use lightrft_ckpt::{
    Alone, Checkpoint, Checkpoints, Dtype, Error, Part, Region, Rotation, Saver, Snapshot, Verify, Wanted,
    Which,
};

const MIB: usize = 1 << 20;

/// A disk with tensors of bytes, saved by one rank.
fn disk_with(tensors: &[(&str, usize)]) -> SimulatedDisk {
    let disk = SimulatedDisk::new();
    let saver = Saver::open_on(Arc::new(disk.clone()), "/c", &Alone).unwrap();
    let held: Vec<Vec<u8>> = tensors.iter().map(|(name, bytes)| content(name, *bytes)).collect();
    let mut snapshot = Snapshot::of_step(1);
    for ((name, bytes), held) in tensors.iter().zip(&held) {
        snapshot.parts.push(Part::new(*name, vec![*bytes], Region::Whole, held));
    }
    saver.save(&Alone, &snapshot, &Rotation::default()).unwrap();
    disk
}

fn content(name: &str, bytes: usize) -> Vec<u8> {
    let first = name.len() as u8;
    let period: Vec<u8> = (0..251).map(|i: u8| i.wrapping_add(first)).collect();
    let mut content = period.repeat(bytes / period.len() + 1);
    content.truncate(bytes);
    content
}

/// Opens the checkpoint with so many readers; `watch` sees every read of a shard from then on.
fn open(
    disk: &SimulatedDisk,
    readers: usize,
    watch: impl Fn(&Operation) -> io::Result<()> + Send + Sync + 'static,
) -> Checkpoint {
    let watched = Observed::new(disk.clone(), move |operation| {
        let read = operation.kind == "read" && operation.path.to_string_lossy().contains("rank-");
        if read { watch(operation) } else { Ok(()) }
    });
    let at = Checkpoints::open_on(Arc::new(watched), "/c").with_readers(NonZeroUsize::new(readers).unwrap());
    at.load(Which::Newest, Verify::WhileReading).unwrap().0
}

/// Lengths of the reads, without the first, which is the table of checksums.
fn reads_of(disk: &SimulatedDisk, act: impl FnOnce(&Checkpoint)) -> Vec<u64> {
    let reads = Arc::new(Mutex::new(Vec::new()));
    let seen = reads.clone();
    let checkpoint = open(disk, 1, move |operation| {
        seen.lock().unwrap().push(operation.bytes);
        Ok(())
    });
    act(&checkpoint);
    reads.lock().unwrap().split_off(1)
}

#[test]
fn a_large_tensor_is_read_in_long_reads_and_not_a_byte_too_many() {
    let disk = disk_with(&[("large", 16 * MIB + 5)]);
    let reads = reads_of(&disk, |checkpoint| {
        let got: Vec<u8> = checkpoint.read_vec("large", &Region::Whole).unwrap();
        assert!(got == content("large", 16 * MIB + 5));
    });
    assert_eq!(reads.iter().sum::<u64>(), 16 * MIB as u64 + 5);
    assert!(reads.len() <= 18, "{reads:?}");
}

#[test]
fn small_tensors_that_lie_side_by_side_are_read_together() {
    let names: Vec<String> = (0..100).map(|i| format!("norm.{i:03}")).collect();
    let tensors: Vec<(&str, usize)> = names.iter().map(|n| (n.as_str(), 1000)).collect();
    let disk = disk_with(&tensors);
    let reads = reads_of(&disk, |checkpoint| {
        let mut got = vec![vec![0u8; 1000]; names.len()];
        // In whatever order they are asked for.
        let mut wanted: Vec<Wanted<'_>> = (names.iter().zip(&mut got).rev())
            .map(|(name, into)| Wanted::new(name, vec![1000], Region::Whole, into))
            .collect();
        checkpoint.read_many(&mut wanted).unwrap();
        assert!(names.iter().zip(&got).all(|(name, got)| *got == content(name, 1000)));
    });
    assert_eq!(reads, [100_000]);
}

#[test]
fn a_block_that_several_wanted_regions_share_is_read_once() {
    let disk = disk_with(&[("w", 1000)]);
    let reads = reads_of(&disk, |checkpoint| {
        let (mut first, mut second) = ([0u8; 10], [0u8; 20]);
        let mut wanted = [
            Wanted::new("w", vec![1000], Region::Flat(500..520), &mut second),
            Wanted::new("w", vec![1000], Region::Flat(5..15), &mut first),
        ];
        checkpoint.read_many(&mut wanted).unwrap();
        assert_eq!((&first[..], &second[..]), (&content("w", 15)[5..], &content("w", 520)[500..]));
    });
    assert_eq!(reads, [1000]);
}

#[test]
fn verifying_reads_every_byte_once_in_long_reads() {
    let disk = disk_with(&[("large", 6 * MIB), ("small", 100), ("smaller", 1)]);
    let shard = disk.content("/c/global_step1/rank-00000.safetensors").unwrap().len() as u64;
    let table = (6 * MIB as u64 / (16 << 10) + 2) * 8;
    let reads = reads_of(&disk, |checkpoint| checkpoint.verify().unwrap());
    assert_eq!(reads.iter().sum::<u64>() + table, shard);
    assert!(reads.len() <= 9, "{reads:?}");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_read() {
    let disk = disk_with(&[("a", 100), ("b", 100)]);
    let untouched =
        |wanted: &mut dyn FnMut(&Checkpoint) -> Error| wanted(&open(&disk, 2, |_| panic!("read")));
    let (mut a, mut b, mut c) = ([7u8; 100], [7i8; 100], [7u8; 3]);
    let refused = untouched(&mut |checkpoint| {
        let mut wanted = [
            Wanted::new("a", vec![100], Region::Whole, &mut a),
            Wanted::new("b", vec![100], Region::Whole, &mut b),
            Wanted::new("c", vec![3], Region::Whole, &mut c),
        ];
        checkpoint.read_many(&mut wanted).unwrap_err()
    });
    let Error::Mismatch(told) = refused else { panic!("{refused}") };
    assert_eq!((told.missing.as_slice(), told.differing.len()), (&["c".to_owned()][..], 1));
    assert_eq!((told.differing[0].name.as_str(), told.differing[0].expected.0), ("b", Dtype::I8));
    let whole = || Region::Whole;
    for (shape, region) in [
        (vec![100], Region::Flat(0..99)),
        (vec![100], Region::Flat(50..150)),
        (vec![10, 10], whole()),
        (vec![101], whole()),
    ] {
        let refused = untouched(&mut |checkpoint| {
            checkpoint.read_many(&mut [Wanted::new("a", shape.clone(), region.clone(), &mut a)]).unwrap_err()
        });
        assert!(matches!(refused, Error::Request { .. } | Error::Mismatch(_)), "{refused}");
    }
    assert_eq!((a, b, c), ([7; 100], [7; 100], [7; 3]));
}

#[test]
fn so_many_threads_read_as_were_asked_for() {
    let disk = disk_with(&[("large", 32 * MIB)]);
    for readers in [1, 3] {
        // Every thread waits in its first read until all are there.
        let seen = Arc::new((Mutex::new(HashSet::new()), Condvar::new()));
        let threads = seen.clone();
        let checkpoint = open(&disk, readers, move |operation| {
            if operation.bytes < MIB as u64 {
                return Ok(()); // The table of checksums, for which all wait.
            }
            let (threads, changed) = &*threads;
            let mut threads = threads.lock().unwrap();
            threads.insert(std::thread::current().id());
            changed.notify_all();
            let all = |threads: &mut HashSet<_>| threads.len() < readers;
            drop(changed.wait_timeout_while(threads, Duration::from_secs(20), all).unwrap());
            Ok(())
        });
        checkpoint.read_vec::<u8>("large", &Region::Whole).unwrap();
        assert_eq!(seen.0.lock().unwrap().len(), readers);
    }
}

#[test]
fn the_first_failure_ends_the_reading() {
    let disk = disk_with(&[("large", 32 * MIB)]);
    let reads = Arc::new(Mutex::new(0));
    let seen = reads.clone();
    let checkpoint = open(&disk, 2, move |operation| {
        let mut seen = seen.lock().unwrap();
        *seen += 1;
        if *seen > 3 {
            Err(io::Error::other(format!("read {} of {}", *seen, operation.bytes)))
        } else {
            Ok(())
        }
    });
    let failed = checkpoint.read_vec::<u8>("large", &Region::Whole);
    assert!(matches!(failed, Err(Error::Io { op: "read", .. })), "{failed:?}");
    // Each of the two threads may have met an error of its own.
    assert!(*reads.lock().unwrap() <= 5);
}

#[test]
fn rot_within_a_long_read_is_found_in_its_block() {
    let disk = disk_with(&[("large", 8 * MIB)]);
    let path = "/c/global_step1/rank-00000.safetensors";
    let whole = disk.content(path).unwrap();
    for at in [0, 5 * MIB + 3, 8 * MIB - 1] {
        let mut spoilt = whole.clone();
        spoilt[4096 + at] ^= 1;
        disk.spoil(path, spoilt).unwrap();
        let checkpoint = open(&disk, 2, |_| Ok(()));
        let Err(Error::Damaged { reason, .. }) = checkpoint.read_vec::<u8>("large", &Region::Whole) else {
            panic!("passed")
        };
        let block = 4096 + at / (16 << 10) * (16 << 10);
        assert!(reason.contains(&format!("bytes {block}..{}", block + (16 << 10))), "{reason}");
        // What does not touch the block is read.
        let begin = if at < MIB { MIB } else { 0 };
        checkpoint.read_vec::<u8>("large", &Region::Flat(begin..begin + MIB)).unwrap();
    }
}
