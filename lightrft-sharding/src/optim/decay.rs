//! Which parameters weight decay pulls on.

/// Whether weight decay acts on a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// It does: matrices and embeddings.
    Yes,
    /// It does not: biases and norms.
    No,
}

/// LightRFT's list: a name that contains one of these, anywhere and in this case, is not decayed.
const NO_DECAY: [&str; 5] = ["bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight"];

/// LightRFT's rule. Substrings, so `q_norm.weight` and even `debias.weight` are spared, while `LayerNorm.weight` and
/// `norm1.weight` are decayed; give [`AdamW::with_decay`](crate::AdamW::with_decay) another rule where that is wrong.
///
/// ```
/// use lightrft_sharding::{Decay, decay_by_name};
///
/// assert_eq!(decay_by_name("model.layers.0.input_layernorm.weight"), Decay::No);
/// assert_eq!(decay_by_name("model.layers.0.mlp.up_proj.weight"), Decay::Yes);
/// ```
pub fn decay_by_name(name: &str) -> Decay {
    if NO_DECAY.iter().any(|part| name.contains(part)) { Decay::No } else { Decay::Yes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_matches_substrings_case_sensitively() {
        for spared in
            ["a.bias", "debias.weight", "q_norm.weight", "x.norm.weight_g", "ln_f.weight", "norm.weight"]
        {
            assert_eq!(decay_by_name(spared), Decay::No, "{spared}");
        }
        for decayed in
            ["LayerNorm.weight", "ln_1.weight", "norm1.weight", "ln_q.weight", "norm_f.weight", "w"]
        {
            assert_eq!(decay_by_name(decayed), Decay::Yes, "{decayed}");
        }
    }
}
