//! Saves beside training: a policy's shards are copied, and written while the run goes on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lightrft_ckpt::{BackgroundSaver, Progress, Rotation, SaveReport, Saver};
use lightrft_collectives::{Communicator, GroupOptions};

use crate::agree::agree;
use crate::checkpoint::{Group, RunState, agreed_snapshot, limits};
use crate::config::StrategyConfig;
use crate::error::{Error, Result};
use crate::prepare::Actor;

/// Saves a policy into one directory while the run goes on. A save blocks for the copy of this rank's shards to host
/// memory; its outcome is told by the next save or by [`finish`](Self::finish).
///
/// Made by [`Strategy::actor_saver`](crate::Strategy::actor_saver). It has the directory to itself until it is dropped,
/// which waits for the save in flight. Its ranks speak on a group of their own, so that the run's calls go on beside it.
#[derive(Debug)]
pub struct ActorSaver {
    saver: BackgroundSaver,
    dir: PathBuf,
    limits: Rotation,
    world: Arc<dyn Communicator>,
}

impl ActorSaver {
    pub(crate) fn new(config: &StrategyConfig, world: &Arc<dyn Communicator>, dir: &Path) -> Result<Self> {
        let ranks: Vec<usize> = (0..world.world_size()).collect();
        let group = world.subgroup_with(&ranks, &GroupOptions::default().exclusive())?;
        let group =
            group.ok_or_else(|| Error::config("the world", "a group of all ranks does not hold this one"))?;
        let opened = Saver::open(dir, &Group(&*group));
        let group = Arc::new(Group(group));
        let saver = opened.and_then(|saver| BackgroundSaver::new(saver, group));
        let saver = agree(&**world, "opening a directory to save to", saver.map_err(Error::from))?;
        Ok(ActorSaver { saver, dir: dir.to_owned(), limits: limits(config), world: world.clone() })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits for the save in flight, then copies this rank's shards and begins to write them. When it returns, the policy
    /// may be trained on. Returns the report of the save before, if that has not been told yet. *Collective.*
    ///
    /// # Errors
    /// [`Error::Checkpoint`], on every rank alike: what is wrong with this save, or the failure of the one before, after
    /// which this one has not begun.
    pub fn save(&mut self, actor: &Actor, state: &RunState) -> Result<Option<SaveReport>> {
        let snapshot = agreed_snapshot(&*self.world, actor, state)?;
        Ok(self.saver.save(&snapshot, &self.limits)?)
    }

    /// Waits for the save in flight and reports it. *Collective.*
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when it failed, on every rank alike.
    pub fn finish(&mut self) -> Result<Option<SaveReport>> {
        Ok(self.saver.finish()?)
    }

    /// How far the save begun last has come on this rank.
    pub fn progress(&self) -> Option<Progress> {
        self.saver.progress()
    }
}
