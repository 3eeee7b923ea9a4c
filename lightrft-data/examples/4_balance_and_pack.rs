//! Answers of very different lengths: shared over ranks so that none waits, packed so that none is padded.
//!
//! `cargo run -p lightrft-data --example 4_balance_and_pack`

use lightrft_data::{BalanceConfig, Cost, PackConfig, PadConfig, TokenSequence, balance, pack, pad};

fn main() -> Result<(), lightrft_data::Error> {
    // What generation brought: short answers, and some that ran to the limit.
    let prompt: Vec<u32> = (1..=20).collect();
    let answers: Vec<usize> = (0..32).map(|i| if i % 8 == 0 { 480 } else { 20 + i * 37 % 120 }).collect();
    let rows: Vec<_> =
        answers.iter().map(|&len| TokenSequence::from_prompt_and_response(&prompt, &vec![7; len])).collect();

    // All ranks know all lengths (one small all-gather), so all make the same plan and talk no further.
    let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
    let plan = balance(&lengths, &BalanceConfig { world: 4, token_budget: 1024, cost: Cost::Tokens })?;
    println!("{} passes on each of 4 ranks", plan.micro_batches());
    for (rank, passes) in plan.ranks.iter().enumerate() {
        for (pass, sequences) in passes.iter().enumerate() {
            let mine: Vec<_> = sequences.iter().map(|&sequence| rows[sequence].clone()).collect();
            let packed = pack(&mine, &PackConfig::new())?;
            let padded = pad(&mine, &PadConfig::right(0))?;
            println!(
                "rank {rank}, pass {pass}: {} sequences, {} tokens packed, {} padded; cu_seqlens {:?}",
                packed.rows,
                packed.ids.len(),
                padded.ids.len(),
                packed.cu_seqlens,
            );
            assert!(packed.ids.len() <= 1024);
        }
    }
    Ok(())
}
