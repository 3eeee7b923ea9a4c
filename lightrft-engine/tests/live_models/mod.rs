//! Weights of the models that tests against real servers use.

use std::path::Path;

use lightrft_engine::testing::TensorBytes;

/// All of a folder's, by layer, as trainers send them.
pub(crate) fn tensors_in(folder: &Path) -> Vec<TensorBytes> {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| TensorBytes {
        name,
        dtype: view.dtype(),
        shape: view.shape().to_vec(),
        bytes: view.data().to_vec(),
    };
    let mut tensors: Vec<TensorBytes> = file.tensors().into_iter().map(tensor).collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

/// Those of a Qwen2.5-VL under the names that `transformers` gives a trainer.
#[allow(dead_code)] // not by every test
pub(crate) fn named_by_a_trainer(mut tensors: Vec<TensorBytes>) -> Vec<TensorBytes> {
    for tensor in &mut tensors {
        tensor.name = match tensor.name.strip_prefix("model.") {
            Some(rest) => format!("model.language_model.{rest}"),
            None if tensor.name.starts_with("visual.") => format!("model.{}", tensor.name),
            None => continue,
        };
    }
    tensors
}
