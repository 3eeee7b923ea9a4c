//! An epoch of a loader over JSON Lines, with and without threads, beside torch's DataLoader over the same file

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use lightrft_data::{
    BadLines, DataLoader, Dataset, DistributedSampler, JsonLines, JsonLinesOptions, LoaderConfig,
    SamplerConfig, Shuffle, Tail,
};

use crate::Options;
use crate::files::write;
use crate::report::{Measured, Row, Unit};

/// As the peer has them.
const BATCH: usize = 32;

pub(crate) fn measure(options: &Options) -> Result<Vec<Row>, Box<dyn Error>> {
    let mib: usize = if options.quick { 8 } else { 64 };
    let named = [0, 1, 2].map(|workers| (format!("loader/JSON Lines, {mib} MiB/{workers} workers"), workers));
    if !named.iter().any(|(what, _)| options.wants(what)) {
        return Ok(Vec::new());
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("prompts.jsonl");
    write(&path, mib << 20)?;
    let lines = JsonLinesOptions { bad_lines: BadLines::RefuseOnRead, ..JsonLinesOptions::default() };
    let lines = Arc::new(JsonLines::open(&path, lines)?);
    let mut rows = Vec::new();
    for (what, workers) in named {
        if !options.wants(&what) {
            continue;
        }
        let (mut ours, mut torch) = (Vec::new(), Vec::new());
        for round in 0..=options.rounds {
            let seconds = epoch(&lines, workers)?;
            if round == 0 {
                continue; // what was just written may still be on its way to the disk
            }
            ours.push(seconds);
            // Python takes seconds a round and varies little.
            if let Some(peer) = options.python.as_ref().filter(|_| workers != 1 && round <= 3) {
                torch.push(peer.take(&format!("loader{workers}"), &path.to_string_lossy())?);
            }
        }
        let ours = Measured::of("ours", ours).ok_or("no times")?;
        let mut row = Row::new(what, Unit::SamplesPerSecond(lines.len()), ours);
        row.others.extend(Measured::taken("torch", &torch));
        rows.push(row);
    }
    Ok(rows)
}

/// Seconds for an epoch in a shuffled order, with the start of the threads.
fn epoch(lines: &Arc<JsonLines>, workers: usize) -> Result<f64, Box<dyn Error>> {
    let (shuffle, tail) = (Shuffle::TorchExact, Tail::Pad);
    let config = SamplerConfig { len: lines.len(), rank: 0, world: 1, seed: 42, shuffle, tail };
    let sampler = DistributedSampler::new(config)?;
    // As many batches ahead as torch has by default: two for each worker.
    let config = LoaderConfig { workers, prefetch_batches: 2 * workers, ..LoaderConfig::new(BATCH) };
    let begin = Instant::now();
    let mut loader = DataLoader::new(Arc::clone(lines), sampler, config)?;
    let mut samples = 0;
    while let Some(batch) = loader.next_batch()? {
        samples += batch.samples.len();
    }
    let seconds = begin.elapsed().as_secs_f64();
    match samples == lines.len() {
        true => Ok(seconds),
        false => Err(format!("{samples} samples of {}", lines.len()).into()),
    }
}
