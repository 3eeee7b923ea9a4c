//! A trainer killed with SIGKILL in the middle of a save, again and again, ends where an unbroken one does.
//! `cargo run -p lightrft-ckpt --example 2_killed_and_resumed`   prints, for each of four kills, the step that the
//! trainer had reached and the one that it resumes at, and at last that both weights are the same.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use lightrft_ckpt::{
    Alone, BackgroundSaver, Checkpoints, Error as CkptError, Part, Region, Rotation, Saver, Snapshot, Verify,
    Which,
};

const STEPS: u64 = 30;
const WEIGHTS: usize = 1 << 18;

/// What training is here: every step depends on all before it, so that a step lost or done twice would show.
fn train(weight: &mut [f32], step: u64) {
    for (i, w) in weight.iter_mut().enumerate() {
        *w = 0.9 * *w + (step as f32 + i as f32).sin();
    }
}

/// The process that is killed: resumes, trains, and saves every step in the background.
fn trainer(dir: &Path) -> Result<(), Box<dyn Error>> {
    let (mut step, mut weight) = match Checkpoints::open(dir).load(Which::Newest, Verify::Everything) {
        Ok((checkpoint, _)) => (checkpoint.step(), checkpoint.read_vec("weight", &Region::Whole)?),
        Err(CkptError::NoCheckpoint { .. }) => (0, vec![0.0; WEIGHTS]),
        Err(e) => return Err(e.into()),
    };
    let mut out = std::io::stdout();
    writeln!(out, "resumed {step}")?;
    let mut saver = BackgroundSaver::new(Saver::open(dir, &Alone)?, Arc::new(Alone))?;
    while step < STEPS {
        step += 1;
        train(&mut weight, step);
        let mut snapshot = Snapshot::of_step(step);
        snapshot.parts.push(Part::new("weight", vec![WEIGHTS], Region::Whole, &weight));
        saver.save(&snapshot, &Rotation { max_num: 2, ..Rotation::default() })?;
        // The save of this step has just begun.
        writeln!(out, "step {step}")?;
    }
    saver.finish()?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    if let Some(dir) = std::env::args_os().nth(1) {
        return trainer(Path::new(&dir));
    }
    let dir = tempfile::tempdir()?;
    let mut unbroken = vec![0.0; WEIGHTS];
    (1..=STEPS).for_each(|step| train(&mut unbroken, step));

    for kill_at in [Some(5), Some(12), Some(13), Some(21), None] {
        let mut child =
            Command::new(std::env::current_exe()?).arg(dir.path()).stdout(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        let resumed = lines.next().ok_or("the trainer ended at once")??;
        let mut last = String::new();
        for line in lines.by_ref() {
            last = line?;
            if kill_at.is_some_and(|step| last == format!("step {step}")) {
                child.kill()?;
                println!("{resumed}, killed while it saved {last}");
                break;
            }
        }
        let ended = child.wait()?;
        if kill_at.is_none() {
            assert!(ended.success() && last == format!("step {STEPS}"));
            println!("{resumed}, came to its end at {last}");
        }
    }

    let (checkpoint, report) = Checkpoints::open(dir.path()).load(Which::Newest, Verify::Everything)?;
    assert!(report.skipped.is_empty());
    let weight: Vec<f32> = checkpoint.read_vec("weight", &Region::Whole)?;
    assert!(checkpoint.step() == STEPS && weight == unbroken);
    println!("step {STEPS}: the same {WEIGHTS} weights as without the kills, bit for bit");
    Ok(())
}
