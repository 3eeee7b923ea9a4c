//! Save and load, ours and the peers': everybody in turns, round by round, in changing order

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use lightrft_ckpt::{Alone, FileSystem, OsFileSystem, Saver};

use crate::disk;
use crate::ground::{Ground, drop_cache};
use crate::peer::Peers;
use crate::report::{Measured, Row, Target, best};
use crate::state::State;

/// Who saves, and the ways to load what was saved.
struct Contender {
    label: &'static str,
    by: By,
    loads: Vec<Load>,
}

enum By {
    Ours(Arc<dyn FileSystem>),
    /// Nobody: as many bytes that mean nothing, which bounds everybody.
    Disk,
    Peer(&'static str),
}

struct Load {
    label: &'static str,
    /// What the peers' process calls it.
    kind: &'static str,
    cold: Vec<f64>,
    warm: Vec<f64>,
}

fn load(label: &'static str, kind: &'static str) -> Load {
    Load { label, kind, cold: Vec::new(), warm: Vec::new() }
}

const OURS: &str = "ours";
/// The same through the page cache.
const BUFFERED: &str = "ours, buffered";
/// Not in the contest.
const DISK: &str = "the disk alone";
/// DCP as it is without further ado: in its own format. With `HuggingFaceStorageWriter` it counts among the torch paths.
const DCP: [&str; 2] = ["DCP", "DCP, 2 threads"];

fn contenders(peers: bool) -> Vec<Contender> {
    let ours = |label, fs, loads| Contender { label, by: By::Ours(Arc::new(fs)), loads };
    let mut all = vec![
        ours(OURS, OsFileSystem::new(), vec![load(OURS, "")]),
        ours(BUFFERED, OsFileSystem::buffered(), Vec::new()),
        Contender { label: DISK, by: By::Disk, loads: vec![load(DISK, "")] },
    ];
    if peers {
        let torch = vec![load("torch.load", "torch"), load("torch.load mmap", "torch-mmap")];
        let safetensors =
            vec![load("safetensors load_file", "safetensors"), load("safetensors open", "safetensors-open")];
        all.extend([
            Contender { label: "torch.save", by: By::Peer("torch"), loads: torch },
            Contender { label: DCP[0], by: By::Peer("dcp-1"), loads: vec![load(DCP[0], "dcp")] },
            Contender { label: DCP[1], by: By::Peer("dcp-2"), loads: vec![load("DCP, 2 files", "dcp")] },
            Contender {
                label: "DCP safetensors",
                by: By::Peer("dcp-hf"),
                loads: vec![load("DCP safetensors", "dcp-hf")],
            },
            Contender { label: "safetensors", by: By::Peer("safetensors"), loads: safetensors },
        ]);
    }
    all
}

/// Which rows were asked for.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) save: bool,
    pub(crate) cold: bool,
    pub(crate) warm: bool,
}

pub(crate) fn measure(
    ground: &Ground,
    state: &mut State,
    peers: &mut Option<Peers>,
    rounds: usize,
    wanted: Wanted,
) -> Result<Vec<Row>, Box<dyn Error>> {
    let mut all = contenders(peers.is_some());
    let mut saves: Vec<Vec<f64>> = all.iter().map(|_| Vec::new()).collect();
    for round in 0..=rounds {
        eprintln!("save and load: round {round} of {rounds}");
        for who in turns(all.len(), round) {
            let contender = &mut all[who];
            let dir = ground.empty("turn")?;
            let saved = match (&contender.by, &mut *peers) {
                (By::Ours(fs), _) => {
                    let saver = Saver::open_on(fs.clone(), &dir, &Alone)?;
                    let begin = Instant::now();
                    state.save(&saver)?;
                    Some(begin.elapsed().as_secs_f64())
                }
                (By::Disk, _) => Some(disk::write(&dir, state.bytes())?),
                (By::Peer(kind), Some(peers)) => peers.time("save", kind, &dir)?,
                (By::Peer(_), None) => None,
            };
            let Some(saved) = saved else { continue };
            // The first round brings in memory and is checked, not counted.
            if round > 0 {
                saves[who].push(saved);
            }
            for load in &mut contender.loads {
                let mut once = || -> Result<Option<f64>, Box<dyn Error>> {
                    let seconds = match (&contender.by, &mut *peers) {
                        (By::Ours(fs), _) => {
                            let begin = Instant::now();
                            state.load(fs.clone(), &dir)?;
                            let seconds = begin.elapsed().as_secs_f64();
                            if round == 0 {
                                state.check()?;
                            }
                            Some(seconds)
                        }
                        (By::Disk, _) => Some(disk::read(&dir, state.bytes())?),
                        (By::Peer(_), Some(peers)) => {
                            let seconds = peers.time("load", load.kind, &dir)?;
                            if round == 0 && seconds.is_some() {
                                peers.check(load.label)?;
                            }
                            seconds
                        }
                        (By::Peer(_), None) => None,
                    };
                    Ok(seconds.filter(|_| round > 0))
                };
                if wanted.cold {
                    drop_cache(&dir)?;
                    load.cold.extend(once()?);
                }
                if wanted.warm {
                    if !wanted.cold {
                        once()?;
                    }
                    load.warm.extend(once()?);
                }
            }
            ground.clear("turn")?;
        }
    }
    let bytes = state.bytes();
    let disk = !ground.is_memory()?;
    let mut rows = Vec::new();
    if wanted.save {
        let times = all.iter().map(|c| c.label).zip(saves).collect();
        rows.extend(row(format!("durable save, {} MiB", bytes >> 20), bytes, times));
        if let Some(row) = rows.last_mut().filter(|_| disk) {
            row.targets = save_targets(row);
        }
    }
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    for load in all.iter_mut().flat_map(|c| &mut c.loads) {
        cold.push((load.label, std::mem::take(&mut load.cold)));
        warm.push((load.label, std::mem::take(&mut load.warm)));
    }
    if wanted.cold && disk {
        rows.extend(row(format!("cold load, {} MiB", bytes >> 20), bytes, cold));
        if let Some(row) = rows.last_mut() {
            let peers: Vec<_> = row.others.iter().filter(|o| o.label != DISK).cloned().collect();
            let faster = best(&peers).map(|peer| (peer, peer.median() / row.ours.median()));
            row.targets.extend(faster.map(|(peer, times)| Target {
                text: format!("<= the best peer's ({}: {times:.2}x ours)", peer.label),
                met: times >= 1.0,
            }));
        }
    }
    if wanted.warm {
        rows.extend(row(format!("warm load, {} MiB", bytes >> 20), bytes, warm));
    }
    Ok(rows)
}

/// Everybody once, in another order every round: a disk is slower to write just after much was read, so that nobody may
/// always come after the same.
fn turns(contenders: usize, round: usize) -> Vec<usize> {
    let mut random = round as u64 + 1;
    let mut order: Vec<usize> = (0..contenders).collect();
    for i in (1..contenders).rev() {
        // SplitMix64.
        random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        order.swap(i, ((bits ^ (bits >> 31)) % (i as u64 + 1)) as usize);
    }
    order
}

fn row(what: String, bytes: u64, times: Vec<(&'static str, Vec<f64>)>) -> Option<Row> {
    let mut all = times.into_iter().filter_map(|(label, times)| Measured::of(label, times));
    let ours = all.next()?;
    Some(Row { what, bytes, ours, others: all.collect(), targets: Vec::new() })
}

fn save_targets(row: &Row) -> Vec<Target> {
    let (dcp, torch): (Vec<_>, Vec<_>) = row
        .others
        .iter()
        .filter(|o| ![BUFFERED, DISK].contains(&o.label))
        .cloned()
        .partition(|o| DCP.contains(&o.label));
    let against = |others: &[Measured], least: f64, whom: &str| {
        let best = best(others)?;
        let times = best.median() / row.ours.median();
        let text = format!(">= {least}x {whom} ({} {times:.2}x)", best.label);
        Some(Target { text, met: times >= least })
    };
    let all: Vec<_> = torch.iter().chain(&dcp).cloned().collect();
    against(&all, 2.5, "the best torch path")
        .into_iter()
        .chain(against(&dcp, 5.0, "DCP in its own format"))
        .collect()
}
