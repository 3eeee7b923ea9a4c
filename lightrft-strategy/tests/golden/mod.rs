//! Reads the golden vectors: tensors as JSON, and a comparison that names the element that differs.

// Each test binary that declares this module uses its own part of it.
#![allow(dead_code, unreachable_pub)]

use lightrft_strategy::rl::Matrix;
use serde_json::Value;

/// A tensor of the vectors, whatever its dtype, as `f64`.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub dtype: String,
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

impl Tensor {
    /// `None` for a JSON null.
    pub fn read(value: &Value) -> Option<Self> {
        let dtype = value.get("dtype")?.as_str()?.to_owned();
        let shape = value["shape"].as_array()?.iter().map(|n| n.as_u64().unwrap() as usize).collect();
        let data = value["data"].as_array()?.iter().map(number).collect();
        Some(Self { dtype, shape, data })
    }

    pub fn f32(&self) -> Vec<f32> {
        self.data.iter().map(|x| *x as f32).collect()
    }

    pub fn i64(&self) -> Vec<i64> {
        self.data.iter().map(|x| *x as i64).collect()
    }

    /// The tensor as a mask: masks of the vectors hold 0 and 1 in every dtype.
    pub fn bool(&self) -> Vec<bool> {
        assert!(self.data.iter().all(|x| *x == 0.0 || *x == 1.0), "a mask holds 0 and 1");
        self.data.iter().map(|x| *x == 1.0).collect()
    }

    /// Rows and columns, with all leading dimensions as rows.
    pub fn dims(&self) -> (usize, usize) {
        let cols = self.shape.last().copied().unwrap_or(1);
        (self.shape[..self.shape.len().saturating_sub(1)].iter().product(), cols)
    }
}

/// A JSON number, or "nan", "inf", "-inf".
pub fn number(value: &Value) -> f64 {
    match value {
        Value::String(text) => text.parse().unwrap(),
        _ => value.as_f64().unwrap(),
    }
}

/// An owned matrix, from which borrowed ones are taken.
#[derive(Clone, Debug)]
pub struct Owned<T> {
    pub data: Vec<T>,
    pub rows: usize,
    pub cols: usize,
}

impl<T> Owned<T> {
    pub fn view(&self) -> Matrix<'_, T> {
        Matrix::new(&self.data, self.rows, self.cols).unwrap()
    }
}

/// A case's input `name` as a matrix.
pub fn matrix(inputs: &Value, name: &str) -> Owned<f32> {
    let tensor = Tensor::read(&inputs[name]).unwrap_or_else(|| panic!("no tensor `{name}`"));
    let (rows, cols) = tensor.dims();
    Owned { data: tensor.f32(), rows, cols }
}

/// A case's input `name` as a mask, `None` for null.
pub fn mask(inputs: &Value, name: &str) -> Option<Owned<bool>> {
    let tensor = Tensor::read(&inputs[name])?;
    let (rows, cols) = tensor.dims();
    Some(Owned { data: tensor.bool(), rows, cols })
}

/// The flat `f32` input `name`.
pub fn floats(inputs: &Value, name: &str) -> Vec<f32> {
    Tensor::read(&inputs[name]).unwrap_or_else(|| panic!("no tensor `{name}`")).f32()
}

/// Absolute and relative tolerance of `f32` results.
pub const F32: (f64, f64) = (1e-5, 2e-5);
/// Of `bf16` results.
pub const BF16: (f64, f64) = (1e-2, 1e-2);

/// `Err` with the first element that is further from `want` than the tolerance allows. NaN equals NaN.
pub fn close(what: &str, got: &[f64], want: &[f64], (abs, rel): (f64, f64)) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{what}: {} elements, want {}", got.len(), want.len()));
    }
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        let same =
            got == want || (got.is_nan() && want.is_nan()) || (got - want).abs() <= abs + rel * want.abs();
        if !same {
            return Err(format!("{what}[{at}]: {got}, want {want}"));
        }
    }
    Ok(())
}

/// [`close`] for `f32` results against a tensor.
pub fn close_to(what: &str, got: &[f32], want: &Tensor) -> Result<(), String> {
    let got: Vec<f64> = got.iter().map(|x| f64::from(*x)).collect();
    close(what, &got, &want.data, if want.dtype == "bf16" { BF16 } else { F32 })
}

/// [`close`] for one number.
pub fn close_scalar(what: &str, got: f64, want: &Value) -> Result<(), String> {
    let want = Tensor::read(want).map_or_else(|| number(want), |tensor| tensor.data[0]);
    close(what, &[got], &[want], F32)
}
