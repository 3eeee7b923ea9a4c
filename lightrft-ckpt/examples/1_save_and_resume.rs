//! Save, stop, resume: the loss goes on as if nothing had happened. Then resume from a damaged checkpoint.
//! `cargo run -p lightrft-ckpt --example 1_save_and_resume`   prints `resumed at step 40, loss ...`

use std::error::Error;
use std::path::Path;

use lightrft_ckpt::{Alone, Checkpoints, Dtype, Part, Region, Rotation, Saver, Snapshot, Verify, Which};

/// Fits one weight vector to a target by gradient descent with momentum.
struct Training {
    step: u64,
    weight: Vec<f32>,
    momentum: Vec<f32>,
}

impl Training {
    fn new() -> Self {
        Training { step: 0, weight: vec![0.0; 8], momentum: vec![0.0; 8] }
    }

    /// One step; returns the loss before it.
    fn step(&mut self) -> f32 {
        let mut loss = 0.0;
        for (i, (w, m)) in self.weight.iter_mut().zip(&mut self.momentum).enumerate() {
            let error = *w - i as f32;
            loss += error * error;
            *m = 0.9 * *m + error;
            *w -= 0.01 * *m;
        }
        self.step += 1;
        loss
    }

    fn save(&self, saver: &Saver) -> lightrft_ckpt::Result<()> {
        let mut snapshot = Snapshot::of_step(self.step);
        snapshot.parts.push(Part::new("weight", vec![8], Region::Whole, &self.weight));
        snapshot.parts.push(Part::new("momentum", vec![8], Region::Whole, &self.momentum));
        saver.save(&Alone, &snapshot, &Rotation { max_num: 2, max_mem_gib: 1.0, ..Rotation::default() })?;
        Ok(())
    }

    fn resume(dir: &Path) -> lightrft_ckpt::Result<Self> {
        let (checkpoint, report) = Checkpoints::open(dir).load(Which::Newest, Verify::Everything)?;
        for skipped in &report.skipped {
            println!("skipped {}: {}", skipped.name, skipped.reason);
        }
        checkpoint.check_against([("weight", Dtype::F32, &[8][..]), ("momentum", Dtype::F32, &[8])])?;
        Ok(Training {
            step: checkpoint.step(),
            weight: checkpoint.read_vec("weight", &Region::Whole)?,
            momentum: checkpoint.read_vec("momentum", &Region::Whole)?,
        })
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let mut unbroken = Training::new();
    {
        let saver = Saver::open(dir.path(), &Alone)?;
        for _ in 0..40 {
            unbroken.step();
            if unbroken.step.is_multiple_of(10) {
                unbroken.save(&saver)?;
            }
        }
    }
    let mut resumed = Training::resume(dir.path())?;
    let (a, b) = (unbroken.step(), resumed.step());
    assert_eq!(a.to_bits(), b.to_bits());
    println!("resumed at step 40, loss {b:.3}");

    // One flipped bit in the newest checkpoint: it is named and skipped, and the one before it taken.
    let shard = dir.path().join("global_step40/rank-00000.safetensors");
    let mut bytes = std::fs::read(&shard)?;
    if let Some(last) = bytes.last_mut() {
        *last ^= 1;
    }
    std::fs::write(&shard, bytes)?;
    println!("resumed at step {}", Training::resume(dir.path())?.step);
    Ok(())
}
