//! Exponentials and logarithms that stay finite where a float would not.

/// Where [`exp_capped`] leaves the exponential. A probability ratio of `e^20 = 4.9e8` carries no information beyond
/// "far off", and its square still fits in an `f32`.
pub(crate) const EXP_CAP: f64 = 20.0;

/// `exp(x)` and its derivative, continued along its tangent above [`EXP_CAP`].
///
/// The continuation is monotone, convex and once differentiable: a loss built on it grows and keeps pointing the right
/// way where `exp` overflows, and its gradient is bounded by `e^20`.
pub(crate) fn exp_capped(x: f64) -> (f64, f64) {
    if x <= EXP_CAP {
        let y = x.exp();
        (y, y)
    } else {
        // NaN lands here too, and stays NaN.
        let y = EXP_CAP.exp();
        (y * (1.0 + (x - EXP_CAP)), y)
    }
}

/// `ln(1 + exp(x))` without overflow.
pub(crate) fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// `1 / (1 + exp(-x))` without overflow.
pub(crate) fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// `ln(sum(exp(values)))` without overflow; `-inf` for no values or only `-inf`, and `+inf` if one is `+inf`.
/// `f32::max` drops a NaN, the sum does not: one NaN makes the result NaN.
pub(crate) fn log_sum_exp(values: &[f32]) -> f64 {
    let max = f64::from(values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    if !max.is_finite() {
        return max;
    }
    let sum: f64 = values.iter().map(|x| (f64::from(*x) - max).exp()).sum();
    max + sum.ln()
}
