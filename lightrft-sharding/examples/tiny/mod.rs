//! A small language model on plain slices, with its gradients written by hand: what a model must do to be sharded,
//! with no tensor library in the way. It predicts the next token from the last one.

#![allow(unreachable_pub, missing_docs)]

use std::convert::Infallible;

use lightrft_sharding::{FlatUnit, ParamSpec, StageGrads, StageSpec, StagedModel, UnitSpec, UnitValues};

/// Sizes of the model.
#[derive(Clone, Copy, Debug)]
pub struct Tiny {
    pub vocab: usize,
    pub width: usize,
    pub layers: usize,
}

/// Tokens and what follows them.
#[derive(Clone, Debug)]
pub struct Batch {
    pub tokens: Vec<usize>,
    pub targets: Vec<usize>,
}

/// A unit's whole buffer, with the offset of each parameter.
pub struct Bound {
    values: Vec<f32>,
    offsets: Vec<(usize, usize)>,
}

impl Bound {
    fn param(&self, index: usize) -> &[f32] {
        let (start, end) = self.offsets[index];
        &self.values[start..end]
    }
}

impl Tiny {
    /// Deterministic starting values for the parameter called `name`, elements `start..` of it.
    pub fn fill(name: &str, start: usize, out: &mut [f32]) {
        let seed = name.bytes().fold(17u32, |seed, byte| seed.wrapping_mul(31).wrapping_add(u32::from(byte)));
        for (at, value) in out.iter_mut().enumerate() {
            let mut x = seed ^ (start + at) as u32;
            for _ in 0..2 {
                x = (x ^ (x >> 16)).wrapping_mul(0x045d_9f3b);
            }
            let noise = ((x >> 8) as f32 / (1 << 24) as f32 - 0.5) * 0.8;
            *value = if name.ends_with("norm.weight") { 1.0 + 0.1 * noise } else { noise };
        }
    }

    /// The mean cross-entropy over `batch`, and the gradient of its sum divided by `denominator`: the number of tokens
    /// of the global batch, so that gradients need only be summed.
    pub fn loss(&self, logits: &[f32], batch: &Batch, denominator: usize) -> (f32, Vec<f32>) {
        let mut loss = 0.0;
        let mut grad = logits.to_vec();
        for (row, &target) in grad.chunks_mut(self.vocab).zip(&batch.targets) {
            let max = row.iter().copied().fold(f32::MIN, f32::max);
            let sum: f32 = row.iter().map(|z| (z - max).exp()).sum();
            loss += sum.ln() + max - row[target];
            row.iter_mut().for_each(|z| *z = (*z - max).exp() / sum / denominator as f32);
            row[target] -= 1.0 / denominator as f32;
        }
        (loss / batch.targets.len() as f32, grad)
    }
}

/// Units: the embedding, which the head uses too; one for each layer; the head.
impl StagedModel for Tiny {
    type Batch = Batch;
    type Activation = Vec<f32>;
    type Params = Bound;
    /// A layer's tanh, which its backward would compute again.
    type Saved = Vec<f32>;
    type Error = lightrft_sharding::Error;

    fn units(&self) -> Vec<UnitSpec> {
        let (v, d) = (self.vocab, self.width);
        let mut units = vec![UnitSpec::new("embed", [ParamSpec::new("embed.weight", [v, d])])];
        units.extend((0..self.layers).map(|i| {
            let name = |part: &str| format!("layers.{i}.{part}");
            UnitSpec::new(
                format!("layers.{i}"),
                [ParamSpec::new(name("weight"), [d, d]), ParamSpec::new(name("bias"), [d])],
            )
        }));
        units.push(UnitSpec::new(
            "head",
            [ParamSpec::new("norm.weight", [d]), ParamSpec::new("head.bias", [v])],
        ));
        units
    }

    fn stages(&self) -> Vec<StageSpec> {
        let mut stages = vec![StageSpec::new("embed", [0])];
        stages.extend((1..=self.layers).map(|unit| StageSpec::new(format!("layer {}", unit - 1), [unit])));
        stages.push(StageSpec::new("head", [0, self.layers + 1]));
        stages
    }

    fn bind(&self, unit: &FlatUnit, values: UnitValues) -> Result<Bound, Self::Error> {
        let values = values.into_f32();
        let offsets = unit.params().iter().map(|param| (param.range().start, param.range().end)).collect();
        Ok(Bound { values, offsets })
    }

    fn unbind(&self, params: Bound) -> Option<UnitValues> {
        Some(params.values.into())
    }

    fn forward(
        &self,
        stage: usize,
        params: &[&Bound],
        batch: &Batch,
        input: Option<&Vec<f32>>,
    ) -> Result<Vec<f32>, Self::Error> {
        let d = self.width;
        let x = input.map_or(&[][..], Vec::as_slice);
        Ok(match stage {
            0 => batch.tokens.iter().flat_map(|&t| &params[0].param(0)[t * d..][..d]).copied().collect(),
            _ if stage <= self.layers => {
                let mut y = hidden(x, params[0]);
                y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
                y
            }
            _ => {
                let (embed, scale, bias) = (params[0].param(0), params[1].param(0), params[1].param(1));
                let scaled =
                    |row: &[f32]| -> Vec<f32> { row.iter().zip(scale).map(|(x, s)| x * s).collect() };
                let logits = x.chunks(d).flat_map(|row| {
                    let row = scaled(row);
                    (0..self.vocab).map(move |v| dot(&row, &embed[v * d..][..d]) + bias[v])
                });
                logits.collect()
            }
        })
    }

    fn backward(
        &self,
        stage: usize,
        params: &[&Bound],
        batch: &Batch,
        input: Option<&Vec<f32>>,
        grad_output: Vec<f32>,
        grads: &mut StageGrads<'_>,
    ) -> Result<Option<Vec<f32>>, Self::Error> {
        let d = self.width;
        let x = input.map_or(&[][..], Vec::as_slice);
        Ok(match stage {
            0 => {
                let table = grads.slice_mut(0, 0)?;
                for (&token, grad) in batch.tokens.iter().zip(grad_output.chunks(d)) {
                    add_scaled(&mut table[token * d..][..d], grad, 1.0);
                }
                None
            }
            _ if stage <= self.layers => {
                return self.backward_saved(
                    stage,
                    params,
                    batch,
                    input,
                    hidden(x, params[0]),
                    grad_output,
                    grads,
                );
            }
            _ => {
                let (embed, scale) = (params[0].param(0), params[1].param(0));
                let mut grad_x = vec![0.0; x.len()];
                let (mut grad_scale, mut grad_bias) = (vec![0.0; d], vec![0.0; self.vocab]);
                let grad_table = grads.slice_mut(0, 0)?;
                for ((x, grad), grad_x) in
                    x.chunks(d).zip(grad_output.chunks(self.vocab)).zip(grad_x.chunks_mut(d))
                {
                    let scaled: Vec<f32> = x.iter().zip(scale).map(|(x, s)| x * s).collect();
                    let mut grad_scaled = vec![0.0; d];
                    for (v, &g) in grad.iter().enumerate() {
                        add_scaled(&mut grad_table[v * d..][..d], &scaled, g);
                        add_scaled(&mut grad_scaled, &embed[v * d..][..d], g);
                    }
                    add_scaled(&mut grad_bias, grad, 1.0);
                    for i in 0..d {
                        grad_scale[i] += grad_scaled[i] * x[i];
                        grad_x[i] = grad_scaled[i] * scale[i];
                    }
                }
                grads.add(1, 0, &grad_scale)?;
                grads.add(1, 1, &grad_bias)?;
                Some(grad_x)
            }
        })
    }

    fn forward_saving(
        &self,
        stage: usize,
        params: &[&Bound],
        batch: &Batch,
        input: Option<&Vec<f32>>,
    ) -> Result<(Vec<f32>, Option<Vec<f32>>), Self::Error> {
        let Some(x) = input.filter(|_| stage <= self.layers) else {
            return Ok((self.forward(stage, params, batch, input)?, None));
        };
        let tanh = hidden(x, params[0]);
        Ok((tanh.iter().zip(x).map(|(y, x)| y + x).collect(), Some(tanh)))
    }

    fn backward_saved(
        &self,
        _stage: usize,
        params: &[&Bound],
        _batch: &Batch,
        input: Option<&Vec<f32>>,
        tanh: Vec<f32>,
        grad_output: Vec<f32>,
        grads: &mut StageGrads<'_>,
    ) -> Result<Option<Vec<f32>>, Self::Error> {
        let d = self.width;
        let x = input.map_or(&[][..], Vec::as_slice);
        // y = x + tanh(x W^T + b), so d tanh = 1 - tanh^2.
        let mut grad_inner = tanh;
        grad_inner.iter_mut().zip(&grad_output).for_each(|(h, g)| *h = (1.0 - *h * *h) * g);
        let mut grad_x = grad_output;
        let mut grad_bias = vec![0.0; d];
        let weight = params[0].param(0);
        let grad_weight = grads.slice_mut(0, 0)?;
        for ((x, inner), grad_x) in x.chunks(d).zip(grad_inner.chunks(d)).zip(grad_x.chunks_mut(d)) {
            for (row, &g) in inner.iter().enumerate() {
                add_scaled(&mut grad_weight[row * d..][..d], x, g);
                add_scaled(grad_x, &weight[row * d..][..d], g);
            }
            add_scaled(&mut grad_bias, inner, 1.0);
        }
        grads.add(0, 1, &grad_bias)?;
        Ok(Some(grad_x))
    }
}

/// A reader of starting values, for [`lightrft_sharding::ShardedUnits::load`].
pub fn start(
    param: &lightrft_sharding::FlatParam,
    range: std::ops::Range<usize>,
    out: &mut [f32],
) -> Result<(), Infallible> {
    Tiny::fill(param.name(), range.start, out);
    Ok(())
}

/// tanh(x W^T + b), row by row.
fn hidden(x: &[f32], layer: &Bound) -> Vec<f32> {
    let (weight, bias) = (layer.param(0), layer.param(1));
    let d = bias.len();
    x.chunks(d)
        .flat_map(|x| (0..d).map(move |row| (dot(x, &weight[row * d..][..d]) + bias[row]).tanh()))
        .collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add_scaled(sum: &mut [f32], part: &[f32], factor: f32) {
    sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part * factor);
}
