//! Orders of an epoch, samplers over them, and plans of unequal sequences

use std::error::Error;
use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

use lightrft_data::{
    BalanceConfig, Cost, DistributedSampler, Exhausted, Mixture, Permutation, SamplerConfig, Shuffle, Tail,
    balance,
};

use crate::Options;
use crate::peer::Taken;
use crate::report::{Measured, Row, Target, Unit};

/// As the peers know them.
const RANKS: usize = 8;
const RANK: usize = 3;

fn sampler(len: usize, shuffle: Shuffle) -> Result<DistributedSampler, lightrft_data::Error> {
    let config = SamplerConfig { len, rank: RANK, world: RANKS, seed: 42, shuffle, tail: Tail::Drop };
    DistributedSampler::new(config)
}

/// A sampler that goes to the middle of an epoch, and its first index there.
fn first_index(len: usize, shuffle: Shuffle) -> Result<Option<usize>, lightrft_data::Error> {
    let mut sampler = sampler(len, shuffle)?;
    sampler.set_epoch(0, len as u64 / 2)?;
    Ok(sampler.indices()?.next())
}

/// Makes the table of an epoch once and says the nanoseconds and the KiB that took.
pub(crate) fn child(len: usize) -> Result<(), Box<dyn Error>> {
    let before = peak_kib()?;
    let begin = Instant::now();
    black_box(first_index(len, Shuffle::TorchExact)?);
    let nanoseconds = begin.elapsed().as_nanos();
    println!("{nanoseconds} {}", peak_kib()? - before);
    Ok(())
}

fn peak_kib() -> Result<u64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
    Ok(peak.ok_or("no VmHWM")?.parse()?)
}

pub(crate) fn measure(options: &Options) -> Result<Vec<Row>, Box<dyn Error>> {
    let len: usize = if options.quick { 10_000_000 } else { 100_000_000 };
    let size = format!("{:.0e}", len as f64);
    let mut rows = Vec::new();
    let indices = 4_000_000;
    let mut each =
        |what: String, count: usize, limit: Option<f64>, run: &dyn Fn() -> Result<usize, Box<dyn Error>>| {
            if !options.wants(&what) {
                return Ok(());
            }
            let seconds = times(options.rounds, run)?;
            let ours = Measured::of("ours", seconds).ok_or("no times")?;
            let mut row = Row::new(what, Unit::NanosecondsEach(count), ours);
            if let Some(limit) = limit {
                let met = row.unit.value(row.ours.median()) <= limit;
                row.targets.push(Target { text: format!("<= {limit} ns"), met });
            }
            rows.push(row);
            Ok::<_, Box<dyn Error>>(())
        };

    let seekable = sampler(len, Shuffle::Seekable)?;
    each(format!("seekable/next/{size}"), indices, Some(50.0), &|| {
        Ok(seekable.indices()?.take(indices).fold(0, |all, index| all ^ index))
    })?;
    let order = Permutation::new(Shuffle::Seekable, len, 42, 0)?;
    each(format!("seekable/any/{size}"), indices, None, &|| {
        // Each position is known only when the one before has been looked up.
        Ok((0..indices).fold(1, |at, _| order.at(at).unwrap_or_default()))
    })?;
    let mixture = Mixture::new([(len / 2, 70), (len / 4, 20), (len / 4, 10)], Exhausted::Cycle);
    let mixed = sampler(len / 2 + len / 4 * 2, Shuffle::Seekable)?.mixing(mixture)?;
    each(format!("mixture of 3/next/{size}"), indices, None, &|| {
        Ok(mixed.indices()?.take(indices).fold(0, |all, index| all ^ index))
    })?;
    // Start-up of an epoch, in its middle: there is none, so what is left is below what a sample's reading costs.
    each(format!("seekable/first index/{size}"), 1000, Some(5000.0), &|| {
        let mut all = 0;
        for _ in 0..1000 {
            all ^= first_index(black_box(len), Shuffle::Seekable)?.unwrap_or_default();
        }
        Ok(all)
    })?;

    let what = format!("torch_exact/first index/{size}");
    if options.wants(&what) {
        rows.push(torch_exact(options, what, len)?);
    }
    let what = "balance/1024 sequences, 64 ranks";
    if options.wants(what) {
        let lengths = lengths(1024);
        let config = BalanceConfig { world: 64, token_budget: 16_384, cost: Cost::Tokens };
        let seconds = times(options.rounds, &|| Ok(balance(&lengths, &config)?.micro_batches()))?;
        let ours = Measured::of("ours", seconds).ok_or("no times")?;
        rows.push(Row::new(what.to_owned(), Unit::Milliseconds, ours));
    }
    Ok(rows)
}

/// Seconds of each round but a first one.
fn times(rounds: usize, run: &dyn Fn() -> Result<usize, Box<dyn Error>>) -> Result<Vec<f64>, Box<dyn Error>> {
    let mut seconds = Vec::new();
    for round in 0..=rounds {
        let begin = Instant::now();
        black_box(run()?);
        if round > 0 {
            seconds.push(begin.elapsed().as_secs_f64());
        }
    }
    Ok(seconds)
}

fn torch_exact(options: &Options, what: String, len: usize) -> Result<Row, Box<dyn Error>> {
    let (mut ours, mut lightrft, mut randperm) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.rounds.min(3) {
        let mut child = Command::new(std::env::current_exe()?);
        child.args(["--child", &len.to_string()]);
        ours.push(Taken::of(child)?);
        if let Some(python) = &options.python {
            lightrft.push(python.take("lightrft", &len.to_string())?);
            randperm.push(python.take("randperm", &len.to_string())?);
        }
    }
    let mut row = Row::new(what, Unit::Seconds, Measured::taken("ours", &ours).ok_or("no times")?);
    let peak = row.ours.peak_mib.unwrap_or(f64::INFINITY);
    row.targets.push(Target { text: "<= 0.4 GiB".into(), met: peak <= 0.4 * 1024.0 });
    if let Some(lightrft) = Measured::taken("lightrft", &lightrft) {
        let met = row.ours.median() <= 0.3 * lightrft.median();
        row.targets.push(Target { text: "<= 0.3x lightrft".into(), met });
        row.others.push(lightrft);
    }
    row.others.extend(Measured::taken("torch.randperm", &randperm));
    Ok(row)
}

/// Lengths as rollouts have them: most short, a few at the limit.
fn lengths(count: usize) -> Vec<usize> {
    let mut state = 1u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f64 / (1u64 << 31) as f64
    };
    (0..count).map(|_| (100.0 + 3996.0 * next().powi(3)) as usize).collect()
}
