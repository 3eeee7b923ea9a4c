//! `convert`: a Hugging Face folder as a checkpoint, or a checkpoint as other ranks would have saved it.

use std::error::Error;
use std::io::Write;

use lightrft_ckpt::{HfFolder, save_as_ranks};

use crate::args::Convert;
use crate::inspect::open;
use crate::list::exists;
use crate::show::{counted, size};
use crate::{Outcome, Usage};

pub(crate) fn run(convert: &Convert, out: &mut dyn Write) -> Result<Outcome, Box<dyn Error>> {
    exists(&convert.from)?;
    let is_model =
        ["model.safetensors", "model.safetensors.index.json"].iter().any(|f| convert.from.join(f).exists());
    let report = if is_model {
        if let Some(tag) = &convert.tag {
            let text = format!("`{}` is a model folder, which has no tag `{tag}`", convert.from.display());
            return Err(Usage(text).into());
        }
        let folder = HfFolder::open(&convert.from)?;
        let step = convert.step.unwrap_or(0);
        save_as_ranks(&convert.to, convert.world_size, |rank| folder.share(step, rank, convert.world_size))?
    } else {
        if convert.step.is_some() {
            return Err(Usage("--step is for model folders; a checkpoint keeps its own".into()).into());
        }
        let checkpoint = open(&convert.from, convert.tag.as_deref())?;
        let (before, after) = (checkpoint.world_size(), convert.world_size);
        if after < before {
            eprintln!("the states of ranks {after} to {} are left out", before - 1);
        }
        save_as_ranks(&convert.to, after, |rank| checkpoint.share(rank, after))?
    };
    writeln!(
        out,
        "{}: step {}, {} as {}, in `{}`",
        report.tag,
        report.step,
        size(report.bytes),
        counted(convert.world_size, "rank"),
        convert.to.display()
    )?;
    Ok(Outcome::Fine)
}
