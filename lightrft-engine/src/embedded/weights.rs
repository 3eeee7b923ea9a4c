//! Tensors by HF's names: read from a model folder, checked against the configuration, or drawn at random.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::config::DecoderConfig;
use super::error::{ModelError, ModelResult};

/// A set of tensors by HF's names: a whole model, or the parameters of one stage of it.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
}

impl FromIterator<(String, Tensor)> for Weights {
    fn from_iter<I: IntoIterator<Item = (String, Tensor)>>(iter: I) -> Self {
        Self { tensors: iter.into_iter().collect() }
    }
}

impl Weights {
    /// The tensor of this name.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`] when it is not in the set.
    pub fn tensor(&self, name: &str) -> ModelResult<&Tensor> {
        self.tensors
            .get(name)
            .ok_or_else(|| ModelError::MissingTensor { name: name.to_owned(), expected: Vec::new() })
    }

    /// Adds a tensor, or replaces the one of this name.
    pub fn insert(&mut self, name: String, tensor: Tensor) {
        self.tensors.insert(name, tensor);
    }

    /// Every tensor with its name, in the order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, t)| (name.as_str(), t))
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }

    /// Checks that exactly the parameters of `config` are here, in its shapes.
    ///
    /// # Errors
    /// Names the first tensor that is missing, unknown or of another shape.
    pub fn check(&self, config: &DecoderConfig) -> ModelResult<()> {
        let mut known = 0;
        for p in config.parameter_groups().into_iter().flat_map(|g| g.parameters) {
            match self.tensors.get(&p.name) {
                None => return Err(ModelError::MissingTensor { name: p.name, expected: p.shape }),
                Some(t) if t.dims() != p.shape => {
                    return Err(ModelError::Shape {
                        name: p.name,
                        got: t.dims().to_vec(),
                        expected: p.shape,
                    });
                }
                Some(_) => known += 1,
            }
        }
        if known < self.tensors.len() {
            let groups = config.parameter_groups();
            let is_known = |name: &str| groups.iter().flat_map(|g| &g.parameters).any(|p| p.name == name);
            if let Some(name) = self.tensors.keys().find(|n| !is_known(n)) {
                return Err(ModelError::UnknownTensor { name: name.clone() });
            }
        }
        Ok(())
    }

    /// Reads `model.safetensors`, or the files of `model.safetensors.index.json`, of a model folder.
    ///
    /// A stored `lm_head.weight` of a tied model is ignored, as HF does.
    ///
    /// # Errors
    /// Names the file or the tensor that is wrong.
    pub fn from_folder(
        folder: &Path,
        config: &DecoderConfig,
        dtype: DType,
        device: &Device,
    ) -> ModelResult<Self> {
        let mut weights = Self::default();
        for path in weight_files(folder)? {
            let bytes =
                std::fs::read(&path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
            let tensors = candle_core::safetensors::load_buffer(&bytes, device)
                .map_err(|e| ModelError::Malformed { path: path.clone(), what: e.to_string() })?;
            for (name, tensor) in tensors {
                weights.insert(name, tensor.to_dtype(dtype)?);
            }
        }
        if config.tie_word_embeddings {
            weights.tensors.remove("lm_head.weight");
        }
        weights.check(config)?;
        Ok(weights)
    }

    /// A fresh model: matrices from a normal distribution of standard deviation `std`, norms one, biases zero.
    ///
    /// The same seed gives the same bits with the same C library, whose logarithm and sine it uses.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn random(config: &DecoderConfig, seed: u64, std: f64, device: &Device) -> ModelResult<Self> {
        let mut normal = Normal::new(seed);
        let mut weights = Self::default();
        for p in config.parameter_groups().into_iter().flat_map(|g| g.parameters) {
            let n: usize = p.shape.iter().product();
            let data: Vec<f32> = if p.name.ends_with("bias") {
                vec![0.0; n]
            } else if p.shape.len() == 1 {
                vec![1.0; n]
            } else {
                (0..n).map(|_| (normal.next() * std) as f32).collect()
            };
            weights.insert(p.name, Tensor::from_vec(data, p.shape, device)?);
        }
        Ok(weights)
    }
}

/// The safetensors files of a model folder: those that `model.safetensors.index.json` names, else `model.safetensors`.
///
/// # Errors
/// [`ModelError::Io`] and [`ModelError::Malformed`] name the index.
fn weight_files(folder: &Path) -> ModelResult<Vec<PathBuf>> {
    let index = folder.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![folder.join("model.safetensors")]);
    }
    let malformed = |what: String| ModelError::Malformed { path: index.clone(), what };
    let text =
        std::fs::read_to_string(&index).map_err(|source| ModelError::Io { path: index.clone(), source })?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| malformed(e.to_string()))?;
    let map = json["weight_map"].as_object().ok_or_else(|| malformed("no `weight_map` object".into()))?;
    let mut names = std::collections::BTreeSet::new();
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(|| malformed(format!("`{tensor}` names no file")))?;
        // A file name, never a path: an index must not reach outside of its folder.
        if file.contains(['/', '\\']) || file.starts_with('.') {
            return Err(malformed(format!("`{tensor}` lies in `{file}`, which is not a plain file name")));
        }
        names.insert(file.to_owned());
    }
    Ok(names.into_iter().map(|n| folder.join(n)).collect())
}

/// Normal deviates by Box and Muller's transform over SplitMix64.
struct Normal {
    state: u64,
    spare: Option<f64>,
}

impl Normal {
    fn new(seed: u64) -> Self {
        Self { state: seed, spare: None }
    }

    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn next(&mut self) -> f64 {
        if let Some(z) = self.spare.take() {
            return z;
        }
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        let angle = std::f64::consts::TAU * self.uniform();
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }
}
