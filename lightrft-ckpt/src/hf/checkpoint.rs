//! From a checkpoint to a model folder, piece by piece, whatever the ranks were that saved it.

use std::cmp::Ordering;
use std::path::PathBuf;
use std::sync::Arc;

use safetensors::Dtype;

use super::writer::{HfOptions, HfReport, HfWriter};
use crate::checkpoint::Checkpoint;
use crate::element::{element_bytes, element_count};
use crate::error::{Error, Result};
use crate::fs::FileSystem;
use crate::manifest::BLOCK_BYTES;
use crate::os::OsFileSystem;
use crate::region::Region;
use crate::safetensors::TensorSpec;

/// Bytes of a tensor in memory at a time: many checksummed blocks, so that few are read twice.
const PIECE_BYTES: usize = 32 * BLOCK_BYTES;

/// Tensors whose names begin so are an optimizer's state.
const OPTIMIZER: &str = "optimizer.";
/// Tensors whose names begin so are a moving average of the parameters.
const AVERAGE: &str = "ema.";

/// Which tensors of a checkpoint are exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExportTensors {
    /// The model's: all but those whose names begin with `optimizer.` or `ema.`.
    #[default]
    Model,
    /// The model's, with the moving average `ema.{name}` in place of `{name}` wherever there is one.
    Average,
}

/// Writes a checkpoint's model as a Hugging Face folder, holding a few MiB in memory at a time. The tensors come in
/// the order of their names, numbers in them by value: layer 2 before layer 10.
///
/// # Errors
/// [`Error::Request`] when there is nothing to export, or no average; all of [`HfWriter`]'s, and those of
/// [`Checkpoint::read`].
pub fn export_hf(
    checkpoint: &Checkpoint,
    path: impl Into<PathBuf>,
    tensors: ExportTensors,
    options: &HfOptions,
) -> Result<HfReport> {
    export_hf_on(Arc::new(OsFileSystem::new()), checkpoint, path, tensors, options)
}

/// Like [`export_hf`], to a file system of the caller's choice.
///
/// # Errors
/// As there.
pub fn export_hf_on(
    fs: Arc<dyn FileSystem>,
    checkpoint: &Checkpoint,
    path: impl Into<PathBuf>,
    tensors: ExportTensors,
    options: &HfOptions,
) -> Result<HfReport> {
    let of_model = |name: &str| !name.starts_with(OPTIMIZER) && !name.starts_with(AVERAGE);
    let mut model: Vec<(&str, Dtype, &[usize])> = checkpoint.tensors().filter(|t| of_model(t.0)).collect();
    model.sort_by(|a, b| natural(a.0, b.0));
    let averaged = |name: &str| format!("{AVERAGE}{name}");
    if tensors == ExportTensors::Average && !model.iter().any(|t| checkpoint.tensor(&averaged(t.0)).is_some())
    {
        let reason = "there is no moving average of any parameter".to_owned();
        return Err(Error::Request { name: format!("{AVERAGE}*"), reason });
    }
    // From the name in the folder to the name in the checkpoint.
    let source = |name: &str| match tensors {
        ExportTensors::Average if checkpoint.tensor(&averaged(name)).is_some() => averaged(name),
        _ => name.to_owned(),
    };
    let specs = model.iter().map(|&(name, dtype, shape)| {
        let (dtype, shape) = checkpoint.tensor(&source(name)).unwrap_or((dtype, shape));
        TensorSpec::new(name, dtype, shape)
    });
    let mut writer = HfWriter::create_on(fs, path, specs, options)?;
    let order: Vec<String> = writer.order().map(str::to_owned).collect();
    let mut piece = Vec::new();
    for name in order {
        copy(checkpoint, &source(&name), &mut piece, |bytes| writer.push_piece(&name, bytes))?;
    }
    writer.finish()
}

/// Hands over all elements of a tensor, a piece at a time; an empty one when there are none.
fn copy(
    checkpoint: &Checkpoint,
    name: &str,
    piece: &mut Vec<u8>,
    mut push: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let unknown = || Error::NoTensor { within: checkpoint.tag().into(), name: name.into() };
    let (dtype, shape) = checkpoint.tensor(name).ok_or_else(unknown)?;
    let size = element_bytes(dtype).unwrap_or(1);
    let too_many =
        || Error::Request { name: name.into(), reason: format!("shape {shape:?} has too many elements") };
    let total = element_count(shape).ok_or_else(too_many)?;
    let mut at = 0;
    loop {
        let end = total.min(at + PIECE_BYTES / size);
        piece.resize((end - at) * size, 0);
        checkpoint.read(name, &Region::Flat(at..end), piece)?;
        push(piece)?;
        at = end;
        if at == total {
            return Ok(());
        }
    }
}

/// By characters, except that runs of digits count as numbers.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut a_rest, mut b_rest) = (a.as_bytes(), b.as_bytes());
    loop {
        let (a_digits, b_digits) = (digits(a_rest), digits(b_rest));
        let ordered = if a_digits > 0 && b_digits > 0 {
            let number = |bytes: &[u8], n: usize| {
                let zeros = bytes[..n].iter().take_while(|b| **b == b'0').count();
                bytes[zeros..n].to_vec()
            };
            let (x, y) = (number(a_rest, a_digits), number(b_rest, b_digits));
            (a_rest, b_rest) = (&a_rest[a_digits..], &b_rest[b_digits..]);
            x.len().cmp(&y.len()).then(x.cmp(&y))
        } else {
            match (a_rest.split_first(), b_rest.split_first()) {
                // `01` and `1` are the same number, not the same name.
                (None, None) => return a.cmp(b),
                (None, _) => return Ordering::Less,
                (_, None) => return Ordering::Greater,
                (Some((x, a_next)), Some((y, b_next))) => {
                    (a_rest, b_rest) = (a_next, b_next);
                    x.cmp(y)
                }
            }
        };
        if ordered.is_ne() {
            return ordered;
        }
    }
}

fn digits(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|b| b.is_ascii_digit()).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn layers_are_ordered_by_their_numbers() {
        let mut names = ["layers.10.w", "layers.2.w", "layers.2.b", "embed", "layers.02.w", "norm"];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, ["embed", "layers.2.b", "layers.02.w", "layers.2.w", "layers.10.w", "norm"]);
    }

    proptest! {
        #[test]
        fn the_order_is_total(names in prop::collection::vec("[a.0-2]{0,6}", 3)) {
            let (a, b, c) = (names[0].as_str(), names[1].as_str(), names[2].as_str());
            prop_assert_eq!(natural(a, b), natural(b, a).reverse());
            prop_assert_eq!(natural(a, b).is_eq(), a == b);
            if natural(a, b).is_le() && natural(b, c).is_le() {
                prop_assert!(natural(a, c).is_le());
            }
        }
    }
}
