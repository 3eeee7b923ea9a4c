//! Every setting of sharding does what it says: what is sent, what is kept, what learns.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::counted::{Call, Counted, Sent};
use common::{all_parameters, config, on_ranks, sequences, settings, write_folder};
use lightrft_collectives::Dtype;
use lightrft_sharding::Activations;
use lightrft_strategy::model::{Sequence, TokenBatch};
use lightrft_strategy::{GatherFrom, Precision, ShardSize, Strategy, StrategyConfig};

const ROWS: usize = 8;

fn model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config(serde_json::json!({})), 3);
    folder
}

/// What came of three steps on one rank.
struct Run {
    parameters: Vec<f32>,
    /// Log-probabilities of the last batch, after the steps.
    log_probs: Vec<f32>,
    /// What the second step sent.
    calls: Vec<Call>,
    /// Bytes of parameters, gradients and optimizer state, from step to step.
    kept_bytes: usize,
    /// The most bytes of whole units and gradients.
    peak_bytes: usize,
    /// Ranks that a shard is cut over, and those that hold the same one.
    groups: (usize, usize),
}

impl Run {
    fn count(&self, sent: Sent, ranks: usize) -> usize {
        self.calls.iter().filter(|call| call.sent == sent && call.ranks == ranks).count()
    }

    fn dtypes(&self, sent: Sent) -> Vec<Dtype> {
        let mut all: Vec<Dtype> =
            self.calls.iter().filter(|call| call.sent == sent).map(|call| call.dtype).collect();
        all.dedup();
        all
    }
}

/// Three steps of two passes; the first rank's account. All ranks end with the same parameters.
fn train(ranks: usize, settings: &StrategyConfig) -> Run {
    let folder = model();
    let mut runs = on_ranks(ranks, |world| {
        let world = Counted::new(world);
        let strategy = Strategy::with_world(settings.clone(), Arc::clone(&world.comm))?;
        let mut actor = strategy.prepare_actor(folder.path())?;
        let all = sequences(ROWS);
        let share = ROWS / ranks;
        let mine: Vec<Sequence<'_>> = all[strategy.rank() * share..][..share]
            .iter()
            .map(|(prompt, answer)| Sequence { prompt, answer })
            .collect();
        let mut calls = Vec::new();
        for step in 0..3 {
            world.take();
            strategy.supervised_step(&mut actor, &mine, 1e-3)?;
            if step == 1 {
                calls = world.take();
            }
        }
        let batch = TokenBatch::new(actor.model.model().decoder(), &mine)?;
        let log_probs = strategy.policy_log_probs(&mut actor, &batch)?;
        let units = actor.model.units();
        Ok(Run {
            log_probs,
            calls,
            kept_bytes: units.persistent_bytes() + actor.optimizer.persistent_bytes(),
            peak_bytes: units.transient_bytes().peak,
            groups: (units.communicator().world_size(), units.replicas().world_size()),
            parameters: all_parameters(&mut actor)?,
        })
    });
    let first = runs.swap_remove(0);
    assert!(runs.iter().all(|run| run.parameters == first.parameters), "all ranks have the same parameters");
    first
}

/// Two ranks, two passes a step.
fn plain() -> StrategyConfig {
    settings(ROWS, 2)
}

fn gap(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max)
}

/// Units of the model: the embedding, two layers, the head.
const UNITS: usize = 4;
/// Passes of a step.
const PASSES: usize = 2;

#[test]
fn units_that_stay_after_forward_are_gathered_once_a_pass() {
    let always = train(2, &plain());
    let never = train(2, &StrategyConfig { reshard_after_forward: false, ..plain() });
    // Of a unit that is freed one gather is for backward; the head and its tied embedding stay for that in any case.
    let uses = UNITS + 1 + UNITS - 1;
    assert_eq!(always.count(Sent::AllGather, 2), PASSES * uses);
    assert_eq!(never.count(Sent::AllGather, 2), PASSES * UNITS);
    assert!(never.peak_bytes > always.peak_bytes, "{} and {}", never.peak_bytes, always.peak_bytes);
    assert!(always.parameters == never.parameters);
}

#[test]
fn hpz_gathers_among_neighbours_once_the_step_has_gathered_from_all() {
    let four = StrategyConfig { micro_train_batch_size: 1, ..plain() };
    let from_all = train(4, &four);
    let hpz = train(4, &StrategyConfig { hpz_size: 2, ..four });
    assert_eq!(from_all.count(Sent::AllGather, 2), 0);
    // Each unit comes from all ranks once a step, and from the neighbour afterwards.
    assert_eq!(hpz.count(Sent::AllGather, 4), UNITS);
    assert_eq!(
        hpz.count(Sent::AllGather, 4) + hpz.count(Sent::AllGather, 2),
        from_all.count(Sent::AllGather, 4)
    );
    assert!(hpz.kept_bytes > from_all.kept_bytes);
    assert!(hpz.parameters == from_all.parameters);
}

#[test]
fn what_runs_ahead_or_beside_takes_memory_and_changes_no_bit() {
    let waits = train(2, &StrategyConfig { prefetch: 0, ..plain() });
    for settings in [
        StrategyConfig { prefetch: 2, ..plain() },
        StrategyConfig { prefetch: 0, overlap_comm: true, ..plain() },
    ] {
        let ahead = train(2, &settings);
        assert!(ahead.peak_bytes > waits.peak_bytes, "{} and {}", ahead.peak_bytes, waits.peak_bytes);
        assert_eq!(ahead.kept_bytes, waits.kept_bytes);
        assert!(ahead.parameters == waits.parameters);
    }
}

#[test]
fn a_bucket_holds_the_gradients_of_as_many_units_as_fit() {
    let stage2 = StrategyConfig { zero_stage: 2, ..plain() };
    let together = train(2, &stage2);
    let alone = train(2, &StrategyConfig { reduce_bucket_size: 1, ..stage2 });
    assert_eq!(together.count(Sent::ReduceScatter, 2), PASSES);
    assert_eq!(alone.count(Sent::ReduceScatter, 2), PASSES * UNITS);
    assert!(together.parameters == alone.parameters);
}

#[test]
fn small_units_may_stay_whole() {
    let cut = train(2, &plain());
    let whole = train(2, &StrategyConfig { persistence_threshold: 1_000_000, ..plain() });
    assert_eq!((whole.count(Sent::AllGather, 2), whole.count(Sent::ReduceScatter, 2)), (0, 0));
    assert!(whole.kept_bytes >= 2 * cut.kept_bytes - 64 * UNITS);
    assert!(gap(&cut.parameters, &whole.parameters) < 1e-6);
}

#[test]
fn parameters_travel_and_compute_in_the_types_that_are_asked_for() {
    let wide = train(2, &plain());
    assert_eq!(wide.dtypes(Sent::AllGather), [Dtype::F32]);
    let bf16 = StrategyConfig { param_dtype: Precision::Bf16, ..plain() };
    let gathered = train(2, &bf16);
    assert_eq!(gathered.dtypes(Sent::AllGather), [Dtype::BF16]);
    assert_eq!(gathered.dtypes(Sent::ReduceScatter), [Dtype::F32]);
    let computed = train(2, &StrategyConfig { compute_dtype: Precision::Bf16, ..bf16 });
    for narrow in [&gathered, &computed] {
        assert_eq!(narrow.kept_bytes, wide.kept_bytes, "masters are f32");
        let gap = gap(&narrow.log_probs, &wide.log_probs);
        assert!(gap > 1e-5 && gap < 0.1, "{gap}");
    }
    // Rounding every product is coarser than rounding the parameters.
    assert!(gathered.log_probs != computed.log_probs);
}

#[test]
fn a_copy_that_gathers_read_takes_memory_and_changes_no_bit() {
    let masters = StrategyConfig { param_dtype: Precision::Bf16, ..plain() };
    let copy = StrategyConfig { gather_from: GatherFrom::Copy, ..masters.clone() };
    let (masters, copy) = (train(2, &masters), train(2, &copy));
    assert!(copy.kept_bytes * 16 >= masters.kept_bytes * 18 - 64 * UNITS, "2 bytes beside 16");
    assert!(copy.parameters == masters.parameters && copy.log_probs == masters.log_probs);
}

#[test]
fn what_is_summed_once_a_step_may_be_summed_beside_its_last_pass() {
    let four = StrategyConfig { micro_train_batch_size: 1, ..plain() };
    for settings in [
        StrategyConfig { zero_stage: 0, ..four.clone() },
        StrategyConfig { zero_stage: 1, ..four.clone() },
        StrategyConfig { shard_size: ShardSize::Ranks(2), ..four },
    ] {
        // A bucket for each unit, that there is something to run beside the next.
        let settings = StrategyConfig { reduce_bucket_size: 1, ..settings };
        let beside = train(4, &StrategyConfig { overlap_comm: true, ..settings.clone() });
        let after = train(4, &settings);
        assert!(beside.parameters == after.parameters);
        let sums = |run: &Run| run.calls.iter().filter(|call| call.sent != Sent::AllGather).count();
        assert_eq!(sums(&beside), sums(&after), "stage {}", settings.zero_stage);
    }
}

#[test]
fn gradients_travel_and_add_up_in_the_types_that_are_asked_for() {
    let wide = train(2, &plain());
    let sent = train(2, &StrategyConfig { reduce_dtype: Precision::Bf16, ..plain() });
    assert_eq!(sent.dtypes(Sent::ReduceScatter), [Dtype::BF16]);
    assert_eq!(sent.dtypes(Sent::AllGather), [Dtype::F32]);
    assert!(sent.parameters != wide.parameters && gap(&sent.parameters, &wide.parameters) < 1e-2);
    let added = train(2, &StrategyConfig { grad_accum_dtype: Precision::Bf16, ..plain() });
    assert!(added.kept_bytes * 16 <= wide.kept_bytes * 14 + 64 * UNITS, "2 bytes instead of 4");
    assert!(added.parameters != wide.parameters && gap(&added.parameters, &wide.parameters) < 1e-2);
}

#[test]
fn computing_layers_again_changes_no_bit() {
    let kept = train(2, &plain());
    let again = train(2, &StrategyConfig { gradient_checkpointing: true, ..plain() });
    assert!(kept.parameters == again.parameters);
    let activations = |gradient_checkpointing| {
        StrategyConfig { gradient_checkpointing, ..plain() }.actor_policy().unwrap().activations
    };
    assert_eq!((activations(false), activations(true)), (Activations::Keep, Activations::Recompute));
}

#[test]
fn shards_may_be_cut_over_some_ranks_and_copied_over_the_others() {
    let four = StrategyConfig { micro_train_batch_size: 1, ..plain() };
    let world = train(4, &four);
    let hsdp = train(4, &StrategyConfig { shard_size: ShardSize::Ranks(2), ..four.clone() });
    let auto = train(4, &StrategyConfig { shard_size: ShardSize::Auto, ..four });
    assert_eq!((world.groups, hsdp.groups, auto.groups), ((4, 1), (2, 2), (4, 1)));
    assert_eq!(world.count(Sent::AllReduce, 2), 0);
    assert!(hsdp.count(Sent::AllReduce, 2) > 0, "replicas sum their shards");
    assert!(gap(&hsdp.parameters, &world.parameters) < 1e-6);
    assert!(auto.parameters == world.parameters);
}

#[test]
fn the_reference_is_cut_as_it_is_told() {
    let folder = model();
    let reference = |reference_shard_size| {
        let of_ranks = on_ranks(4, |world| {
            let config = StrategyConfig { reference_shard_size, ..settings(ROWS, 1) };
            let strategy = Strategy::with_world(config, world)?;
            let reference = strategy.prepare_reference(folder.path())?;
            let units = reference.model.units();
            Ok((units.communicator().world_size(), units.persistent_bytes()))
        });
        of_ranks[0]
    };
    let bytes = 4 * config(serde_json::json!({})).parameter_count();
    let near = |kept: usize, part: usize| (bytes / part..=bytes / part + 16 * UNITS).contains(&kept);
    for (size, ranks) in [(ShardSize::World, 4), (ShardSize::Ranks(2), 2), (ShardSize::Auto, 1)] {
        let (cut_over, kept) = reference(size);
        assert_eq!(cut_over, ranks);
        assert!(near(kept, ranks), "{size:?}: {kept}");
    }
}

#[test]
fn frozen_parameters_stay_as_they_were_and_have_no_optimizer_state() {
    let folder = model();
    let prefix = "model.layers.0.";
    let all = train(2, &plain());
    let frozen = StrategyConfig { freeze_prefix: vec![prefix.to_owned()], ..plain() };
    let part = train(2, &frozen);
    assert!(part.kept_bytes < all.kept_bytes);
    let ranges = on_ranks(1, |world| {
        let config = StrategyConfig { freeze_prefix: Vec::new(), ..settings(ROWS, 2) };
        let mut actor = Strategy::with_world(config, world)?.prepare_actor(folder.path())?;
        let plan = actor.model.units().plan().clone();
        let mut start = 0;
        let mut names = Vec::new();
        for unit in plan.units() {
            for param in unit.params() {
                names.push((param.name().to_owned(), start + param.range().start..start + param.range().end));
            }
            start += unit.elems();
        }
        Ok((names, all_parameters(&mut actor)?))
    });
    let (names, before) = &ranges[0];
    for (name, range) in names {
        let unchanged = before[range.clone()] == part.parameters[range.clone()];
        assert_eq!(unchanged, name.starts_with(prefix), "{name}");
    }

    let refused = |folder: &Path, prefixes: &[&str]| {
        let config = StrategyConfig {
            freeze_prefix: prefixes.iter().map(|&prefix| prefix.to_owned()).collect(),
            ..settings(ROWS, 2)
        };
        on_ranks(1, |world| {
            let strategy = Strategy::with_world(config.clone(), world)?;
            Ok(strategy.prepare_actor(folder).unwrap_err().to_string())
        })
        .remove(0)
    };
    let unknown = refused(folder.path(), &[prefix, "visual"]);
    assert!(unknown.contains("freeze_prefix") && unknown.contains("visual"), "{unknown}");
    let everything = refused(folder.path(), &["model."]);
    assert!(everything.contains("freeze_prefix") && everything.contains("learn"), "{everything}");
}
