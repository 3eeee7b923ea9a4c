//! Two data sets in proportion, each prompt four times: what a step of group sampling (GRPO) draws.
//!
//! `cargo run -p lightrft-data --example 3_mix_and_group`

use lightrft_data::{
    Concat, DataLoader, Dataset, DistributedSampler, Exhausted, GroupPlacement, Groups, InMemory,
    LoaderConfig, MicroBatch, Mixture, SamplerConfig, Shuffle, Tail,
};

fn main() -> Result<(), lightrft_data::Error> {
    let sums: InMemory<String> = (0..30).map(|i| format!("{i}+{i}")).collect();
    let words: InMemory<String> = (0..8).map(|i| format!("word {i}")).collect();
    // Three sums for each word; the words begin again until all sums are through.
    let mixture = Mixture::new([(sums.len(), 3), (words.len(), 1)], Exhausted::Cycle);
    let both = Concat::new(vec![sums, words])?;

    let sampler = DistributedSampler::new(SamplerConfig {
        len: both.len(),
        rank: 0,
        world: 2,
        seed: 7,
        shuffle: Shuffle::Seekable,
        tail: Tail::Drop,
    })?;
    let sampler =
        sampler.mixing(mixture)?.in_groups(Groups { size: 4, placement: GroupPlacement::OneRank })?;

    // Each rank takes four prompts a step, so sixteen samples, and generates answers to one prompt at a time.
    let config = LoaderConfig { workers: 2, micro_batch: MicroBatch::Samples(4), ..LoaderConfig::new(16) };
    let mut loader = DataLoader::new(both, sampler, config)?;
    let mut drawn = 0;
    while let Some(batch) = loader.next_batch()? {
        let prompts: Vec<_> = batch.passes().map(|copies| copies[0].as_str()).collect();
        println!("rank 0 asks each of {prompts:?} four times; groups {:?}", batch.groups);
        drawn += batch.samples.len();
    }
    assert_eq!(drawn, 80, "forty prompts in an epoch, twenty of them on this rank");
    Ok(())
}
