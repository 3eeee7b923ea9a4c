//! How a rank's file is written: by which threads, in which pieces, with the same result.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, ThreadId};
use std::time::Duration;

use lightrft_ckpt::testing::{Observed, Operation, SimulatedDisk};
use lightrft_ckpt::{Alone, OsFileSystem, Part, Region, Rotation, Saver, Snapshot, Verify, Which};

const SHARD: &str = "global_step1/rank-00000.safetensors";
/// About ten blocks of a page, not a whole number of them.
const ELEMENTS: usize = 9_999;

fn snapshot(elements: &[f32]) -> Snapshot<'_> {
    let mut snapshot = Snapshot::of_step(1);
    let (a, b) = elements.split_at(elements.len() / 3);
    snapshot.parts.push(Part::new("a", vec![a.len()], Region::Whole, a));
    snapshot.parts.push(Part::new("b", vec![b.len()], Region::Whole, b));
    snapshot
}

fn elements() -> Vec<f32> {
    (0..ELEMENTS).map(|i| i as f32).collect()
}

/// The writes to a rank's file, of a save with this saver's settings.
fn writes(set: impl Fn(Saver) -> Saver, elements: &[f32]) -> Vec<(u64, ThreadId)> {
    let noted = Arc::new(Mutex::new(Vec::new()));
    let disk = Observed::new(SimulatedDisk::new(), {
        let noted = noted.clone();
        move |operation| {
            if is_data(operation) {
                noted.lock().unwrap().push((operation.bytes, thread::current().id()));
            }
            Ok(())
        }
    });
    let saver = set(Saver::open_on(Arc::new(disk), "/c", &Alone).unwrap());
    saver.save(&Alone, &snapshot(elements), &Rotation::KEEP_ALL).unwrap();
    noted.lock().unwrap().clone()
}

fn is_data(operation: &Operation) -> bool {
    operation.kind == "write" && operation.path.extension().is_some_and(|e| e == "safetensors")
}

#[test]
fn a_file_is_the_same_whoever_writes_it_and_wherever() {
    let elements = elements();
    let disk = SimulatedDisk::new();
    let saver = Saver::open_on(Arc::new(disk.clone()), "/c", &Alone).unwrap();
    saver.save(&Alone, &snapshot(&elements), &Rotation::KEEP_ALL).unwrap();
    let expected = disk.content(format!("/c/{SHARD}")).unwrap();
    for fs in [OsFileSystem::new(), OsFileSystem::buffered()] {
        for (threads, block_bytes) in [(1, 4096), (2, 4096), (3, 12_288), (2, 1 << 20)] {
            let dir = tempfile::tempdir().unwrap();
            let saver = Saver::open_on(Arc::new(fs), dir.path(), &Alone).unwrap();
            let saver = saver.with_writers(threads).with_block_bytes(block_bytes);
            saver.save(&Alone, &snapshot(&elements), &Rotation::KEEP_ALL).unwrap();
            let found = std::fs::read(dir.path().join(SHARD)).unwrap();
            assert!(found == expected, "{threads} threads, blocks of {block_bytes}, {fs:?}");
            saver.checkpoints().load(Which::Newest, Verify::Everything).unwrap();
        }
    }
}

#[test]
fn blocks_have_the_bytes_that_were_set() {
    for block_bytes in [4096, 8192] {
        let writes = writes(|saver| saver.with_block_bytes(block_bytes), &elements());
        assert!(writes.iter().all(|(bytes, _)| *bytes <= block_bytes as u64), "{writes:?}");
        assert!(writes.iter().filter(|(bytes, _)| *bytes == block_bytes as u64).count() > 3, "{writes:?}");
    }
}

#[test]
fn one_writer_is_the_calling_thread_and_so_it_is_for_a_small_file() {
    let large = writes(|saver| saver.with_writers(1).with_block_bytes(4096), &elements());
    let small = writes(|saver| saver.with_writers(8), &elements());
    for writes in [large, small] {
        assert!(writes.iter().all(|(_, by)| *by == thread::current().id()), "{writes:?}");
    }
}

#[test]
fn all_writers_but_one_write_at_the_same_time() {
    // Every write waits until all the threads that may write have been at one.
    let threads = 3;
    let met = Arc::new((Mutex::new(HashSet::new()), Condvar::new()));
    let disk = Observed::new(SimulatedDisk::new(), move |operation| {
        if is_data(operation) && operation.bytes == 4096 {
            let (writing, changed) = &*met;
            let mut seen = writing.lock().unwrap();
            seen.insert(thread::current().id());
            changed.notify_all();
            let alone = |seen: &mut HashSet<ThreadId>| seen.len() < threads - 1;
            let (_seen, waited) = changed.wait_timeout_while(seen, Duration::from_secs(20), alone).unwrap();
            if waited.timed_out() {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    });
    let saver = Saver::open_on(Arc::new(disk), "/c", &Alone).unwrap();
    let saver = saver.with_writers(threads).with_block_bytes(4096);
    saver.save(&Alone, &snapshot(&elements()), &Rotation::KEEP_ALL).unwrap();
}
