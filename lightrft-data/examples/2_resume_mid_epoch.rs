//! Stop in the middle of an epoch and go on with another number of ranks, without a prompt lost or seen twice.
//!
//! `cargo run -p lightrft-data --example 2_resume_mid_epoch`

use lightrft_data::{DistributedSampler, Resume, SamplerConfig, SamplerState, Shuffle, Tail};

fn rank_of(rank: usize, world: usize) -> Result<DistributedSampler, lightrft_data::Error> {
    DistributedSampler::new(SamplerConfig {
        len: 24,
        rank,
        world,
        seed: 7,
        shuffle: Shuffle::Seekable,
        tail: Tail::Drop,
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut seen = Vec::new();

    // Four ranks take two prompts each, twice.
    let mut checkpoint = String::new();
    for rank in 0..4 {
        let mut sampler = rank_of(rank, 4)?;
        sampler.set_epoch(3, 0)?;
        for _ in 0..2 {
            seen.extend(sampler.next_indices(2)?);
        }
        checkpoint = serde_json::to_string(&sampler.state())?; // the same on every rank
    }
    println!("the checkpoint holds {checkpoint}");

    // The job comes back with two ranks.
    let state: SamplerState = serde_json::from_str(&checkpoint)?;
    for rank in 0..2 {
        let mut sampler = rank_of(rank, 2)?;
        assert_eq!(sampler.restore(&state)?, Resume::Exact);
        let rest: Vec<_> = sampler.indices()?.collect();
        println!("rank {rank} of 2 goes on with {rest:?}");
        seen.extend(rest);
    }
    seen.sort_unstable();
    assert!(seen.iter().copied().eq(0..24), "every prompt once");

    // Sixteen consumed prompts are no whole number of rows for five ranks: that is said, not hidden.
    let mut sampler = rank_of(0, 5)?;
    assert_eq!(sampler.restore(&state)?, Resume::Repeats { samples: 1 });
    println!("five ranks would see one prompt again");
    Ok(())
}
