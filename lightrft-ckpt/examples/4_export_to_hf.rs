//! From a training checkpoint to a Hugging Face folder that `transformers` loads, in bf16 and in shards, and back.
//! `cargo run -p lightrft-ckpt --example 4_export_to_hf`   prints the files of the folder, the largest rounding error of
//! a weight, and the ranks of the checkpoint that is made of the folder.

use std::error::Error;

use lightrft_ckpt::{
    Alone, Checkpoints, ExportTensors, Floats, HfFolder, HfOptions, Part, Region, Rotation, Saver, Snapshot,
    Verify, Which, export_hf, save_as_ranks,
};
use serde_json::json;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let (embedding, weight): (Vec<f32>, Vec<f32>) =
        ((0..3200).map(|i| (i as f32).sin()).collect(), (0..1024).map(|i| (i as f32).cos()).collect());
    let mut snapshot = Snapshot::of_step(40);
    for (name, shape, values) in [
        ("model.embed_tokens.weight", [100, 32], &embedding),
        ("model.layers.0.mlp.up_proj.weight", [32, 32], &weight),
        // Left out of the export: it is not the model.
        ("optimizer.exp_avg.model.layers.0.mlp.up_proj.weight", [32, 32], &weight),
        // By `tie_word_embeddings` it is the embedding: written once.
        ("lm_head.weight", [100, 32], &embedding),
    ] {
        snapshot.parts.push(Part::new(name, shape.to_vec(), Region::Whole, values));
    }
    let checkpoints = dir.path().join("checkpoints");
    Saver::open(&checkpoints, &Alone)?.save(&Alone, &snapshot, &Rotation::KEEP_ALL)?;

    let (checkpoint, _) = Checkpoints::open(&checkpoints).load(Which::Newest, Verify::WhileReading)?;
    let options = HfOptions {
        floats: Floats::Bf16,
        max_shard_bytes: 7_000,
        // With `source`, the folder of the model that was trained, its config.json and tokenizer come along instead.
        config: json!({"model_type": "llama", "tie_word_embeddings": true}).as_object().cloned(),
        ..HfOptions::default()
    };
    let path = dir.path().join("model");
    let report = export_hf(&checkpoint, &path, ExportTensors::Model, &options)?;
    println!("{} tensors in {} shards, {} bytes:", report.tensors, report.shards, report.bytes);
    let mut names: Vec<_> =
        std::fs::read_dir(&path)?.map(|e| Ok(e?.file_name())).collect::<std::io::Result<_>>()?;
    names.sort();
    names.iter().for_each(|name| println!("  {}", name.to_string_lossy()));

    let folder = HfFolder::open(&path)?;
    let mut head = vec![0.0; 3200];
    folder.read_f32("lm_head.weight", &Region::Whole, &mut head)?;
    let error = head.iter().zip(&embedding).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(error <= 1.0 / 512.0);
    println!("rounded to bf16, a weight is off by at most {error:.5}");

    let again = save_as_ranks(&dir.path().join("imported"), 2, |rank| folder.share(0, rank, 2))?;
    println!("and as a checkpoint of 2 ranks: {} with {} bytes", again.tag, again.bytes);
    Ok(())
}
