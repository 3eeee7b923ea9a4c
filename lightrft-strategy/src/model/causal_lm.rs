//! The decoder as a staged model: embedding, layers and head, each gathered, used and freed on its own.
//!
//! A gathered unit becomes one tensor by move, and its parameters are views of it: the forward pass copies no
//! parameter. Backward needs candle variables, which always own their memory, so one unit's parameters are copied
//! while that unit's gradient is taken.

use candle_core::{Device, Tensor, Var};
use lightrft_engine::embedded::{Decoder, ModelResult, Weights};
use lightrft_sharding::{FlatUnit, ParamSpec, StageGrads, StageSpec, StagedModel, UnitSpec, UnitValues};

use super::TokenBatch;
use crate::error::{Error, Result};

/// A causal language model whose output is the log-probability of each target token, `[rows, cols]`.
#[derive(Clone, Debug)]
pub struct CausalLm {
    decoder: Decoder,
}

/// The parameters of one gathered unit.
#[derive(Debug)]
pub struct BoundUnit {
    /// In the order of the unit.
    params: Vec<(String, Tensor)>,
}

impl CausalLm {
    /// The decoder as a model that can be sharded.
    pub fn new(decoder: Decoder) -> Self {
        Self { decoder }
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    fn run(
        &self,
        stage: usize,
        weights: &Weights,
        batch: &TokenBatch,
        input: Option<&Tensor>,
    ) -> ModelResult<Tensor> {
        match input {
            None => self.decoder.embed(weights, &batch.ids),
            Some(x) if stage <= self.decoder.config().layers => {
                self.decoder.layer(stage - 1, weights, x, &batch.frame, None)
            }
            Some(x) => self.decoder.log_probs(weights, x, &batch.targets),
        }
    }
}

impl StagedModel for CausalLm {
    type Batch = TokenBatch;
    type Activation = Tensor;
    type Params = BoundUnit;
    type Saved = ();
    type Error = Error;

    fn units(&self) -> Vec<UnitSpec> {
        let groups = self.decoder.config().parameter_groups();
        let unit = |g: lightrft_engine::embedded::ParameterGroup| {
            let params: Vec<_> = g.parameters.into_iter().map(|p| ParamSpec::new(p.name, p.shape)).collect();
            UnitSpec::new(g.name, params)
        };
        groups.into_iter().map(unit).collect()
    }

    fn stages(&self) -> Vec<StageSpec> {
        let layers = self.decoder.config().layers;
        let mut stages = vec![StageSpec::new("embed", [0])];
        stages.extend((0..layers).map(|i| StageSpec::new(format!("layers.{i}"), [i + 1])));
        // A tied head multiplies by the embedding's matrix.
        let head =
            if self.decoder.config().tie_word_embeddings { vec![0, layers + 1] } else { vec![layers + 1] };
        stages.push(StageSpec::new("head", head));
        stages
    }

    fn bind(&self, unit: &FlatUnit, values: UnitValues) -> Result<BoundUnit> {
        let values = values.into_f32();
        let elems = values.len();
        let flat = Tensor::from_vec(values, elems, &Device::Cpu)?.to_device(self.decoder.device())?;
        let view = |p: &lightrft_sharding::FlatParam| -> Result<(String, Tensor)> {
            let view = flat.narrow(0, p.range().start, p.elems())?.reshape(p.shape())?;
            Ok((p.name().to_owned(), view))
        };
        Ok(BoundUnit { params: unit.params().iter().map(view).collect::<Result<_>>()? })
    }

    fn forward(
        &self,
        stage: usize,
        params: &[&BoundUnit],
        batch: &TokenBatch,
        input: Option<&Tensor>,
    ) -> Result<Tensor> {
        let weights: Weights = params.iter().flat_map(|u| u.params.iter().cloned()).collect();
        Ok(self.run(stage, &weights, batch, input)?)
    }

    fn backward(
        &self,
        stage: usize,
        params: &[&BoundUnit],
        batch: &TokenBatch,
        input: Option<&Tensor>,
        grad_output: Tensor,
        grads: &mut StageGrads<'_>,
    ) -> Result<Option<Tensor>> {
        let mut vars = Vec::new();
        let mut weights = Vec::new();
        for (unit, bound) in params.iter().enumerate() {
            for (param, (name, value)) in bound.params.iter().enumerate() {
                // What is frozen needs no variable of its own.
                if !grads.wants(unit, param)? {
                    weights.push((name.clone(), value.clone()));
                    continue;
                }
                let var = Var::from_tensor(value)?;
                weights.push((name.clone(), var.as_tensor().clone()));
                vars.push((unit, param, var));
            }
        }
        let weights: Weights = weights.into_iter().collect();
        let input = input.map(Var::from_tensor).transpose()?;
        let output = self.run(stage, &weights, batch, input.as_ref().map(Var::as_tensor))?;
        // candle starts from ones, so the gradient of the output goes in as a factor.
        let mut found = (output * grad_output)?.sum_all()?.backward()?;
        for (unit, param, var) in &vars {
            // A parameter this batch did not touch has no gradient, which counts as zero.
            if let Some(gradient) = found.remove(var.as_tensor()) {
                grads.add(*unit, *param, &gradient.flatten_all()?.to_vec1::<f32>()?)?;
            }
        }
        Ok(input.and_then(|var| found.remove(var.as_tensor())))
    }
}
