//! Looks into checkpoints as a program: which there are, what one holds and where, whether every byte is as it was.
//! `cargo run -p lightrft-ckpt --example 3_inspect`   prints a listing, the tensors of one checkpoint with the files and
//! bytes of their regions, and the damage that it does to another. The command `lightrft-ckpt` does the same.

use std::error::Error;

use lightrft_ckpt::{
    Alone, Checkpoints, Part, Region, Rotation, Saver, Snapshot, Verify, Which, save_as_ranks,
};

fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let (weight, moment) = (vec![0.5f32; 6000], vec![0.25f32; 6000]);
    for step in [10, 20] {
        let mut snapshot = Snapshot::of_step(step);
        snapshot.parts.push(Part::new("layer.weight", vec![60, 100], Region::Whole, &weight));
        snapshot.parts.push(Part::new(
            "optimizer.exp_avg.layer.weight",
            vec![60, 100],
            Region::Whole,
            &moment,
        ));
        snapshot.shared = serde_json::json!({"consumed_samples": step * 128});
        Saver::open(dir.path(), &Alone)?.save(&Alone, &snapshot, &Rotation::KEEP_ALL)?;
    }
    let checkpoints = Checkpoints::open(dir.path());
    // Step 20 anew, as three ranks would have saved it.
    let (whole, _) = checkpoints.load(Which::Newest, Verify::Everything)?;
    save_as_ranks(dir.path(), 3, |rank| whole.share(rank, 3))?;

    for listed in checkpoints.list()? {
        println!("{}: step {}, {} ranks, {} bytes", listed.tag, listed.step, listed.world_size, listed.bytes);
    }
    let (checkpoint, _) = checkpoints.load(Which::Newest, Verify::WhileReading)?;
    println!("{} holds, with {}:", checkpoint.tag(), checkpoint.shared());
    for (name, dtype, shape) in checkpoint.tensors() {
        println!("  {name}: {dtype} {shape:?}");
        for saved in checkpoint.regions(name)? {
            println!("    {:?} in bytes {:?} of {}", saved.region, saved.bytes, saved.file);
        }
    }
    checkpoint.verify()?;

    let shard = dir.path().join("global_step10/rank-00000.safetensors");
    let mut bytes = std::fs::read(&shard)?;
    bytes[9000] ^= 1;
    std::fs::write(&shard, bytes)?;
    let (damaged, _) = checkpoints.load(Which::Tag("global_step10"), Verify::WhileReading)?;
    match damaged.verify() {
        Err(e) => {
            println!("one bit later: {}", e.to_string().replace(&dir.path().display().to_string(), "..."))
        }
        Ok(()) => return Err("the damage was not seen".into()),
    }
    Ok(())
}
