//! A call of `generate`: steps of the schedule, from prompts to completions.

use std::sync::Arc;

use super::cpu::Team;
use super::pages::Pages;
use super::sampling::{Draw, DrawKey, Past, Sampler, Unusable, uniform};
use super::schedule::{Row, Schedule};
use super::step::{Forward, Step};
use super::stop::{Detokenize, Stops};
use crate::{Completion, Error, FinishReason, LogProbs, Progress, Request, Result, Version, Watch};

/// What completions are drawn with.
#[derive(Debug)]
pub(super) struct Drive<'a> {
    pub(super) team: &'a Team,
    pub(super) pages: &'a mut Pages,
    pub(super) detokenizer: Option<&'a dyn Detokenize>,
    pub(super) max_sequences: usize,
    pub(super) version: Version,
}

impl Drive<'_> {
    /// Draws every completion, in steps of about `step_columns`; they come in the order in which they end.
    pub(super) fn run(
        self,
        model: &mut impl Forward,
        step_columns: usize,
        requests: &[Request],
        watch: &mut Watch<'_>,
    ) -> Result<Vec<Completion>> {
        let total = requests.iter().fold(0_usize, |n, r| n.saturating_add(r.samples));
        let mut progress = Progress { total, ..Progress::default() };
        watch.report(progress)?;
        let mut schedule = Schedule::new(requests, self.max_sequences, step_columns);
        let mut completions = Vec::new();
        let (mut steps, mut columns) = (0_usize, 0_usize);
        while !schedule.is_over() {
            schedule.admit(self.pages);
            let batch = schedule.compose(self.pages);
            if !batch.columns.is_empty() {
                model.step(&Step {
                    pages: self.pages.count(),
                    copies: &batch.copies,
                    columns: &batch.columns,
                    tables: &schedule.tables(&batch),
                    wanted: &batch.wanted,
                })?;
            }
            let model = &*model;
            let copy = |column| Arc::from(model.logits(column, &mut Vec::new()));
            let due = schedule.computed(&batch, self.pages, copy);
            let drawn = self.team.enter(|| self.draw(requests, schedule.rows(), &due, model));
            let mut ended = Vec::new();
            let mut finishes = Vec::new();
            for ((at, _), drawn) in due.iter().zip(drawn) {
                let row = schedule.row_mut(*at);
                if let Some(finish) = self.take(row, requests, drawn)? {
                    ended.push(*at);
                    finishes.push(finish);
                }
                progress.tokens += 1;
            }
            for (row, finish) in
                schedule.leave(&ended, self.pages).into_iter().zip(finishes.into_iter().rev())
            {
                let Row { request, sample, tokens, log_probs, .. } = row;
                completions.push(Completion {
                    request,
                    sample: requests[request].first_sample + sample,
                    tokens,
                    log_probs,
                    finish,
                    version: self.version,
                });
            }
            progress.done = completions.len();
            steps += 1;
            columns += batch.columns.len();
            watch.report(progress)?;
        }
        let (tokens, preemptions) = (progress.tokens, schedule.preemptions());
        tracing::debug!(completions = total, tokens, steps, columns, preemptions, "generated");
        Ok(completions)
    }

    fn draw(
        &self,
        requests: &[Request],
        rows: &[Row],
        due: &[(usize, Option<usize>)],
        model: &impl Forward,
    ) -> Vec<Result<Draw, Unusable>> {
        let mut drawn = vec![Err(Unusable::NothingLeft); due.len()];
        let jobs: Vec<_> = due.iter().zip(&mut drawn).collect();
        let work = due.len() * model.vocabulary() * 16;
        self.team.each(work, jobs, <(Sampler, Vec<f32>)>::default, |(sampler, copy), ((at, column), to)| {
            let row = &rows[*at];
            let request = &requests[row.request];
            let logits = match (column, &row.logits) {
                (None, Some(shared)) => shared,
                (column, _) => model.logits(column.unwrap_or(0), copy),
            };
            let u = uniform(DrawKey {
                seed: request.sampling.seed,
                request: request.id.unwrap_or(row.request as u64),
                sample: (request.first_sample + row.sample) as u32,
                position: row.tokens.len() as u32,
            });
            let past = Past { prompt: &request.prompt, completion: &row.tokens };
            *to = sampler.draw(logits, &request.sampling, past, u);
        });
        drawn
    }

    /// Adds a drawn token to its row, and says why the row ends if it does.
    fn take(
        &self,
        row: &mut Row,
        requests: &[Request],
        drawn: Result<Draw, Unusable>,
    ) -> Result<Option<FinishReason>> {
        let sampling = &requests[row.request].sampling;
        let drawn = drawn.map_err(|unusable| Error::Logits {
            request: row.request,
            sample: requests[row.request].first_sample + row.sample,
            position: row.tokens.len(),
            reason: unusable.to_string(),
        })?;
        row.logits = None;
        row.tokens.push(drawn.token);
        match sampling.log_probs {
            LogProbs::None => {}
            LogProbs::Raw => row.log_probs.push(drawn.raw_log_prob),
            LogProbs::Processed => row.log_probs.push(drawn.processed_log_prob),
        }
        if sampling.stop_tokens.contains(&drawn.token) {
            return Ok(Some(FinishReason::Stop(drawn.token)));
        }
        if let (false, Some(detokenizer)) = (sampling.stop_strings.is_empty(), self.detokenizer) {
            let heed =
                if row.tokens.len() > sampling.min_new_tokens { Stops::Heeded } else { Stops::Ignored };
            let found = row.tail.read(detokenizer, &row.tokens, &sampling.stop_strings, heed);
            let found = found.map_err(|source| Error::Backend {
                engine: "embedded",
                operation: "turning tokens into text",
                source,
            })?;
            if let Some(index) = found {
                return Ok(Some(FinishReason::StopString(index)));
            }
        }
        Ok((row.tokens.len() >= sampling.max_new_tokens).then_some(FinishReason::Length))
    }
}
