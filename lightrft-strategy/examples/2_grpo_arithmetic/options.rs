//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::prelude::*;
use lightrft_strategy::StrategyConfig;

pub(crate) const HELP: &str = "\
GRPO on sums: a small language model learns arithmetic by reinforcement learning.

  --ranks N       processes that share the work (2); under torchrun its number counts
  --steps N       rollouts with their updates (450)
  --seed N        seeds the model, the order of prompts and every sampled token (1)
  --out DIR       where checkpoints, metrics and pictures go (target/demo, begun anew each time)
  --resume        go on from the newest checkpoint in DIR
  --kill-at N     kill a rank with SIGKILL in the middle of step N, then resume; 0 for no kill
                  (in the middle of the run)
  --warm-up N     supervised steps before RL, at most (1000); they end when some questions are answered
  --prompts FILE  questions to train on, JSON Lines of {\"prompt\": ..., \"label\": ...}
  --held-out FILE questions to evaluate on
  --config FILE   TOML of settings that replace the example's
  --help          this text";

/// What the command line asks for.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) ranks: usize,
    pub(crate) steps: u64,
    /// Replaces that of `--config`.
    pub(crate) seed: Option<u64>,
    pub(crate) out: Option<PathBuf>,
    pub(crate) resume: bool,
    pub(crate) kill_at: Option<u64>,
    pub(crate) warm_up_steps: usize,
    pub(crate) prompts: PathBuf,
    pub(crate) held_out: PathBuf,
    pub(crate) config: Option<PathBuf>,
    /// Set for the ranks that this program starts itself.
    pub(crate) launched_here: bool,
}

impl Options {
    /// Reads the command line; `None` when help was asked for.
    pub(crate) fn parse() -> Result<Option<Self>, lexopt::Error> {
        let mut options = Self {
            ranks: 2,
            steps: 450,
            seed: None,
            out: None,
            resume: false,
            kill_at: None,
            warm_up_steps: 1000,
            prompts: crate::task::training_file(),
            held_out: crate::task::held_out_file(),
            config: None,
            launched_here: false,
        };
        let mut parser = lexopt::Parser::from_env();
        while let Some(argument) = parser.next()? {
            match argument {
                Long("ranks") => options.ranks = parser.value()?.parse()?,
                Long("steps") => options.steps = parser.value()?.parse()?,
                Long("seed") => options.seed = Some(parser.value()?.parse()?),
                Long("out") => options.out = Some(parser.value()?.into()),
                Long("resume") => options.resume = true,
                Long("kill-at") => options.kill_at = Some(parser.value()?.parse()?),
                Long("warm-up") => options.warm_up_steps = parser.value()?.parse()?,
                Long("prompts") => options.prompts = parser.value()?.into(),
                Long("held-out") => options.held_out = parser.value()?.into(),
                Long("config") => options.config = Some(parser.value()?.into()),
                Long("launched-here") => options.launched_here = true,
                Long("help") | Short('h') => return Ok(None),
                other => return Err(other.unexpected()),
            }
        }
        if options.ranks == 0 || options.steps == 0 {
            return Err("--ranks and --steps must be at least 1".into());
        }
        Ok(Some(options))
    }

    /// The command line of a rank with these options.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let mut list: Vec<OsString> = Vec::new();
        let mut add = |name: &str, value: OsString| list.extend([name.into(), value]);
        add("--ranks", self.ranks.to_string().into());
        add("--steps", self.steps.to_string().into());
        if let Some(seed) = self.seed {
            add("--seed", seed.to_string().into());
        }
        add("--kill-at", self.kill_at.unwrap_or(0).to_string().into());
        add("--warm-up", self.warm_up_steps.to_string().into());
        add("--prompts", self.prompts.clone().into());
        add("--held-out", self.held_out.clone().into());
        for (name, path) in [("--out", &self.out), ("--config", &self.config)] {
            if let Some(path) = path {
                add(name, path.into());
            }
        }
        if self.resume {
            list.push("--resume".into());
        }
        list.push("--launched-here".into());
        list
    }

    /// The run's settings for a world of `ranks`: those of `--config`, or the example's own.
    pub(crate) fn settings(&self, ranks: usize) -> lightrft_strategy::Result<StrategyConfig> {
        let mut settings = match &self.config {
            Some(file) => StrategyConfig::from_file(file)?,
            None => crate::task::settings(1, ranks, self.steps),
        };
        settings.seed = self.seed.unwrap_or(settings.seed);
        Ok(settings)
    }

    /// The output folder.
    pub(crate) fn out(&self) -> PathBuf {
        self.out.clone().unwrap_or_else(|| PathBuf::from("target/demo"))
    }

    /// In which step a rank is killed, with checkpoints every so many steps: by custom a few steps after one near the
    /// middle, so that the resumed run does some steps again that can be compared.
    pub(crate) fn kill_step(&self, save_steps: usize) -> Option<u64> {
        let every = save_steps as u64;
        match self.kill_at {
            Some(0) => None,
            Some(step) => Some(step),
            None if self.resume || every < 2 || self.steps < 3 * every => None,
            None => Some(self.steps / 2 / every * every + every.div_ceil(2) + 1),
        }
    }
}
