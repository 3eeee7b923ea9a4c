//! Weights held for reading, and what a step on the CPU sees of them.

use std::collections::BTreeMap;

use candle_core::{Layout, Storage, StorageRef, Tensor};

use super::config::DecoderConfig;
use super::cpu::{Layer, Linear, Matrix, Model};
use super::error::{ModelError, ModelResult};
use super::weights::Weights;

/// Every tensor of a model, locked for reading.
pub(super) struct Held<'w> {
    /// Each of them once, by its address, though many tensors be views of it: a lock that this thread has must not be asked
    /// for again, since somebody who waits to write would come first.
    storages: BTreeMap<usize, StorageRef<'w>>,
    tensors: BTreeMap<&'w str, (usize, &'w Layout)>,
    /// Vectors that are not f32, widened.
    wide: BTreeMap<&'w str, Vec<f32>>,
}

impl<'w> Held<'w> {
    pub(super) fn of(weights: &'w Weights) -> ModelResult<Self> {
        let mut wide = BTreeMap::new();
        for (name, tensor) in weights.iter().filter(|(_, t)| t.rank() == 1) {
            if tensor.dtype() != candle_core::DType::F32 {
                let vector = tensor.to_dtype(candle_core::DType::F32)?.to_vec1()?;
                wide.insert(name, vector);
            }
        }
        let (mut storages, mut tensors) = (BTreeMap::new(), BTreeMap::new());
        let mut of_each = BTreeMap::new();
        for (name, tensor) in weights.iter() {
            let (storage, layout) = tensor.storage_and_layout();
            let address = std::ptr::from_ref::<Storage>(&storage).addr();
            tensors.insert(name, (address, layout));
            of_each.insert(address, tensor);
        }
        for (address, tensor) in of_each {
            storages.insert(address, tensor.storage_and_layout().0);
        }
        Ok(Self { storages, tensors, wide })
    }

    fn matrix(&self, name: &str) -> ModelResult<Matrix<'_>> {
        let (address, layout) = self
            .tensors
            .get(name)
            .ok_or_else(|| ModelError::MissingTensor { name: name.to_owned(), expected: Vec::new() })?;
        let (start, end) = layout.contiguous_offsets().ok_or_else(|| unreadable(name))?;
        let storage = self.storages.get(address).ok_or_else(|| unreadable(name))?;
        let Storage::Cpu(storage) = &**storage else { return Err(unreadable(name)) };
        match storage {
            candle_core::CpuStorage::F32(w) => Ok(Matrix::F32(&w[start..end])),
            candle_core::CpuStorage::BF16(w) => Ok(Matrix::Bf16(&w[start..end])),
            candle_core::CpuStorage::F16(w) => Ok(Matrix::F16(&w[start..end])),
            _ => Err(unreadable(name)),
        }
    }

    fn vector(&self, name: &str) -> ModelResult<&[f32]> {
        if let Some(wide) = self.wide.get(name) {
            return Ok(wide);
        }
        match self.matrix(name)? {
            Matrix::F32(w) => Ok(w),
            _ => Err(unreadable(name)),
        }
    }

    /// The model, as a step sees it.
    pub(super) fn model<'a>(
        &'a self,
        config: &DecoderConfig,
        frequencies: &'a [f32],
    ) -> ModelResult<Model<'a>> {
        let layer = |index: usize| -> ModelResult<Layer<'a>> {
            let vector = |name: &str| self.vector(&format!("model.layers.{index}.{name}"));
            let linear = |name: &str, bias: bool| -> ModelResult<Linear<'a>> {
                let name = format!("model.layers.{index}.{name}");
                let bias = if bias { Some(self.vector(&format!("{name}.bias"))?) } else { None };
                Ok(Linear { weight: self.matrix(&format!("{name}.weight"))?, bias })
            };
            Ok(Layer {
                attention_norm: vector("input_layernorm.weight")?,
                q: linear("self_attn.q_proj", config.qkv_bias)?,
                k: linear("self_attn.k_proj", config.qkv_bias)?,
                v: linear("self_attn.v_proj", config.qkv_bias)?,
                head_norms: match config.has_head_norms() {
                    true => Some((vector("self_attn.q_norm.weight")?, vector("self_attn.k_norm.weight")?)),
                    false => None,
                },
                o: linear("self_attn.o_proj", config.output_bias)?,
                mlp_norm: vector("post_attention_layernorm.weight")?,
                gate: linear("mlp.gate_proj", config.mlp_bias)?,
                up: linear("mlp.up_proj", config.mlp_bias)?,
                down: linear("mlp.down_proj", config.mlp_bias)?,
            })
        };
        let embed = self.matrix("model.embed_tokens.weight")?;
        Ok(Model {
            hidden: config.hidden_size,
            heads: config.heads,
            eps: config.rms_norm_eps as f32,
            frequencies,
            embed,
            layers: (0..config.layers).map(layer).collect::<ModelResult<_>>()?,
            norm: self.vector("model.norm.weight")?,
            head: if config.tie_word_embeddings { embed } else { self.matrix("lm_head.weight")? },
        })
    }
}

fn unreadable(name: &str) -> ModelError {
    let what = format!("tensor `{name}`: contiguous f32, bf16 or f16 elements in host memory were expected");
    ModelError::Tensor(candle_core::Error::Msg(what))
}

/// The same tensor as a step can read it; shared with the given one if it is so already.
pub(super) fn readable(tensor: &Tensor, dtype: candle_core::DType) -> candle_core::Result<Tensor> {
    tensor.detach().to_device(&candle_core::Device::Cpu)?.to_dtype(dtype)?.contiguous()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_buffer_that_many_tensors_are_views_of_is_locked_once() {
        let flat = Tensor::arange(0_f32, 48.0, &Device::Cpu).unwrap();
        let view = |at: usize| (format!("view {at}"), flat.narrow(0, 16 * at, 16).unwrap());
        let own = ("own".to_owned(), Tensor::ones(16, candle_core::DType::F32, &Device::Cpu).unwrap());
        let weights: Weights = (0..3).map(view).chain([own]).collect();
        let held = Held::of(&weights).unwrap();
        assert_eq!((held.storages.len(), held.tensors.len()), (2, 4));
        let first = |name: &str| held.vector(name).unwrap()[0];
        assert_eq!(["own", "view 0", "view 1", "view 2"].map(first), [1.0, 0.0, 16.0, 32.0]);
    }
}
