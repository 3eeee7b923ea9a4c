//! Any number of ranks trains the decoder to the same parameters as one rank on the same global batch.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::{all_parameters, config, on_ranks, sequences, settings, write_folder};
use lightrft_strategy::model::Sequence;
use lightrft_strategy::{Strategy, StrategyConfig};

const ROWS: usize = 12;

/// Five steps on `ranks` ranks; every parameter afterwards.
fn train(folder: &Path, ranks: usize, settings: &StrategyConfig) -> Vec<f32> {
    let mut of_ranks = on_ranks(ranks, |world| {
        let strategy = Strategy::with_world(settings.clone(), world)?;
        let mut actor = strategy.prepare_actor(folder)?;
        let all = sequences(ROWS);
        let share = ROWS / ranks;
        let mine: Vec<Sequence<'_>> = all[strategy.rank() * share..][..share]
            .iter()
            .map(|(prompt, answer)| Sequence { prompt, answer })
            .collect();
        for _ in 0..5 {
            strategy.supervised_step(&mut actor, &mine, 1e-3)?;
        }
        all_parameters(&mut actor)
    });
    let first = of_ranks.swap_remove(0);
    assert!(of_ranks.iter().all(|other| *other == first), "all ranks gather the same parameters");
    first
}

#[test]
fn n_ranks_equal_one_bit_for_bit_when_sums_have_one_order() {
    for tied in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path(), &config(serde_json::json!({ "tie_word_embeddings": tied })), 3);
        for ranks in [2, 3, 4] {
            // One rank takes the others' parts one after another, in rank order. Nothing is clipped: the norm is
            // summed in another order, and its last bits may differ.
            let settings = StrategyConfig { max_norm: 0.0, ..settings(ROWS, ROWS / ranks) };
            let (one, many) = (train(folder.path(), 1, &settings), train(folder.path(), ranks, &settings));
            assert!(one == many, "{ranks} ranks differ from one (tied embeddings: {tied})");
        }
    }
}

#[test]
fn n_ranks_equal_one_to_1e_6_with_clipping_and_other_micro_batches() {
    let folder = tempfile::tempdir().unwrap();
    // No biases: that of the key projection has a gradient of exactly zero in exact arithmetic (the softmax does not
    // see it), and AdamW scales what rounding leaves of it up to a whole step.
    write_folder(folder.path(), &config(serde_json::json!({ "model_type": "llama" })), 3);
    let one = train(folder.path(), 1, &StrategyConfig { max_norm: 0.1, ..settings(ROWS, ROWS) });
    for ranks in [1, 2, 3, 4] {
        let settings = StrategyConfig { max_norm: 0.1, ..settings(ROWS, 1) };
        let many = train(folder.path(), ranks, &settings);
        let gap = one.iter().zip(&many).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(gap <= 1e-6, "{ranks} ranks in micro-batches of one differ by {gap}");
    }
}

#[test]
fn every_zero_stage_equals_one_rank_to_1e_6() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config(serde_json::json!({ "model_type": "llama" })), 3);
    let settings = StrategyConfig { max_norm: 0.1, ..settings(ROWS, 2) };
    let one = train(folder.path(), 1, &settings);
    for zero_stage in 0..=3 {
        let many = train(folder.path(), 3, &StrategyConfig { zero_stage, ..settings.clone() });
        let gap = one.iter().zip(&many).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(gap <= 1e-6, "stage {zero_stage} on 3 ranks differs by {gap}");
    }
}

#[test]
fn a_rank_keeps_16_bytes_a_parameter_over_the_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(serde_json::json!({}));
    write_folder(folder.path(), &config, 3);
    let units = config.parameter_groups().len();
    for ranks in [1, 2, 3, 4] {
        let bytes = on_ranks(ranks, |world| {
            let strategy = Strategy::with_world(settings(ROWS, 1), world)?;
            let actor = strategy.prepare_actor(folder.path())?;
            Ok(actor.model.units().persistent_bytes() + actor.optimizer.persistent_bytes())
        });
        let exact = 16 * config.parameter_count() / ranks;
        for bytes in bytes {
            // Padding: less than one element a unit on each rank.
            assert!(
                (exact..=exact + 16 * units).contains(&bytes),
                "{ranks} ranks: {bytes}, {exact} expected"
            );
        }
    }
}
