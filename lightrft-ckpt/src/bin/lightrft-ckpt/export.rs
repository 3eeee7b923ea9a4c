//! `export`: a checkpoint's model as a Hugging Face folder.

use std::error::Error;
use std::io::Write;

use lightrft_ckpt::{HfOptions, export_hf};
use serde_json::{Map, Value};

use crate::Outcome;
use crate::args::Export;
use crate::inspect::open;
use crate::show::{counted, size};

pub(crate) fn run(export: &Export, out: &mut dyn Write) -> Result<Outcome, Box<dyn Error>> {
    let checkpoint = open(&export.dir, export.tag.as_deref())?;
    let mut options =
        HfOptions { floats: export.floats, source: export.source.clone(), ..HfOptions::default() };
    if let Some(path) = &export.config {
        let text = std::fs::read(path).map_err(|e| format!("`{}`: {e}", path.display()))?;
        let config: Map<String, Value> =
            serde_json::from_slice(&text).map_err(|e| format!("`{}`: {e}", path.display()))?;
        options.config = Some(config);
    }
    if let Some(bytes) = export.max_shard_bytes {
        options.max_shard_bytes = bytes;
    }
    let report = export_hf(&checkpoint, &export.to, export.tensors, &options)?;
    writeln!(
        out,
        "{} of step {}: {}, {} in {}, as `{}`",
        checkpoint.tag(),
        checkpoint.step(),
        counted(report.tensors, "tensor"),
        size(report.bytes),
        counted(report.shards, "file"),
        export.to.display()
    )?;
    for left in &report.not_removed {
        eprintln!("the folder that was there is left as `{}`: {}", left.name, left.reason);
    }
    if options.config.is_none() && !export.to.join("config.json").exists() {
        eprintln!("there is no config.json in it: --from or --config takes one along");
    }
    Ok(Outcome::Fine)
}
