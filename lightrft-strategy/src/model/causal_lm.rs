//! The decoder as a staged model: embedding, layers and head, each gathered, used and freed on its own.
//!
//! Neither pass copies a parameter. A gathered unit becomes one tensor by move, its parameters are views of it, and when
//! it is freed the buffer moves out again, for the next gather. candle gives a gradient to every operand that stands
//! beside a variable, so the one variable of a stage is its input, and the views get theirs with it. The embedding has no
//! such input; its gradient is added row by row.
//!
//! Of a stage that is not recomputed its graph is kept: activations, and one copy of the input. It names the parameters'
//! views, but their memory goes when the unit is freed; backward puts the memory of the unit as gathered anew behind them.

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, Var};
use lightrft_engine::embedded::{Decoder, ModelResult, Weights};
use lightrft_sharding::{FlatUnit, ParamSpec, StageGrads, StageSpec, StagedModel, UnitSpec, UnitValues};

use super::TokenBatch;
use super::bound::{BoundUnit, with_values_of};
use crate::error::{Error, Result};

/// A causal language model whose output is the log-probability of each target token, `[rows, cols]`.
#[derive(Clone, Debug)]
pub struct CausalLm {
    decoder: Decoder,
}

/// The graph of one stage's forward pass.
#[derive(Debug)]
pub struct SavedStage {
    output: Tensor,
    input: Var,
    /// The operands that get gradients.
    units: Vec<BoundUnit>,
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
        params: &[&BoundUnit],
        batch: &TokenBatch,
        input: Option<&Tensor>,
    ) -> ModelResult<Tensor> {
        let weights: Weights = params.iter().flat_map(|unit| unit.params().iter().cloned()).collect();
        match input {
            None => self.decoder.embed(&weights, &batch.ids),
            Some(x) if stage <= self.decoder.config().layers => {
                self.decoder.layer(stage - 1, &weights, x, &batch.frame)
            }
            Some(x) => self.decoder.log_probs(&weights, x, &batch.targets),
        }
    }

    /// Runs a stage that has an input, and keeps the graph.
    fn record(
        &self,
        stage: usize,
        params: &[&BoundUnit],
        batch: &TokenBatch,
        input: &Tensor,
    ) -> Result<SavedStage> {
        let input = Var::from_tensor(input)?;
        let output = self.run(stage, params, batch, Some(input.as_tensor()))?;
        Ok(SavedStage { output, input, units: params.iter().map(|unit| unit.share()).collect() })
    }
}

impl SavedStage {
    /// The vector-Jacobian product, while the parameters' views have their memory.
    fn pull(self, grad_output: Tensor, grads: &mut StageGrads<'_>) -> Result<Option<Tensor>> {
        let Self { output, input, units } = self;
        // candle starts from ones, so the gradient of the output goes in as a factor.
        let mut found = (output * grad_output)?.sum_all()?.backward()?;
        for (unit, bound) in units.iter().enumerate() {
            for (param, (_, view)) in bound.params().iter().enumerate() {
                // A parameter this batch did not touch has no gradient, which counts as zero.
                if let Some(gradient) = found.remove(view)
                    && grads.wants(unit, param)?
                {
                    with_f32(&gradient, |gradient| Ok(grads.add(unit, param, gradient)?))?;
                }
            }
        }
        Ok(found.remove(input.as_tensor()))
    }
}

/// Adds each column's gradient to the row of its token.
fn embed_backward(ids: &Tensor, grad_output: &Tensor, grads: &mut StageGrads<'_>) -> Result<()> {
    // The unit's one parameter is the table.
    if !grads.wants(0, 0)? {
        return Ok(());
    }
    let (width, ids) = (grad_output.dims3()?.2, ids.flatten_all()?.to_vec1::<u32>()?);
    let table = grads.slice_mut(0, 0)?;
    with_f32(grad_output, |gradient| {
        for (id, gradient) in ids.into_iter().zip(gradient.chunks_exact(width)) {
            let row = id as usize * width;
            if let Some(sums) = table.get_mut(row..row + width) {
                sums.iter_mut().zip(gradient).for_each(|(sum, part)| *sum += part);
            }
        }
        Ok(())
    })
}

/// Shows `f` the elements of a tensor in row-major order, widened to f32; without a copy where they lie so on the host.
fn with_f32<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => f(&values[start..end]),
        _ => f(&tensor.flatten_all()?.to_vec1::<f32>()?),
    }
}

impl StagedModel for CausalLm {
    type Batch = TokenBatch;
    type Activation = Tensor;
    type Params = BoundUnit;
    type Saved = SavedStage;
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
        BoundUnit::new(unit, values, self.decoder.dtype(), self.decoder.device())
    }

    fn unbind(&self, unit: BoundUnit) -> Option<UnitValues> {
        unit.into_values()
    }

    fn forward(
        &self,
        stage: usize,
        params: &[&BoundUnit],
        batch: &TokenBatch,
        input: Option<&Tensor>,
    ) -> Result<Tensor> {
        Ok(self.run(stage, params, batch, input)?)
    }

    /// Keeps the graph of layers and head. The embedding has nothing to keep; and on a device other than the host the
    /// memory behind a view cannot be taken away, so there everything is recomputed.
    fn forward_saving(
        &self,
        stage: usize,
        params: &[&BoundUnit],
        batch: &TokenBatch,
        input: Option<&Tensor>,
    ) -> Result<(Tensor, Option<SavedStage>)> {
        match input.filter(|_| self.decoder.device().is_cpu()) {
            None => Ok((self.forward(stage, params, batch, input)?, None)),
            Some(input) => {
                let saved = self.record(stage, params, batch, input)?;
                Ok((saved.output.detach(), Some(saved)))
            }
        }
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
        let Some(input) = input else {
            embed_backward(&batch.ids, &grad_output, grads)?;
            return Ok(None);
        };
        self.record(stage, params, batch, input)?.pull(grad_output, grads)
    }

    fn backward_saved(
        &self,
        _stage: usize,
        params: &[&BoundUnit],
        _batch: &TokenBatch,
        _input: Option<&Tensor>,
        saved: SavedStage,
        grad_output: Tensor,
        grads: &mut StageGrads<'_>,
    ) -> Result<Option<Tensor>> {
        let units: Vec<BoundUnit> = saved.units.iter().map(BoundUnit::share).collect();
        with_values_of(&units, params, || saved.pull(grad_output, grads))
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::{Arc, Mutex};

    use lightrft_collectives::{Communicator, Single, local::World};
    use lightrft_engine::embedded::DecoderConfig;
    use lightrft_sharding::{Activations, Policy, Precision, ReshardAfterForward, ShardedModel};

    use super::*;
    use crate::model::Sequence;

    fn decoder(tied: bool, dtype: DType) -> Decoder {
        let json = serde_json::json!({
            "model_type": "qwen2", "vocab_size": 16, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 32, "tie_word_embeddings": tied
        });
        let config = DecoderConfig::from_json(&json.to_string()).unwrap();
        Decoder::new(config, dtype, &Device::Cpu).unwrap()
    }

    fn weights(decoder: &Decoder) -> Weights {
        Weights::random(decoder.config(), 5, 0.3, &Device::Cpu).unwrap()
    }

    /// The model, with what it was asked and what its graphs hold on to.
    struct Watched {
        model: CausalLm,
        asked: Mutex<Vec<&'static str>>,
        held: Mutex<Vec<BoundUnit>>,
    }

    impl Watched {
        fn note(&self, what: &'static str) {
            self.asked.lock().unwrap().push(what);
        }
    }

    impl StagedModel for Watched {
        type Batch = TokenBatch;
        type Activation = Tensor;
        type Params = BoundUnit;
        type Saved = SavedStage;
        type Error = Error;

        fn units(&self) -> Vec<UnitSpec> {
            self.model.units()
        }
        fn stages(&self) -> Vec<StageSpec> {
            self.model.stages()
        }
        fn bind(&self, unit: &FlatUnit, values: UnitValues) -> Result<BoundUnit> {
            self.model.bind(unit, values)
        }
        fn unbind(&self, unit: BoundUnit) -> Option<UnitValues> {
            let values = self.model.unbind(unit);
            assert!(values.as_ref().is_some_and(|values| !values.is_empty()), "the buffer comes back");
            values
        }
        fn forward(
            &self,
            stage: usize,
            params: &[&BoundUnit],
            batch: &TokenBatch,
            input: Option<&Tensor>,
        ) -> Result<Tensor> {
            self.note("forward");
            self.model.forward(stage, params, batch, input)
        }
        fn forward_saving(
            &self,
            stage: usize,
            params: &[&BoundUnit],
            batch: &TokenBatch,
            input: Option<&Tensor>,
        ) -> Result<(Tensor, Option<SavedStage>)> {
            self.note("forward");
            let ran = self.model.forward_saving(stage, params, batch, input)?;
            self.held
                .lock()
                .unwrap()
                .extend(ran.1.iter().flat_map(|saved| saved.units.iter().map(BoundUnit::share)));
            Ok(ran)
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
            self.note(if input.is_some() { "computed again" } else { "embedding" });
            self.model.backward(stage, params, batch, input, grad_output, grads)
        }
        fn backward_saved(
            &self,
            stage: usize,
            params: &[&BoundUnit],
            batch: &TokenBatch,
            input: Option<&Tensor>,
            saved: SavedStage,
            grad_output: Tensor,
            grads: &mut StageGrads<'_>,
        ) -> Result<Option<Tensor>> {
            self.note("kept");
            self.model.backward_saved(stage, params, batch, input, saved, grad_output, grads)
        }
    }

    fn sharded(comm: Arc<dyn Communicator>, decoder: Decoder, policy: Policy) -> ShardedModel<Watched> {
        let weights = weights(&decoder);
        let watched =
            Watched { model: CausalLm::new(decoder), asked: Mutex::default(), held: Mutex::default() };
        let mut model = ShardedModel::new(watched, comm, policy).unwrap();
        model
            .units_mut()
            .load(|param, range, out| {
                let all =
                    weights.tensor(param.name()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                out.copy_from_slice(&all[range]);
                Ok::<_, Infallible>(())
            })
            .unwrap();
        model
    }

    fn batch(decoder: &Decoder, first: u32) -> TokenBatch {
        let (one, two) = ([first, 4, 5, 4], [7, 8, first]);
        let sequences =
            [Sequence { prompt: &one, answer: &[6, 7, 1] }, Sequence { prompt: &two, answer: &[9, 1] }];
        TokenBatch::new(decoder, &sequences).unwrap()
    }

    fn ones(output: &Tensor) -> Tensor {
        output.ones_like().unwrap()
    }

    /// Every gradient shard after two passes that were open at once, and what the model was asked.
    fn gradients(
        comm: Arc<dyn Communicator>,
        tied: bool,
        dtype: DType,
        policy: Policy,
    ) -> (Vec<Vec<f32>>, Vec<&'static str>) {
        let mut model = sharded(comm, decoder(tied, dtype), policy.clone());
        let (first, second) = {
            let decoder = model.model().model.decoder();
            (batch(decoder, 3), batch(decoder, 12))
        };
        let (one, tape_one) = model.forward(&first).unwrap();
        let (two, tape_two) = model.forward(&second).unwrap();
        if policy.reshard_after_forward == ReshardAfterForward::Always {
            let held = std::mem::take(&mut *model.model().held.lock().unwrap());
            // The head stays for backward, which begins with it, and both passes have the same; of the tied embedding it
            // is the second pass's.
            let last = if tied { 3 } else { 2 };
            let freed = held.len() - if held.is_empty() { 0 } else { last };
            assert_eq!(
                held.iter().filter(|unit| unit.is_empty()).count(),
                freed,
                "freed units have no memory"
            );
        }
        model.backward(tape_two, ones(&two)).unwrap();
        model.backward(tape_one, ones(&one)).unwrap();
        let missing: Vec<&str> = model.params_without_gradient().collect();
        assert!(missing.is_empty(), "without a gradient: {missing:?}");
        let units = model.units_mut();
        units.sync_gradients().unwrap();
        let shards =
            (0..units.plan().units().len()).map(|unit| units.grad(unit).unwrap().unwrap().to_vec()).collect();
        let asked = model.model().asked.lock().unwrap().clone();
        (shards, asked)
    }

    #[test]
    fn a_kept_graph_gives_the_gradients_of_a_stage_computed_again_bit_for_bit() {
        let of = |tied: bool, reshard, precision, dtype, activations| {
            let policy = Policy {
                reshard_after_forward: reshard,
                param_dtype: precision,
                activations,
                ..Policy::default()
            };
            World::new(2).launch(|comm| Ok::<_, Error>(gradients(comm, tied, dtype, policy.clone()))).unwrap()
        };
        for tied in [true, false] {
            for reshard in [ReshardAfterForward::Always, ReshardAfterForward::Never] {
                for (precision, dtype) in [
                    (Precision::F32, DType::F32),
                    (Precision::Bf16, DType::F32),
                    (Precision::Bf16, DType::BF16),
                ] {
                    let again = of(tied, reshard, precision, dtype, Activations::Recompute);
                    let kept = of(tied, reshard, precision, dtype, Activations::Keep);
                    for ((again, asked), (kept, asked_less)) in again.iter().zip(&kept) {
                        assert!(again == kept, "{tied} {reshard:?} {precision:?} {dtype:?}");
                        assert_eq!(asked.iter().filter(|what| **what == "computed again").count(), 6);
                        assert!(!asked_less.contains(&"computed again"));
                        assert_eq!(asked_less.iter().filter(|what| **what == "kept").count(), 6);
                    }
                }
            }
        }
    }

    #[test]
    fn views_get_the_gradients_that_variables_get() {
        for tied in [true, false] {
            let decoder = decoder(tied, DType::F32);
            let weights = weights(&decoder);
            let vars: Vec<(String, Var)> = weights
                .iter()
                .map(|(name, tensor)| (name.to_owned(), Var::from_tensor(tensor).unwrap()))
                .collect();
            let whole: Weights =
                vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
            let batches = [batch(&decoder, 3), batch(&decoder, 12)];
            let mut sums: Vec<Vec<f32>> = vars.iter().map(|(_, var)| vec![0.0; var.elem_count()]).collect();
            for batch in &batches {
                let x = decoder.hidden(&whole, &batch.ids, &batch.frame).unwrap();
                let found = decoder.log_probs(&whole, &x, &batch.targets).unwrap().sum_all().unwrap();
                let found = found.backward().unwrap();
                for (sum, (_, var)) in sums.iter_mut().zip(&vars) {
                    let gradient = found.get(var.as_tensor()).unwrap().flatten_all().unwrap();
                    for (sum, part) in sum.iter_mut().zip(gradient.to_vec1::<f32>().unwrap()) {
                        *sum += part;
                    }
                }
            }
            let policy = Policy { activations: Activations::Keep, ..Policy::default() };
            let units = sharded(Single::world(), decoder, policy.clone()).units().plan().clone();
            let (shards, _) = gradients(Single::world(), tied, DType::F32, policy);
            for (unit, shard) in units.units().iter().zip(&shards) {
                for param in unit.params() {
                    let at = vars.iter().position(|(name, _)| name == param.name()).unwrap();
                    let gap = shard[param.range()].iter().zip(&sums[at]).map(|(a, b)| (a - b).abs());
                    let gap = gap.fold(0f32, f32::max);
                    assert!(gap < 2e-5, "{}: {gap}", param.name());
                }
            }
        }
    }

    #[test]
    fn values_gathered_in_bf16_are_computed_in_bf16_without_a_copy_or_cast_to_f32() {
        for (dtype, precision) in [(DType::BF16, Precision::Bf16), (DType::F32, Precision::F32)] {
            let model = CausalLm::new(decoder(true, dtype));
            let policy = Policy { param_dtype: Precision::Bf16, ..Policy::default() };
            let plan = sharded(Single::world(), decoder(true, dtype), policy).units().plan().clone();
            let unit = &plan.units()[0];
            let values = vec![half::bf16::from_f32(1.5); unit.padded_elems()];
            let pointer = values.as_ptr().cast::<u8>();
            let bound = model.bind(unit, UnitValues::Bf16(values)).unwrap();
            assert!(bound.params().iter().all(|(_, tensor)| tensor.dtype() == dtype));
            let back = model.unbind(bound).unwrap();
            assert_eq!(back.precision(), precision);
            if let UnitValues::Bf16(values) = &back {
                assert_eq!(values.as_ptr().cast::<u8>(), pointer, "the same buffer");
            }
            assert!(back.into_f32().iter().all(|value| *value == 1.5));
        }
    }
}
