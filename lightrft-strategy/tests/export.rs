//! A sharded policy leaves as a Hugging Face folder: in shards, in bf16, with its tokenizer, read back by all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use candle_core::{DType, Device};
use common::{all_parameters, config, on_ranks, settings, write_folder};
use half::bf16;
use lightrft_engine::embedded::{DecoderConfig, EmbeddedEngine, Settings, Weights};
use lightrft_strategy::{Floats, HfOptions, Strategy, StrategyConfig};
use serde_json::Value;

fn two_ranks(zero_stage: u8) -> StrategyConfig {
    StrategyConfig { zero_stage, ..settings(4, 2) }
}

#[test]
fn shards_of_bf16_are_read_by_the_trainer_and_by_the_engine() {
    for tied in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        write_folder(&folder, &config(serde_json::json!({"tie_word_embeddings": tied})), 3);
        let out = dir.path().join("out");
        on_ranks(2, |world| {
            let strategy = Strategy::with_world(two_ranks(3), world)?;
            let mut actor = strategy.prepare_actor(&folder)?;
            let mut expected = all_parameters(&mut actor)?;
            expected.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
            let options = HfOptions {
                floats: Floats::Bf16,
                max_shard_bytes: 2000,
                source: Some(folder.clone()),
                ..HfOptions::default()
            };
            strategy.save_model(&mut actor, &out, &options)?;
            let mut exported = strategy.prepare_actor(&out)?;
            assert!(all_parameters(&mut exported)? == expected);
            Ok(())
        });
        assert!(out.join("model.safetensors.index.json").exists() && out.join("tokenizer.json").exists());
        let config = DecoderConfig::from_folder(&out).unwrap();
        assert_eq!(config, DecoderConfig::from_folder(&folder).unwrap());
        let exported = Weights::from_folder(&out, &config, DType::F32, &Device::Cpu).unwrap();
        let original = Weights::from_folder(&folder, &config, DType::F32, &Device::Cpu).unwrap();
        for (name, tensor) in original.iter() {
            let values = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let rounded: Vec<f32> = values(tensor).iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
            assert_eq!(values(exported.tensor(name).unwrap()), rounded, "{name}");
        }
        EmbeddedEngine::from_folder(&out, Settings::default()).unwrap();
    }
}

#[test]
fn an_export_that_would_lose_something_fails_on_every_rank() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    write_folder(&folder, &config(serde_json::json!({})), 3);
    on_ranks(2, |world| {
        let strategy = Strategy::with_world(two_ranks(1), world)?;
        let mut actor = strategy.prepare_actor(&folder)?;
        // Without a source nobody writes the tokenizer again.
        let told = strategy.save_model(&mut actor, &folder, &HfOptions::default()).unwrap_err().to_string();
        assert!(told.contains("tokenizer.json"), "rank {}: {told}", strategy.rank());
        Ok(())
    });
    assert!(folder.join("tokenizer.json").exists());
}

#[test]
fn what_only_the_source_says_of_the_model_is_exported_too() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    let decoder = config(serde_json::json!({}));
    write_folder(&folder, &decoder, 3);
    let of = |folder: &Path| -> Value {
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
    };
    let mut said = of(&folder);
    said["bos_token_id"] = 1.into();
    said["sliding_window"] = 4096.into();
    // Another value for something that the decoder computes with, and no other shape.
    let mut other = said.clone();
    other["rope_theta"] = 77.0.into();
    let mut wider = said.clone();
    wider["vocab_size"] = (decoder.vocab_size + 1).into();
    std::fs::write(folder.join("config.json"), said.to_string()).unwrap();
    let source = |said: &Value, name: &str| {
        let source = dir.path().join(name);
        std::fs::create_dir(&source).unwrap();
        std::fs::write(source.join("config.json"), said.to_string()).unwrap();
        HfOptions { source: Some(source), ..HfOptions::default() }
    };
    let options = [source(&said, "same"), source(&other, "other"), source(&wider, "wider")];
    on_ranks(2, |world| {
        let strategy = Strategy::with_world(two_ranks(3), world)?;
        let mut actor = strategy.prepare_actor(&folder)?;
        for (options, name) in options.iter().zip(["a", "b"]) {
            strategy.save_model(&mut actor, &dir.path().join(name), options)?;
        }
        let told =
            strategy.save_model(&mut actor, &dir.path().join("c"), &options[2]).unwrap_err().to_string();
        assert!(told.contains("shape"), "rank {}: {told}", strategy.rank());
        Ok(())
    });
    for name in ["a", "b"] {
        let out = dir.path().join(name);
        assert_eq!((&of(&out)["bos_token_id"], &of(&out)["sliding_window"]), (&1.into(), &4096.into()));
        assert_eq!(DecoderConfig::from_folder(&out).unwrap(), decoder, "{name}");
    }
    assert!(!dir.path().join("c").exists());
}
