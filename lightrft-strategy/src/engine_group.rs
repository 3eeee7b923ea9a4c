//! Prompts of the ranks that share an engine go to it together, and each rank gets its own completions back.

use std::sync::Arc;
use std::time::Duration;

use lightrft_collectives::{Communicator, CommunicatorExt};
use lightrft_engine::{Completion, Engine, Level, Parts, Request, Watch};

use crate::error::{Error, Result};

/// How long an engine may generate: less than ranks wait for each other, so that they hear why.
const DEADLINE: Duration = Duration::from_secs(30 * 60);

/// What the engine does between rollouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Between {
    /// It stays awake, with its weights.
    Awake,
    /// It wakes to generate, and drops its weights after.
    Asleep,
}

/// Consecutive ranks that share one engine, held by the first of them.
#[derive(Debug)]
pub(crate) struct EngineGroup {
    group: Arc<dyn Communicator>,
}

/// One rank's completions, or why the engine gave none: what the leader sends to each member.
type Answer = std::result::Result<Vec<Completion>, String>;

impl EngineGroup {
    /// Cuts the world into groups of `size` consecutive ranks. *Collective over the world.*
    pub(crate) fn new(world: &dyn Communicator, size: usize) -> Result<Self> {
        let mut mine = None;
        for first in (0..world.world_size()).step_by(size) {
            let ranks: Vec<usize> = (first..first + size).collect();
            if let Some(group) = world.subgroup(&ranks)? {
                mine = Some(group);
            }
        }
        match mine {
            Some(group) => Ok(Self { group }),
            None => Err(Error::config(
                format!("engine_tp_size = {size}, world size = {}", world.world_size()),
                "the second must be a multiple of the first",
            )),
        }
    }

    pub(crate) fn is_leader(&self) -> bool {
        self.group.rank() == 0
    }

    /// Generates for all members.
    pub(crate) fn generate(
        &self,
        engine: Option<&mut (dyn Engine + 'static)>,
        requests: &[Request],
        between: Between,
    ) -> Result<Vec<Completion>> {
        if self.group.world_size() == 1 {
            return run(engine, requests, between);
        }
        let gathered = self.group.gather_object(&requests.to_vec(), 0)?;
        // The leader keeps its error; the others wait for an answer, and get its text.
        let mut failed = None;
        let parts: Option<Vec<Answer>> = gathered.map(|per_rank| {
            let all: Vec<Request> = per_rank.iter().flatten().cloned().collect();
            match run(engine, &all, between) {
                Ok(completions) => split(completions, &per_rank).into_iter().map(Ok).collect(),
                Err(error) => {
                    let what = error.to_string();
                    failed = Some(error);
                    per_rank.iter().map(|_| Err(what.clone())).collect()
                }
            }
        });
        let answer: Answer = self.group.scatter_object(parts.as_deref(), 0)?;
        if let Some(error) = failed {
            return Err(error);
        }
        let leader = self.group.ranks().first().copied().unwrap_or(0);
        answer.map_err(|what| Error::OtherRank { rank: leader, phase: "generation", what })
    }
}

/// Generates on this rank's engine.
fn run(
    engine: Option<&mut (dyn Engine + 'static)>,
    requests: &[Request],
    between: Between,
) -> Result<Vec<Completion>> {
    let engine = engine.ok_or_else(|| {
        Error::config("engine = none", "the first rank of an engine group must hold the engine")
    })?;
    if between == Between::Asleep {
        engine.wake(Parts::All)?;
    }
    let completions = engine.generate(requests, &mut Watch::within(DEADLINE))?;
    if between == Between::Asleep {
        // The weights are about to be outdated: dropping them costs nothing, and frees the most.
        engine.sleep(Level::Two)?;
    }
    Ok(completions)
}

/// Cuts completions of all requests into those of each rank, their request indices counted from the rank's first.
fn split(completions: Vec<Completion>, per_rank: &[Vec<Request>]) -> Vec<Vec<Completion>> {
    let mut parts: Vec<Vec<Completion>> = per_rank.iter().map(|_| Vec::new()).collect();
    let starts: Vec<usize> = per_rank
        .iter()
        .scan(0, |start, requests| {
            let this = *start;
            *start += requests.len();
            Some(this)
        })
        .collect();
    for mut completion in completions {
        // The last rank that starts at or before the request; ranks without requests start where the next one does.
        let rank = starts.partition_point(|start| *start <= completion.request).saturating_sub(1);
        if let (Some(start), Some(part)) = (starts.get(rank), parts.get_mut(rank)) {
            completion.request -= start;
            part.push(completion);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use lightrft_engine::{FinishReason, Sampling, Version};

    #[test]
    fn every_rank_gets_its_own_completions_in_order() {
        let request = || Request::new([1], Sampling::default()).samples(2);
        let per_rank = vec![vec![request()], vec![], vec![request(), request()]];
        let completion = |request, sample| Completion {
            request,
            sample,
            tokens: vec![request as u32],
            log_probs: vec![],
            finish: FinishReason::Length,
            version: Version(1),
        };
        let all = (0..3).flat_map(|r| (0..2).map(move |s| completion(r, s))).collect();
        let parts = split(all, &per_rank);
        assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [2, 0, 4]);
        assert!(parts[2].iter().map(|c| (c.request, c.tokens[0])).eq([(0, 1), (0, 1), (1, 2), (1, 2)]));
    }
}
