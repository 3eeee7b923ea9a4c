//! The embedded engine: the seam's contract over a decoder and its weights.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::config::DecoderConfig;
use super::cpu::Team;
use super::drive::Drive;
use super::error::ModelError;
use super::pages::Pages;
use super::place::Place;
use super::stop::Detokenize;
use super::update::EmbeddedUpdate;
use super::weights::Weights;
use crate::{
    Completion, Engine, Error, Event, Level, Limits, MemoryBytes, Parts, Request, Result, State, Update,
    Version, Watch, check_requests, refuse_stop_strings,
};

/// Where an [`EmbeddedEngine`] has its weights and its cache, and computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The processor, in host memory.
    #[default]
    Cpu,
    /// The GPU with this ordinal among those that the process sees.
    #[cfg(feature = "cuda")]
    Cuda(usize),
}

/// How an [`EmbeddedEngine`] computes.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where weights and cache are, and what computes.
    pub device: Device,
    /// Type in which weights are kept: f32, bf16 or f16. Pushed weights are converted to it. On the CPU arithmetic, and
    /// the keys and values of the cache, are f32: narrow weights save memory, and time where it is spent reading them.
    /// On a GPU keys, values and what a product reads are of this type as well; sums, the residual stream and logits
    /// are f32, and products of f32 do not use TF32.
    pub dtype: DType,
    /// Most sequences that are drawn at once; bounds the cache and the time of a step. At least 1. A completion's place
    /// is taken by the next one as soon as it has ended.
    pub max_sequences: usize,
    /// Most bytes of keys and values. Where they are spent, the completions that began last give their part up, and
    /// compute it again later; a request that would not fit even alone is refused. `None` bounds them by
    /// `max_sequences` and the context alone, and on a GPU by four fifths of the memory that is free when a call begins, less
    /// what steps need.
    pub cache_bytes: Option<u64>,
    /// Threads of a step, on a GPU of the draws after it. `None` takes the rayon pool that the caller runs in, which `RAYON_NUM_THREADS` bounds; a
    /// number makes a pool of the engine's own, of which 1 is the calling thread. With a rank on every core, 1 keeps
    /// engines and trainers from taking each other's core.
    pub threads: Option<NonZeroUsize>,
    /// Turns tokens into text for [`Sampling::stop_strings`](crate::Sampling::stop_strings), which are refused without.
    pub detokenizer: Option<Arc<dyn Detokenize>>,
    /// The version of the weights that the engine is made with.
    pub version: Version,
}

impl Default for Settings {
    /// The CPU, f32, 64 sequences at once, no budget of the cache, the ambient threads, no tokenizer, version 0.
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            dtype: DType::F32,
            max_sequences: 64,
            cache_bytes: None,
            threads: None,
            detokenizer: None,
            version: Version(0),
        }
    }
}

/// An engine in this process, on the CPU or on a GPU.
///
/// Requests are drawn side by side, a token each a step: one that ends leaves at once, and the next begins in its place.
/// A prompt is computed once for all its samples, which share its part of the cache; long prompts are computed in
/// pieces, between which the others go on.
///
/// A completion's tokens and log-probabilities are the same bits whatever else is drawn with it, however many threads
/// compute, and whether it had to give way and was computed again. They are the same on all processors with fused
/// multiply-adds (x86-64 with AVX2 or AVX-512, AArch64). On a GPU they are the same bits on GPUs of one kind with the same
/// version of cuBLAS, and differ from the CPU's by rounding. Tokens are drawn from logits by the same code on the host.
///
/// The cache's memory is kept from one call to the next, until the engine sleeps. Sleeping at [`Level::One`] moves the
/// weights to host memory; on the CPU they are there, so nothing moves, and [`MemoryBytes::parked`] says that they are
/// held. Sleeping at [`Level::Two`] frees them, on the CPU provided that no clone of the [`Weights`] given to
/// [`EmbeddedEngine::new`] or [`EmbeddedEngine::adopt`] is alive elsewhere. There is never more than one set: on the CPU
/// an update frees the former weights when it begins, on a GPU it writes over them.
///
/// A GPU that fails a process fails it for good, unless what it lacks is memory: the call ends with `Error::GpuLost`, and the
/// engine is [`State::Dead`] from then on.
#[derive(Debug)]
pub struct EmbeddedEngine {
    config: DecoderConfig,
    settings: Settings,
    end_tokens: Vec<u32>,
    team: Team,
    place: Place,
    pages: Pages,
    state: State,
    version: Version,
}

impl EmbeddedEngine {
    /// An engine with these weights, awake. On the CPU tensors of [`Settings::dtype`] in host memory are shared, not copied.
    ///
    /// # Errors
    /// [`Error::Model`] if the configuration contradicts itself, or names the tensor that does not fit it; those of
    /// [`EmbeddedEngine::without_weights`].
    pub fn new(config: DecoderConfig, weights: Weights, settings: Settings) -> Result<Self> {
        weights.check(&config)?;
        let mut engine = Self::without_weights(config, settings)?;
        engine.place.replace(&weights)?;
        engine.state = State::READY;
        Ok(engine)
    }

    /// An engine that waits for its first update, stale until then.
    ///
    /// # Errors
    /// [`Error::Model`] if the configuration contradicts itself or the settings' type of weights is none;
    /// [`Error::Backend`] if the system gives no threads. With a GPU `Error::Gpu` without the driver, NVRTC, cuBLAS or
    /// such a GPU, and `Error::GpuMemory`.
    pub fn without_weights(config: DecoderConfig, settings: Settings) -> Result<Self> {
        config.validate()?;
        if !matches!(settings.dtype, DType::F32 | DType::BF16 | DType::F16) {
            let (field, value) = ("dtype", format!("{:?}", settings.dtype));
            return Err(ModelError::Config { field, value, expected: "F32, BF16 or F16".into() }.into());
        }
        let place = Place::open(&config, &settings)?;
        Ok(Self {
            end_tokens: config.eos_token_ids.clone(),
            config,
            team: team(settings.threads)?,
            pages: Pages::new(pages_within(settings.cache_bytes, place.page_bytes())),
            place,
            state: State::EMPTY,
            version: settings.version,
            settings,
        })
    }

    /// An engine from a Hugging Face folder: `config.json` and `model.safetensors`, or the files of
    /// `model.safetensors.index.json`. Where the settings name no [`Settings::detokenizer`], the folder's
    /// `tokenizer.json` becomes it, if there is one. `generation_config.json` may name more
    /// [end tokens](EmbeddedEngine::end_tokens). The folder's chat template is not looked at: prompts are token ids.
    ///
    /// # Errors
    /// [`Error::Model`] names the file, the field or the tensor that is wrong; those of
    /// [`EmbeddedEngine::without_weights`].
    pub fn from_folder(folder: &Path, mut settings: Settings) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if settings.detokenizer.is_none() && path.exists() {
            let tokenizer = tokenizers::Tokenizer::from_file(&path)
                .map_err(|error| ModelError::Malformed { path, what: error.to_string() })?;
            settings.detokenizer = Some(Arc::new(tokenizer));
        }
        let config = DecoderConfig::from_folder(folder)?;
        let end_tokens = config.end_tokens(folder)?;
        let weights = Weights::from_folder(folder, &config, settings.dtype, &candle_core::Device::Cpu)?;
        Ok(Self { end_tokens, ..Self::new(config, weights, settings)? })
    }

    /// The tokens with which the model ends what it says, for [`Sampling::stop_tokens`](crate::Sampling::stop_tokens): the
    /// engine itself stops at none. From a folder `eos_token_id` of `generation_config.json` where that is given, which for a chat
    /// model also names the end of an answer; else of `config.json`. Empty where neither names any.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// The model's shape.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// A whole update without a copy: takes the trainer's tensors themselves, as version `to`, where they are of
    /// [`Settings::dtype`] and in host memory. Whoever writes into them afterwards changes the engine's weights too; another
    /// thread that does so waits for a call of [`generate`](Engine::generate) that is under way. An engine on a GPU copies
    /// them there.
    ///
    /// # Errors
    /// [`Error::Refused`] while asleep; [`Error::Model`] names a tensor that is missing, unknown or of another shape.
    /// The former weights are kept then. Where a GPU fails at the copy, the engine is stale.
    pub fn adopt(&mut self, to: Version, weights: &Weights) -> Result<()> {
        let updating = self.state.after(Event::BeginUpdate)?;
        weights.check(&self.config)?;
        let replaced = self.place.replace(weights);
        if let Err(error) = self.survived(replaced) {
            if self.settings.device != Device::Cpu && self.state != State::Dead {
                self.state = updating;
                self.step(Event::Abandon)?;
            }
            return Err(error);
        }
        self.state = updating.after(Event::Commit)?;
        self.replaced(to);
        Ok(())
    }

    pub(super) fn dtype(&self) -> DType {
        self.settings.dtype
    }

    pub(super) fn step(&mut self, event: Event) -> Result<()> {
        self.state = self.state.after(event)?;
        if !self.state.has_weights() {
            self.place.drop_weights();
        }
        Ok(())
    }

    /// Takes a tensor of an update: a parameter, of the engine's type.
    pub(super) fn stage(&mut self, name: String, tensor: Tensor) -> Result<()> {
        let staged = self.place.stage(name, tensor);
        self.survived(staged)
    }

    /// Ends an update of which every tensor was staged.
    pub(super) fn commit(&mut self, to: Version) -> Result<()> {
        let committed = self.state.after(Event::Commit)?;
        let taken = self.place.commit();
        self.survived(taken)?;
        self.state = committed;
        self.replaced(to);
        Ok(())
    }

    /// What a call on the engine's device came to, which may have been the end of it.
    fn survived<T>(&mut self, done: Result<T>) -> Result<T> {
        if done.as_ref().is_err_and(Error::is_death) {
            self.place.abandon();
            self.pages.clear();
            self.step(Event::Die)?;
        }
        done
    }

    fn replaced(&mut self, to: Version) {
        self.version = to;
        tracing::debug!(version = to.0, bytes = self.place.weight_bytes(), "weights replaced");
    }

    /// Refuses a request whose longest completion would not fit the cache even alone.
    fn check_cache(&self, requests: &[Request]) -> Result<()> {
        for (request, r) in requests.iter().enumerate() {
            // The last token drawn is never computed.
            let tokens = r.prompt.len() + r.sampling.max_new_tokens - 1;
            let (needed, most) = (Pages::pages_of(tokens), self.pages.limit());
            if needed > most {
                let [needed_bytes, cache_bytes] = [needed, most].map(|n| n as u64 * self.place.page_bytes());
                return Err(Error::CacheExceeded { request, tokens, needed_bytes, cache_bytes });
            }
        }
        Ok(())
    }
}

/// Whole pages within so many bytes.
fn pages_within(cache_bytes: Option<u64>, page_bytes: u64) -> usize {
    cache_bytes.map_or(usize::MAX, |bytes| usize::try_from(bytes / page_bytes.max(1)).unwrap_or(usize::MAX))
}

fn team(threads: Option<NonZeroUsize>) -> Result<Team> {
    let Some(threads) = threads else { return Ok(Team::Ambient) };
    if threads.get() == 1 {
        return Ok(Team::Caller);
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads.get())
        .thread_name(|index| format!("engine-{index}"))
        .build();
    pool.map(Team::Own).map_err(|source| Error::Backend {
        engine: "embedded",
        operation: "starting its threads",
        source: Box::new(source),
    })
}

impl Engine for EmbeddedEngine {
    fn generate(&mut self, requests: &[Request], watch: &mut Watch<'_>) -> Result<Vec<Completion>> {
        self.state.after(Event::Generate)?;
        check_requests(requests, self.limits())?;
        if self.settings.detokenizer.is_none() {
            refuse_stop_strings(requests)?;
        }
        let cache_bytes = match self.settings.cache_bytes {
            Some(bytes) => Some(bytes),
            None => {
                let most = self.place.default_cache_bytes(self.settings.max_sequences);
                self.survived(most)?
            }
        };
        let page_bytes = self.place.page_bytes();
        self.pages.reset(pages_within(Some(self.place.cache_bytes()), page_bytes));
        self.pages.set_limit(pages_within(cache_bytes, page_bytes));
        self.check_cache(requests)?;
        let drive = Drive {
            team: &self.team,
            pages: &mut self.pages,
            detokenizer: self.settings.detokenizer.as_deref(),
            max_sequences: self.settings.max_sequences,
            version: self.version,
        };
        let drawn = self.place.run(&self.config, &self.team, drive, requests, watch);
        let mut completions = self.survived(drawn)?;
        completions.sort_by_key(|c| (c.request, c.sample));
        Ok(completions)
    }

    fn sleep(&mut self, level: Level) -> Result<()> {
        let asleep = self.state.after(Event::Sleep(level))?;
        self.pages.clear();
        self.place.drop_cache();
        if asleep.has_weights() {
            let parked = self.place.park();
            self.survived(parked)?;
        } else {
            self.place.drop_weights();
        }
        self.state = asleep;
        Ok(())
    }

    fn wake(&mut self, parts: Parts) -> Result<()> {
        let woken = self.state.after(Event::Wake(parts))?;
        if woken.has_weights() {
            let back = self.place.unpark();
            self.survived(back)?;
        }
        self.state = woken;
        Ok(())
    }

    fn begin_update(&mut self, to: Version) -> Result<Box<dyn Update + '_>> {
        self.state = self.state.after(Event::BeginUpdate)?;
        self.place.begin_update();
        Ok(Box::new(EmbeddedUpdate::new(self, to)))
    }

    fn state(&self) -> State {
        self.state
    }

    fn version(&self) -> Option<Version> {
        self.state.has_weights().then_some(self.version)
    }

    fn memory_bytes(&self) -> Option<MemoryBytes> {
        let (bytes, cache) = (self.place.weight_bytes(), self.place.cache_bytes());
        Some(match self.state {
            State::Asleep { .. } => MemoryBytes { parked: bytes, ..MemoryBytes::default() },
            _ => MemoryBytes { weights: bytes, cache, ..MemoryBytes::default() },
        })
    }

    fn limits(&self) -> Limits {
        let config = self.config();
        Limits { vocabulary: config.vocab_size, context_tokens: config.max_position_embeddings }
    }

    fn parameters(&self) -> Option<BTreeMap<String, Vec<usize>>> {
        let parameters = self.config().parameter_groups().into_iter().flat_map(|g| g.parameters);
        Some(parameters.map(|p| (p.name, p.shape)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EngineExt, Refusal, Sampling};

    #[test]
    fn an_engine_whose_device_is_gone_is_dead() {
        let config = DecoderConfig::from_json(
            r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}"#,
        )
        .unwrap();
        let weights = Weights::random(&config, 1, 0.1, &candle_core::Device::Cpu).unwrap();
        let mut engine = EmbeddedEngine::new(config, weights, Settings::default()).unwrap();
        let request = Request::new([1, 2, 3], Sampling::greedy(4));
        engine.complete(std::slice::from_ref(&request)).unwrap();

        let passes = Error::Refused(State::EMPTY.after(Event::Generate).unwrap_err());
        engine.survived::<()>(Err(passes)).unwrap_err();
        assert_eq!(engine.state(), State::READY);
        let lost = Error::Refused(Refusal { state: State::Dead, event: Event::Generate, advice: "" });
        engine.survived::<()>(Err(lost)).unwrap_err();
        assert_eq!((engine.state(), engine.version()), (State::Dead, None));
        assert_eq!(engine.memory_bytes(), Some(MemoryBytes::default()));
        assert!(engine.complete(&[request]).unwrap_err().is_death());
    }
}
