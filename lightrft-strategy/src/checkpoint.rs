//! Which state goes into a checkpoint, and how it comes back, also onto another number of ranks.

use std::collections::BTreeSet;
use std::error::Error as StdError;
use std::path::Path;
use std::sync::Arc;

use lightrft_ckpt::{
    Agreement, Checkpoint, Checkpoints, Dtype, LoadReport, Mismatch, Part, Region, Rotation, SaveReport,
    Saver, Snapshot, Verify, Which,
};
use lightrft_collectives::{Communicator, CommunicatorExt};
use lightrft_data::SamplerState;
use lightrft_sharding::{AdamWCounters, Ema, EmaCounters, FlatParam, StateKind, load_state, state_parts};
use serde::{Deserialize, Serialize};

use crate::agree::agree;
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

/// What of a checkpoint is loaded, in the words of DeepSpeed's `load_checkpoint`, to which LightRFT passes them on.
///
/// The default is all of the newest whole checkpoint, strictly: what a run needs to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions<'a> {
    /// Which checkpoint.
    pub which: Which<'a>,
    /// Whether every tensor must be in the checkpoint, and none besides. Otherwise those that are missing keep their
    /// values, and [`Loaded`] lists them; another shape is refused in any case.
    pub load_module_strict: bool,
    /// Whether AdamW's moments and counters are loaded. Otherwise they stay as they are.
    pub load_optimizer_states: bool,
    /// Whether the learning rate goes on where it stood. Otherwise [`RunState::updates`] is 0: its schedule begins anew.
    pub load_lr_scheduler_states: bool,
    /// Whether the parameters are all that is loaded: no optimizer, no schedule, no moving average.
    pub load_module_only: bool,
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        LoadOptions {
            which: Which::Newest,
            load_module_strict: true,
            load_optimizer_states: true,
            load_lr_scheduler_states: true,
            load_module_only: false,
        }
    }
}

impl LoadOptions<'_> {
    fn loads(&self, kind: StateKind) -> bool {
        match kind {
            StateKind::Param => true,
            StateKind::ExpAvg | StateKind::ExpAvgSq => self.load_optimizer_states && !self.load_module_only,
            StateKind::Ema => !self.load_module_only,
        }
    }
}

/// A checkpoint that was loaded.
#[derive(Debug)]
pub struct Loaded {
    /// Where the run stood.
    pub state: RunState,
    /// Tensors that are not in the checkpoint and kept their values; none when it was loaded strictly.
    pub missing: Vec<String>,
    /// Tensors of the checkpoint that this policy has not; none when it was loaded strictly.
    pub unexpected: Vec<String>,
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
pub(crate) struct Group<C>(pub(crate) C);

impl<C: std::ops::Deref<Target = dyn Communicator>> Agreement for Group<C> {
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

pub(crate) fn limits(config: &StrategyConfig) -> Rotation {
    Rotation { max_num: config.max_ckpt_num, max_mem_gib: config.max_ckpt_mem, ..Rotation::default() }
}

/// What this rank saves. A snapshot that one rank cannot make is an error on all. *Collective.*
pub(crate) fn agreed_snapshot<'a>(
    world: &dyn Communicator,
    actor: &'a Actor,
    state: &RunState,
) -> Result<Snapshot<'a>> {
    agree(world, "gathering what to save", snapshot(actor, state))
}

/// This rank's shards, and the state that all share.
fn snapshot<'a>(actor: &'a Actor, state: &RunState) -> Result<Snapshot<'a>> {
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
    Ok(snapshot)
}

pub(crate) fn save(
    config: &StrategyConfig,
    world: &Arc<dyn Communicator>,
    actor: &Actor,
    dir: &Path,
    state: &RunState,
) -> Result<SaveReport> {
    let group = Group(&**world);
    let snapshot = agreed_snapshot(&**world, actor, state)?;
    let saver = Saver::open(dir, &group)?;
    Ok(saver.save(&group, &snapshot, &limits(config))?)
}

/// Loads a whole checkpoint. `check` sees its state before anything of the policy changes.
pub(crate) fn load(
    world: &Arc<dyn Communicator>,
    actor: &mut Actor,
    dir: &Path,
    options: &LoadOptions<'_>,
    check: impl FnOnce(&str, &RunState) -> Result<()>,
) -> Result<Option<Loaded>> {
    let group = Group(&**world);
    let (checkpoint, report) =
        match Checkpoints::open(dir).load_together(&group, options.which, Verify::Everything) {
            Ok(found) => found,
            Err(lightrft_ckpt::Error::NoCheckpoint { skipped, .. }) if skipped.is_empty() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
    let wrong = |what: String| Error::Resume { tag: checkpoint.tag().to_owned(), what };
    let differences = check_tensors(actor, &checkpoint, options)?;
    let shared: Shared = serde_json::from_value(checkpoint.shared().clone())
        .map_err(|e| wrong(format!("its state cannot be read: {e}")))?;
    check(checkpoint.tag(), &shared.run)?;
    let mut run = shared.run;
    let Actor { model, optimizer, ema, accumulated } = actor;
    let read = |kind, param: &FlatParam, range, into: &mut [f32]| {
        let name = tensor_name(kind, param.name());
        // In host memory, what is not overwritten stays.
        if differences.missing.contains(&name) {
            return Ok(());
        }
        checkpoint.read_into(&name, &Region::Flat(range), into)
    };
    let moments = options.loads(StateKind::ExpAvg);
    let mut average = ema.as_mut().filter(|_| options.loads(StateKind::Ema));
    let mut read_all = || -> Result<()> {
        load_state(model.units_mut(), moments.then_some(&mut *optimizer), read)?;
        match (average.as_deref_mut(), &shared.ema) {
            (Some(ema), Some(_)) => {
                ema.load_state(|param, range, into| read(StateKind::Ema, param, range, into))?;
            }
            // A run that had none: the average begins here.
            (Some(ema), None) => ema.copy_from(model.units())?,
            (None, _) => {}
        }
        Ok(())
    };
    // A disk may fail one rank now, after all have verified: none goes on with a policy that another has not.
    agree(&**world, "loading a checkpoint", read_all())?;
    if moments {
        let (steps, skipped) = (shared.optimizer_steps, shared.optimizer_skipped);
        optimizer.set_counters(AdamWCounters { steps, skipped });
    }
    if options.load_module_only || !options.load_lr_scheduler_states {
        run.updates = 0;
    }
    if let Some(ema) = average {
        ema.set_counters(shared.ema.unwrap_or_default());
    }
    // What a step that failed had accumulated belongs to other parameters.
    model.units_mut().zero_gradients();
    *accumulated = 0;
    let Mismatch { missing, unexpected, .. } = differences;
    Ok(Some(Loaded { state: run, missing, unexpected, report, changed: Vec::new() }))
}

/// Compares names and shapes before anything is read, so that a refusal leaves the policy as it was. Returns the
/// differences that the options allow.
fn check_tensors(actor: &Actor, checkpoint: &Checkpoint, options: &LoadOptions<'_>) -> Result<Mismatch> {
    let plan = actor.model.units().plan();
    // One that this run does not keep is passed over, one that it keeps and the checkpoint has not begins anew.
    let has_average = checkpoint.shared()["ema"].is_object();
    let kinds = [StateKind::Param, StateKind::ExpAvg, StateKind::ExpAvgSq, StateKind::Ema];
    let mut expected = Vec::new();
    let mut passed_over = BTreeSet::new();
    for param in plan.units().iter().flat_map(|unit| unit.params()) {
        // Of what is frozen there is no optimizer state, and no average.
        let count = match (param.is_trainable(), has_average) {
            (false, _) => 1,
            (true, false) => 3,
            (true, true) => 4,
        };
        for kind in kinds.into_iter().take(count) {
            let name = tensor_name(kind, param.name());
            if options.loads(kind) {
                expected.push((name, param.shape()));
            } else {
                passed_over.insert(name);
            }
        }
    }
    let expected = expected.iter().map(|(name, shape)| (name.as_str(), Dtype::F32, *shape));
    let mut differences = match checkpoint.check_against(expected) {
        Ok(()) => return Ok(Mismatch::default()),
        Err(lightrft_ckpt::Error::Mismatch(differences)) => *differences,
        Err(error) => return Err(error.into()),
    };
    differences.unexpected.retain(|name| !passed_over.contains(name));
    let same_names = differences.missing.is_empty() && differences.unexpected.is_empty();
    if differences.differing.is_empty() && (same_names || !options.load_module_strict) {
        return Ok(differences);
    }
    Err(lightrft_ckpt::Error::Mismatch(Box::new(differences)).into())
}
