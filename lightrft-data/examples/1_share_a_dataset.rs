//! Three ranks share seventeen prompts: each knows its own part without asking the others.
//!
//! `cargo run -p lightrft-data --example 1_share_a_dataset`

use lightrft_data::{
    DataLoader, Dataset, DistributedSampler, JsonLines, JsonLinesOptions, LoaderConfig, SamplerConfig,
    Shuffle, Tail,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("sums.jsonl");
    let lines: Vec<_> =
        (0..17).map(|i| format!(r#"{{"prompt": "{i}+{i}=", "label": "{}"}}"#, i + i)).collect();
    std::fs::write(&path, lines.join("\n"))?;

    let world = 3;
    let mut seen = Vec::new();
    for rank in 0..world {
        // In a real run every rank is a process and does this by itself.
        let sums = JsonLines::open(&path, JsonLinesOptions::default())?;
        let sampler = DistributedSampler::new(SamplerConfig {
            len: sums.len(),
            rank,
            world,
            seed: 42,
            shuffle: Shuffle::TorchExact,
            tail: Tail::Drop,
        })?;
        let config = LoaderConfig { workers: 2, ..LoaderConfig::new(2) };
        let mut loader = DataLoader::new(sums, sampler, config)?;
        for batch in loader.batches() {
            let batch = batch?;
            let prompts: Vec<_> = batch.samples.iter().map(|sample| sample.text.as_str()).collect();
            println!("rank {rank}: {:?} {prompts:?}", batch.indices);
            seen.extend(batch.indices);
        }
    }

    seen.sort_unstable();
    seen.dedup();
    println!(
        "{} of 17 prompts seen, each once; the other two would not fill a row of three ranks",
        seen.len()
    );
    assert_eq!(seen.len(), 15);
    Ok(())
}
