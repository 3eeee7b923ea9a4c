//! `verify`: every byte of one checkpoint, or of all.

use std::error::Error;
use std::io::Write;
use std::time::Instant;

use lightrft_ckpt::{Checkpoints, Verify as Check, Which};

use crate::Outcome;
use crate::args::{Verify, VerifyWhich};
use crate::list::exists;
use crate::show::size;

pub(crate) fn run(verify: &Verify, out: &mut dyn Write) -> Result<Outcome, Box<dyn Error>> {
    exists(&verify.dir)?;
    let checkpoints = Checkpoints::open(&verify.dir);
    let refused = checkpoints.refused()?;
    let listed = checkpoints.list()?;
    let tags: Vec<String> = match &verify.which {
        VerifyWhich::Tag(tag) => vec![tag.clone()],
        VerifyWhich::Newest => listed.first().map(|l| l.tag.clone()).into_iter().collect(),
        VerifyWhich::All => listed.iter().map(|l| l.tag.clone()).collect(),
    };
    let mut outcome = Outcome::Fine;
    if verify.which == VerifyWhich::All {
        for skipped in &refused {
            writeln!(out, "{}: DAMAGED: {}", skipped.name, skipped.reason)?;
            outcome = Outcome::Damaged;
        }
    }
    if tags.is_empty() && outcome == Outcome::Fine {
        return Err(format!("no checkpoint in `{}`", verify.dir.display()).into());
    }
    for tag in tags {
        let begun = Instant::now();
        let verified = checkpoints.load(Which::Tag(&tag), Check::WhileReading).and_then(|(checkpoint, _)| {
            checkpoint.verify()?;
            Ok(checkpoint.files().map(|(_, bytes)| bytes).sum::<u64>())
        });
        match verified {
            Ok(bytes) => {
                let seconds = begun.elapsed().as_secs_f64();
                writeln!(out, "{tag}: whole, {} read in {seconds:.1} s", size(bytes))?;
            }
            Err(e @ lightrft_ckpt::Error::NoTag { .. }) => return Err(e.into()),
            Err(e) => {
                writeln!(out, "{tag}: DAMAGED: {e}")?;
                outcome = Outcome::Damaged;
            }
        }
    }
    Ok(outcome)
}
