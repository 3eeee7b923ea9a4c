//! What a unit's gather and reduce cost beside the bare collectives, between processes of this machine

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lightrft_collectives::launch::Launcher;
use lightrft_collectives::{CommunicatorExt as _, ReduceOp, Rendezvous};
use lightrft_sharding::{Mode, ParamSpec, Plan, ShardedUnits, UnitSpec};

use crate::overlap::{HALF_BYTES, HalfGathers, Overlaps, Pass};
use crate::report::{Measured, Row, Target};

const RANKS: usize = 2;

/// Where the first rank writes its times.
const OUTPUT: &str = "LIGHTRFT_BENCH_OUTPUT";

/// A rank that hangs is ended by its own deadline, and says why.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Elements of the unit: 16 MiB, a small decoder layer in f32.
const ELEMS: usize = 4 << 20;

/// Forward passes of a model take a tenth of a second.
const MOST_PASSES: usize = 10;

/// Measures in two processes, of this program; `prefix` is what stands before its name.
pub(crate) fn measure(prefix: &[String], rounds: usize, folder: &Path) -> Result<Vec<Row>, Box<dyn Error>> {
    let output = folder.join("times");
    let own = std::env::current_exe()?.display().to_string();
    let words: Vec<String> = prefix.iter().cloned().chain([own]).collect();
    let launcher = Launcher::new(&words[0])
        .args(&words[1..])
        .args(["--rank", &rounds.to_string()])
        .env(OUTPUT, &output)
        .ranks(RANKS)
        .grace(Duration::from_secs(1));
    let outcome = launcher.run()?;
    let text = std::fs::read_to_string(&output).map_err(|e| format!("no times: {e}; {outcome:?}"))?;
    let mut lines = text.lines().map(|line| -> Result<Vec<f64>, Box<dyn Error>> {
        Ok(line.split(' ').map(str::parse).collect::<Result<_, _>>()?)
    });
    let mut next = || lines.next().unwrap_or_else(|| Err("too few times".into()));
    let mut rows = Vec::new();
    for (what, bytes) in [("gather a unit", 4 * ELEMS), ("reduce a gradient", 4 * ELEMS)] {
        let (bare, ours) = (next()?, next()?);
        // Disturbances hit pairs alike, so it is their ratios whose median counts.
        let mut ratios: Vec<f64> = ours.iter().zip(&bare).map(|(ours, bare)| ours / bare).collect();
        ratios.sort_by(f64::total_cmp);
        let ratio = ratios.get(ratios.len() / 2).copied().unwrap_or(f64::NAN);
        let text = format!("<= collective + 5% (median of pairs {:+.1}%)", (ratio - 1.0) * 100.0);
        let (Some(ours), Some(bare)) = (Measured::of("ours", ours), Measured::of("collective alone", bare))
        else {
            return Err("no times".into());
        };
        let what = format!("{what}, {} MiB, {RANKS} ranks", bytes >> 20);
        let targets = vec![Target { text, met: ratio <= 1.05 }];
        rows.push(Row { what, bytes, ours, others: vec![bare], targets });
    }
    let (alone, masters, copy) = (next()?, next()?, next()?);
    let mut ratios: Vec<f64> = copy.iter().zip(&alone).map(|(copy, alone)| copy / alone).collect();
    ratios.sort_by(f64::total_cmp);
    let ratio = ratios.get(ratios.len() / 2).copied().unwrap_or(f64::NAN);
    let text = format!("<= collective + 5% (median of pairs {:+.1}%)", (ratio - 1.0) * 100.0);
    let others = [("collective alone", alone), ("from masters", masters)];
    let others = others.into_iter().filter_map(|(label, times)| Measured::of(label, times)).collect();
    rows.push(Row {
        what: format!("gather a bf16 unit from a copy, {} MiB, {RANKS} ranks", HALF_BYTES >> 20),
        bytes: HALF_BYTES,
        ours: Measured::of("ours", copy).ok_or("no times")?,
        others,
        targets: vec![Target { text, met: ratio <= 1.05 }],
    });
    for (what, label, of) in [
        ("forward with units gathered ahead", "no prefetch", "gathers"),
        ("last backward with replicas' sums beside", "at the step", "sums"),
    ] {
        let (waiting, sending, beside) = (next()?, next()?, next()?);
        let passes = waiting.iter().zip(&sending).zip(&beside);
        let mut hidden: Vec<f64> =
            passes.map(|((waiting, sending), beside)| (waiting - beside) / sending).collect();
        hidden.sort_by(f64::total_cmp);
        let hidden = hidden.get(hidden.len() / 2).copied().unwrap_or(f64::NAN);
        let (Some(ours), Some(waiting)) = (Measured::of("ours", beside), Measured::of(label, waiting)) else {
            return Err("no times".into());
        };
        let text = format!(">= 80% of {of} hidden ({:.0}%)", hidden * 100.0);
        let targets = vec![Target { text, met: hidden >= 0.8 }];
        let what = format!("{what}, {RANKS} ranks");
        rows.push(Row { what, bytes: 0, ours, others: vec![waiting], targets });
    }
    Ok(rows)
}

/// What one rank does.
pub(crate) fn rank(rounds: usize) -> Result<(), Box<dyn Error>> {
    let comm = Rendezvous::from_env()?.timeout(TIMEOUT).init()?;
    let unit = UnitSpec::new("layer", [ParamSpec::new("layer.weight", [ELEMS])]);
    let plan = Arc::new(Plan::new(vec![unit], comm.world_size())?);
    let mut units = ShardedUnits::new(plan, Arc::clone(&comm), Mode::Train)?;
    let shard = vec![1.0f32; ELEMS / RANKS];
    let mut full = vec![1.0f32; ELEMS];
    let mut part = shard.clone();
    units.load_unit(0, &full)?;
    // Each call begins together and ends when the last rank's does.
    let timed = |call: &mut dyn FnMut() -> Result<(), Box<dyn Error>>| -> Result<f64, Box<dyn Error>> {
        comm.barrier()?;
        let begin = Instant::now();
        call()?;
        let mut seconds = [begin.elapsed().as_secs_f64()];
        comm.all_reduce(&mut seconds, ReduceOp::Max)?;
        Ok(seconds[0])
    };
    let mut times: [Vec<f64>; 4] = Default::default();
    for round in 0..=rounds {
        let gather_alone = timed(&mut || Ok(comm.all_gather(&shard, &mut full)?))?;
        let gather = timed(&mut || {
            let (values, lease) = units.gather(0)?.into_parts();
            drop(lease);
            units.recycle(values);
            Ok(())
        })?;
        let reduce_alone = timed(&mut || Ok(comm.reduce_scatter(&full, &mut part, ReduceOp::Sum)?))?;
        let (mut grad, lease) = units.gradient_buffer(0)?.into_parts();
        drop(lease);
        grad.fill(1.0);
        let mut grad = Some(grad);
        let reduce = timed(&mut || Ok(units.reduce_gradient(0, grad.take().unwrap_or_default())?))?;
        units.zero_gradients();
        // The first round brings in pages and buffers.
        if round > 0 {
            for (times, seconds) in times.iter_mut().zip([gather_alone, gather, reduce_alone, reduce]) {
                times.push(seconds);
            }
        }
    }
    let mut gathers = HalfGathers::new(&comm)?;
    let mut halves: [Vec<f64>; 3] = Default::default();
    for round in 0..=rounds {
        let seconds = gathers.times()?;
        if round > 0 {
            halves.iter_mut().zip(seconds).for_each(|(times, seconds)| times.push(seconds));
        }
    }
    drop(gathers);
    let mut overlaps = Overlaps::new(&comm)?;
    let mut passes: [Vec<f64>; 6] = Default::default();
    for round in 0..=rounds.min(MOST_PASSES) {
        let both = [overlaps.forward()?, overlaps.backward()?];
        if round > 0 {
            let seconds =
                both.into_iter().flat_map(|Pass { waiting, sending, beside }| [waiting, sending, beside]);
            passes.iter_mut().zip(seconds).for_each(|(times, seconds)| times.push(seconds));
        }
    }
    if comm.rank() == 0 {
        let lines = times
            .iter()
            .chain(&halves)
            .chain(&passes)
            .map(|times| times.iter().map(f64::to_string).collect::<Vec<_>>().join(" "));
        std::fs::write(std::env::var(OUTPUT)?, lines.collect::<Vec<_>>().join("\n"))?;
    }
    comm.barrier()?;
    Ok(())
}
