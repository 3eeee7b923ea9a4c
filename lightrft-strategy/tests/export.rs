//! A sharded policy leaves as a Hugging Face folder: in shards, in bf16, with its tokenizer, read back by all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use candle_core::{DType, Device};
use common::{all_parameters, config, on_ranks, settings, write_folder};
use half::bf16;
use lightrft_engine::embedded::{DecoderConfig, EmbeddedEngine, Settings, Weights};
use lightrft_strategy::{Floats, HfOptions, Strategy, StrategyConfig};

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
