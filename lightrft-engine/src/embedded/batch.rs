//! One batch from prompts to completions: prefill once per prompt, a row per sample, finished rows leave.

use candle_core::{DType, Tensor};

use super::decoder::Decoder;
use super::error::ModelError;
use super::kv_cache::KvCache;
use super::sampling::{DrawKey, Past, draw, uniform};
use super::weights::Weights;
use crate::{Completion, Error, FinishReason, LogProbs, Progress, Request, Result, Version, Watch};

/// Some or all samples of one request, drawn in one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) request: usize,
    pub(super) first_sample: usize,
    pub(super) samples: usize,
}

/// Cuts requests into batches of at most `max_sequences` samples, prompts of similar length together.
pub(super) fn plan(requests: &[Request], max_sequences: usize) -> Vec<Vec<Piece>> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|i| requests[*i].prompt.len());
    let mut batches: Vec<Vec<Piece>> = Vec::new();
    let mut free = 0;
    for request in order {
        let mut first_sample = 0;
        while first_sample < requests[request].samples {
            if free == 0 {
                batches.push(Vec::new());
                free = max_sequences.max(1);
            }
            let samples = free.min(requests[request].samples - first_sample);
            if let Some(batch) = batches.last_mut() {
                batch.push(Piece { request, first_sample, samples });
            }
            first_sample += samples;
            free -= samples;
        }
    }
    batches
}

/// A completion that is being drawn: one row of the batch.
struct Row {
    request: usize,
    sample: usize,
    /// Columns of padding before its prompt.
    padding: usize,
    tokens: Vec<u32>,
    log_probs: Vec<f32>,
}

/// What a batch is drawn with.
#[derive(Clone, Copy)]
pub(super) struct Model<'a> {
    pub(super) decoder: &'a Decoder,
    pub(super) weights: &'a Weights,
    pub(super) version: Version,
}

impl Model<'_> {
    /// Draws every sample of `pieces`; the completions come in the order in which they end.
    pub(super) fn run(
        self,
        requests: &[Request],
        pieces: &[Piece],
        watch: &mut Watch<'_>,
        progress: &mut Progress,
    ) -> Result<Vec<Completion>> {
        let width = pieces.iter().map(|p| requests[p.request].prompt.len()).max().unwrap_or(0);
        let padding: Vec<usize> = pieces.iter().map(|p| width - requests[p.request].prompt.len()).collect();
        let mut cache = KvCache::new(self.decoder.config().layers);
        let prompts: Vec<Vec<u32>> = pieces
            .iter()
            .zip(&padding)
            .map(|(p, pad)| [&vec![0; *pad], requests[p.request].prompt.as_slice()].concat())
            .collect();
        let mut logits = self.step(&prompts, &padding, &mut cache)?;

        // From one row for each prompt to one row for each sample.
        let mut rows = Vec::new();
        let mut sources: Vec<u32> = Vec::new();
        for (index, (piece, padding)) in pieces.iter().zip(padding).enumerate() {
            for sample in piece.first_sample..piece.first_sample + piece.samples {
                let (tokens, log_probs) = (Vec::new(), Vec::new());
                rows.push(Row { request: piece.request, sample, padding, tokens, log_probs });
                sources.push(index as u32);
            }
        }
        if sources.len() > pieces.len() {
            cache.select_rows(&sources).map_err(ModelError::from)?;
        }

        let mut completions = Vec::with_capacity(rows.len());
        while !rows.is_empty() {
            let batch_rows = rows.len();
            let mut live = Vec::with_capacity(batch_rows);
            let mut staying: Vec<u32> = Vec::new();
            for (at, mut row) in rows.into_iter().enumerate() {
                let source = sources.get(at).map_or(at, |s| *s as usize);
                let finish = draw_next(&mut row, requests, &logits[source])?;
                progress.tokens += 1;
                match finish {
                    Some(finish) => {
                        let Row { request, sample, tokens, log_probs, .. } = row;
                        let version = self.version;
                        completions.push(Completion { request, sample, tokens, log_probs, finish, version });
                        progress.done += 1;
                    }
                    None => {
                        staying.push(at as u32);
                        live.push(row);
                    }
                }
            }
            watch.report(*progress)?;
            // Only the first draw reads logits of prompts; afterwards row and logits stand side by side.
            sources.clear();
            rows = live;
            if rows.is_empty() {
                break;
            }
            if staying.len() < batch_rows {
                cache.select_rows(&staying).map_err(ModelError::from)?;
            }
            let last: Vec<[u32; 1]> = rows.iter().filter_map(|r| r.tokens.last().map(|t| [*t])).collect();
            let padding: Vec<usize> = rows.iter().map(|r| r.padding).collect();
            logits = self.step(&last, &padding, &mut cache)?;
        }
        Ok(completions)
    }

    /// Computes new columns for every row of the batch, and gives the logits of each row's last one.
    fn step<R: AsRef<[u32]>>(
        self,
        rows: &[R],
        padding: &[usize],
        cache: &mut KvCache,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        let ids = self.decoder.token_ids(rows)?;
        let (_, new) = ids.dims2()?;
        let frame = self.decoder.padded_frame(padding, cache.len(), new)?;
        let hidden: Tensor = self.decoder.hidden(self.weights, &ids, &frame, Some(cache))?;
        let last = hidden.narrow(1, new - 1, 1)?.contiguous()?;
        let logits = self.decoder.logits(self.weights, &last)?;
        Ok(logits.squeeze(1)?.to_dtype(DType::F32)?.to_vec2()?)
    }
}

/// Draws the row's next token, and says why the row ends if it does.
fn draw_next(row: &mut Row, requests: &[Request], logits: &[f32]) -> Result<Option<FinishReason>> {
    let request = &requests[row.request];
    let sampling = &request.sampling;
    let position = row.tokens.len();
    let u = uniform(DrawKey {
        seed: sampling.seed,
        request: request.id.unwrap_or(row.request as u64),
        sample: row.sample as u32,
        position: position as u32,
    });
    let drawn = draw(logits, sampling, Past { prompt: &request.prompt, completion: &row.tokens }, u)
        .map_err(|unusable| Error::Logits {
            request: row.request,
            sample: row.sample,
            position,
            reason: unusable.to_string(),
        })?;
    row.tokens.push(drawn.token);
    match sampling.log_probs {
        LogProbs::None => {}
        LogProbs::Raw => row.log_probs.push(drawn.raw_log_prob),
        LogProbs::Processed => row.log_probs.push(drawn.processed_log_prob),
    }
    Ok(if sampling.stop_tokens.contains(&drawn.token) {
        Some(FinishReason::Stop(drawn.token))
    } else if row.tokens.len() >= sampling.max_new_tokens {
        Some(FinishReason::Length)
    } else {
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sampling;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_sample_is_drawn_once_in_batches_that_are_full(
            samples in prop::collection::vec(1_usize..9, 0..12),
            lengths in prop::collection::vec(1_usize..30, 12),
            max in 1_usize..10,
        ) {
            let requests: Vec<Request> = samples
                .iter()
                .zip(&lengths)
                .map(|(n, len)| Request::new(vec![0; *len], Sampling::default()).samples(*n))
                .collect();
            let batches = plan(&requests, max);
            let mut seen = vec![vec![0; 9]; requests.len()];
            for (at, batch) in batches.iter().enumerate() {
                let size: usize = batch.iter().map(|p| p.samples).sum();
                prop_assert!(size == max || (at + 1 == batches.len() && size <= max));
                for p in batch {
                    (p.first_sample..p.first_sample + p.samples).for_each(|s| seen[p.request][s] += 1);
                }
            }
            for (counts, n) in seen.iter().zip(&samples) {
                prop_assert!(counts.iter().enumerate().all(|(s, c)| *c == usize::from(s < *n)));
            }
        }
    }
}
