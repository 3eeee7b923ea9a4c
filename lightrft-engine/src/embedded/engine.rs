//! The embedded engine: the seam's contract over a decoder and its weights.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;

use super::batch::{Model, plan};
use super::config::DecoderConfig;
use super::decoder::Decoder;
use super::error::{ModelError, ModelResult};
use super::weights::Weights;
use crate::{
    Completion, Engine, Error, Event, Level, Limits, MemoryBytes, NamedTensor, Parts, Progress, Request,
    Result, State, Update, Version, Watch, check_requests, refuse_stop_strings,
};

/// How an [`EmbeddedEngine`] computes.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Type of weights, cache and arithmetic. Pushed weights are converted to it.
    pub dtype: DType,
    /// Where weights and cache live.
    pub device: Device,
    /// Most sequences that are drawn at once; bounds the cache and the time of a step. At least 1.
    pub max_sequences: usize,
    /// The version of the weights that the engine is made with.
    pub version: Version,
}

impl Default for Settings {
    /// f32 on the CPU, 64 sequences at once, version 0.
    fn default() -> Self {
        Self { dtype: DType::F32, device: Device::Cpu, max_sequences: 64, version: Version(0) }
    }
}

/// An engine in this process.
///
/// The cache lives as long as a call of [`Engine::generate`]. Sleeping at [`Level::One`] moves the weights to host
/// memory; on the CPU that is where they are, so nothing moves, and [`MemoryBytes::parked`] says that they are held.
/// Sleeping at [`Level::Two`] frees them, provided that no clone of the [`Weights`] given to [`EmbeddedEngine::new`]
/// is alive elsewhere. An update frees the former weights when it begins, so there is never more than one set.
#[derive(Debug)]
pub struct EmbeddedEngine {
    decoder: Decoder,
    settings: Settings,
    /// Empty unless the state has weights.
    weights: Weights,
    state: State,
    version: Version,
}

impl EmbeddedEngine {
    /// An engine with these weights, awake.
    ///
    /// # Errors
    /// [`Error::Model`] if the configuration contradicts itself, or names the tensor that does not fit it.
    pub fn new(config: DecoderConfig, weights: Weights, settings: Settings) -> Result<Self> {
        weights.check(&config)?;
        let mut engine = Self::without_weights(config, settings)?;
        let fit = |t: &Tensor| t.to_device(&engine.settings.device)?.to_dtype(engine.settings.dtype);
        engine.weights = each(&weights, fit)?;
        engine.state = State::READY;
        Ok(engine)
    }

    /// An engine that waits for its first update, stale until then.
    ///
    /// # Errors
    /// [`Error::Model`] if the configuration contradicts itself.
    pub fn without_weights(config: DecoderConfig, settings: Settings) -> Result<Self> {
        let decoder = Decoder::new(config, settings.dtype, &settings.device)?;
        let version = settings.version;
        Ok(Self { decoder, settings, weights: Weights::default(), state: State::EMPTY, version })
    }

    /// An engine from a Hugging Face folder: `config.json` and `model.safetensors`, or the files of
    /// `model.safetensors.index.json`.
    ///
    /// # Errors
    /// [`Error::Model`] names the file, the field or the tensor that is wrong.
    pub fn from_folder(folder: &Path, settings: Settings) -> Result<Self> {
        let config = DecoderConfig::from_folder(folder)?;
        let weights = Weights::from_folder(folder, &config, settings.dtype, &settings.device)?;
        Self::new(config, weights, settings)
    }

    /// The model's shape.
    pub fn config(&self) -> &DecoderConfig {
        self.decoder.config()
    }

    fn step(&mut self, event: Event) -> Result<()> {
        self.state = self.state.after(event)?;
        if !self.state.has_weights() {
            self.weights = Weights::default();
        }
        Ok(())
    }

    fn move_weights(&mut self, device: &Device) -> ModelResult<()> {
        self.weights = each(&self.weights, |t| t.to_device(device))?;
        Ok(())
    }
}

fn each(weights: &Weights, f: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> ModelResult<Weights> {
    weights.iter().map(|(name, tensor)| Ok((name.to_owned(), f(tensor)?))).collect()
}

impl Engine for EmbeddedEngine {
    fn generate(&mut self, requests: &[Request], watch: &mut Watch<'_>) -> Result<Vec<Completion>> {
        self.state.after(Event::Generate)?;
        check_requests(requests, self.limits())?;
        refuse_stop_strings(requests)?;
        let model = Model { decoder: &self.decoder, weights: &self.weights, version: self.version };
        let total = requests.iter().fold(0_usize, |n, r| n.saturating_add(r.samples));
        let mut progress = Progress { total, ..Progress::default() };
        watch.report(progress)?;
        let mut completions = Vec::new();
        for pieces in plan(requests, self.settings.max_sequences) {
            completions.extend(model.run(requests, &pieces, watch, &mut progress)?);
        }
        completions.sort_by_key(|c| (c.request, c.sample));
        tracing::debug!(completions = total, tokens = progress.tokens, version = self.version.0, "generated");
        Ok(completions)
    }

    fn sleep(&mut self, level: Level) -> Result<()> {
        let next = self.state.after(Event::Sleep(level))?;
        if next.has_weights() {
            self.move_weights(&Device::Cpu)?;
        }
        self.step(Event::Sleep(level))
    }

    fn wake(&mut self, parts: Parts) -> Result<()> {
        let next = self.state.after(Event::Wake(parts))?;
        if next.has_weights() {
            let device = self.settings.device.clone();
            self.move_weights(&device)?;
        }
        self.step(Event::Wake(parts))
    }

    fn begin_update(&mut self, to: Version) -> Result<Box<dyn Update + '_>> {
        self.step(Event::BeginUpdate)?;
        let shapes = self.parameters().unwrap_or_default();
        Ok(Box::new(EmbeddedUpdate { engine: self, to, shapes, staged: BTreeMap::new() }))
    }

    fn state(&self) -> State {
        self.state
    }

    fn version(&self) -> Option<Version> {
        self.state.has_weights().then_some(self.version)
    }

    fn memory_bytes(&self) -> Option<MemoryBytes> {
        let bytes = self.weights.bytes() as u64;
        Some(match self.state {
            State::Asleep { .. } => MemoryBytes { parked: bytes, ..MemoryBytes::default() },
            _ => MemoryBytes { weights: bytes, ..MemoryBytes::default() },
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

/// A complete new set of tensors that is being assembled.
#[derive(Debug)]
struct EmbeddedUpdate<'a> {
    engine: &'a mut EmbeddedEngine,
    to: Version,
    shapes: BTreeMap<String, Vec<usize>>,
    staged: BTreeMap<String, Tensor>,
}

impl EmbeddedUpdate<'_> {
    /// A tensor of the engine's own type and device, with its own memory.
    fn tensor(&self, tensor: &NamedTensor<'_>) -> Result<Tensor> {
        let name = tensor.name().to_owned();
        let Some(expected) = self.shapes.get(tensor.name()) else {
            return Err(Error::UnknownTensor { name });
        };
        if tensor.shape() != expected {
            return Err(Error::Shape { name, got: tensor.shape().to_vec(), expected: expected.clone() });
        }
        if self.staged.contains_key(tensor.name()) {
            return Err(Error::RepeatedTensor { name });
        }
        let dtype = match tensor.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            got => return Err(Error::Dtype { name, got, expected: "F32, BF16 or F16" }),
        };
        let Settings { device, dtype: own, .. } = &self.engine.settings;
        let tensor = Tensor::from_raw_buffer(tensor.bytes(), dtype, tensor.shape(), device)
            .and_then(|t| t.to_dtype(*own))
            .map_err(ModelError::from)?;
        Ok(tensor)
    }
}

impl Update for EmbeddedUpdate<'_> {
    fn push(&mut self, bucket: &[NamedTensor<'_>]) -> Result<()> {
        let mut taken = BTreeMap::new();
        for tensor in bucket {
            if taken.insert(tensor.name().to_owned(), self.tensor(tensor)?).is_some() {
                return Err(Error::RepeatedTensor { name: tensor.name().to_owned() });
            }
        }
        self.staged.append(&mut taken);
        Ok(())
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        let missing: Vec<&String> = self.shapes.keys().filter(|n| !self.staged.contains_key(*n)).collect();
        if !missing.is_empty() {
            return Err(Error::MissingTensors {
                version: self.to,
                missing: missing.len(),
                total: self.shapes.len(),
                examples: missing.into_iter().take(4).cloned().collect(),
            });
        }
        self.engine.step(Event::Commit)?;
        self.engine.weights = std::mem::take(&mut self.staged).into_iter().collect();
        self.engine.version = self.to;
        tracing::debug!(version = self.to.0, bytes = self.engine.weights.bytes(), "weights replaced");
        Ok(())
    }
}

impl Drop for EmbeddedUpdate<'_> {
    fn drop(&mut self) {
        // After a commit the engine is awake and refuses this event, which is right: there is nothing to abandon.
        let abandoned = self.engine.step(Event::Abandon).is_ok();
        if abandoned {
            tracing::warn!(to = self.to.0, "weight update dropped before its commit: the engine is stale");
        }
    }
}
