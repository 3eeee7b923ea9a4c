//! The loop over threads: several updates a rollout, shared engines, epochs, and parts that misbehave.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{config, on_ranks, sequences, settings, write_folder};
use lightrft_collectives::Communicator;
use lightrft_data::{JsonLines, JsonLinesOptions};
use lightrft_engine::{
    Completion, Engine, Level, Limits, MemoryBytes, Parts, Request, State, Update, Version, Watch,
};
use lightrft_strategy::model::{Sequence, TokenBatch};
use lightrft_strategy::{
    Grpo, GrpoParts, OldLogProbs, Precision, Result, Score, ShardSize, StepMetrics, Strategy, StrategyConfig,
    Text,
};

/// A model, and twelve questions, in a folder.
fn prepare() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config(serde_json::json!({})), 11);
    let lines: String =
        (0..12).map(|i| format!("{{\"prompt\": \"{i}+1=\", \"label\": \"{}\"}}\n", i + 1)).collect();
    std::fs::write(folder.path().join("prompts.jsonl"), lines).unwrap();
    folder
}

fn parts(strategy: &Strategy, folder: &Path) -> Result<GrpoParts> {
    let actor = strategy.prepare_actor(folder)?;
    Ok(GrpoParts {
        reference: Some(strategy.prepare_reference(folder)?),
        engine: strategy.prepare_engine(&actor)?,
        actor,
        text: Text::from_folder(folder)?,
        prompts: JsonLines::open(folder.join("prompts.jsonl"), JsonLinesOptions::default())?,
        // Any reward that differs between answers will do.
        reward: Box::new(|_, answer| Score {
            reward: answer.text.len() as f32,
            correct: answer.text.len() == 2,
        }),
        stop_tokens: vec![1],
        total_steps: 4,
    })
}

fn run(
    folder: &Path,
    config: &StrategyConfig,
    steps: usize,
    change: impl Fn(&mut GrpoParts) + Sync,
) -> Vec<Vec<StepMetrics>> {
    on_ranks(2, |world| {
        let strategy = Strategy::with_world(config.clone(), world)?;
        let mut parts = parts(&strategy, folder)?;
        change(&mut parts);
        let mut grpo = Grpo::new(&strategy, parts)?;
        (0..steps).map(|_| grpo.step()).collect()
    })
}

/// Eight prompts of twelve a rollout, two samples each, two updates of eight sequences.
fn small() -> StrategyConfig {
    StrategyConfig {
        rollout_batch_size: 8,
        train_batch_size: 8,
        generate_max_len: 6,
        actor_lr: 1e-3,
        lr_warmup_ratio: 0.0,
        enable_engine_sleep: true,
        log_parameters_hash: true,
        ..settings(8, 2)
    }
}

#[test]
fn updates_epochs_and_metrics_add_up() {
    let folder = prepare();
    let config = StrategyConfig { max_epochs: 2, old_log_probs: OldLogProbs::Policy, ..small() };
    let ranks = run(folder.path(), &config, 3, |parts| parts.reference = None);
    // Times differ between ranks, what was computed does not.
    let computed = |m: &StepMetrics| (m.step, m.epoch, m.reward, m.tokens, m.parameters_hash.clone());
    assert!(ranks[0].iter().map(computed).eq(ranks[1].iter().map(computed)));
    let epochs: Vec<u64> = ranks[0].iter().map(|m| m.epoch).collect();
    assert_eq!(epochs, [0, 1, 2], "four of the twelve prompts are left over in each epoch");
    for m in &ranks[0] {
        assert_eq!(m.kl, None);
        assert!(m.log_prob_gap < 1e-4, "{}", m.log_prob_gap);
        assert!(m.length >= 1.0 && m.length <= 6.0 && m.tokens as f64 == (m.length * 16.0).round());
        assert!(m.grad_norm > 0.0 && m.skipped_updates == 0);
    }
    assert_ne!(ranks[0][0].parameters_hash, ranks[0][1].parameters_hash);
}

#[test]
fn memory_given_up_around_generation_changes_no_bit_and_is_accounted_for() {
    let folder = prepare();
    let run_with = |config: StrategyConfig| run(folder.path(), &config, 2, |_| {}).swap_remove(0);
    let hashes = |steps: &[StepMetrics]| steps.iter().map(|m| m.parameters_hash.clone()).collect::<Vec<_>>();
    for zero_stage in [0, 2, 3] {
        let base = StrategyConfig { zero_stage, ..small() };
        let plain = run_with(base.clone());
        assert!(plain.iter().all(|m| m.offload.is_none()));
        let of = |actor_offload, adam_offload, reference_offload| {
            let config = StrategyConfig { actor_offload, adam_offload, reference_offload, ..base.clone() };
            let steps = run_with(config);
            assert_eq!(hashes(&steps), hashes(&plain));
            steps[1].offload.unwrap()
        };
        let (actor, adam, reference) =
            (of(true, false, false), of(false, true, false), of(false, false, true));
        let parameters = config(serde_json::json!({})).parameter_count() as u64;
        // Gradients at the least: whole in stage 0, cut in the others.
        let gradients = 4 * parameters * if zero_stage == 0 { 2 } else { 1 };
        assert!(actor.bytes >= gradients, "stage {zero_stage}: {actor:?}");
        assert!(actor.kept_bytes >= gradients, "masters stay: {actor:?}");
        // Its state is in host memory, which is where it would go.
        assert!(adam.bytes == 0 && adam.kept_bytes >= 2 * gradients, "stage {zero_stage}: {adam:?}");
        assert!(reference.bytes > 0 && reference.kept_bytes > 0, "stage {zero_stage}: {reference:?}");
        let all = of(true, true, true);
        assert_eq!(all.bytes, actor.bytes + adam.bytes + reference.bytes);
        assert!(all.seconds > 0.0);
    }
}

/// Eight sequences of four ranks, two updates a rollout.
fn four_ranks(change: impl FnOnce(&mut StrategyConfig)) -> StrategyConfig {
    let mut config = StrategyConfig { micro_train_batch_size: 1, ..small() };
    change(&mut config);
    config.validate(4).unwrap();
    config
}

#[test]
fn all_choices_at_once_train_and_resume_bit_for_bit() {
    let configs = [
        four_ranks(|c| {
            c.hpz_size = 2;
            c.param_dtype = Precision::Bf16;
            c.overlap_comm = true;
            c.prefetch = 2;
            c.freeze_prefix = vec!["model.embed_tokens".to_owned()];
        }),
        four_ranks(|c| {
            c.shard_size = ShardSize::Ranks(2);
            c.reference_shard_size = ShardSize::Auto;
            c.param_dtype = Precision::Bf16;
            c.compute_dtype = Precision::Bf16;
            c.grad_accum_dtype = Precision::Bf16;
            c.gradient_checkpointing = true;
        }),
        four_ranks(|c| {
            c.zero_stage = 2;
            c.overlap_comm = true;
            c.reduce_bucket_size = 1000;
            c.persistence_threshold = 20;
            c.reduce_dtype = Precision::Bf16;
        }),
        four_ranks(|c| c.reshard_after_forward = false),
    ];
    for config in configs {
        let config = StrategyConfig {
            enable_ema: true,
            actor_offload: true,
            adam_offload: true,
            reference_offload: true,
            use_kl_loss: true,
            ..config
        };
        let folder = prepare();
        let dir = folder.path().join("checkpoints");
        // Of bf16, half of a thousandth of a logit; what generation and training round differently adds up.
        let gap = if config.compute_dtype == Precision::F32 { 1e-4 } else { 0.2 };
        on_ranks(4, |world| {
            let strategy = Strategy::with_world(config.clone(), world)?;
            let mut grpo = Grpo::new(&strategy, parts(&strategy, folder.path())?)?;
            let begin = grpo.parameters_hash()?;
            grpo.step()?;
            assert_ne!(grpo.parameters_hash()?, begin);
            grpo.save(&dir, serde_json::Value::Null)?;
            let average =
                |grpo: &mut Grpo<'_>| grpo.actor_mut().ema.as_ref().unwrap().average(1).unwrap().to_vec();
            let second = grpo.step()?;
            let actor = grpo.actor_mut();
            let (steps, moves) = (actor.optimizer.counters().steps, actor.ema.as_ref().unwrap().counters());
            assert_eq!((steps, moves.updates), (4, 4), "two updates a rollout, and the average with each");
            assert!(second.log_prob_gap < gap, "{}", second.log_prob_gap);

            let mut again = Grpo::new(&strategy, parts(&strategy, folder.path())?)?;
            again.resume(&dir)?.unwrap();
            let repeated = again.step()?;
            assert_eq!((second.parameters_hash, second.reward), (repeated.parameters_hash, repeated.reward));
            assert_eq!((second.grad_norm, second.kl), (repeated.grad_norm, repeated.kl));
            assert!(average(&mut grpo) == average(&mut again));
            Ok(())
        });
    }
}

#[test]
fn a_run_that_saves_in_the_background_resumes_from_what_it_saved() {
    let folder = prepare();
    let dir = folder.path().join("checkpoints");
    let settings = StrategyConfig { async_save: true, save_steps: 1, ..small() };
    on_ranks(2, |world| {
        let strategy = Strategy::with_world(settings.clone(), world)?;
        let mut grpo = Grpo::new(&strategy, parts(&strategy, folder.path())?)?;
        grpo.step()?;
        assert_eq!(grpo.save_if_due(&dir, serde_json::Value::Null)?, None, "it has begun");
        let second = grpo.step()?;
        // Waits for what is in flight; the policy is then as it was after the first step.
        let loaded = grpo.resume(&dir)?.unwrap();
        assert_eq!((loaded.state.step, grpo.steps_done()), (1, 1));
        let repeated = grpo.step()?;
        assert_eq!((second.parameters_hash, second.reward), (repeated.parameters_hash, repeated.reward));
        assert_eq!(grpo.save_if_due(&dir, serde_json::Value::Null)?, None, "the first was told of by then");
        assert_eq!(grpo.finish_saves()?.unwrap().step, 2);
        // A save that is waited for, into the directory that the other had.
        assert_eq!(grpo.save(&dir, serde_json::Value::Null)?.step, 2);
        Ok(())
    });
}

#[test]
fn an_optimizer_that_is_offloaded_refuses_to_step_until_it_is_loaded() {
    let folder = prepare();
    on_ranks(1, |world| {
        let strategy = Strategy::with_world(StrategyConfig { adam_offload: true, ..small() }, world)?;
        let mut grpo = Grpo::new(&strategy, parts(&strategy, folder.path())?)?;
        let rows = [([3u32, 4], [5u32, 1])];
        let rows = rows.each_ref().map(|(prompt, answer)| Sequence { prompt, answer });
        // A step of the strategy's own loads it.
        strategy.supervised_step(grpo.actor_mut(), &rows, 1e-3)?;
        let actor = grpo.actor_mut();
        assert!(actor.optimizer.step(actor.model.units_mut(), 1e-3).is_err());
        assert!(strategy.maybe_load_optimizer(actor)?.is_some());
        actor.optimizer.step(actor.model.units_mut(), 1e-3)?;
        assert!(strategy.maybe_offload_optimizer(actor)?.is_some());
        // A step that is refused keeps its turn.
        let batch = TokenBatch::new(actor.model.model().decoder(), &rows)?;
        for _ in 0..strategy.accumulated_gradient() {
            strategy.backward(actor, &batch, |log_probs| Ok(((), vec![-1.0; log_probs.len()])))?;
        }
        assert!(strategy.optimizer_step(actor, 1e-3).is_err());
        strategy.maybe_load_optimizer(actor)?;
        assert!(strategy.optimizer_step(actor, 1e-3)?.is_some());
        Ok(())
    });
}

#[test]
fn passes_that_were_left_open_are_not_in_a_supervised_step() {
    let folder = prepare();
    let rows = sequences(8);
    let parameters = |left_open: bool| {
        on_ranks(1, |world| {
            let strategy = Strategy::with_world(settings(8, 4), world)?;
            let mut actor = strategy.prepare_actor(folder.path())?;
            let all: Vec<Sequence<'_>> =
                rows.iter().map(|(prompt, answer)| Sequence { prompt, answer }).collect();
            if left_open {
                let batch = TokenBatch::new(actor.model.model().decoder(), &all[..4])?;
                strategy.backward(&mut actor, &batch, |log_probs| Ok(((), vec![-1.0; log_probs.len()])))?;
            }
            strategy.supervised_step(&mut actor, &all, 1e-3)?;
            let units = actor.model.units();
            (0..units.plan().units().len()).map(|unit| Ok(units.param(unit)?.to_vec())).collect()
        })
        .remove(0)
    };
    let [with, without]: [Vec<Vec<f32>>; 2] = [true, false].map(parameters);
    assert!(with == without);
}

#[test]
fn a_mean_loss_is_divided_by_passes_and_ranks() {
    let folder = prepare();
    let rows = sequences(8);
    // The gradient norm of one step, however the eight sequences are cut.
    let norm = |ranks: usize, micro: usize| {
        on_ranks(ranks, |world| {
            let strategy = Strategy::with_world(settings(8, micro), world)?;
            let mut actor = strategy.prepare_actor(folder.path())?;
            assert_eq!(strategy.loss_scale(), micro as f32 / 8.0);
            let mine = &rows[strategy.rank() * (8 / ranks)..][..8 / ranks];
            let mut report = None;
            for micro in mine.chunks(micro) {
                let micro: Vec<Sequence<'_>> =
                    micro.iter().map(|(prompt, answer)| Sequence { prompt, answer }).collect();
                let batch = TokenBatch::new(actor.model.model().decoder(), &micro)?;
                strategy.backward(&mut actor, &batch, |log_probs| {
                    Ok(((), vec![-1.0 / micro.len() as f32; log_probs.len()]))
                })?;
                assert!(report.is_none(), "no step before the last pass");
                report = strategy.optimizer_step(&mut actor, 0.0)?;
            }
            Ok(report.unwrap().grad_norm)
        })
        .remove(0)
    };
    let whole = norm(1, 8);
    for (ranks, micro) in [(1, 4), (1, 1), (2, 4), (2, 1), (4, 2)] {
        let cut = norm(ranks, micro);
        assert!((cut / whole - 1.0).abs() < 1e-5, "{ranks} ranks by {micro}: {cut}, {whole}");
    }
}

#[test]
fn ranks_that_share_an_engine_train_as_ranks_with_their_own() {
    let folder = prepare();
    let hashes = |sharing| {
        // The engine batches other prompts together, which may change the last bits of its log-probabilities: the
        // policy computes its own.
        let config = StrategyConfig {
            engine_tp_size: sharing,
            use_kl_loss: true,
            old_log_probs: OldLogProbs::Policy,
            ..small()
        };
        let ranks = run(folder.path(), &config, 2, |_| {});
        ranks[0].iter().map(|m| (m.parameters_hash.clone(), m.kl.is_some())).collect::<Vec<_>>()
    };
    assert_eq!(hashes(1), hashes(2));
}

/// An engine that does as another does, but for its replies.
#[derive(Debug)]
struct Bent {
    engine: Box<dyn Engine>,
    bend: fn(&mut Vec<Completion>),
}

impl Engine for Bent {
    fn generate(
        &mut self,
        requests: &[Request],
        watch: &mut Watch<'_>,
    ) -> lightrft_engine::Result<Vec<Completion>> {
        let mut completions = self.engine.generate(requests, watch)?;
        (self.bend)(&mut completions);
        Ok(completions)
    }
    fn sleep(&mut self, level: Level) -> lightrft_engine::Result<()> {
        self.engine.sleep(level)
    }
    fn wake(&mut self, parts: Parts) -> lightrft_engine::Result<()> {
        self.engine.wake(parts)
    }
    fn begin_update(&mut self, to: Version) -> lightrft_engine::Result<Box<dyn Update + '_>> {
        self.engine.begin_update(to)
    }
    fn state(&self) -> State {
        self.engine.state()
    }
    fn version(&self) -> Option<Version> {
        self.engine.version()
    }
    fn memory_bytes(&self) -> Option<MemoryBytes> {
        self.engine.memory_bytes()
    }
    fn limits(&self) -> Limits {
        self.engine.limits()
    }
}

/// The error of each rank when `change` is made to the parts of rank 1 alone.
fn failures(config: &StrategyConfig, change: impl Fn(&mut GrpoParts) + Sync) -> Vec<String> {
    let folder = prepare();
    on_ranks(2, |world: Arc<dyn Communicator>| {
        let strategy = Strategy::with_world(config.clone(), world)?;
        let mut parts = parts(&strategy, folder.path())?;
        if strategy.rank() == 1 {
            change(&mut parts);
        }
        Ok(Grpo::new(&strategy, parts).and_then(|mut grpo| grpo.step()).unwrap_err().to_string())
    })
}

#[test]
fn what_goes_wrong_on_one_rank_is_told_on_all() {
    let bent = |bend: fn(&mut Vec<Completion>)| {
        move |parts: &mut GrpoParts| {
            let engine = parts.engine.take().unwrap();
            parts.engine = Some(Box::new(Bent { engine, bend }));
        }
    };
    let without_log_probs = failures(&small(), bent(|all| all[3].log_probs.clear()));
    let swapped = failures(&small(), bent(|all| all.swap(0, 1)));
    let no_number = failures(&small(), |parts| {
        parts.reward = Box::new(|_, _| Score { reward: f32::NAN, correct: false });
    });
    let no_engine = failures(&small(), |parts| parts.engine = None);
    for (texts, name) in [
        (without_log_probs, "0 log-probabilities"),
        (swapped, "sample 1"),
        (no_number, "reward NaN"),
        (no_engine, "engine is missing"),
    ] {
        assert!(texts[1].contains(name), "{name} is not in: {}", texts[1]);
        assert!(texts[0].contains(name) && texts[0].contains("rank 1"), "{}", texts[0]);
    }
}

#[test]
fn settings_that_differ_between_ranks_are_refused_by_name() {
    let texts = on_ranks(2, |world| {
        let config = StrategyConfig { init_kl_coef: 0.5 + world.rank() as f64, ..small() };
        Ok(Strategy::with_world(config, world).unwrap_err().to_string())
    });
    for text in texts {
        assert!(text.contains("init_kl_coef") && text.contains("0.5") && text.contains("1.5"), "{text}");
    }
}

#[test]
fn a_run_resumed_in_the_same_program_goes_on_and_says_what_changed() {
    let folder = prepare();
    let dir = folder.path().join("checkpoints");
    let of_rank = |world| {
        let strategy = Strategy::with_world(small(), world)?;
        let mut grpo = Grpo::new(&strategy, parts(&strategy, folder.path())?)?;
        grpo.step()?;
        grpo.save(&dir, serde_json::json!({ "note": 1 }))?;
        let second = grpo.step()?;

        let changed = StrategyConfig { init_kl_coef: 0.5, ..small() };
        let strategy = Strategy::with_world(changed, Arc::clone(strategy.world()))?;
        let mut again = Grpo::new(&strategy, parts(&strategy, folder.path())?)?;
        let loaded = again.resume(&dir)?.unwrap();
        assert_eq!(loaded.state.client["note"], 1);
        assert!(
            loaded.changed.len() == 1 && loaded.changed[0].contains("init_kl_coef"),
            "{:?}",
            loaded.changed
        );
        // The coefficient plays no part without the penalty.
        let repeated = again.step()?;
        assert_eq!((second.parameters_hash, second.reward), (repeated.parameters_hash, repeated.reward));

        let other =
            Strategy::with_world(StrategyConfig { seed: 43, ..small() }, Arc::clone(strategy.world()))?;
        let mut other = Grpo::new(&other, parts(&other, folder.path())?)?;
        let before = other.parameters_hash()?;
        let text = other.resume(&dir).unwrap_err().to_string();
        assert!(text.contains("seed 42") && text.contains("seed 43"), "{text}");
        assert_eq!(other.parameters_hash()?, before, "a refused checkpoint changes nothing");
        Ok(())
    };
    on_ranks(2, of_rank);
}

#[test]
fn the_policy_learns_what_is_rewarded_and_nothing_else() {
    let folder = prepare();
    let config = StrategyConfig {
        rollout_batch_size: 12,
        n_samples_per_prompt: 8,
        train_batch_size: 96,
        micro_train_batch_size: 16,
        actor_lr: 1e-2,
        ..small()
    };
    // Sevens, and how many of them: a score that falls to the wrong answer teaches nothing.
    let sevens = |text: &str| text.matches('7').count() as f32;
    let learned = run(folder.path(), &config, 30, |parts| {
        parts.reward = Box::new(move |_, a| Score { reward: sevens(a.text), correct: sevens(a.text) > 0.0 });
    });
    let (first, last) = (&learned[0][0], &learned[0][29]);
    assert!(first.reward < 1.0 && last.reward > 3.0, "from {} to {}", first.reward, last.reward);
    // One reward for every answer is no signal: without a penalty and weight decay, nothing moves.
    let equal = run(folder.path(), &config, 2, |parts| {
        parts.reward = Box::new(|_, _| Score { reward: 0.1, correct: true });
    });
    assert_eq!(equal[0][0].parameters_hash, equal[0][1].parameters_hash);
    assert_eq!(equal[0][1].grad_norm, 0.0);
}
