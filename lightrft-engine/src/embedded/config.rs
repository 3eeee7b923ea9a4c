//! The decoder's shape, read from a Hugging Face `config.json`, and the parameters that follow from it.

use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::{ModelError, ModelResult};

/// The families whose forward pass this decoder computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Llama, and models that share its layout and call themselves `llama` (SmolLM).
    Llama,
    /// Qwen2 and Qwen2.5: biases on the query, key and value projections only.
    Qwen2,
    /// Qwen3: an RMSNorm over each query and key head, and biases on all four projections of the attention or none.
    Qwen3,
}

/// How rotary frequencies are stretched for long contexts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// Every frequency divided by the factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3's rule: low frequencies are divided, high ones kept, those between are interpolated.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths longer than `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths shorter than `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before the stretching, in tokens.
        original_max_position_embeddings: usize,
    },
}

/// Shape of a decoder-only transformer with RMSNorm, rotary embeddings, grouped-query attention and SwiGLU.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Which family's rules apply.
    pub family: Family,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the SwiGLU.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// The epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// Whether the output projection is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the three projections of the SwiGLU have biases.
    pub mlp_bias: bool,
    /// Tokens that end a completion, from `eos_token_id`. A folder's `generation_config.json` may name more:
    /// [`EmbeddedEngine::end_tokens`](super::EmbeddedEngine::end_tokens).
    pub eos_token_ids: Vec<u32>,
}

/// A parameter's name and shape, as in HF's safetensors files.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Parameter {
    /// HF's name, for example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Shape, row-major; linear weights are `[out, in]`.
    pub shape: Vec<usize>,
}

/// Parameters that are used together: the embedding, one layer, or the head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterGroup {
    /// `embed`, `layers.{i}` or `head`.
    pub name: String,
    /// The parameters, in a fixed order.
    pub parameters: Vec<Parameter>,
}

/// `config.json` as it is written, with every spelling that is in use.
#[derive(Debug, Deserialize, Serialize, Default)]
struct Raw {
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    max_position_embeddings: Option<usize>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    use_sliding_window: Option<bool>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Debug, Deserialize, Serialize, Default)]
struct RawRope {
    rope_type: Option<String>,
    /// The older spelling; files of some releases hold both.
    r#type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    fn all(self) -> Vec<u32> {
        match self {
            OneOrMany::One(id) => vec![id],
            OneOrMany::Many(ids) => ids,
        }
    }
}

/// `generation_config.json`, as far as it says when to stop.
#[derive(Debug, Deserialize)]
struct RawGeneration {
    eos_token_id: Option<OneOrMany>,
}

impl DecoderConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// [`ModelError::Io`] and [`ModelError::Malformed`] name the file, [`ModelError::Config`] the field.
    pub fn from_folder(folder: &Path) -> ModelResult<Self> {
        let path = folder.join("config.json");
        let text =
            std::fs::read_to_string(&path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
        Self::from_json(&text).map_err(|error| match error {
            ModelError::Malformed { what, .. } => ModelError::Malformed { path, what },
            other => other,
        })
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] for text that is not such a file, [`ModelError::Config`] for a field that is absent
    /// or that this decoder does not support.
    pub fn from_json(text: &str) -> ModelResult<Self> {
        let raw: Raw = serde_json::from_str(text)
            .map_err(|e| ModelError::Malformed { path: "config.json".into(), what: e.to_string() })?;
        let family = match raw.model_type.as_deref() {
            Some("llama") => Family::Llama,
            Some("qwen2") => Family::Qwen2,
            Some("qwen3") => Family::Qwen3,
            other => {
                return Err(bad(
                    "model_type",
                    other.unwrap_or("(absent)"),
                    "one of `llama`, `qwen2`, `qwen3` was expected",
                ));
            }
        };
        let need = |field, value: Option<usize>| {
            value.ok_or_else(|| bad(field, "(absent)", "a number was expected"))
        };
        let hidden_size = need("hidden_size", raw.hidden_size)?;
        let heads = need("num_attention_heads", raw.num_attention_heads)?;
        let head_dim = match raw.head_dim {
            Some(d) => d,
            // This family's default, which `config.json` may leave out.
            None if family == Family::Qwen3 => 128,
            None if heads > 0 && hidden_size % heads == 0 => hidden_size / heads,
            None => {
                return Err(bad(
                    "hidden_size and num_attention_heads",
                    format!("{hidden_size} and {heads}"),
                    "hidden_size must be a multiple of num_attention_heads when head_dim is absent",
                ));
            }
        };
        let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        let (qkv_bias, output_bias, mlp_bias) = match family {
            Family::Qwen2 => (true, false, false),
            Family::Llama | Family::Qwen3 => {
                let attention = raw.attention_bias.unwrap_or(false);
                (attention, attention, family == Family::Llama && raw.mlp_bias.unwrap_or(false))
            }
        };
        let config = Self {
            family,
            vocab_size: need("vocab_size", raw.vocab_size)?,
            hidden_size,
            intermediate_size: need("intermediate_size", raw.intermediate_size)?,
            layers: need("num_hidden_layers", raw.num_hidden_layers)?,
            heads,
            kv_heads: raw.num_key_value_heads.unwrap_or(heads),
            head_dim,
            rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6),
            rope_theta: rope.and_then(|r| r.rope_theta).or(raw.rope_theta).unwrap_or(10_000.0),
            rope_scaling: rope_scaling(rope)?,
            max_position_embeddings: need("max_position_embeddings", raw.max_position_embeddings)?,
            // Absent means untied in all families.
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            qkv_bias,
            output_bias,
            mlp_bias,
            eos_token_ids: raw.eos_token_id.map(OneOrMany::all).unwrap_or_default(),
        };
        if let Some(act) = raw.hidden_act.as_deref().filter(|a| *a != "silu") {
            return Err(bad("hidden_act", act, "only `silu` is supported"));
        }
        if raw.use_sliding_window == Some(true) {
            return Err(bad("use_sliding_window", true, "sliding-window attention is not supported"));
        }
        config.validate()?;
        Ok(config)
    }

    /// The tokens that end a completion of a folder's model: `eos_token_id` of its `generation_config.json`, which for a
    /// chat model also names the end of an answer; those of `config.json` where there is no such file or field.
    pub(super) fn end_tokens(&self, folder: &Path) -> ModelResult<Vec<u32>> {
        let path = folder.join("generation_config.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(self.eos_token_ids.clone()),
            Err(source) => return Err(ModelError::Io { path, source }),
        };
        let raw: RawGeneration = match serde_json::from_str(&text) {
            Ok(raw) => raw,
            Err(error) => return Err(ModelError::Malformed { path, what: error.to_string() }),
        };
        let tokens = raw.eos_token_id.map_or_else(|| self.eos_token_ids.clone(), OneOrMany::all);
        match tokens.iter().find(|token| **token as usize >= self.vocab_size) {
            None => Ok(tokens),
            Some(token) => {
                let what =
                    format!("eos_token_id {token} is outside the vocabulary of {} tokens", self.vocab_size);
                Err(ModelError::Malformed { path, what })
            }
        }
    }

    /// The text of a `config.json` that HF and this crate read back as this configuration.
    pub fn to_json(&self) -> String {
        let (class, name) = match self.family {
            Family::Llama => ("LlamaForCausalLM", "llama"),
            Family::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Family::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
        };
        let mut v = serde_json::json!({
            "architectures": [class],
            "model_type": name,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "eos_token_id": self.eos_token_ids,
            "torch_dtype": "float32",
        });
        if self.family != Family::Qwen2 {
            v["attention_bias"] = self.qkv_bias.into();
        }
        if self.family == Family::Llama {
            v["mlp_bias"] = self.mlp_bias.into();
        }
        match self.rope_scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => {
                v["rope_scaling"] = serde_json::json!({ "rope_type": "linear", "factor": factor });
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                v["rope_scaling"] = serde_json::json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_max_position_embeddings,
                });
            }
        }
        format!("{v:#}\n")
    }

    /// Checks that the numbers fit together.
    ///
    /// # Errors
    /// [`ModelError::Config`] names the field, or both fields that contradict each other.
    pub fn validate(&self) -> ModelResult<()> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (field, value) in positive {
            if value == 0 {
                return Err(bad(field, 0, "a positive number was expected"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(bad(
                "num_attention_heads and num_key_value_heads",
                format!("{} and {}", self.heads, self.kv_heads),
                "the first must be a multiple of the second",
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(bad("head_dim", self.head_dim, "rotary embeddings need an even number"));
        }
        if let Some(id) = self.eos_token_ids.iter().find(|id| **id as usize >= self.vocab_size) {
            return Err(bad(
                "eos_token_id and vocab_size",
                format!("{id} and {}", self.vocab_size),
                "the token must lie in the vocabulary",
            ));
        }
        let stretch = match self.rope_scaling {
            RopeScaling::None => None,
            RopeScaling::Linear { factor } => Some((factor, true)),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, .. } => {
                Some((factor, low_freq_factor > 0.0 && high_freq_factor > low_freq_factor))
            }
        };
        if let Some((factor, bounds_in_order)) = stretch
            && !(factor > 0.0 && factor.is_finite() && bounds_in_order)
        {
            return Err(bad(
                "rope_scaling",
                format!("{:?}", self.rope_scaling),
                "factor must be positive, and 0 < low_freq_factor < high_freq_factor",
            ));
        }
        if self.qkv_bias != (self.family == Family::Qwen2 || self.output_bias)
            || (self.family == Family::Qwen2 && self.output_bias)
            || (self.family != Family::Llama && self.mlp_bias)
        {
            return Err(bad(
                "model_type, attention_bias and mlp_bias",
                format!("{:?}, {}, {} and {}", self.family, self.qkv_bias, self.output_bias, self.mlp_bias),
                "Qwen2 has biases on query, key and value alone; Llama and Qwen3 on all four projections or on none; only \
                 Llama has some in its SwiGLU",
            ));
        }
        if !(self.rms_norm_eps > 0.0 && self.rope_theta > 0.0) {
            return Err(bad(
                "rms_norm_eps and rope_theta",
                format!("{} and {}", self.rms_norm_eps, self.rope_theta),
                "both must be positive",
            ));
        }
        Ok(())
    }

    /// The model's parameters in groups that are used together: `embed`, `layers.0`, ..., `head`.
    ///
    /// With tied embeddings the `head` group holds the final norm only, and the head uses `embed`'s matrix too.
    pub fn parameter_groups(&self) -> Vec<ParameterGroup> {
        let (h, i) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut groups =
            vec![group("embed", vec![parameter("model.embed_tokens.weight", &[self.vocab_size, h])])];
        for layer in 0..self.layers {
            let prefix = format!("model.layers.{layer}.");
            let mut list = Vec::new();
            let mut add =
                |name: &str, shape: &[usize]| list.push(parameter(format!("{prefix}{name}"), shape));
            add("input_layernorm.weight", &[h]);
            for (name, out) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
                add(&format!("self_attn.{name}.weight"), &[out, h]);
                if self.qkv_bias {
                    add(&format!("self_attn.{name}.bias"), &[out]);
                }
            }
            if self.has_head_norms() {
                add("self_attn.q_norm.weight", &[self.head_dim]);
                add("self_attn.k_norm.weight", &[self.head_dim]);
            }
            add("self_attn.o_proj.weight", &[h, q]);
            if self.output_bias {
                add("self_attn.o_proj.bias", &[h]);
            }
            add("post_attention_layernorm.weight", &[h]);
            for (name, out, inp) in [("gate_proj", i, h), ("up_proj", i, h), ("down_proj", h, i)] {
                add(&format!("mlp.{name}.weight"), &[out, inp]);
                if self.mlp_bias {
                    add(&format!("mlp.{name}.bias"), &[out]);
                }
            }
            groups.push(group(format!("layers.{layer}"), list));
        }
        let mut head = vec![parameter("model.norm.weight", &[h])];
        if !self.tie_word_embeddings {
            head.push(parameter("lm_head.weight", &[self.vocab_size, h]));
        }
        groups.push(group("head", head));
        groups
    }

    /// Whether every query and key head is normed before it is turned to its position.
    pub fn has_head_norms(&self) -> bool {
        self.family == Family::Qwen3
    }

    /// Number of parameters, a tied matrix counted once.
    pub fn parameter_count(&self) -> usize {
        self.parameter_groups()
            .iter()
            .flat_map(|g| &g.parameters)
            .map(|p| p.shape.iter().product::<usize>())
            .sum()
    }

    /// Rotary frequency of each pair of elements of a head, radians per position.
    pub(super) fn rotary_frequencies(&self) -> Vec<f64> {
        let half = self.head_dim / 2;
        (0..half)
            .map(|k| {
                let f = self.rope_theta.powf(-(2.0 * k as f64) / self.head_dim as f64);
                match self.rope_scaling {
                    RopeScaling::None => f,
                    RopeScaling::Linear { factor } => f / factor,
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor,
                        high_freq_factor,
                        original_max_position_embeddings,
                    } => {
                        let original = original_max_position_embeddings as f64;
                        let wavelength = std::f64::consts::TAU / f;
                        if wavelength < original / high_freq_factor {
                            f
                        } else if wavelength > original / low_freq_factor {
                            f / factor
                        } else {
                            let smooth = (original / wavelength - low_freq_factor)
                                / (high_freq_factor - low_freq_factor);
                            (1.0 - smooth) * f / factor + smooth * f
                        }
                    }
                }
            })
            .collect()
    }
}

fn rope_scaling(rope: Option<&RawRope>) -> ModelResult<RopeScaling> {
    let Some(rope) = rope else { return Ok(RopeScaling::None) };
    let need = |field, value: Option<f64>| {
        value.ok_or_else(|| bad(field, "(absent)", "this kind of rope scaling needs it"))
    };
    match rope.rope_type.as_deref().or(rope.r#type.as_deref()) {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: need("rope_scaling.factor", rope.factor)? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: need("rope_scaling.factor", rope.factor)?,
            low_freq_factor: need("rope_scaling.low_freq_factor", rope.low_freq_factor)?,
            high_freq_factor: need("rope_scaling.high_freq_factor", rope.high_freq_factor)?,
            original_max_position_embeddings: rope.original_max_position_embeddings.ok_or_else(|| {
                bad(
                    "rope_scaling.original_max_position_embeddings",
                    "(absent)",
                    "this kind of rope scaling needs it",
                )
            })?,
        }),
        Some(other) => {
            Err(bad("rope_scaling.rope_type", other, "one of `default`, `linear`, `llama3` was expected"))
        }
    }
}

fn bad(field: &'static str, value: impl ToString, expected: impl ToString) -> ModelError {
    ModelError::Config { field, value: value.to_string(), expected: expected.to_string() }
}

fn parameter(name: impl Into<String>, shape: &[usize]) -> Parameter {
    Parameter { name: name.into(), shape: shape.to_vec() }
}

fn group(name: impl Into<String>, parameters: Vec<Parameter>) -> ParameterGroup {
    ParameterGroup { name: name.into(), parameters }
}
