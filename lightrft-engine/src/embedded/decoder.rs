//! The decoder as a trainer computes it, with gradients.
//!
//! The forward pass is cut into stages, `embed`, `layer(0)`, ..., and a head (`logits` or `log_probs`), so that a
//! sharded trainer can gather the parameters of one stage, use them and free them, and take the gradient of one stage
//! at a time. Every stage is a plain function of its [`Weights`] and its input; with parameters that are candle
//! variables each of them receives a gradient.

use candle_core::{DType, Device, Tensor};

use super::config::DecoderConfig;
use super::error::{ModelError, ModelResult};
use super::graft;
use super::weights::Weights;

/// A Llama-, Qwen2- or Qwen3-type decoder without its weights.
#[derive(Clone, Debug)]
pub struct Decoder {
    config: DecoderConfig,
    /// Rotary frequencies, radians per position, rounded to f32 as HF does.
    frequencies: Vec<f32>,
    device: Device,
    dtype: DType,
}

/// Where the tokens of a batch stand: rotary tables and the attention mask, shared by all layers.
#[derive(Clone, Debug)]
pub struct Frame {
    cos: Tensor,
    sin: Tensor,
    /// `[1, 1, queries, keys]`, 0 where attention is allowed, else -inf.
    mask: Tensor,
}

impl Decoder {
    /// A decoder of this shape, computing in `dtype` on `device`.
    ///
    /// # Errors
    /// [`ModelError::Config`] when the configuration contradicts itself.
    pub fn new(config: DecoderConfig, dtype: DType, device: &Device) -> ModelResult<Self> {
        config.validate()?;
        let frequencies = config.rotary_frequencies().into_iter().map(|f| f as f32).collect();
        Ok(Self { config, frequencies, device: device.clone(), dtype })
    }

    /// The shape.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Where tensors live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The type it computes in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Token ids as a tensor `[batch, length]` for [`Decoder::embed`].
    ///
    /// # Errors
    /// [`ModelError::Batch`] for rows of different lengths, an empty batch, a sequence over the context, or a token
    /// outside the vocabulary (each named).
    pub fn token_ids<R: AsRef<[u32]>>(&self, rows: &[R]) -> ModelResult<Tensor> {
        let length = rows.first().map_or(0, |r| r.as_ref().len());
        if length == 0 {
            return Err(ModelError::Batch("an empty batch or sequence has nothing to compute".into()));
        }
        let limit = self.config.max_position_embeddings;
        if length > limit {
            return Err(ModelError::Batch(format!(
                "a sequence of {length} tokens is longer than the context of {limit}"
            )));
        }
        let mut flat = Vec::with_capacity(rows.len() * length);
        for (i, row) in rows.iter().enumerate() {
            let row = row.as_ref();
            if row.len() != length {
                return Err(ModelError::Batch(format!(
                    "row {i} has {} tokens, row 0 has {length}: pad them to one length",
                    row.len()
                )));
            }
            if let Some(id) = row.iter().find(|id| **id as usize >= self.config.vocab_size) {
                return Err(ModelError::Batch(format!(
                    "row {i} holds token {id}, the vocabulary ends at {}",
                    self.config.vocab_size - 1
                )));
            }
            flat.extend_from_slice(row);
        }
        Ok(Tensor::from_vec(flat, (rows.len(), length), &self.device)?)
    }

    /// The frame of whole sequences of `length` tokens that start at position 0 (padding, if any, on the right).
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn frame(&self, length: usize) -> ModelResult<Frame> {
        let mut angles = Vec::with_capacity(length * self.frequencies.len());
        let mut mask = vec![f32::NEG_INFINITY; length * length];
        for query in 0..length {
            angles.extend(self.frequencies.iter().map(|f| query as f32 * f));
            mask[query * length..=query * length + query].fill(0.0);
        }
        let (cos, sin): (Vec<f32>, Vec<f32>) =
            angles.iter().map(|a| (f64::from(*a).cos() as f32, f64::from(*a).sin() as f32)).unzip();
        let table = |data: Vec<f32>| -> ModelResult<Tensor> {
            Ok(Tensor::from_vec(data, (length, self.frequencies.len()), &self.device)?
                .to_dtype(self.dtype)?)
        };
        Ok(Frame {
            cos: table(cos)?,
            sin: table(sin)?,
            mask: Tensor::from_vec(mask, (1, 1, length, length), &self.device)?.to_dtype(self.dtype)?,
        })
    }

    /// Stage `embed`: token ids `[batch, length]` to the residual stream `[batch, length, hidden]`.
    ///
    /// # Errors
    /// A missing weight, or those of the tensor library.
    pub fn embed(&self, weights: &Weights, ids: &Tensor) -> ModelResult<Tensor> {
        let (batch, length) = ids.dims2()?;
        let table = weights.tensor("model.embed_tokens.weight")?;
        let x = table.index_select(&ids.flatten_all()?, 0)?;
        Ok(x.reshape((batch, length, self.config.hidden_size))?)
    }

    /// Stage `layers.{index}`: residual stream to residual stream.
    ///
    /// # Errors
    /// A missing weight, or those of the tensor library.
    pub fn layer(&self, index: usize, weights: &Weights, x: &Tensor, frame: &Frame) -> ModelResult<Tensor> {
        let c = &self.config;
        let (batch, length, _) = x.dims3()?;
        let w = LayerWeights { weights, prefix: format!("model.layers.{index}.") };
        let normed = graft::rms_norm(x, w.get("input_layernorm.weight")?, c.rms_norm_eps)?;
        let heads = |t: Tensor, n: usize| -> ModelResult<Tensor> {
            Ok(t.reshape((batch, length, n, c.head_dim))?.transpose(1, 2)?.contiguous()?)
        };
        let q = heads(w.linear("self_attn.q_proj", &normed, c.qkv_bias)?, c.heads)?;
        let k = heads(w.linear("self_attn.k_proj", &normed, c.qkv_bias)?, c.kv_heads)?;
        let v = heads(w.linear("self_attn.v_proj", &normed, c.qkv_bias)?, c.kv_heads)?;
        let (q, k) = if c.has_head_norms() {
            let normed =
                |x: &Tensor, name| graft::rms_norm(x, w.get(name)?, c.rms_norm_eps).map_err(ModelError::from);
            (normed(&q, "self_attn.q_norm.weight")?, normed(&k, "self_attn.k_norm.weight")?)
        } else {
            (q, k)
        };
        let q = graft::rope(&q, &frame.cos, &frame.sin)?;
        let k = graft::rope(&k, &frame.cos, &frame.sin)?;
        // The query heads of a group stand in one matrix, so keys and values need no copies: [b, kv, group * len, dim].
        let stacked = (batch, c.kv_heads, c.heads / c.kv_heads * length, c.head_dim);
        let scores = q.reshape(stacked)?.matmul(&k.t()?)?.reshape((batch, c.heads, length, length))?;
        let scale = 1.0 / (c.head_dim as f64).sqrt();
        let attention = graft::masked_softmax(&scores, &frame.mask, scale)?;
        let attention = attention.reshape((stacked.0, stacked.1, stacked.2, length))?;
        let out = attention.matmul(&v)?.reshape((batch, c.heads, length, c.head_dim))?;
        let out = out.transpose(1, 2)?.reshape((batch, length, c.heads * c.head_dim))?;
        let x = (x + w.linear("self_attn.o_proj", &out, c.output_bias)?)?;

        let normed = graft::rms_norm(&x, w.get("post_attention_layernorm.weight")?, c.rms_norm_eps)?;
        let gate = w.linear("mlp.gate_proj", &normed, c.mlp_bias)?;
        let up = w.linear("mlp.up_proj", &normed, c.mlp_bias)?;
        let mlp = w.linear("mlp.down_proj", &graft::swiglu(&gate, &up)?, c.mlp_bias)?;
        Ok((x + mlp)?)
    }

    /// Stage `head`: logits `[batch, length, vocab]`.
    ///
    /// # Errors
    /// A missing weight, or those of the tensor library.
    pub fn logits(&self, weights: &Weights, x: &Tensor) -> ModelResult<Tensor> {
        let x = graft::rms_norm(x, weights.tensor("model.norm.weight")?, self.config.rms_norm_eps)?;
        let name =
            if self.config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        Ok(graft::linear(&x, weights.tensor(name)?, None)?)
    }

    /// Stage `head` with the loss' first step: the log-probability, f32 `[batch, length]`, of `targets`
    /// `[batch, length]` (u32) under the logits of the same column, at temperature 1.
    ///
    /// # Errors
    /// A missing weight, or those of the tensor library.
    pub fn log_probs(&self, weights: &Weights, x: &Tensor, targets: &Tensor) -> ModelResult<Tensor> {
        let (batch, length) = targets.dims2()?;
        let logits = self.logits(weights, x)?.reshape((batch * length, self.config.vocab_size))?;
        let log_probs = graft::token_log_probs(&logits, &targets.flatten_all()?)?;
        Ok(log_probs.reshape((batch, length))?)
    }

    /// All stages but the head: the residual stream after the last layer.
    ///
    /// # Errors
    /// A missing weight, or those of the tensor library.
    pub fn hidden(&self, weights: &Weights, ids: &Tensor, frame: &Frame) -> ModelResult<Tensor> {
        let mut x = self.embed(weights, ids)?;
        for i in 0..self.config.layers {
            x = self.layer(i, weights, &x, frame)?;
        }
        Ok(x)
    }
}

/// The weights of one layer, by their names within it.
struct LayerWeights<'a> {
    weights: &'a Weights,
    prefix: String,
}

impl<'a> LayerWeights<'a> {
    fn get(&self, name: &str) -> ModelResult<&'a Tensor> {
        self.weights.tensor(&format!("{}{name}", self.prefix))
    }

    fn linear(&self, name: &str, x: &Tensor, bias: bool) -> ModelResult<Tensor> {
        let w = self.get(&format!("{name}.weight"))?;
        let b = if bias { Some(self.get(&format!("{name}.bias"))?) } else { None };
        Ok(graft::linear(x, w, b)?)
    }
}
