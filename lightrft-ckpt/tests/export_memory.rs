//! An export needs a few MiB of memory, however many tensors there are and however large one of them is.
#![allow(missing_docs, unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use lightrft_ckpt::{
    Alone, Checkpoints, ExportTensors, Floats, HfFolder, HfOptions, Part, Region, Rotation, Saver, Snapshot,
    Verify, Which, export_hf,
};

/// The system's allocator, counting what the process holds.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed on unchanged to the system's allocator, whose contract is the same; counting touches
// only atomics, so it neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the pointer came from `System` with this layout, as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// What an export may hold at once: a piece of a tensor as read and as converted, and what is gathered to be written.
const ALLOWED: usize = 20 << 20;

/// One tensor of 64 MiB and 64 of one MiB.
fn save(dir: &Path) {
    let (large, small) = (vec![1.5f32; 16 << 20], vec![2.5f32; 256 << 10]);
    let mut snapshot = Snapshot::of_step(1);
    snapshot.parts.push(Part::new("embed", vec![large.len()], Region::Whole, &large));
    for i in 0..64 {
        snapshot.parts.push(Part::new(format!("layers.{i}.w"), vec![512, 512], Region::Whole, &small));
    }
    Saver::open(dir, &Alone).unwrap().save(&Alone, &snapshot, &Rotation::KEEP_ALL).unwrap();
}

#[test]
fn an_export_holds_a_piece_of_one_tensor_and_never_the_model() {
    let dir = tempfile::tempdir().unwrap();
    save(&dir.path().join("c"));
    let source = dir.path().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::File::create(source.join("tokenizer.json")).unwrap().set_len(50 << 20).unwrap();
    let checkpoints = Checkpoints::open(dir.path().join("c"));
    let (checkpoint, _) = checkpoints.load(Which::Newest, Verify::WhileReading).unwrap();
    for floats in [Floats::AsGiven, Floats::Bf16] {
        let options = HfOptions {
            floats,
            max_shard_bytes: 10_000_000,
            source: Some(source.clone()),
            ..HfOptions::default()
        };
        let before = LIVE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let report =
            export_hf(&checkpoint, dir.path().join("model"), ExportTensors::Model, &options).unwrap();
        let held = PEAK.load(Ordering::Relaxed) - before;
        assert!(held < ALLOWED, "{floats:?}: {held} bytes held, {} written", report.bytes);
        assert!(report.bytes as usize > ALLOWED + ALLOWED / 4);
        assert_eq!(std::fs::metadata(dir.path().join("model/tokenizer.json")).unwrap().len(), 50 << 20);
        let mut last = [0.0f32];
        let folder = HfFolder::open(dir.path().join("model")).unwrap();
        folder.read_f32("embed", &Region::Flat((16 << 20) - 1..16 << 20), &mut last).unwrap();
        assert_eq!(last, [1.5]);
    }
}
