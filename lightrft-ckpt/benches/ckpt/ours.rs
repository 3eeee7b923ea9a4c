//! What is measured of ours apart from the contest: checksums, saves in the background, another world size, listings

use std::error::Error;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use lightrft_ckpt::testing::{Observed, WithoutChecksums, run_ranks};
use lightrft_ckpt::{
    Agreement as _, Alone, BackgroundSaver, Checkpoints, OsFileSystem, Part, Region, Restore, Rotation,
    Saver, Snapshot, Wanted,
};

use crate::ground::{Ground, drop_cache};
use crate::peer::Peers;
use crate::report::{Measured, Row, Target, median};
use crate::state::{State, share};

const SAVED_BY: usize = 4;
const LOADED_BY: usize = 3;

/// A checkpoint of four ranks read by three, cold: bytes read, counted where they are read, and time.
pub(crate) fn reshard(ground: &Ground, state: &State, rounds: usize) -> Result<Row, Box<dyn Error>> {
    let dir = ground.empty("reshard")?;
    for saved in run_ranks(SAVED_BY, |group| -> lightrft_ckpt::Result<()> {
        let saver = Saver::open(&dir, &group)?;
        saver.save(&group, &state.snapshot(1, group.rank(), SAVED_BY), &Rotation::KEEP_ALL).map(drop)
    }) {
        saved?;
    }
    let read = Arc::new(AtomicU64::new(0));
    let counter = read.clone();
    let fs = Arc::new(Observed::new(OsFileSystem::new(), move |operation| {
        if operation.kind == "read" {
            counter.fetch_add(operation.bytes, Ordering::Relaxed);
        }
        Ok(())
    }));
    let mut times = Vec::new();
    let mut most = 0;
    let memory =
        |rank| state.tensors().map(|(_, t)| vec![1.0f32; share(t.len(), rank, LOADED_BY).len()]).collect();
    let into: Vec<Mutex<Vec<Vec<f32>>>> = (0..LOADED_BY).map(|rank| Mutex::new(memory(rank))).collect();
    let at = Checkpoints::open_on(fs, &dir);
    for _ in 0..rounds {
        drop_cache(&dir)?;
        read.store(0, Ordering::Relaxed);
        let begin = Instant::now();
        for loaded in run_ranks(LOADED_BY, |group| {
            let rank = group.rank();
            let mut into = into[rank].lock().unwrap_or_else(PoisonError::into_inner);
            at.restore(&group, &Restore::default(), &mut (state, &mut *into), |(state, into), _| {
                let tensors = state.tensors().zip(into.iter_mut());
                let wanted = tensors.map(|((name, elements), into)| {
                    let mine = share(elements.len(), rank, LOADED_BY);
                    Wanted::new(name, state.shape(), Region::Flat(mine), &mut into[..])
                });
                Ok(wanted.collect())
            })
            .map(drop)
        }) {
            loaded?;
        }
        times.push(begin.elapsed().as_secs_f64());
        most = most.max(read.load(Ordering::Relaxed));
    }
    for (rank, into) in into.into_iter().enumerate() {
        let into = into.into_inner().unwrap_or_else(PoisonError::into_inner);
        for ((name, elements), into) in state.tensors().zip(into) {
            if into[..] != elements[share(elements.len(), rank, LOADED_BY)] {
                return Err(format!("what rank {rank} loaded of {name} is not what was saved").into());
            }
        }
    }
    ground.clear("reshard")?;
    let ratio = most as f64 / state.bytes() as f64;
    let met = ratio <= 1.02;
    Ok(Row {
        what: format!("cold load of {SAVED_BY} ranks' {} MiB by {LOADED_BY}", state.bytes() >> 20),
        bytes: state.bytes(),
        ours: Measured::of("ours", times).ok_or("no times")?,
        others: Vec::new(),
        targets: vec![Target { text: format!("reads <= 1.02x the bytes needed ({ratio:.4}x)"), met }],
    })
}

/// A durable save with checksums beside one without, in turns.
pub(crate) fn checksums(ground: &Ground, state: &State, rounds: usize) -> Result<Row, Box<dyn Error>> {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for round in 0..=2 * rounds {
        for turn in 0..2 {
            let dir = ground.empty("turn")?;
            let saver = Saver::open(&dir, &Alone)?;
            let leave_out = (turn + round) % 2 == 0;
            let _left_out = leave_out.then(WithoutChecksums::from_now_on);
            let begin = Instant::now();
            state.save(&saver)?;
            if round > 0 {
                let seconds = begin.elapsed().as_secs_f64();
                if leave_out { without.push(seconds) } else { with.push(seconds) }
            }
        }
    }
    ground.clear("turn")?;
    // Slow phases of a disk hit neighbours alike, so it is the ratios of pairs that count.
    let overhead = median(with.iter().zip(&without).map(|(with, without)| with / without - 1.0).collect());
    let text = format!("<= 5% overhead ({:+.1}%, median of {} pairs)", overhead * 100.0, with.len());
    let targets = vec![Target { text, met: overhead <= 0.05 }];
    Ok(Row {
        what: format!("with checksums, a durable save of {} MiB", state.bytes() >> 20),
        bytes: state.bytes(),
        ours: Measured::of("ours", with).ok_or("no times")?,
        others: Measured::of("without checksums", without).into_iter().collect(),
        targets: if ground.is_memory()? { Vec::new() } else { targets },
    })
}

/// Threads that a save in the background copies with, as many as by custom.
const COPIERS: usize = 2;

/// How long a save in the background keeps the caller, beside copies of the state by as many threads and by one, and
/// DCP's. It is judged by the copy of as many threads: against one thread the second would hide what the call costs.
pub(crate) fn blocking(
    ground: &Ground,
    state: &mut State,
    peers: &mut Option<Peers>,
    rounds: usize,
) -> Result<Row, Box<dyn Error>> {
    let dir = ground.empty("background")?;
    let saver = Saver::open(&dir, &Alone)?.with_writers(COPIERS);
    let mut saver = BackgroundSaver::new(saver, Arc::new(Alone))?;
    let keep_one = Rotation { max_num: 1, ..Rotation::KEEP_ALL };
    let (mut ours, mut copies, mut copies_alone, mut dcp) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        let mut copy = |threads| {
            let begin = Instant::now();
            state.copy(threads);
            begin.elapsed().as_secs_f64()
        };
        let (copied, copied_alone) = (copy(COPIERS), copy(1));
        let begin = Instant::now();
        saver.save(&state.snapshot(round as u64, 0, 1), &keep_one)?;
        let blocked = begin.elapsed().as_secs_f64();
        // Nothing is in flight when the next one is timed.
        saver.finish()?;
        let dir = ground.empty("turn")?;
        let theirs = match peers {
            Some(peers) => peers.time("async", "dcp", &dir)?,
            None => None,
        };
        ground.empty("turn")?;
        // The first round brings in memory.
        if round > 0 {
            copies.push(copied);
            copies_alone.push(copied_alone);
            ours.push(blocked);
            dcp.extend(theirs);
        }
    }
    drop(saver);
    ground.clear("background")?;
    ground.clear("turn")?;
    let times = |copies: &[f64]| median(ours.iter().zip(copies).map(|(ours, copy)| ours / copy).collect());
    let (ratio, alone) = (times(&copies), times(&copies_alone));
    let text = format!(
        "<= 1.3x a memcpy by {COPIERS} threads, as many as ours ({ratio:.2}x; {alone:.2}x one by 1; medians of {rounds} \
         pairs)"
    );
    let others = [("memcpy, 2 threads", copies), ("memcpy, 1 thread", copies_alone), ("DCP async_save", dcp)];
    Ok(Row {
        what: format!("blocked by a background save, {} MiB", state.bytes() >> 20),
        bytes: state.bytes(),
        ours: Measured::of("ours", ours).ok_or("no times")?,
        others: others.into_iter().filter_map(|(label, times)| Measured::of(label, times)).collect(),
        targets: vec![Target { text, met: ratio <= 1.3 }],
    })
}

const LISTED: usize = 1000;

/// A thousand checkpoints of so many tensors each, listed while the system has their names and manifests in memory.
pub(crate) fn listing(
    ground: &Ground,
    tensors: usize,
    elems: usize,
    rounds: usize,
) -> Result<Row, Box<dyn Error>> {
    let dir = ground.empty("listing")?;
    save_thousand(&dir, tensors, elems)?;
    let at = Checkpoints::open(&dir);
    let mut times = Vec::new();
    for round in 0..=rounds {
        let begin = Instant::now();
        let listed = at.list()?;
        let seconds = begin.elapsed().as_secs_f64();
        if listed.len() != LISTED {
            return Err(format!("{} checkpoints listed of {LISTED}", listed.len()).into());
        }
        if round > 0 {
            times.push(seconds);
        }
    }
    let manifest = fs::metadata(dir.join("0").join("manifest.json"))?.len();
    ground.clear("listing")?;
    let ours = Measured::of("ours", times).ok_or("no times")?;
    let target = Target { text: "<= 50 ms".into(), met: ours.median() <= 50e-3 };
    Ok(Row {
        what: format!(
            "list {LISTED} checkpoints of {tensors} tensors, cached (manifests of {} KiB)",
            manifest >> 10
        ),
        bytes: 0,
        ours,
        others: Vec::new(),
        targets: vec![target],
    })
}

/// One is saved; the others are its manifest copied and its data linked, as whoever moves checkpoints may do.
fn save_thousand(dir: &Path, tensors: usize, elems: usize) -> Result<(), Box<dyn Error>> {
    let saver = Saver::open(dir, &Alone)?;
    let elements = vec![1.0f32; elems];
    let mut snapshot = Snapshot { tag: "0".into(), ..Snapshot::of_step(1) };
    for i in 0..tensors {
        let name = format!("model.layers.{}.self_attn.part_{}.weight", i / 12, i % 12);
        snapshot.parts.push(Part::new(name, vec![elems], Region::Whole, &elements));
    }
    saver.save(&Alone, &snapshot, &Rotation::KEEP_ALL)?;
    let files: Vec<_> =
        fs::read_dir(dir.join("0"))?.map(|e| Ok(e?.file_name())).collect::<Result<_, std::io::Error>>()?;
    for i in 1..LISTED {
        let copy = dir.join(i.to_string());
        fs::create_dir(&copy)?;
        for name in &files {
            let from = dir.join("0").join(name);
            if name == "manifest.json" {
                fs::copy(from, copy.join(name))?;
            } else {
                fs::hard_link(from, copy.join(name))?;
            }
        }
    }
    Ok(())
}
