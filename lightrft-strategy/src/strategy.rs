//! The type users hold: a world of ranks and a configuration that fits it. Each method is a line or two into a file
//! beside this one.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use lightrft_ckpt::HfOptions;
use lightrft_collectives::{Communicator, CommunicatorExt, ReduceOp, Rendezvous};
use lightrft_engine::{Completion, Engine, Request, Version};
use lightrft_sharding::{Offload as _, OffloadReport, loss_scale};

use crate::actor_saver::ActorSaver;
use crate::agree::agree;
use crate::checkpoint::{self, LoadOptions, RunState};
use crate::config::StrategyConfig;
use crate::cores::Cores;
use crate::engine_group::{Between, EngineGroup};
use crate::error::{Error, Result};
use crate::export;
use crate::model::TokenBatch;
use crate::prepare::{self, Actor, Reference};
use crate::step;
use crate::weight_sync;

/// Ranks, their engine groups, and the settings of a run.
#[derive(Debug)]
pub struct Strategy {
    config: StrategyConfig,
    world: Arc<dyn Communicator>,
    engine_group: EngineGroup,
    cores: Cores,
}

impl Strategy {
    /// Joins the ranks that the environment names (those of `torchrun`, Slurm or our launcher; none means a world of
    /// one), and checks the configuration against their number. Embedded engines of several processes on the same cores
    /// divide them, unless `RAYON_NUM_THREADS` says how many threads each process has.
    ///
    /// # Errors
    /// [`Error::Collectives`](crate::Error::Collectives) when the ranks do not meet,
    /// [`Error::Config`](crate::Error::Config) for a contradiction.
    pub fn setup_distributed(config: StrategyConfig) -> Result<Self> {
        let world = Rendezvous::from_env()?.init()?;
        Self::with_world(config, world)
    }

    /// As [`setup_distributed`](Self::setup_distributed), over a world that is there already. *Collective.*
    ///
    /// # Errors
    /// As there.
    pub fn with_world(config: StrategyConfig, world: Arc<dyn Communicator>) -> Result<Self> {
        let mine = config.validate(world.world_size()).map(|()| config.clone());
        let mine = agree(&*world, "reading the settings", mine)?;
        let all: Vec<StrategyConfig> = world.all_gather_object(&mine)?;
        if let Some((rank, other)) = all.iter().enumerate().find(|(_, other)| **other != mine) {
            let fields = mine.differences(other).join(", ");
            return Err(Error::config(
                fields,
                format!("rank {} and rank {rank} have different settings", world.rank()),
            ));
        }
        let engine_group = EngineGroup::new(&*world, config.engine_tp_size)?;
        let cores = Cores::share(&*world, engine_group.is_leader())?;
        Ok(Self { config, world, engine_group, cores })
    }

    /// The settings.
    pub fn config(&self) -> &StrategyConfig {
        &self.config
    }

    /// All ranks.
    pub fn world(&self) -> &Arc<dyn Communicator> {
        &self.world
    }

    /// This rank's place among all.
    pub fn rank(&self) -> usize {
        self.world.rank()
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.world.world_size()
    }

    /// Whether this is the rank that speaks for all.
    pub fn is_rank_0(&self) -> bool {
        self.rank() == 0
    }

    /// Whether this rank holds the engine of its group.
    pub fn holds_engine(&self) -> bool {
        self.engine_group.is_leader()
    }

    /// Backward passes of this rank before each optimizer step.
    pub fn accumulated_gradient(&self) -> usize {
        self.config.accumulated_gradient(self.world_size())
    }

    /// The policy of a model folder, sharded for training, with its optimizer. *Collective.*
    ///
    /// # Errors
    /// What is wrong with the folder, or ranks that found different models.
    pub fn prepare_actor(&self, folder: &Path) -> Result<Actor> {
        prepare::actor(&self.config, &self.world, folder)
    }

    /// The frozen reference of a model folder, sharded. *Collective.*
    ///
    /// # Errors
    /// As [`prepare_actor`](Self::prepare_actor).
    pub fn prepare_reference(&self, folder: &Path) -> Result<Reference> {
        prepare::reference(&self.config, &self.world, folder)
    }

    /// The embedded engine for this policy, without weights yet, on the ranks that hold one.
    ///
    /// # Errors
    /// [`Error::Engine`](crate::Error::Engine).
    pub fn prepare_engine(&self, actor: &Actor) -> Result<Option<Box<dyn Engine>>> {
        prepare::engine(&self.config, self.holds_engine(), self.cores, actor)
    }

    /// Log-probabilities of the batch's targets under the frozen reference, `[rows, cols]`. *Collective.*
    ///
    /// # Errors
    /// [`Error::Sharding`](crate::Error::Sharding).
    pub fn reference_log_probs(&self, reference: &mut Reference, batch: &TokenBatch) -> Result<Vec<f32>> {
        step::log_probs(&mut reference.model, batch)
    }

    /// Log-probabilities of the batch's targets under the policy, `[rows, cols]`, without a gradient. *Collective.*
    ///
    /// # Errors
    /// [`Error::Sharding`](crate::Error::Sharding).
    pub fn policy_log_probs(&self, actor: &mut Actor, batch: &TokenBatch) -> Result<Vec<f32>> {
        step::log_probs(&mut actor.model, batch)
    }

    /// What [`backward`](Self::backward) multiplies a loss by, one over the passes of a step times the ranks:
    /// [`loss_scale`].
    pub fn loss_scale(&self) -> f32 {
        let positive = |count| NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN);
        loss_scale(positive(self.accumulated_gradient()), positive(self.world_size()))
    }

    /// One forward and backward pass. `loss` is given the log-probabilities `[rows, cols]` and returns what it likes,
    /// with the gradient by them; gradients of all ranks and passes add up until
    /// [`optimizer_step`](Self::optimizer_step). *Collective.*
    ///
    /// The loss is the mean over this pass's sequences. Its gradient is multiplied by [`loss_scale`](Self::loss_scale), so
    /// that what adds up is the gradient of the mean over [`train_batch_size`](StrategyConfig::train_batch_size)
    /// sequences, however they were cut.
    ///
    /// Call [`optimizer_step`](Self::optimizer_step) after each pass: in the last one before a step the ranks sum all that they
    /// have not yet, and no pass is taken between that and the step.
    ///
    /// # Errors
    /// The loss' own, or [`Error::Sharding`](crate::Error::Sharding).
    pub fn backward<R>(
        &self,
        actor: &mut Actor,
        batch: &TokenBatch,
        loss: impl FnOnce(&[f32]) -> Result<(R, Vec<f32>)>,
    ) -> Result<R> {
        step::backward(actor, batch, self.accumulated_gradient(), self.loss_scale(), loss)
    }

    /// As [`backward`](Self::backward), for a loss that is divided already by what the batch as a whole calls for, such as
    /// its number of tokens over all passes and ranks: see [`Reduction`](crate::rl::Reduction). *Collective.*
    ///
    /// # Errors
    /// As there.
    pub fn backward_unscaled<R>(
        &self,
        actor: &mut Actor,
        batch: &TokenBatch,
        loss: impl FnOnce(&[f32]) -> Result<(R, Vec<f32>)>,
    ) -> Result<R> {
        step::backward(actor, batch, self.accumulated_gradient(), 1.0, loss)
    }

    /// Clips the global gradient norm and steps AdamW, once enough passes have accumulated. *Collective.*
    ///
    /// # Errors
    /// [`Error::Sharding`](crate::Error::Sharding).
    pub fn optimizer_step(
        &self,
        actor: &mut Actor,
        lr: f64,
    ) -> Result<Option<lightrft_sharding::StepReport>> {
        step::optimizer_step(actor, self.accumulated_gradient(), lr)
    }

    /// Moves the average of the policy towards it, `average <- beta average + (1 - beta) parameter`, where
    /// [`enable_ema`](StrategyConfig::enable_ema) keeps one. Call it once for each optimizer step. (LightRFT calls its own
    /// after each pass, and moves the average after those that stepped.) Each rank moves its shard; nothing is sent.
    ///
    /// # Errors
    /// [`Error::Sharding`](crate::Error::Sharding) for an average of another model.
    pub fn moving_average(&self, actor: &mut Actor) -> Result<()> {
        if let Some(ema) = &mut actor.ema {
            ema.update(actor.model.units())?;
        }
        Ok(())
    }

    /// Lets the optimizer's state leave the device until [`maybe_load_optimizer`](Self::maybe_load_optimizer), where
    /// [`adam_offload`](StrategyConfig::adam_offload) asks for it: `None` where it does not. A step in between is refused.
    /// State in host memory is where it would go, and costs nothing.
    ///
    /// # Errors
    /// [`Error::Sharding`](crate::Error::Sharding).
    pub fn maybe_offload_optimizer(&self, actor: &mut Actor) -> Result<Option<OffloadReport>> {
        let offload = || actor.optimizer.offload();
        Ok(self.config.adam_offload.then(offload).transpose()?)
    }

    /// Takes the optimizer's state back; `None` where nothing asks for its offload.
    ///
    /// # Errors
    /// [`Error::Sharding`](crate::Error::Sharding).
    pub fn maybe_load_optimizer(&self, actor: &mut Actor) -> Result<Option<OffloadReport>> {
        let reload = || actor.optimizer.reload();
        Ok(self.config.adam_offload.then(reload).transpose()?)
    }

    /// Hands the requests of an engine group to its engine and each rank its own completions back. `engine` is given
    /// where [`holds_engine`](Self::holds_engine). *Collective over the engine group.*
    ///
    /// # Errors
    /// The engine's, on every rank of its group.
    pub fn gather_and_generate(
        &self,
        engine: Option<&mut (dyn Engine + 'static)>,
        requests: &[Request],
    ) -> Result<Vec<Completion>> {
        let between = if self.config.enable_engine_sleep { Between::Asleep } else { Between::Awake };
        self.engine_group.generate(engine, requests, between)
    }

    /// Streams the policy's parameters into the engine as one transaction, unit by unit, as the policy computes with them:
    /// in [`param_dtype`](StrategyConfig::param_dtype). *Collective.*
    ///
    /// # Errors
    /// The engine's, on every rank; it is then stale until an update succeeds.
    pub fn update_engine_weights(
        &self,
        actor: &mut Actor,
        engine: Option<&mut (dyn Engine + 'static)>,
        version: Version,
    ) -> Result<()> {
        weight_sync::update(&*self.world, actor, engine, version)
    }

    /// Saves parameters, optimizer and run state, and rotates old checkpoints out. *Collective.*
    ///
    /// # Errors
    /// [`Error::Checkpoint`](crate::Error::Checkpoint), on every rank alike.
    pub fn save_ckpt(
        &self,
        actor: &Actor,
        dir: &Path,
        state: &RunState,
    ) -> Result<lightrft_ckpt::SaveReport> {
        checkpoint::save(&self.config, &self.world, actor, dir, state)
    }

    /// What saves checkpoints into a directory while the run goes on. It is the one saver of that directory while it
    /// lives. *Collective.*
    ///
    /// # Errors
    /// As of [`save_ckpt`](Self::save_ckpt), when the directory cannot be had.
    pub fn actor_saver(&self, dir: &Path) -> Result<ActorSaver> {
        ActorSaver::new(&self.config, &self.world, dir)
    }

    /// Loads the newest whole checkpoint, all of it, or nothing when there is none. *Collective.*
    ///
    /// # Errors
    /// [`Error::Checkpoint`](crate::Error::Checkpoint); for a checkpoint of another model it names the tensors that
    /// differ, and nothing has been loaded. Every byte is verified before anything is loaded; a disk that fails after that,
    /// on any rank, is an error on all of them, and the policy is then partly loaded and of no use.
    pub fn load_ckpt(&self, actor: &mut Actor, dir: &Path) -> Result<Option<checkpoint::Loaded>> {
        self.load_ckpt_with(actor, dir, &LoadOptions::default())
    }

    /// As [`load_ckpt`](Self::load_ckpt), of the checkpoint and with the parts that the options name; `None` when there
    /// is no checkpoint and none was asked for by its tag. *Collective.*
    ///
    /// # Errors
    /// As there.
    pub fn load_ckpt_with(
        &self,
        actor: &mut Actor,
        dir: &Path,
        options: &LoadOptions<'_>,
    ) -> Result<Option<checkpoint::Loaded>> {
        checkpoint::load(&self.world, actor, dir, options, |_, _| Ok(()))
    }

    /// Writes the policy as a Hugging Face folder: `config.json`, safetensors in as many files as the options say and in
    /// the dtype they say, and copies of the tokenizer files of their source. One unit is in memory at a time.
    /// *Collective.*
    ///
    /// # Errors
    /// On every rank, when rank 0 cannot write; also when the folder is there and holds something that would be lost.
    pub fn save_model(&self, actor: &mut Actor, folder: &Path, options: &HfOptions) -> Result<()> {
        export::save_model(&self.world, &mut actor.model, folder, options)
    }

    /// As [`save_model`](Self::save_model), with the moving average in place of the parameters that learn. The policy is
    /// afterwards as it was. *Collective.*
    ///
    /// # Errors
    /// As there; [`Error::Config`] where no average is kept.
    pub fn save_ema_model(&self, actor: &mut Actor, folder: &Path, options: &HfOptions) -> Result<()> {
        export::save_ema_model(&self.world, actor, folder, options)
    }

    /// The mean of each value over ranks, in one call. *Collective.*
    ///
    /// # Errors
    /// [`Error::Collectives`](crate::Error::Collectives).
    pub fn all_reduce_mean(&self, values: &mut [f64]) -> Result<()> {
        Ok(self.world.all_reduce(values, ReduceOp::Mean)?)
    }
}
