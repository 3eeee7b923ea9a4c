//! A model that computes nothing and sees everything: it writes down the parameters it is given, gives whole numbers as
//! gradients, and skips stages as its batch says.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use lightrft_sharding::{
    FlatParam, FlatUnit, ParamSpec, StageGrads, StageSpec, StagedModel, UnitSpec, UnitValues,
};

/// Bits of parameters by round and name.
pub type Seen = BTreeMap<(usize, String), Vec<u32>>;

/// Which batch of the run it is.
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    pub round: usize,
    pub rank: usize,
    pub pass: usize,
}

#[derive(Debug)]
pub struct Probe {
    shapes: Vec<Vec<Vec<usize>>>,
    /// The units of each stage.
    stages: Vec<Vec<usize>>,
    seen: Mutex<Seen>,
    /// Stages whose backward began from what they had saved.
    pub kept: AtomicUsize,
}

/// A bound unit: each parameter's name and values, and the buffer, to be given back.
#[derive(Debug)]
pub struct Bound {
    params: Vec<(String, Vec<f32>)>,
    buffer: UnitValues,
}

impl Probe {
    /// One stage for each unit, and a last one that uses the last unit again, tied to the first.
    pub fn new(shapes: &[Vec<Vec<usize>>]) -> Self {
        let last = shapes.len() - 1;
        let mut stages: Vec<Vec<usize>> = (0..=last).map(|unit| vec![unit]).collect();
        stages.push(if last == 0 { vec![0] } else { vec![last, 0] });
        Self::with_stages(shapes, stages)
    }

    pub fn with_stages(shapes: &[Vec<Vec<usize>>], stages: Vec<Vec<usize>>) -> Self {
        Self { shapes: shapes.to_vec(), stages, seen: Mutex::default(), kept: AtomicUsize::new(0) }
    }

    /// The starting values of the parameter called `name`.
    pub fn start_of(name: &str, out: &mut [f32]) {
        let seed: usize = name.bytes().map(usize::from).sum();
        out.iter_mut().enumerate().for_each(|(at, value)| *value = value_at(seed, at));
    }

    pub fn take_seen(&self) -> Seen {
        std::mem::take(&mut *self.seen.lock().unwrap())
    }

    /// Every pass of a round must see the same parameters, forward and backward.
    fn see(&self, round: usize, params: &[&Bound]) -> Result<(), String> {
        let mut seen = self.seen.lock().unwrap();
        for (name, values) in params.iter().flat_map(|unit| unit.params.iter()) {
            let was = seen.entry((round, name.clone())).or_insert_with(|| bits(values));
            if *was != bits(values) {
                return Err(format!("{name} changed within round {round}"));
            }
        }
        Ok(())
    }
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Starting values.
pub fn start(param: &FlatParam, range: Range<usize>, out: &mut [f32]) -> Result<(), Infallible> {
    let seed: usize = param.name().bytes().map(usize::from).sum();
    for (value, at) in out.iter_mut().zip(range) {
        *value = value_at(seed, at);
    }
    Ok(())
}

fn value_at(seed: usize, at: usize) -> f32 {
    ((seed + 7 * at) % 31) as f32 / 16.0 - 1.0
}

/// A gradient of small whole numbers, which f32, bf16 and f16 add without rounding.
pub fn gradient(name: &str, batch: &Batch, elems: usize) -> Vec<f32> {
    let seed = name.bytes().map(usize::from).sum::<usize>() + 3 * batch.rank + 5 * batch.pass + batch.round;
    (0..elems).map(|at| ((seed + 7 * at) % 5) as f32 - 2.0).collect()
}

impl StagedModel for Probe {
    type Batch = Batch;
    type Activation = usize;
    type Params = Bound;
    /// The stage's own input, to be found again.
    type Saved = Option<usize>;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn units(&self) -> Vec<UnitSpec> {
        let unit = |(u, shapes): (usize, &Vec<Vec<usize>>)| {
            let param =
                |(p, shape): (usize, &Vec<usize>)| ParamSpec::new(format!("u{u}.p{p}"), shape.clone());
            UnitSpec::new(format!("u{u}"), shapes.iter().enumerate().map(param).collect::<Vec<_>>())
        };
        self.shapes.iter().enumerate().map(unit).collect()
    }

    fn stages(&self) -> Vec<StageSpec> {
        let stage = |(at, units): (usize, &Vec<usize>)| StageSpec::new(format!("s{at}"), units.clone());
        self.stages.iter().enumerate().map(stage).collect()
    }

    fn skips(&self, stage: usize, batch: &Batch) -> bool {
        // The last stage always runs, so that there is an output; others may be skipped on all ranks.
        stage + 1 < self.stages.len() && (stage + batch.rank + 2 * batch.pass).is_multiple_of(3)
    }

    fn bind(&self, unit: &FlatUnit, values: UnitValues) -> Result<Bound, Self::Error> {
        assert_eq!(values.len(), unit.padded_elems());
        let wide = values.clone().into_f32();
        let bound = |param: &FlatParam| (param.name().to_owned(), wide[param.range()].to_vec());
        Ok(Bound { params: unit.params().iter().map(bound).collect(), buffer: values })
    }

    fn unbind(&self, params: Bound) -> Option<UnitValues> {
        Some(params.buffer)
    }

    fn forward(
        &self,
        stage: usize,
        params: &[&Bound],
        batch: &Batch,
        input: Option<&usize>,
    ) -> Result<usize, Self::Error> {
        assert!(!self.skips(stage, batch));
        self.see(batch.round, params)?;
        Ok(input.map_or(1, |input| input + 1))
    }

    fn forward_saving(
        &self,
        stage: usize,
        params: &[&Bound],
        batch: &Batch,
        input: Option<&usize>,
    ) -> Result<(usize, Option<Self::Saved>), Self::Error> {
        Ok((self.forward(stage, params, batch, input)?, Some(input.copied())))
    }

    fn backward(
        &self,
        stage: usize,
        params: &[&Bound],
        batch: &Batch,
        input: Option<&usize>,
        grad_output: usize,
        grads: &mut StageGrads<'_>,
    ) -> Result<Option<usize>, Self::Error> {
        // Each stage that ran added one on the way forward and takes one on the way back.
        assert_eq!(grad_output, input.map_or(1, |input| input + 1), "stage {stage}");
        self.see(batch.round, params)?;
        for (unit, bound) in params.iter().enumerate() {
            for (param, (name, values)) in bound.params.iter().enumerate() {
                let gradient = gradient(name, batch, values.len());
                if !grads.wants(unit, param)? {
                    assert!(grads.slice_mut(unit, param).is_err());
                }
                grads.add(unit, param, &gradient)?;
            }
        }
        Ok(Some(grad_output - 1))
    }

    fn backward_saved(
        &self,
        stage: usize,
        params: &[&Bound],
        batch: &Batch,
        input: Option<&usize>,
        saved: Option<usize>,
        grad_output: usize,
        grads: &mut StageGrads<'_>,
    ) -> Result<Option<usize>, Self::Error> {
        assert_eq!(saved, input.copied());
        self.kept.fetch_add(1, Ordering::Relaxed);
        self.backward(stage, params, batch, input, grad_output, grads)
    }
}
