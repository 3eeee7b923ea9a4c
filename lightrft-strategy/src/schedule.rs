//! Learning rates over optimizer steps, by the names and with the values of HF transformers' `get_scheduler`.
//!
//! ```
//! use lightrft_strategy::schedule::Schedule;
//!
//! // LightRFT's: 3% warmup, then half a cosine down to a tenth of the rate.
//! let schedule = Schedule::cosine_with_min_lr(1e-6, 100, 0.03)?;
//! assert_eq!(schedule.lr(3), 1e-6);
//! assert!((schedule.lr(100) - 1e-7).abs() < 1e-18);
//! assert_eq!(schedule.lr(1_000), schedule.lr(100));
//! # Ok::<_, lightrft_strategy::schedule::Error>(())
//! ```
//!
//! Two differences from HF. Past the last training step the progress stays at 1: the rate stays at its minimum, where
//! HF's cosine schedules rise again. And where warmup takes all the steps there is nothing to divide by: the polynomial
//! decay is at its end then, where HF stops with a division by zero.
//!
//! As in HF, warmup starts at 0: with warmup the first optimizer step changes nothing.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// A schedule that cannot be built.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A number is outside its range.
    #[error("`{what}` is {got}, expected {want}")]
    Range {
        /// The argument.
        what: &'static str,
        /// Its value.
        got: f64,
        /// The range, in words.
        want: &'static str,
    },
    /// A schedule that ends was given no end, or one that warms up no warmup.
    #[error("schedule `{schedule}` needs `{what}`")]
    Missing {
        /// The schedule.
        schedule: &'static str,
        /// What was not given.
        what: &'static str,
    },
}

/// The lower end of a cosine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MinLr {
    /// A rate.
    #[serde(rename = "min_lr")]
    Rate(f64),
    /// A fraction of the base rate.
    #[serde(rename = "min_lr_rate")]
    Fraction(f64),
}

/// A curve from 0 to 1, for warmup and decay of [`Shape::WarmupStableDecay`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Curve {
    /// A straight line.
    #[default]
    #[serde(rename = "linear")]
    Linear,
    /// A cosine.
    #[serde(rename = "cosine")]
    Cosine,
    /// `1 - sqrt`, steep first when it falls.
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

/// The shape of a schedule. Serde tags are HF's names.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Shape {
    /// The base rate always, without warmup.
    Constant,
    /// Warmup, then the base rate.
    ConstantWithWarmup,
    /// Warmup, then a line to 0.
    Linear,
    /// Warmup, then `num_cycles` of a cosine; half a one ends at 0.
    Cosine {
        /// Waves.
        #[serde(default = "half_a_wave")]
        num_cycles: f64,
    },
    /// Warmup, then `num_cycles` half cosines, each from the base rate to 0.
    CosineWithRestarts {
        /// Restarts, the first start included.
        num_cycles: u32,
    },
    /// Warmup, then a power of the remaining share down to `lr_end`.
    Polynomial {
        /// The rate at the end, below the base rate.
        lr_end: f64,
        /// The power; 1 is a line.
        power: f64,
    },
    /// Warmup, then one over the square root of the step. It has no end.
    InverseSqrt {
        /// Steps over which the rate falls by `1 / sqrt(2)`; `None` for the warmup, or 10,000 without one.
        timescale: Option<usize>,
    },
    /// Warmup, then a cosine that ends at a minimum above 0.
    CosineWithMinLr {
        /// The minimum.
        #[serde(flatten)]
        min: MinLr,
        /// Waves.
        #[serde(default = "half_a_wave")]
        num_cycles: f64,
    },
    /// Warmup, a plateau, and a decay over the last `num_decay_steps`.
    WarmupStableDecay {
        /// Steps of decay.
        num_decay_steps: usize,
        /// The fraction of the base rate at both ends.
        min_lr_ratio: f64,
        /// Waves of a cosine decay.
        num_cycles: f64,
        /// Curve of the warmup.
        warmup_type: Curve,
        /// Curve of the decay.
        decay_type: Curve,
    },
}

/// HF's default of `num_cycles`.
fn half_a_wave() -> f64 {
    0.5
}

impl Shape {
    /// HF's name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::ConstantWithWarmup => "constant_with_warmup",
            Self::Linear => "linear",
            Self::Cosine { .. } => "cosine",
            Self::CosineWithRestarts { .. } => "cosine_with_restarts",
            Self::Polynomial { .. } => "polynomial",
            Self::InverseSqrt { .. } => "inverse_sqrt",
            Self::CosineWithMinLr { .. } => "cosine_with_min_lr",
            Self::WarmupStableDecay { .. } => "warmup_stable_decay",
        }
    }
}

impl Default for Shape {
    /// LightRFT's: half a cosine down to a tenth.
    fn default() -> Self {
        Self::CosineWithMinLr { min: MinLr::Fraction(0.1), num_cycles: 0.5 }
    }
}

/// A learning rate for every optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    shape: Shape,
    base_lr: f64,
    warmup_steps: usize,
    training_steps: Option<usize>,
}

impl Schedule {
    /// A schedule of `shape` that peaks at `base_lr`.
    ///
    /// `training_steps` may be `None` for shapes without an end: constant, constant with warmup, inverse square root.
    ///
    /// # Errors
    /// [`Error::Missing`] when the shape needs an end and has none, [`Error::Range`] for a rate that is negative or
    /// not finite, a polynomial end that is not below `base_lr`, or restarts or a timescale of 0.
    pub fn new(
        shape: Shape,
        base_lr: f64,
        warmup_steps: usize,
        training_steps: Option<usize>,
    ) -> Result<Self, Error> {
        let range = |what, got, want| Err(Error::Range { what, got, want });
        if !(base_lr >= 0.0 && base_lr.is_finite()) {
            return range("base_lr", base_lr, "at least 0, finite");
        }
        let endless =
            matches!(shape, Shape::Constant | Shape::ConstantWithWarmup | Shape::InverseSqrt { .. });
        if training_steps.is_none() && !endless {
            return Err(Error::Missing { schedule: shape.name(), what: "training_steps" });
        }
        match shape {
            Shape::Polynomial { lr_end, .. } if !(lr_end >= 0.0 && lr_end < base_lr) => {
                return range("lr_end", lr_end, "at least 0 and less than base_lr");
            }
            Shape::Polynomial { power, .. } if !(power > 0.0 && power.is_finite()) => {
                return range("power", power, "more than 0, finite");
            }
            Shape::CosineWithMinLr { min: MinLr::Rate(min) | MinLr::Fraction(min), .. }
                if !(min >= 0.0 && min.is_finite()) =>
            {
                return range("min_lr", min, "at least 0, finite");
            }
            Shape::InverseSqrt { timescale: Some(0) } => return range("timescale", 0.0, "at least 1"),
            Shape::CosineWithRestarts { num_cycles: 0 } => return range("num_cycles", 0.0, "at least 1"),
            Shape::CosineWithMinLr { min: MinLr::Rate(_), .. } if base_lr == 0.0 => {
                return range("base_lr", 0.0, "more than 0 with a min_lr");
            }
            _ => {}
        }
        Ok(Self { shape, base_lr, warmup_steps, training_steps })
    }

    /// LightRFT's schedule: `ceil(max_steps * warmup_ratio)` steps of warmup, then half a cosine down to a tenth.
    ///
    /// # Errors
    /// [`Error::Range`] unless `0 <= warmup_ratio <= 1` and `base_lr` is finite and not negative.
    pub fn cosine_with_min_lr(base_lr: f64, max_steps: usize, warmup_ratio: f64) -> Result<Self, Error> {
        if !(0.0..=1.0).contains(&warmup_ratio) {
            return Err(Error::Range { what: "warmup_ratio", got: warmup_ratio, want: "0 to 1" });
        }
        let warmup_steps = (max_steps as f64 * warmup_ratio).ceil() as usize;
        Self::new(Shape::default(), base_lr, warmup_steps, Some(max_steps))
    }

    /// The rate of the optimizer step that comes after `step` finished ones: `lr(0)` is the first step's.
    pub fn lr(&self, step: usize) -> f64 {
        self.base_lr * self.factor(step)
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Steps of warmup.
    pub fn warmup_steps(&self) -> usize {
        self.warmup_steps
    }

    fn factor(&self, step: usize) -> f64 {
        if let Shape::Constant = self.shape {
            return 1.0;
        }
        if step < self.warmup_steps {
            let progress = step as f64 / self.warmup_steps as f64;
            return match self.shape {
                Shape::WarmupStableDecay { min_lr_ratio, warmup_type, .. } => {
                    lift(warmup_type.rise(progress), min_lr_ratio)
                }
                _ => progress,
            };
        }
        let after = step - self.warmup_steps;
        match self.shape {
            Shape::Constant | Shape::ConstantWithWarmup => 1.0,
            Shape::Linear => self.remaining(step),
            Shape::Cosine { num_cycles } => wave(self.progress(after), num_cycles).max(0.0),
            Shape::CosineWithRestarts { num_cycles } => {
                let progress = self.progress(after);
                if progress >= 1.0 {
                    0.0
                } else {
                    0.5 * (1.0 + (PI * (f64::from(num_cycles) * progress).fract()).cos())
                }
            }
            Shape::Polynomial { lr_end, power } => {
                ((self.base_lr - lr_end) * self.remaining(step).powf(power) + lr_end) / self.base_lr
            }
            Shape::InverseSqrt { timescale } => {
                let timescale = timescale.unwrap_or(match self.warmup_steps {
                    0 => 10_000,
                    warmup => warmup,
                });
                // HF shifts the curve so that it meets the warmup at 1.
                1.0 / ((after + timescale) as f64 / timescale as f64).sqrt()
            }
            Shape::CosineWithMinLr { min, num_cycles } => {
                let floor = match min {
                    MinLr::Rate(rate) => rate / self.base_lr,
                    MinLr::Fraction(fraction) => fraction,
                };
                lift(wave(self.progress(after), num_cycles), floor).max(0.0)
            }
            Shape::WarmupStableDecay { num_decay_steps, min_lr_ratio, num_cycles, decay_type, .. } => {
                let end = self.training_steps.unwrap_or(usize::MAX);
                let decayed = step.saturating_add(num_decay_steps).saturating_sub(end);
                if step >= end {
                    min_lr_ratio
                } else if decayed == 0 {
                    1.0
                } else {
                    let progress = decayed as f64 / num_decay_steps as f64;
                    lift(decay_type.fall(progress, num_cycles), min_lr_ratio).max(0.0)
                }
            }
        }
    }

    /// How much of the way from the end of warmup to the last step is done, `0..=1`.
    fn progress(&self, after_warmup: usize) -> f64 {
        (after_warmup as f64 / self.steps_after_warmup()).min(1.0)
    }

    /// How much of that way is left, `0..=1`: 0 at the last step, also where warmup takes all the steps.
    fn remaining(&self, step: usize) -> f64 {
        let left = self.training_steps.unwrap_or(usize::MAX).saturating_sub(step);
        (left as f64 / self.steps_after_warmup()).min(1.0)
    }

    /// At least 1, as HF has it, so that there is something to divide by.
    fn steps_after_warmup(&self) -> f64 {
        self.training_steps.unwrap_or(usize::MAX).saturating_sub(self.warmup_steps).max(1) as f64
    }
}

/// `num_cycles` waves from 1, by way of 0.
fn wave(progress: f64, num_cycles: f64) -> f64 {
    0.5 * (1.0 + (PI * num_cycles * 2.0 * progress).cos())
}

/// `0..=1` onto `floor..=1`.
fn lift(factor: f64, floor: f64) -> f64 {
    factor * (1.0 - floor) + floor
}

impl Curve {
    fn rise(self, progress: f64) -> f64 {
        match self {
            Self::Linear => progress,
            Self::Cosine => 0.5 * (1.0 - (PI * progress).cos()),
            Self::OneMinusSqrt => 1.0 - (1.0 - progress).sqrt(),
        }
    }

    fn fall(self, progress: f64, num_cycles: f64) -> f64 {
        match self {
            Self::Linear => 1.0 - progress,
            Self::Cosine => wave(progress, num_cycles),
            Self::OneMinusSqrt => 1.0 - progress.sqrt(),
        }
    }
}
