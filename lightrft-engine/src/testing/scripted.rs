//! An engine without a model: it keeps the contract, counts its memory, and answers what a test wants.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use safetensors::Dtype;

use super::TensorBytes;
use crate::transfer::check_fit;
use crate::{
    Completion, Engine, Error, Event, FinishReason, Level, Limits, LogProbs, MemoryBytes, NamedTensor, Parts,
    Progress, Request, Result, State, Update, Version, Watch, check_requests, refuse_stop_strings,
};

type Script = Box<dyn FnMut(&Request, usize) -> Vec<u32> + Send>;

/// An engine that draws every token of its vocabulary with the same probability, or says what a script tells it.
///
/// It has two parameters, `embed.weight` of `[vocabulary, 4]` and `norm.weight` of `[4]`, both f32; its answers change
/// when their bytes do. Filters and penalties mean nothing here, and stop strings are refused. It starts awake, at [`Version`] 0.
pub struct ScriptedEngine {
    limits: Limits,
    state: State,
    version: Version,
    weights: BTreeMap<String, Vec<u8>>,
    script: Option<Script>,
    events: Vec<Event>,
    /// Calls before the one that it dies at.
    calls_left: Option<usize>,
}

impl fmt::Debug for ScriptedEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ScriptedEngine({}, {})", self.state, self.version)
    }
}

impl ScriptedEngine {
    /// An engine of `vocabulary` tokens with a context of 1024.
    pub fn new(vocabulary: usize) -> Self {
        let mut engine = Self {
            limits: Limits { vocabulary, context_tokens: 1024 },
            state: State::READY,
            version: Version(0),
            weights: BTreeMap::new(),
            script: None,
            events: Vec::new(),
            calls_left: None,
        };
        engine.weights = engine.example_weights(0).into_iter().map(|t| (t.name, t.bytes)).collect();
        engine
    }

    /// The same engine, whose completion of a request's sample is `reply(request, sample)`, cut at a stop token or at
    /// `max_new_tokens`. An empty or short reply is filled up with token 0.
    #[must_use]
    pub fn replying(mut self, reply: impl FnMut(&Request, usize) -> Vec<u32> + Send + 'static) -> Self {
        self.script = Some(Box::new(reply));
        self
    }

    /// The same engine, which dies at its call number `call`, from 0. Those of [`Update`] count, refused ones do not; a call
    /// of [`generate`](Engine::generate) ends in its middle, after half of the completions.
    #[must_use]
    pub fn dying_at(mut self, call: usize) -> Self {
        self.calls_left = Some(call);
        self
    }

    /// The same engine with another context length.
    #[must_use]
    pub fn with_context(mut self, context_tokens: usize) -> Self {
        self.limits.context_tokens = context_tokens;
        self
    }

    /// A whole set of weights, different for each `seed`.
    pub fn example_weights(&self, seed: u64) -> Vec<TensorBytes> {
        let tensor = |(name, shape): (&'static str, Vec<usize>)| {
            let count = shape.iter().product::<usize>() as u64;
            let values: Vec<f32> =
                (0..count).map(|i| (mix(&[seed, i]) >> 40) as f32 / (1_u64 << 24) as f32).collect();
            TensorBytes::from_f32(name, &shape, &values)
        };
        self.shapes().into_iter().map(tensor).collect()
    }

    /// Every event so far that was not refused, in order.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    fn shapes(&self) -> [(&'static str, Vec<usize>); 2] {
        [("embed.weight", vec![self.limits.vocabulary, 4]), ("norm.weight", vec![4])]
    }

    fn step(&mut self, event: Event) -> Result<()> {
        self.state = self.state.after(event)?;
        self.events.push(event);
        Ok(())
    }

    /// Counts a call, and tells whether it is the last one.
    fn dies(&mut self) -> bool {
        let left = self.calls_left.as_mut();
        left.is_some_and(|left| std::mem::replace(left, left.saturating_sub(1)) == 0)
    }

    /// Counts a call that is allowed, and dies if it is the last one.
    fn survive(&mut self, event: Event) -> Result<()> {
        self.state.after(event)?;
        if self.dies() { self.die(event) } else { Ok(()) }
    }

    fn die(&mut self, event: Event) -> Result<()> {
        self.step(Event::Die)?;
        self.weights.clear();
        self.step(event)
    }

    fn fingerprint(&self) -> u64 {
        self.weights.values().flatten().fold(0, |hash, byte| mix(&[hash, u64::from(*byte)]))
    }

    fn draw(&self, key: &[u64], sampling: &crate::Sampling, position: usize) -> u32 {
        let vocabulary = self.limits.vocabulary.max(1) as u64;
        let first = mix(key) % vocabulary;
        let banned =
            |token: u64| position < sampling.min_new_tokens && sampling.stop_tokens.contains(&(token as u32));
        let mut candidates = (0..vocabulary).map(|step| (first + step) % vocabulary);
        candidates.find(|token| !banned(*token)).unwrap_or(first) as u32
    }

    fn tokens(&mut self, index: usize, request: &Request, sample: usize, weights: u64) -> Vec<u32> {
        let sampling = &request.sampling;
        if let Some(script) = self.script.as_mut() {
            let mut tokens = script(request, sample);
            tokens.resize(sampling.max_new_tokens, 0);
            return tokens;
        }
        let prompt = request.prompt.iter().fold(weights, |hash, token| mix(&[hash, u64::from(*token)]));
        let (seed, id) = (sampling.seed, request.id.unwrap_or(index as u64));
        (0..sampling.max_new_tokens)
            .map(|position| {
                let mut key = vec![prompt, position as u64];
                if sampling.temperature > 0.0 {
                    key.extend([seed, id, sample as u64]);
                }
                self.draw(&key, sampling, position)
            })
            .collect()
    }

    fn complete_one(&mut self, index: usize, request: &Request, sample: usize, weights: u64) -> Completion {
        let sampling = &request.sampling;
        let mut tokens = self.tokens(index, request, sample, weights);
        let stop = tokens.iter().position(|token| sampling.stop_tokens.contains(token));
        let finish = match stop {
            Some(at) => {
                tokens.truncate(at + 1);
                FinishReason::Stop(tokens[at])
            }
            None => FinishReason::Length,
        };
        let log_prob = match sampling.log_probs {
            LogProbs::Processed if sampling.temperature == 0.0 => 0.0,
            LogProbs::Raw | LogProbs::Processed | LogProbs::None => -(self.limits.vocabulary as f32).ln(),
        };
        let log_probs = match sampling.log_probs {
            LogProbs::None => Vec::new(),
            LogProbs::Raw | LogProbs::Processed => vec![log_prob; tokens.len()],
        };
        Completion { request: index, sample, tokens, log_probs, finish, version: self.version }
    }
}

impl Engine for ScriptedEngine {
    fn generate(&mut self, requests: &[Request], watch: &mut Watch<'_>) -> Result<Vec<Completion>> {
        self.state.after(Event::Generate)?;
        check_requests(requests, self.limits)?;
        refuse_stop_strings(requests)?;
        let dies = self.dies();
        let mut progress =
            Progress { total: requests.iter().map(|r| r.samples).sum(), ..Progress::default() };
        let weights = self.fingerprint();
        let mut completions = Vec::with_capacity(progress.total);
        for (index, request) in requests.iter().enumerate() {
            for sample in request.first_sample..request.first_sample + request.samples {
                watch.report(progress)?;
                if dies && progress.done >= progress.total / 2 {
                    self.die(Event::Generate)?;
                }
                let completion = self.complete_one(index, request, sample, weights);
                progress.done += 1;
                progress.tokens += completion.tokens.len();
                completions.push(completion);
            }
        }
        watch.report(progress)?;
        self.step(Event::Generate)?;
        Ok(completions)
    }

    fn sleep(&mut self, level: Level) -> Result<()> {
        self.survive(Event::Sleep(level))?;
        self.step(Event::Sleep(level))?;
        if !self.state.has_weights() {
            self.weights.clear();
        }
        Ok(())
    }

    fn wake(&mut self, parts: Parts) -> Result<()> {
        self.survive(Event::Wake(parts))?;
        self.step(Event::Wake(parts))
    }

    fn begin_update(&mut self, to: Version) -> Result<Box<dyn Update + '_>> {
        self.survive(Event::BeginUpdate)?;
        self.step(Event::BeginUpdate)?;
        self.weights.clear();
        Ok(Box::new(ScriptedUpdate { engine: self, to }))
    }

    fn state(&self) -> State {
        self.state
    }

    fn version(&self) -> Option<Version> {
        self.state.has_weights().then_some(self.version)
    }

    fn memory_bytes(&self) -> Option<MemoryBytes> {
        let bytes = self.weights.values().map(|w| w.len() as u64).sum();
        let cache = match self.state {
            State::Awake { cache } | State::Stale { cache } | State::Updating { cache } => match cache {
                crate::Cache::Ready => self.limits.context_tokens as u64,
                crate::Cache::Asleep => 0,
            },
            State::Asleep { .. } | State::Dead => 0,
        };
        Some(match self.state {
            State::Asleep { .. } => MemoryBytes { weights: 0, cache, parked: bytes },
            _ => MemoryBytes { weights: bytes, cache, parked: 0 },
        })
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn parameters(&self) -> Option<BTreeMap<String, Vec<usize>>> {
        Some(self.shapes().map(|(name, shape)| (name.to_owned(), shape)).into())
    }
}

#[derive(Debug)]
struct ScriptedUpdate<'a> {
    engine: &'a mut ScriptedEngine,
    to: Version,
}

impl Update for ScriptedUpdate<'_> {
    fn push(&mut self, bucket: &[NamedTensor<'_>]) -> Result<()> {
        let shapes = BTreeMap::from(self.engine.shapes());
        check_fit(&shapes, bucket.iter().map(|tensor| (tensor.name(), tensor.shape())))?;
        let mut seen = BTreeSet::new();
        for tensor in bucket {
            let name = tensor.name().to_owned();
            if tensor.dtype() != Dtype::F32 {
                return Err(Error::Dtype { name, got: tensor.dtype(), expected: "F32" });
            }
            if !seen.insert(tensor.name()) || self.engine.weights.contains_key(tensor.name()) {
                return Err(Error::RepeatedTensor { name });
            }
        }
        self.engine.survive(Event::Commit)?;
        for tensor in bucket {
            self.engine.weights.insert(tensor.name().to_owned(), tensor.bytes().to_vec());
        }
        Ok(())
    }

    fn commit(self: Box<Self>) -> Result<()> {
        let names: Vec<String> = self.engine.shapes().iter().map(|(name, _)| (*name).to_owned()).collect();
        let missing: Vec<String> =
            names.iter().filter(|n| !self.engine.weights.contains_key(*n)).cloned().collect();
        if !missing.is_empty() {
            let (total, count) = (names.len(), missing.len());
            return Err(Error::MissingTensors { version: self.to, missing: count, total, examples: missing });
        }
        self.engine.survive(Event::Commit)?;
        self.engine.step(Event::Commit)?;
        self.engine.version = self.to;
        Ok(())
    }
}

impl Drop for ScriptedUpdate<'_> {
    fn drop(&mut self) {
        // After a commit the engine is awake, and abandoning is refused: nothing to do then.
        if self.engine.step(Event::Abandon).is_ok() {
            self.engine.weights.clear();
        }
    }
}

/// A hash of a few numbers: the finaliser of `SplitMix64` over their running sum.
fn mix(words: &[u64]) -> u64 {
    words.iter().fold(0x9e37_79b9_7f4a_7c15, |hash: u64, word| {
        let mut z = hash.wrapping_add(*word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}
