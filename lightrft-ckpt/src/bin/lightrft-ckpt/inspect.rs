//! `inspect`: what one checkpoint holds.

use std::error::Error;
use std::io::Write;

use lightrft_ckpt::{Checkpoint, Checkpoints, Region, SavedRegion, Verify, Which};
use serde_json::{Value, json};

use crate::Outcome;
use crate::args::{Form, Inspect};
use crate::list::exists;
use crate::show::{Align, counted, rfc3339, size, table, time};

/// States longer than this are cut off in the text.
const STATE_CHARS: usize = 400;

pub(crate) fn run(inspect: &Inspect, out: &mut dyn Write) -> Result<Outcome, Box<dyn Error>> {
    let checkpoint = open(&inspect.dir, inspect.tag.as_deref())?;
    match inspect.form {
        Form::Json => writeln!(out, "{:#}", as_json(&checkpoint)?)?,
        Form::Text => as_text(&checkpoint, inspect.regions, out)?,
    }
    Ok(Outcome::Fine)
}

/// Opens the checkpoint of a tag, or the newest, saying on standard error which were passed over.
pub(crate) fn open(dir: &std::path::Path, tag: Option<&str>) -> Result<Checkpoint, Box<dyn Error>> {
    exists(dir)?;
    let which = tag.map_or(Which::Newest, Which::Tag);
    let (checkpoint, report) = Checkpoints::open(dir).load(which, Verify::WhileReading)?;
    for skipped in &report.skipped {
        eprintln!("passed over `{}`: {}", skipped.name, skipped.reason);
    }
    Ok(checkpoint)
}

fn tensor_bytes(checkpoint: &Checkpoint, name: &str) -> Result<u64, Box<dyn Error>> {
    let regions = checkpoint.regions(name)?;
    Ok(regions.iter().map(|r| r.bytes.end - r.bytes.start).sum())
}

fn as_json(checkpoint: &Checkpoint) -> Result<Value, Box<dyn Error>> {
    let region = |r: &SavedRegion<'_>| {
        let mut json = match &r.region {
            Region::Whole => json!({}),
            Region::Flat(range) => json!({"flat": [range.start, range.end]}),
            Region::Box { start, extent } => json!({"box": {"start": start, "extent": extent}}),
        };
        json["file"] = r.file.into();
        json["bytes"] = json!([r.bytes.start, r.bytes.end]);
        json
    };
    let mut tensors = Vec::new();
    for (name, dtype, shape) in checkpoint.tensors() {
        let regions: Vec<Value> = checkpoint.regions(name)?.iter().map(region).collect();
        let bytes = tensor_bytes(checkpoint, name)?;
        tensors
            .push(json!({"name": name, "dtype": dtype, "shape": shape, "bytes": bytes, "regions": regions}));
    }
    let files: Vec<Value> =
        checkpoint.files().map(|(name, bytes)| json!({"name": name, "bytes": bytes})).collect();
    Ok(json!({
        "tag": checkpoint.tag(), "step": checkpoint.step(), "ranks": checkpoint.world_size(),
        "saved": rfc3339(checkpoint.saved()), "path": checkpoint.path().display().to_string(),
        "files": files, "tensors": tensors, "shared": checkpoint.shared(), "rank_states": checkpoint.rank_states(),
    }))
}

fn as_text(checkpoint: &Checkpoint, with_regions: bool, out: &mut dyn Write) -> Result<(), Box<dyn Error>> {
    let (step, ranks) = (checkpoint.step(), counted(checkpoint.world_size(), "rank"));
    writeln!(
        out,
        "{}: step {step}, saved by {} at {} UTC\n",
        checkpoint.tag(),
        ranks,
        time(checkpoint.saved())
    )?;
    let (left, right) = (Align::Left, Align::Right);
    let files: Vec<Vec<String>> =
        checkpoint.files().map(|(name, bytes)| vec![name.to_owned(), size(bytes)]).collect();
    table(out, &[("file", left), ("size", right)], &files)?;
    writeln!(out)?;

    let mut rows = Vec::new();
    let (mut bytes, mut elements) = (0u64, 0u128);
    for (name, dtype, shape) in checkpoint.tensors() {
        let regions = checkpoint.regions(name)?;
        let of_tensor = tensor_bytes(checkpoint, name)?;
        bytes += of_tensor;
        // The bytes are all there, so only a zero lets the product of the others overflow.
        elements += if shape.contains(&0) { 0 } else { shape.iter().map(|&dim| dim as u128).product() };
        rows.push(vec![
            name.to_owned(),
            dtype.to_string(),
            format!("{shape:?}"),
            size(of_tensor),
            regions.len().to_string(),
        ]);
        for r in regions.iter().filter(|_| with_regions) {
            let place = match &r.region {
                Region::Whole => "all".to_owned(),
                Region::Flat(range) => format!("{}..{}", range.start, range.end),
                Region::Box { start, extent } => format!("{extent:?} at {start:?}"),
            };
            let lies = format!("  {place} in {} at {}", r.file, r.bytes.start);
            rows.push(vec![
                lies,
                String::new(),
                String::new(),
                size(r.bytes.end - r.bytes.start),
                String::new(),
            ]);
        }
    }
    let columns = [("tensor", left), ("dtype", left), ("shape", left), ("size", right), ("regions", right)];
    table(out, &columns, &rows)?;
    writeln!(out, "\n{} tensors, {elements} elements, {}\n", checkpoint.tensors().len(), size(bytes))?;

    writeln!(out, "shared state: {}", short(checkpoint.shared()))?;
    for (rank, state) in checkpoint.rank_states().iter().enumerate() {
        writeln!(out, "rank {rank}: {}", short(state))?;
    }
    Ok(())
}

fn short(state: &Value) -> String {
    let text = state.to_string();
    match text.char_indices().nth(STATE_CHARS) {
        Some((end, _)) => {
            format!("{}... ({} characters; --json shows all)", &text[..end], text.chars().count())
        }
        None => text,
    }
}
