//! Who is computed in the next step: completions join, wait, share their prompt's pages, give way and leave.

use std::collections::VecDeque;
use std::sync::Arc;

use super::pages::{PAGE_TOKENS, PageId, Pages};
use super::step::Column;
use super::stop::Tail;
use crate::Request;

/// A completion that is being drawn.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) request: usize,
    pub(super) sample: usize,
    /// Tokens drawn so far.
    pub(super) tokens: Vec<u32>,
    pub(super) log_probs: Vec<f32>,
    pub(super) tail: Tail,
    /// Pages with the keys and values of its first `cached` tokens, prompt first.
    table: Vec<PageId>,
    cached: usize,
    /// What its first token is drawn from, when another sample has computed the prompt.
    pub(super) logits: Option<Arc<[f32]>>,
    /// The later samples of its request wait for it to compute the prompt.
    leads: bool,
}

/// A completion, or several, that are not being drawn.
#[derive(Debug)]
enum Waiting {
    /// Sample `sample` and those after it: the first computes the prompt for all.
    Fresh { request: usize, sample: usize },
    /// Samples from `sample` on, whose prompt has been computed.
    Forks { request: usize, sample: usize, table: Vec<PageId>, logits: Arc<[f32]> },
    /// One that gave its pages up, and computes them again.
    Preempted(Row),
}

/// What the next step computes.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) columns: Vec<Column>,
    /// Pages to copy before: from, to.
    pub(super) copies: Vec<(PageId, PageId)>,
    /// Rows of the step, in the order of their tables, with the number of their columns.
    rows: Vec<(usize, usize)>,
    /// Columns after which a token is drawn.
    pub(super) wanted: Vec<usize>,
    /// Their rows.
    wanted_rows: Vec<usize>,
}

/// The completions of one call.
#[derive(Debug)]
pub(super) struct Schedule<'r> {
    requests: &'r [Request],
    max_sequences: usize,
    /// Most columns of one step, as far as sequences that only go on do not need more.
    step_columns: usize,
    /// Admitted first stands first. The first is never made to wait, so that there always is progress.
    running: Vec<Row>,
    waiting: VecDeque<Waiting>,
    /// How often a row has given way.
    preemptions: usize,
}

impl<'r> Schedule<'r> {
    pub(super) fn new(requests: &'r [Request], max_sequences: usize, step_columns: usize) -> Self {
        let waiting = (0..requests.len()).map(|request| Waiting::Fresh { request, sample: 0 }).collect();
        let max_sequences = max_sequences.max(1);
        Self { requests, max_sequences, step_columns, running: Vec::new(), waiting, preemptions: 0 }
    }

    pub(super) fn is_over(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    pub(super) fn preemptions(&self) -> usize {
        self.preemptions
    }

    pub(super) fn rows(&self) -> &[Row] {
        &self.running
    }

    /// The pages of the batch's sequences.
    pub(super) fn tables(&self, batch: &Batch) -> Vec<&[PageId]> {
        batch.rows.iter().map(|(row, _)| self.running[*row].table.as_slice()).collect()
    }

    fn total(&self, row: &Row) -> usize {
        self.requests[row.request].prompt.len() + row.tokens.len()
    }

    /// Fills free places, while there are pages for those who take them.
    pub(super) fn admit(&mut self, pages: &mut Pages) {
        while self.running.len() < self.max_sequences {
            let Some(next) = self.waiting.front() else { return };
            let needed = match next {
                Waiting::Fresh { request, .. } => Pages::pages_of(self.requests[*request].prompt.len() + 1),
                Waiting::Preempted(row) => Pages::pages_of(self.total(row) + 1),
                // The prompt's last page is copied, or there is a next one.
                Waiting::Forks { .. } => 1,
            };
            // Pages that those who run are about to take.
            let owed: usize = self
                .running
                .iter()
                .map(|row| Pages::pages_of(self.total(row) + 1).saturating_sub(row.table.len()))
                .sum();
            if !self.running.is_empty() && owed + needed > pages.available() {
                return;
            }
            let Some(next) = self.waiting.pop_front() else { return };
            match next {
                Waiting::Fresh { request, sample } => {
                    let leads = sample + 1 < self.requests[request].samples;
                    self.running.push(row(request, sample, Vec::new(), 0, None, leads));
                }
                Waiting::Preempted(row) => self.running.push(row),
                Waiting::Forks { request, sample, table, logits } => {
                    let cached = self.requests[request].prompt.len();
                    if sample + 1 < self.requests[request].samples {
                        table.iter().for_each(|page| pages.share(*page));
                        let (table, logits) = (table.clone(), Arc::clone(&logits));
                        self.waiting.push_front(Waiting::Forks {
                            request,
                            sample: sample + 1,
                            table,
                            logits,
                        });
                    }
                    self.running.push(row(request, sample, table, cached, Some(logits), false));
                }
            }
        }
    }

    /// What the next step computes, with pages for it. The youngest give way where there are none.
    pub(super) fn compose(&mut self, pages: &mut Pages) -> Batch {
        let mut batch = Batch::default();
        let going_on = self.running.iter().filter(|row| self.total(row) == row.cached + 1).count();
        let mut spare = self.step_columns.saturating_sub(going_on).max(PAGE_TOKENS);
        let mut at = 0;
        while at < self.running.len() {
            let pending = self.total(&self.running[at]) - self.running[at].cached;
            let count = match pending {
                0 | 1 => pending,
                more => more.min(spare),
            };
            if count == 0 {
                at += 1;
                continue;
            }
            if !self.find_pages(at, count, pages, &mut batch.copies) {
                // It was the youngest itself, and waits again.
                continue;
            }
            if pending > 1 {
                spare -= count;
            }
            let row = &self.running[at];
            let prompt = &self.requests[row.request].prompt;
            let tokens = prompt.iter().chain(&row.tokens).enumerate().skip(row.cached).take(count);
            let sequence = batch.rows.len();
            batch.columns.extend(tokens.map(|(position, token)| Column {
                token: *token,
                position,
                sequence,
            }));
            batch.rows.push((at, count));
            if count == pending {
                batch.wanted.push(batch.columns.len() - 1);
                batch.wanted_rows.push(at);
            }
            at += 1;
        }
        batch
    }

    /// Pages of its own for the next `count` tokens of row `at`; `false` if the row had to give way.
    fn find_pages(
        &mut self,
        at: usize,
        count: usize,
        pages: &mut Pages,
        copies: &mut Vec<(PageId, PageId)>,
    ) -> bool {
        loop {
            let row = &mut self.running[at];
            let first = row.cached / PAGE_TOKENS;
            let copied = row.table.get(first).copied().filter(|page| pages.is_shared(*page));
            if copied.is_none() && row.table.len() * PAGE_TOKENS >= row.cached + count {
                return true;
            }
            match (pages.take(), copied) {
                (Some(page), Some(shared)) => {
                    copies.push((shared, page));
                    pages.release(shared);
                    row.table[first] = page;
                }
                (Some(page), None) => row.table.push(page),
                (None, _) if self.forget_a_prompt(pages) => {}
                (None, _) => {
                    let youngest = self.running.len() - 1;
                    self.preempt(pages);
                    if youngest == at {
                        return false;
                    }
                }
            }
        }
    }

    /// Gives up the pages of a prompt whose samples wait.
    fn forget_a_prompt(&mut self, pages: &mut Pages) -> bool {
        let kept = self.waiting.iter_mut().rev().find(|w| matches!(w, Waiting::Forks { .. }));
        let Some(kept) = kept else { return false };
        if let Waiting::Forks { request, sample, table, .. } = kept {
            table.drain(..).for_each(|page| pages.release(page));
            *kept = Waiting::Fresh { request: *request, sample: *sample };
        }
        true
    }

    /// Makes the row that was admitted last wait, without its pages.
    fn preempt(&mut self, pages: &mut Pages) {
        if let Some(mut row) = self.running.pop() {
            row.table.drain(..).for_each(|page| pages.release(page));
            row.cached = 0;
            row.logits = None;
            self.waiting.push_front(Waiting::Preempted(row));
            self.preemptions += 1;
        }
    }

    /// Takes note that the batch was computed. `logits` copies the row of logits of a wanted column. Gives the rows that
    /// draw a token now, with the wanted column that they draw it from, or `None` for [`Row::logits`].
    pub(super) fn computed(
        &mut self,
        batch: &Batch,
        pages: &mut Pages,
        logits: impl Fn(usize) -> Arc<[f32]>,
    ) -> Vec<(usize, Option<usize>)> {
        for (row, count) in &batch.rows {
            self.running[*row].cached += count;
        }
        for (column, at) in batch.wanted_rows.iter().enumerate() {
            let row = &mut self.running[*at];
            if row.leads && row.tokens.is_empty() {
                row.leads = false;
                row.table.iter().for_each(|page| pages.share(*page));
                self.waiting.push_front(Waiting::Forks {
                    request: row.request,
                    sample: row.sample + 1,
                    table: row.table.clone(),
                    logits: logits(column),
                });
            }
        }
        let mut due: Vec<_> = batch.wanted_rows.iter().enumerate().map(|(c, row)| (*row, Some(c))).collect();
        let forked = self.running.iter().enumerate().filter(|(_, row)| row.logits.is_some());
        due.extend(forked.map(|(at, _)| (at, None)));
        due.sort_unstable();
        due
    }

    /// A row that has drawn.
    pub(super) fn row_mut(&mut self, at: usize) -> &mut Row {
        &mut self.running[at]
    }

    /// Takes the rows `ended`, rising, out, and their pages back.
    pub(super) fn leave(&mut self, ended: &[usize], pages: &mut Pages) -> Vec<Row> {
        let mut left = Vec::with_capacity(ended.len());
        for at in ended.iter().rev() {
            let mut row = self.running.remove(*at);
            row.table.drain(..).for_each(|page| pages.release(page));
            left.push(row);
        }
        left
    }
}

fn row(
    request: usize,
    sample: usize,
    table: Vec<PageId>,
    cached: usize,
    logits: Option<Arc<[f32]>>,
    leads: bool,
) -> Row {
    let (tokens, log_probs, tail) = (Vec::new(), Vec::new(), Tail::default());
    Row { request, sample, tokens, log_probs, tail, table, cached, logits, leads }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::Sampling;
    use proptest::prelude::*;

    /// Plays a call to its end; every token drawn is the number of tokens before it.
    fn play(requests: &[Request], max_sequences: usize, limit: usize) -> Result<usize, TestCaseError> {
        let mut pages = Pages::new(limit);
        let mut schedule = Schedule::new(requests, max_sequences, 256);
        let mut left: HashMap<(usize, usize), Vec<u32>> = HashMap::new();
        let samples: usize = requests.iter().map(|r| r.samples).sum();
        let work: usize = requests.iter().map(|r| r.samples * (r.prompt.len() + 40)).sum();
        for _ in 0..work + 10 {
            if schedule.is_over() {
                break;
            }
            schedule.admit(&mut pages);
            prop_assert!(schedule.rows().len() <= max_sequences);
            let oldest = schedule.rows().first().map(|row| (row.request, row.sample));
            let batch = schedule.compose(&mut pages);
            prop_assert_eq!(
                schedule.rows().first().map(|row| (row.request, row.sample)),
                oldest,
                "it never waits"
            );
            let tables = schedule.tables(&batch);
            let mut writers: HashMap<PageId, usize> = HashMap::new();
            for column in &batch.columns {
                let page = tables[column.sequence][column.position / PAGE_TOKENS];
                prop_assert!(!pages.is_shared(page), "nobody else reads what is written");
                prop_assert_eq!(*writers.entry(page).or_insert(column.sequence), column.sequence);
            }
            let due = schedule.computed(&batch, &mut pages, |_| Arc::from([0.0]));
            prop_assert!(!batch.columns.is_empty() || !due.is_empty(), "every step gets on");
            let mut ended = Vec::new();
            for (at, column) in due {
                let row = schedule.row_mut(at);
                prop_assert_eq!(column.is_none(), row.logits.take().is_some());
                row.tokens.push(row.tokens.len() as u32);
                // Some stop early.
                let most = requests[row.request].sampling.max_new_tokens;
                if row.tokens.len() == most
                    || (row.request + row.sample).is_multiple_of(5) && row.tokens.len() == 2
                {
                    ended.push(at);
                }
            }
            for row in schedule.leave(&ended, &mut pages) {
                prop_assert!(left.insert((row.request, row.sample), row.tokens).is_none(), "it ended twice");
            }
        }
        prop_assert!(schedule.is_over(), "it comes to an end");
        prop_assert_eq!(left.len(), samples);
        for tokens in left.values() {
            prop_assert!(tokens.iter().enumerate().all(|(i, t)| *t == i as u32), "{:?}", tokens);
        }
        prop_assert_eq!(pages.available(), limit, "every page was given back");
        Ok(schedule.preemptions())
    }

    proptest! {
        #[test]
        fn everybody_ends_once_within_any_budget_that_fits_the_largest(
            shapes in prop::collection::vec((1_usize..90, 1_usize..6, 1_usize..40), 1..8),
            max_sequences in 1_usize..9,
            spare in 0_usize..12,
        ) {
            let requests: Vec<Request> = shapes
                .iter()
                .map(|(length, samples, max_new_tokens)| {
                    let sampling = Sampling { max_new_tokens: *max_new_tokens, ..Sampling::default() };
                    Request::new(vec![1; *length], sampling).samples(*samples)
                })
                .collect();
            let needed = |(length, _, new): &(usize, usize, usize)| Pages::pages_of(length + new - 1);
            let largest = shapes.iter().map(needed).max().unwrap_or(1);
            play(&requests, max_sequences, largest + spare)?;
        }
    }

    #[test]
    fn the_youngest_gives_way_when_pages_run_out() {
        let sampling = Sampling { max_new_tokens: 40, ..Sampling::default() };
        let requests: Vec<Request> =
            (0..3).map(|_| Request::new([1; 16], sampling.clone()).samples(2)).collect();
        assert!(play(&requests, 8, 6).unwrap() > 0);
        assert_eq!(play(&requests, 8, 64).unwrap(), 0);
    }
}
