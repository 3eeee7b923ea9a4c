//! Which state goes into a checkpoint, and how it comes back, also onto another number of ranks.

use std::error::Error as StdError;
use std::path::Path;
use std::sync::Arc;

use lightrft_ckpt::{
    Agreement, Checkpoint, Checkpoints, Dtype, LoadReport, Part, Region, Rotation, SaveReport, Saver,
    Snapshot, Verify, Which,
};
use lightrft_collectives::{Communicator, CommunicatorExt};
use lightrft_data::SamplerState;
use lightrft_sharding::{AdamWCounters, Ema, EmaCounters, StateKind, load_state, state_parts};
use serde::{Deserialize, Serialize};

use crate::config::StrategyConfig;
use crate::error::{Error, Result};
use crate::prepare::Actor;

/// What a run needs besides tensors to go on exactly where it stopped.
///
/// There is no generator to save: every sampled token is a function of the seed, the step, the prompt, the sample and
/// the position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// Rollouts done.
    pub step: u64,
    /// Optimizer steps done: the learning rate's schedule stands here.
    pub updates: u64,
    /// Rollouts of the whole run, which the learning rate's schedule spans.
    pub total_steps: u64,
    /// The settings it was made with.
    pub settings: StrategyConfig,
    /// Position in the prompts.
    pub sampler: SamplerState,
    /// What the program that drives the run wants back, LightRFT's `client_state`.
    pub client: serde_json::Value,
}

/// A checkpoint that was loaded.
#[derive(Debug)]
pub struct Loaded {
    /// Where the run stood.
    pub state: RunState,
    /// Which checkpoint it was, and which damaged ones were passed over.
    pub report: LoadReport,
    /// Settings that differ from those of the run that saved it, with both values: what keeps the resumed run from
    /// being exactly that run's.
    pub changed: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Shared {
    run: RunState,
    optimizer_steps: u64,
    optimizer_skipped: u64,
    /// Of the moving average, where one is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ema: Option<EmaCounters>,
}

/// A process group as the agreement that checkpoints ask for.
struct Group<'a>(&'a dyn Communicator);

impl Agreement for Group<'_> {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn world_size(&self) -> usize {
        self.0.world_size()
    }

    fn exchange(&self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, Box<dyn StdError + Send + Sync>> {
        Ok(self.0.all_gather_v(&mine)?)
    }
}

/// The tensor's name in a checkpoint: the parameter's own, or the optimizer's or the average's for it.
fn tensor_name(kind: StateKind, parameter: &str) -> String {
    match kind {
        StateKind::Param => parameter.to_owned(),
        StateKind::Ema => format!("ema.{parameter}"),
        other => format!("optimizer.{}.{parameter}", other.as_str()),
    }
}

pub(crate) fn save(
    config: &StrategyConfig,
    world: &Arc<dyn Communicator>,
    actor: &Actor,
    dir: &Path,
    state: &RunState,
) -> Result<SaveReport> {
    let group = Group(&**world);
    let counters = actor.optimizer.counters();
    let shared = Shared {
        run: state.clone(),
        optimizer_steps: counters.steps,
        optimizer_skipped: counters.skipped,
        ema: actor.ema.as_ref().map(Ema::counters),
    };
    let mut snapshot = Snapshot::of_step(state.step);
    snapshot.shared = serde_json::to_value(&shared)
        .map_err(|e| Error::Resume { tag: snapshot.tag.clone(), what: e.to_string() })?;
    let average = actor.ema.iter().flat_map(Ema::state_parts);
    for part in state_parts(actor.model.units(), Some(&actor.optimizer)).into_iter().chain(average) {
        let name = tensor_name(part.kind, part.param.name());
        snapshot.parts.push(Part::new(name, part.param.shape(), Region::Flat(part.range), part.values));
    }
    let limits =
        Rotation { max_num: config.max_ckpt_num, max_mem_gib: config.max_ckpt_mem, ..Rotation::default() };
    Ok(Saver::open(dir, &group)?.save(&group, &snapshot, &limits)?)
}

/// Loads the newest whole checkpoint. `check` sees its state before anything of the policy changes.
pub(crate) fn load(
    world: &Arc<dyn Communicator>,
    actor: &mut Actor,
    dir: &Path,
    check: impl FnOnce(&str, &RunState) -> Result<()>,
) -> Result<Option<Loaded>> {
    let group = Group(&**world);
    let (checkpoint, report) =
        match Checkpoints::open(dir).load_together(&group, Which::Newest, Verify::Everything) {
            Ok(found) => found,
            Err(lightrft_ckpt::Error::NoCheckpoint { skipped, .. }) if skipped.is_empty() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
    let wrong = |what: String| Error::Resume { tag: checkpoint.tag().to_owned(), what };
    check_tensors(actor, &checkpoint)?;
    let shared: Shared = serde_json::from_value(checkpoint.shared().clone())
        .map_err(|e| wrong(format!("its state cannot be read: {e}")))?;
    check(checkpoint.tag(), &shared.run)?;
    let Actor { model, optimizer, ema, accumulated } = actor;
    load_state(model.units_mut(), Some(optimizer), |kind, param, range, into| {
        checkpoint.read_into(&tensor_name(kind, param.name()), &Region::Flat(range), into)
    })?;
    optimizer
        .set_counters(AdamWCounters { steps: shared.optimizer_steps, skipped: shared.optimizer_skipped });
    match (ema, shared.ema) {
        (Some(ema), Some(counters)) => {
            ema.load_state(|param, range, into| {
                let name = tensor_name(StateKind::Ema, param.name());
                checkpoint.read_into(&name, &Region::Flat(range), into)
            })?;
            ema.set_counters(counters);
        }
        // A run that had none: the average begins here.
        (Some(ema), None) => {
            ema.copy_from(model.units())?;
            ema.set_counters(EmaCounters::default());
        }
        (None, _) => {}
    }
    // What a step that failed had accumulated belongs to other parameters.
    model.units_mut().zero_gradients();
    *accumulated = 0;
    Ok(Some(Loaded { state: shared.run, report, changed: Vec::new() }))
}

/// Compares names and shapes before anything is read, so that a refusal leaves the policy as it was.
fn check_tensors(actor: &Actor, checkpoint: &Checkpoint) -> Result<()> {
    let plan = actor.model.units().plan();
    // One that this run does not keep is passed over, one that it keeps and the checkpoint has not begins anew.
    let has_average = checkpoint.shared()["ema"].is_object();
    let mut expected = Vec::new();
    for param in plan.units().iter().flat_map(|unit| unit.params()) {
        // Of what is frozen there is no optimizer state, and no average.
        let kinds = [StateKind::Param, StateKind::ExpAvg, StateKind::ExpAvgSq, StateKind::Ema];
        let count = match (param.is_trainable(), has_average) {
            (false, _) => 1,
            (true, false) => 3,
            (true, true) => 4,
        };
        for kind in kinds.into_iter().take(count) {
            expected.push((tensor_name(kind, param.name()), param.shape()));
        }
    }
    Ok(checkpoint.check_against(expected.iter().map(|(name, shape)| (name.as_str(), Dtype::F32, *shape)))?)
}
