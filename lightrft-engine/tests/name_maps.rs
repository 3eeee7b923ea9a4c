//! Name maps on the names of real models: total, one to one, and what LightRFT's rule says.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;

use lightrft_engine::{Error, NameMap, Prefixes, engine_names};
use proptest::prelude::*;

/// Parameters of Qwen2.5-VL as `transformers` names them (`Qwen2_5_VLForConditionalGeneration.named_parameters`).
fn qwen2_5_vl(layers: usize, blocks: usize) -> Vec<String> {
    let mut names = vec!["model.visual.patch_embed.proj.weight".to_owned()];
    let biased = ["attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
    for block in 0..blocks {
        let of = |name: &str| format!("model.visual.blocks.{block}.{name}");
        names.extend(["norm1.weight", "norm2.weight"].map(of));
        names.extend(biased.iter().flat_map(|n| [of(&format!("{n}.weight")), of(&format!("{n}.bias"))]));
    }
    names.push("model.visual.merger.ln_q.weight".to_owned());
    names.extend(
        [0, 2]
            .iter()
            .flat_map(|m| ["weight", "bias"].map(|kind| format!("model.visual.merger.mlp.{m}.{kind}"))),
    );
    names.push("model.language_model.embed_tokens.weight".to_owned());
    for layer in 0..layers {
        let of = |name: &str| format!("model.language_model.layers.{layer}.{name}");
        let attention = ["q_proj", "k_proj", "v_proj"];
        names.extend(
            attention
                .iter()
                .flat_map(|p| ["weight", "bias"].map(|kind| of(&format!("self_attn.{p}.{kind}")))),
        );
        let rest = [
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        ];
        names.extend(rest.map(|name| of(&format!("{name}.weight"))));
    }
    names.extend(["model.language_model.norm.weight", "lm_head.weight"].map(str::to_owned));
    names
}

/// LightRFT's rule as it is written there: cut a leading `model.`, then a `language_model.`, and put `model.` before
/// what the latter stood before, unless that begins with `lm_head`.
fn lightrft(name: &str) -> String {
    let bare = name.strip_prefix("model.").unwrap_or(name);
    match bare.strip_prefix("language_model.") {
        Some(rest) if rest.starts_with("lm_head") => rest.to_owned(),
        Some(rest) => format!("model.{rest}"),
        None => bare.to_owned(),
    }
}

#[test]
fn every_parameter_of_qwen2_5_vl_has_its_own_name_in_sglang() {
    // The 7B model, and the 72B one, whose list `transformers` gives with 1,353 names.
    for (layers, blocks, parameters) in [(28, 32, 729), (80, 32, 1353)] {
        let names = qwen2_5_vl(layers, blocks);
        assert_eq!(names.len(), parameters);
        let map = Prefixes::qwen2_5_vl_to_sglang();
        let mapped = engine_names(&map, names.iter().map(String::as_str)).unwrap();
        let distinct: BTreeSet<&str> = mapped.iter().map(AsRef::as_ref).collect();
        assert_eq!(distinct.len(), names.len(), "one to one");
        for (name, mapped) in names.iter().zip(&mapped) {
            assert_eq!(*mapped, lightrft(name), "{name}");
            let places = ["visual.", "model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."];
            assert!(places.iter().any(|place| mapped.starts_with(place)), "SGLang loads no `{mapped}`");
        }
    }
}

#[test]
fn the_examples_of_the_rule_are_kept() {
    let map = Prefixes::qwen2_5_vl_to_sglang();
    let examples = [
        ("model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("model.language_model.layers.0.input_layernorm.weight", "model.layers.0.input_layernorm.weight"),
        ("model.language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("visual.patch_embed.proj.weight", "visual.patch_embed.proj.weight"),
    ];
    for (trainer, engine) in examples {
        assert_eq!(map.engine_name(trainer).unwrap(), engine);
    }
}

#[test]
fn a_text_models_names_are_refused_instead_of_cut_in_half() {
    let map = Prefixes::qwen2_5_vl_to_sglang();
    for name in ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "score.weight", "model.", ""] {
        let error = map.engine_name(name).unwrap_err();
        assert!(matches!(&error, Error::Name { name: named, .. } if named == name), "{error:?}");
        assert!(
            error.to_string().contains("`model.language_model.`"),
            "the known prefixes are named: {error}"
        );
    }
}

proptest! {
    #[test]
    fn a_name_is_mapped_as_lightrft_does_or_refused(
        parts in proptest::collection::vec(
            prop_oneof![Just("model"), Just("language_model"), Just("visual"), Just("lm_head"), Just("layers"), Just("0")],
            1..6,
        ),
    ) {
        let name = format!("{}.weight", parts.join("."));
        if let Ok(mapped) = Prefixes::qwen2_5_vl_to_sglang().engine_name(&name) {
            prop_assert_eq!(mapped.into_owned(), lightrft(&name));
        }
    }
}
