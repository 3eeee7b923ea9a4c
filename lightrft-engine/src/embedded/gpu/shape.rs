//! A model's numbers as the kernels need them, and where each of its tensors lies in the memory of the weights.

use std::collections::BTreeMap;

use candle_core::DType;

use super::super::config::DecoderConfig;
use super::super::pages::PAGE_TOKENS;

/// Type of weights, of cached keys and values, and of what products read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Elements {
    F32,
    Bf16,
    F16,
}

impl Elements {
    pub(super) fn of(dtype: DType) -> Self {
        match dtype {
            DType::BF16 => Elements::Bf16,
            DType::F16 => Elements::F16,
            _ => Elements::F32,
        }
    }

    pub(super) fn dtype(self) -> DType {
        match self {
            Elements::F32 => DType::F32,
            Elements::Bf16 => DType::BF16,
            Elements::F16 => DType::F16,
        }
    }

    pub(super) fn bytes(self) -> u64 {
        match self {
            Elements::F32 => 4,
            Elements::Bf16 | Elements::F16 => 2,
        }
    }
}

/// Most query heads that a block of the attention kernel holds in its registers.
const MOST_SHARED: usize = 8;

/// The model's numbers.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) elements: Elements,
    pub(super) vocabulary: usize,
    pub(super) hidden: usize,
    pub(super) inner: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    pub(super) eps: f32,
}

impl Shape {
    pub(super) fn new(config: &DecoderConfig, dtype: DType) -> Self {
        Self {
            elements: Elements::of(dtype),
            vocabulary: config.vocab_size,
            hidden: config.hidden_size,
            inner: config.intermediate_size,
            layers: config.layers,
            heads: config.heads,
            kv_heads: config.kv_heads,
            dim: config.head_dim,
            eps: config.rms_norm_eps as f32,
        }
    }

    /// Elements of a column's queries, keys and values.
    pub(super) fn qkv(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    /// Elements of a column's queries.
    pub(super) fn queries(&self) -> usize {
        self.heads * self.dim
    }

    /// Query heads that one block of the attention kernel computes: as many as share keys, if they are not too many.
    pub(super) fn shared_heads(&self) -> usize {
        let group = self.heads / self.kv_heads.max(1);
        (1..=group.min(MOST_SHARED)).rev().find(|shared| group.is_multiple_of(*shared)).unwrap_or(1)
    }

    /// Elements of one layer in a page: for each key head, keys and then values of its tokens.
    pub(super) fn page_layer_elems(&self) -> u64 {
        2 * (self.kv_heads * PAGE_TOKENS * self.dim) as u64
    }

    /// Bytes of a page.
    pub(super) fn page_bytes(&self) -> u64 {
        self.layers as u64 * self.page_layer_elems() * self.elements.bytes()
    }

    /// Warps of a block of the attention kernel: what they have to say to each other must fit the memory of a block.
    pub(super) fn attend_warps(&self) -> u32 {
        if self.shared_heads() * self.dim <= 1024 { 8 } else { 2 }
    }

    /// What the kernels are compiled for.
    pub(super) fn options(&self) -> Vec<String> {
        let kind = match self.elements {
            Elements::F32 => 0,
            Elements::Bf16 => 1,
            Elements::F16 => 2,
        };
        let (shared, warps) = (self.shared_heads(), self.attend_warps());
        vec![
            format!("-DKIND={kind}"),
            format!("-DHEADS={}", self.heads),
            format!("-DKV_HEADS={}", self.kv_heads),
            format!("-DDIM={}", self.dim),
            format!("-DSHARED_HEADS={shared}"),
            format!("-DWARPS={warps}"),
            format!("-DPAGE={PAGE_TOKENS}"),
        ]
    }
}

/// A tensor's place in the memory of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Bytes before it.
    pub(super) at: u64,
    /// Its elements.
    pub(super) elems: usize,
    /// Matrices are of the engine's type, vectors f32.
    pub(super) elements: Elements,
}

/// Where one layer's weights begin, in bytes. Matrices that read the same column lie behind each other, and are one
/// product.
#[derive(Clone, Copy, Debug)]
pub(super) struct LayerPlan {
    pub(super) attention_norm: u64,
    pub(super) qkv: u64,
    pub(super) qkv_bias: Option<u64>,
    /// Of query and of key heads.
    pub(super) head_norms: Option<(u64, u64)>,
    pub(super) o: u64,
    pub(super) o_bias: Option<u64>,
    pub(super) mlp_norm: u64,
    pub(super) gate_up: u64,
    pub(super) gate_up_bias: Option<u64>,
    pub(super) down: u64,
    pub(super) down_bias: Option<u64>,
}

/// Where everything lies.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) pieces: BTreeMap<String, Piece>,
    pub(super) embed: u64,
    pub(super) layers: Vec<LayerPlan>,
    pub(super) norm: u64,
    /// The embedding where they are tied.
    pub(super) head: u64,
    /// Bytes of all of it.
    pub(super) bytes: u64,
}

/// Kernels and products read whole vectors.
const ALIGNMENT: u64 = 256;

/// Pieces as they are laid behind each other.
struct Builder<'a> {
    shapes: BTreeMap<String, usize>,
    elements: Elements,
    pieces: &'a mut BTreeMap<String, Piece>,
    bytes: u64,
}

impl Builder<'_> {
    /// Lays tensors behind each other without a gap. The place of the first, if the model has them.
    fn lay(&mut self, names: &[String]) -> Option<u64> {
        self.bytes = self.bytes.next_multiple_of(ALIGNMENT);
        let first = self.bytes;
        for name in names {
            let elems = *self.shapes.get(name)?;
            let is_vector = name.ends_with(".bias") || name.ends_with("norm.weight");
            let elements = if is_vector { Elements::F32 } else { self.elements };
            self.pieces.insert(name.clone(), Piece { at: self.bytes, elems, elements });
            self.bytes += elems as u64 * elements.bytes();
        }
        Some(first)
    }
}

impl Plan {
    pub(super) fn new(config: &DecoderConfig, elements: Elements) -> Self {
        let parameters = config.parameter_groups().into_iter().flat_map(|g| g.parameters);
        let shapes = parameters.map(|p| (p.name, p.shape.iter().product())).collect();
        let mut pieces = BTreeMap::new();
        let mut builder = Builder { shapes, elements, pieces: &mut pieces, bytes: 0 };
        // Every name below is one that the configuration has: the default is for those that it does not need.
        let embed = builder.lay(&["model.embed_tokens.weight".to_owned()]).unwrap_or_default();
        let mut layers = Vec::new();
        for layer in 0..config.layers {
            let names = |list: &[&str], what: &str| -> Vec<String> {
                list.iter().map(|name| format!("model.layers.{layer}.{name}.{what}")).collect()
            };
            let attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
            let gated = ["mlp.gate_proj", "mlp.up_proj"];
            let mut lay = |list: &[&str], what: &str| builder.lay(&names(list, what));
            layers.push(LayerPlan {
                attention_norm: lay(&["input_layernorm"], "weight").unwrap_or_default(),
                qkv: lay(&attention, "weight").unwrap_or_default(),
                qkv_bias: lay(&attention, "bias"),
                head_norms: lay(&["self_attn.q_norm"], "weight").zip(lay(&["self_attn.k_norm"], "weight")),
                o: lay(&["self_attn.o_proj"], "weight").unwrap_or_default(),
                o_bias: lay(&["self_attn.o_proj"], "bias"),
                mlp_norm: lay(&["post_attention_layernorm"], "weight").unwrap_or_default(),
                gate_up: lay(&gated, "weight").unwrap_or_default(),
                gate_up_bias: lay(&gated, "bias"),
                down: lay(&["mlp.down_proj"], "weight").unwrap_or_default(),
                down_bias: lay(&["mlp.down_proj"], "bias"),
            });
        }
        let norm = builder.lay(&["model.norm.weight".to_owned()]).unwrap_or_default();
        let head = builder.lay(&["lm_head.weight".to_owned()]).unwrap_or(embed);
        let bytes = builder.bytes;
        Self { pieces, embed, layers, norm, head, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(more: &str) -> DecoderConfig {
        DecoderConfig::from_json(&format!(
            r#"{{"vocab_size": 96, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
                "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, {more}}}"#
        ))
        .unwrap()
    }

    #[test]
    fn every_parameter_has_a_place_of_its_own_and_what_is_read_together_lies_together() {
        for more in [
            r#""model_type": "qwen2", "tie_word_embeddings": true"#,
            r#""model_type": "qwen3", "attention_bias": true"#,
            r#""model_type": "llama", "attention_bias": true, "mlp_bias": true"#,
        ] {
            let config = config(more);
            for elements in [Elements::F32, Elements::Bf16] {
                let plan = Plan::new(&config, elements);
                let parameters: Vec<_> =
                    config.parameter_groups().into_iter().flat_map(|g| g.parameters).collect();
                assert_eq!(plan.pieces.len(), parameters.len());
                for p in &parameters {
                    let piece = plan.pieces[&p.name];
                    assert_eq!(piece.elems, p.shape.iter().product::<usize>(), "{}", p.name);
                    assert_eq!(piece.elements == elements, elements == Elements::F32 || p.shape.len() == 2);
                }
                let mut places: Vec<_> = plan.pieces.values().collect();
                places.sort_by_key(|piece| piece.at);
                for pair in places.windows(2) {
                    assert!(pair[0].at + pair[0].elems as u64 * pair[0].elements.bytes() <= pair[1].at);
                }
                let q = plan.pieces["model.layers.2.self_attn.q_proj.weight"];
                let k = plan.pieces["model.layers.2.self_attn.k_proj.weight"];
                assert_eq!(plan.layers[2].qkv, q.at);
                assert_eq!(k.at, q.at + q.elems as u64 * elements.bytes());
                assert_eq!(plan.head == plan.embed, config.tie_word_embeddings);
                assert_eq!(plan.layers[0].qkv_bias.is_some(), config.qkv_bias);
                assert_eq!(plan.layers[0].o_bias.is_some(), config.output_bias);
                assert_eq!(plan.layers[0].gate_up_bias.is_some(), config.mlp_bias);
                assert_eq!(plan.layers[0].head_norms.is_some(), config.has_head_norms());
            }
        }
    }

    #[test]
    fn a_block_has_a_whole_part_of_the_heads_that_share_keys() {
        for (heads, kv_heads, expected) in
            [(9, 3, 3), (14, 2, 7), (32, 8, 4), (71, 1, 1), (64, 4, 8), (8, 8, 1)]
        {
            let mut shape = Shape::new(&config(r#""model_type": "llama""#), DType::F32);
            (shape.heads, shape.kv_heads) = (heads, kv_heads);
            assert_eq!(shape.shared_heads(), expected, "{heads} over {kv_heads}");
        }
    }
}
