//! What is measured in this process: passes over memory, and the plan of a large model

use std::convert::Infallible;
use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use half::bf16;
use lightrft_collectives::Single;
use lightrft_sharding::{
    AdamW, AdamWConfig, CopyOut, Ema, EmaConfig, Mode, ParamSpec, Plan, ShardedUnits, UnitSpec, grad_norm,
};

/// A model of one parameter on one rank, with everything that the cases go over.
pub(crate) struct Memory {
    units: ShardedUnits,
    adamw: AdamW,
    ema: Option<Ema>,
    copy: Vec<bf16>,
    elems: usize,
}

/// A pass over memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    AdamW,
    AdamWAndCopy,
    Norm,
    Ema,
}

impl Pass {
    pub(crate) const ALL: [Pass; 4] = [Pass::AdamW, Pass::AdamWAndCopy, Pass::Norm, Pass::Ema];

    /// As the peers know it.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Pass::AdamW => "adamw",
            Pass::AdamWAndCopy => "adamw+bf16",
            Pass::Norm => "norm",
            Pass::Ema => "ema",
        }
    }

    /// Bytes that an element costs, read and written.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Pass::AdamW => 28,
            Pass::AdamWAndCopy => 30,
            Pass::Norm => 4,
            Pass::Ema => 12,
        }
    }

    /// Who else can do it, in the peers' process.
    pub(crate) fn peers(self) -> &'static [&'static str] {
        match self {
            Pass::AdamW => &["for-loop", "foreach", "fused", "deepspeed"],
            Pass::AdamWAndCopy => &["fused", "deepspeed"],
            Pass::Norm | Pass::Ema => &["torch"],
        }
    }
}

impl Memory {
    pub(crate) fn new(elems: usize) -> Result<Self, Box<dyn Error>> {
        let unit = UnitSpec::new("model", [ParamSpec::new("model.weight", [elems])]);
        let plan = Arc::new(Plan::new(vec![unit], 1)?);
        let mut units = ShardedUnits::new(plan, Single::world(), Mode::Train)?;
        let fill = |out: &mut [f32]| out.iter_mut().zip(0u32..).for_each(|(out, i)| *out = noise(i));
        units.load(|_, _, out| {
            fill(out);
            Ok::<_, Infallible>(())
        })?;
        let adamw = AdamW::new(AdamWConfig { weight_decay: 0.01, ..AdamWConfig::lightrft() }, &units)?;
        Ok(Self { units, adamw, ema: None, copy: Vec::new(), elems })
    }

    /// Seconds of one call.
    pub(crate) fn time(&mut self, pass: Pass) -> Result<f64, Box<dyn Error>> {
        let units = &mut self.units;
        // A step forgets the gradient: there is a new one before each, which is not timed.
        let (mut grad, lease) = units.gradient_buffer(0)?.into_parts();
        drop(lease);
        grad.iter_mut().zip(7u32..).for_each(|(grad, i)| *grad = noise(i));
        units.zero_gradients();
        units.reduce_gradient(0, grad)?;
        let norm = grad_norm([&mut *units])?;
        match pass {
            Pass::AdamW => {
                let begin = Instant::now();
                self.adamw.step_with_norm(units, 1e-4, norm)?;
                Ok(begin.elapsed().as_secs_f64())
            }
            Pass::AdamWAndCopy => {
                self.copy.resize(self.elems, bf16::ZERO);
                let begin = Instant::now();
                let copy = CopyOut::Bf16(&mut self.copy);
                self.adamw.step_and_copy(units, 1e-4, norm, [copy])?;
                Ok(begin.elapsed().as_secs_f64())
            }
            Pass::Norm => {
                let begin = Instant::now();
                grad_norm([units])?;
                Ok(begin.elapsed().as_secs_f64())
            }
            Pass::Ema => {
                let ema = match &mut self.ema {
                    Some(ema) => ema,
                    none => none.insert(Ema::new(EmaConfig::lightrft(1), units)?),
                };
                let begin = Instant::now();
                ema.update(units)?;
                Ok(begin.elapsed().as_secs_f64())
            }
        }
    }
}

/// Small numbers of both signs.
fn noise(i: u32) -> f32 {
    ((i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0) * 1e-3
}

/// Ranks of the planned model.
pub(crate) const PLANNED_RANKS: usize = 512;

/// The parameters of Qwen2.5-7B: 28 layers of 12, embedding, norm and head, 339 in all.
pub(crate) fn seven_billion() -> Vec<UnitSpec> {
    let (width, inner, heads) = (3584, 18_944, 512);
    let layer = |l: usize| {
        let param = |name: &str, shape: &[usize]| ParamSpec::new(format!("model.layers.{l}.{name}"), shape);
        let params = [
            param("self_attn.q_proj.weight", &[width, width]),
            param("self_attn.q_proj.bias", &[width]),
            param("self_attn.k_proj.weight", &[heads, width]),
            param("self_attn.k_proj.bias", &[heads]),
            param("self_attn.v_proj.weight", &[heads, width]),
            param("self_attn.v_proj.bias", &[heads]),
            param("self_attn.o_proj.weight", &[width, width]),
            param("mlp.gate_proj.weight", &[inner, width]),
            param("mlp.up_proj.weight", &[inner, width]),
            param("mlp.down_proj.weight", &[width, inner]),
            param("input_layernorm.weight", &[width]),
            param("post_attention_layernorm.weight", &[width]),
        ];
        UnitSpec::new(format!("model.layers.{l}"), params)
    };
    let one = |unit: &str, name: &str, shape: &[usize]| UnitSpec::new(unit, [ParamSpec::new(name, shape)]);
    let mut units = vec![one("embedding", "model.embed_tokens.weight", &[152_064, width])];
    units.extend((0..28).map(layer));
    units.push(one("norm", "model.norm.weight", &[width]));
    units.push(one("head", "lm_head.weight", &[152_064, width]));
    units
}

/// Seconds to plan it, with its fingerprint and what one rank owns.
pub(crate) fn time_plan(rank: usize) -> Result<f64, Box<dyn Error>> {
    let specs = seven_billion();
    let begin = Instant::now();
    let plan = Plan::new(specs, PLANNED_RANKS)?;
    let print = plan.fingerprint();
    let owned: usize = plan.units().iter().map(|unit| unit.owned_parts(rank).count()).sum();
    let seconds = begin.elapsed().as_secs_f64();
    std::hint::black_box((print, owned));
    Ok(seconds)
}
