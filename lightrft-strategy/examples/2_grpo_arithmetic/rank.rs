//! What every rank does: a short supervised warm-up, then RL from its result, checkpoints on the way.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use lightrft_collectives::{Communicator, CommunicatorExt};
use lightrft_data::{Dataset, DistributedSampler, JsonLines, JsonLinesOptions, SamplerConfig, Shuffle, Tail};
use lightrft_engine::embedded::Weights;
use lightrft_strategy::model::Sequence;
use lightrft_strategy::plot::{Series, line_chart};
use lightrft_strategy::{
    Grpo, GrpoParts, HfOptions, MetricsLog, SaveReport, StepMetrics, Strategy, StrategyConfig, Text,
};
use serde_json::{Value, json};

use crate::options::Options;
use crate::task;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The warm-up ends once this share of a probe is answered: training questions that the warm-up does not train on.
const WARM_UP_ACCURACY: f64 = 0.2;
const WARM_UP_LR: f64 = 2e-3;
const WARM_UP_BATCH: usize = 128;
/// Questions of the probe: the last of the training file, at most a fifth of it.
const PROBE: usize = 200;

/// Where a run keeps its files.
struct Folders {
    /// The model as it was drawn.
    random: PathBuf,
    /// The model as it was before RL, which is also the frozen reference.
    start: PathBuf,
    checkpoints: PathBuf,
    metrics: PathBuf,
    picture: PathBuf,
    result: PathBuf,
    /// The model after RL.
    trained: PathBuf,
    /// Its moving average, where one is kept.
    trained_ema: PathBuf,
}

impl Folders {
    fn new(out: &Path) -> Self {
        Self {
            random: out.join("random"),
            start: out.join("start"),
            checkpoints: out.join("checkpoints"),
            metrics: out.join("metrics.jsonl"),
            picture: out.join("reward.svg"),
            result: result_file(out),
            trained: out.join("trained"),
            trained_ema: out.join("trained_ema"),
        }
    }

    /// Clears the way for a new run. One that the user named a folder for is never deleted.
    fn begin(&self, named: bool) -> Result<()> {
        if named && (self.metrics.exists() || self.checkpoints.exists()) {
            let out = self.metrics.with_file_name("");
            return Err(format!(
                "{} holds a run: go on with --resume, or name another folder",
                out.display()
            )
            .into());
        }
        for folder in [&self.start, &self.random, &self.checkpoints, &self.trained, &self.trained_ema] {
            if folder.exists() {
                std::fs::remove_dir_all(folder)?;
            }
        }
        for file in [&self.metrics, &self.picture, &self.result] {
            if file.exists() {
                std::fs::remove_file(file)?;
            }
        }
        Ok(())
    }
}

/// Where rank 0 leaves the run's result.
pub(crate) fn result_file(out: &Path) -> PathBuf {
    out.join("result.json")
}

/// One rank of the run, from start to end.
pub(crate) fn run(world: Arc<dyn Communicator>, options: &Options) -> Result<()> {
    let strategy = Strategy::with_world(options.settings(world.world_size())?, world)?;
    let folders = Folders::new(&options.out());
    let prompts = JsonLines::open(&options.prompts, JsonLinesOptions::default())?;
    let held_out = JsonLines::open(&options.held_out, JsonLinesOptions::default())?;
    say(&strategy, || {
        let settings = strategy.config().summary();
        format!("{} ranks; settings that differ from the defaults:\n{settings}", strategy.world_size())
    });

    if strategy.is_rank_0() && !options.resume {
        folders.begin(options.out.is_some())?;
    }
    // One rank looks for all, after the folder is ready: a file may appear to others later.
    let warm = strategy.is_rank_0().then(|| folders.start.join("model.safetensors").exists());
    if !strategy.world().broadcast_object(warm.as_ref(), 0)? {
        warm_up(&strategy, &folders, &prompts, options)?;
    }

    let mut grpo =
        Grpo::new(&strategy, parts(&strategy, &folders.start, prompts, options.steps, Kind::Policy)?)?;
    let mut client = json!({});
    let mut done_before = Vec::new();
    let resumed = if options.resume { grpo.resume(&folders.checkpoints)? } else { None };
    let mut log = None;
    match resumed {
        Some(loaded) => {
            client = loaded.state.client;
            for skipped in &loaded.report.skipped {
                say(&strategy, || format!("passed over checkpoint {}: {}", skipped.name, skipped.reason));
            }
            if strategy.is_rank_0() {
                let (file, again) = MetricsLog::resume(&folders.metrics, grpo.steps_done())?;
                log = Some(file);
                done_before = again;
            }
            say(&strategy, || {
                let repeat = done_before.len();
                format!("resumed from {}; {repeat} later steps are done again", loaded.report.tag)
            });
            for setting in &loaded.changed {
                say(&strategy, || format!("changed since: {setting}"));
            }
        }
        None => {
            if options.resume {
                say(&strategy, || "no checkpoint to resume from: the run begins".to_owned());
            }
            let before = grpo.evaluate(&held_out, 0..held_out.len())?;
            client["accuracy_before"] = before.into();
            say(&strategy, || format!("held-out accuracy before RL {before:.3}"));
            if strategy.is_rank_0() {
                log = Some(MetricsLog::create(&folders.metrics)?);
            }
        }
    }

    while grpo.steps_done() < options.steps {
        let next = grpo.steps_done() + 1;
        let victim = strategy.rank() == strategy.world_size() - 1 && options.kill_at == Some(next);
        let metrics = grpo.step_with(|| {
            if victim {
                die();
            }
        })?;
        if let Some(log) = log.as_mut() {
            log.append(&serde_json::to_value(&metrics)?)?;
        }
        say(&strategy, || progress(&metrics, options.steps));
        let saved = grpo.save_if_due(&folders.checkpoints, client.clone())?;
        tell_saved(&strategy, saved);
    }
    let last = grpo.finish_saves()?;
    tell_saved(&strategy, last);

    let after = grpo.evaluate(&held_out, 0..held_out.len())?;
    say(&strategy, || format!("held-out accuracy after RL {after:.3}"));
    let beside = HfOptions { source: Some(folders.start.clone()), ..HfOptions::default() };
    strategy.save_model(grpo.actor_mut(), &folders.trained, &beside)?;
    if strategy.config().enable_ema {
        strategy.save_ema_model(grpo.actor_mut(), &folders.trained_ema, &beside)?;
    }
    if strategy.is_rank_0() {
        let lines = MetricsLog::read(&folders.metrics)?;
        draw(&lines, &folders.picture)?;
        let tokens: f64 = lines.iter().filter_map(|l| l["tokens"].as_f64()).sum();
        let seconds: f64 =
            lines.iter().filter_map(|l| Some(l["tokens"].as_f64()? / l["tokens_per_s"].as_f64()?)).sum();
        let result = json!({
            "accuracy_before": client["accuracy_before"],
            "accuracy_after": after,
            "steps": grpo.steps_done(),
            "ranks": strategy.world_size(),
            "tokens_per_s": (tokens / seconds.max(1e-9)).round(),
            "resumed_exactly": same_steps(&done_before, &lines),
        });
        let staged = folders.result.with_extension("tmp");
        std::fs::write(&staged, format!("{result}\n"))?;
        std::fs::rename(&staged, &folders.result)?;
    }
    // No rank leaves while another may still need it.
    strategy.world().barrier()?;
    Ok(())
}

enum Kind {
    /// Trained by supervision: no reference.
    WarmUp,
    Policy,
}

fn parts(
    strategy: &Strategy,
    folder: &Path,
    prompts: JsonLines,
    steps: u64,
    kind: Kind,
) -> Result<GrpoParts> {
    let actor = strategy.prepare_actor(folder)?;
    let reference = match kind {
        Kind::WarmUp => None,
        Kind::Policy => Some(strategy.prepare_reference(folder)?),
    };
    let engine = strategy.prepare_engine(&actor)?;
    Ok(GrpoParts {
        actor,
        reference,
        engine,
        text: Text::from_folder(folder)?,
        prompts,
        reward: Box::new(task::score),
        stop_tokens: vec![task::END],
        total_steps: steps,
    })
}

/// Trains a random model on the answers until it gives some of them, and leaves it in the `start` folder.
fn warm_up(strategy: &Strategy, folders: &Folders, prompts: &JsonLines, options: &Options) -> Result<()> {
    let began = Instant::now();
    // Supervision has no reference, and so no penalty against one.
    let settings = StrategyConfig { use_kl_loss: false, ..strategy.config().clone() };
    let strategy = &Strategy::with_world(settings, Arc::clone(strategy.world()))?;
    let random = &folders.random;
    if strategy.is_rank_0() {
        let config = task::model();
        let weights = Weights::random(&config, strategy.config().seed, 0.08, &candle_core::Device::Cpu)?;
        lightrft_strategy::write_model(random, &config, &weights)?;
        std::fs::write(random.join("tokenizer.json"), task::TOKENIZER)?;
    }
    strategy.world().barrier()?;
    let questions = JsonLines::open(&options.prompts, JsonLinesOptions::default())?;
    let mut run = Grpo::new(strategy, parts(strategy, random, questions, 1, Kind::WarmUp)?)?;
    let text = Text::from_folder(random)?;
    let world = strategy.world_size();
    let probe = prompts.len() - PROBE.min(prompts.len() / 5)..prompts.len();
    let mut sampler = DistributedSampler::new(SamplerConfig {
        len: probe.start,
        rank: strategy.rank(),
        world,
        seed: strategy.config().seed,
        shuffle: Shuffle::TorchExact,
        tail: Tail::Drop,
    })?;
    let per_rank = WARM_UP_BATCH.div_ceil(world);
    let mut accuracy = 0.0;
    let mut steps = 0;
    while steps < options.warm_up_steps && accuracy < WARM_UP_ACCURACY {
        if sampler.remaining() < per_rank as u64 {
            sampler.set_epoch(sampler.epoch() + 1, 0)?;
        }
        let mut pairs = Vec::with_capacity(per_rank);
        for index in sampler.next_indices(per_rank)? {
            let prompt = prompts.get(index)?;
            let mut answer = text.encode(prompt.label.as_deref().unwrap_or_default())?;
            answer.push(task::END);
            pairs.push((text.encode(&prompt.text)?, answer));
        }
        let sequences: Vec<Sequence<'_>> =
            pairs.iter().map(|(prompt, answer)| Sequence { prompt, answer }).collect();
        let lr = WARM_UP_LR * ((steps + 1) as f64 / 20.0).min(1.0);
        let (loss, _) = strategy.supervised_step(run.actor_mut(), &sequences, lr)?;
        steps += 1;
        if steps % 2 == 0 {
            accuracy = run.evaluate(prompts, probe.clone())?;
        }
        if steps % 25 == 0 {
            say(strategy, || format!("warm-up step {steps:3}  loss {loss:.3}  accuracy {accuracy:.3}"));
        }
    }
    let beside = HfOptions { source: Some(random.clone()), ..HfOptions::default() };
    strategy.save_model(run.actor_mut(), &folders.start, &beside)?;
    say(strategy, || {
        let seconds = began.elapsed().as_secs_f64();
        format!("warm-up: {steps} supervised steps in {seconds:.1} s, {accuracy:.3} of a probe answered")
    });
    Ok(())
}

fn progress(m: &StepMetrics, steps: u64) -> String {
    format!(
        "step {:3}/{steps}  reward {:.3}  accuracy {:.3}  kl {:.4}  length {:.2}  {:5.0} tokens/s  \
         generate {:.2} s  score {:.2} s  train {:.2} s  update {:.2} s",
        m.step,
        m.reward,
        m.accuracy,
        m.kl.unwrap_or(f64::NAN),
        m.length,
        m.tokens_per_s,
        m.generate_s,
        m.score_s,
        m.train_s,
        m.update_s
    )
}

/// Whether steps that were done before a kill came out the same, bit for bit, when they were done again. `None` when
/// there were none, or no hashes to tell by.
fn same_steps(before: &[Value], now: &[Value]) -> Option<bool> {
    let hash = |line: &Value| line["parameters_hash"].as_str().map(str::to_owned);
    if before.is_empty() || before.iter().any(|line| hash(line).is_none()) {
        return None;
    }
    let again = |step: &Value| now.iter().find(|line| line["step"] == *step).and_then(hash);
    Some(before.iter().all(|line| again(&line["step"]) == hash(line)))
}

fn draw(lines: &[Value], picture: &Path) -> Result<()> {
    let reward: Vec<f64> = lines.iter().filter_map(|l| l["reward"].as_f64()).collect();
    line_chart(
        picture,
        "Reward",
        "mean reward of a rollout",
        &Series::with_moving_average("reward", &reward, 10),
    )?;
    Ok(())
}

fn tell_saved(strategy: &Strategy, saved: Option<SaveReport>) {
    if let Some(saved) = saved {
        say(strategy, || format!("saved {} ({} KiB)", saved.tag, saved.bytes / 1024));
    }
}

fn say(strategy: &Strategy, line: impl FnOnce() -> String) {
    if strategy.is_rank_0() {
        println!("{}", line());
    }
}

/// The end that a crash, a lost machine or the kernel's memory killer brings: no destructor runs.
fn die() {
    // Failing to kill itself, the rank goes on, and the run says that nothing was resumed.
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
}
