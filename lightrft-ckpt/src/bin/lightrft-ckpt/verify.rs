//! `verify`: every byte of one checkpoint, or of all.

use std::error::Error;
use std::io::Write;
use std::time::Instant;

use lightrft_ckpt::{Checkpoints, Error as CheckpointError, Listed, Survey};

use crate::Outcome;
use crate::args::{Verify, VerifyWhich};
use crate::list::{Look, exists, look};
use crate::show::size;

pub(crate) fn run(verify: &Verify, out: &mut dyn Write) -> Result<Outcome, Box<dyn Error>> {
    exists(&verify.dir)?;
    let checkpoints = Checkpoints::open(&verify.dir);
    let Survey { checkpoints: mut listed, refused, .. } = checkpoints.survey()?;
    let mut outcome = Outcome::Fine;
    for skipped in &refused {
        // Nobody knows its step: it may be the one that whoever asks for the newest, or for all, wants to hear about.
        let wanted = match &verify.which {
            VerifyWhich::Tag(tag) => *tag == skipped.name,
            VerifyWhich::Newest | VerifyWhich::All => true,
        };
        match verify.which {
            VerifyWhich::Newest => eprintln!("passed over `{}`: {}", skipped.name, skipped.reason),
            _ if wanted => writeln!(out, "{}: DAMAGED: {}", skipped.name, skipped.reason)?,
            _ => eprintln!("beside it, `{}` is damaged: {}", skipped.name, skipped.reason),
        }
        if wanted {
            outcome = Outcome::Damaged;
        }
    }
    match &verify.which {
        VerifyWhich::All => {}
        VerifyWhich::Newest => listed.truncate(1),
        VerifyWhich::Tag(tag) => {
            let present = listed.iter().map(|l| l.tag.clone()).collect();
            listed.retain(|l| l.tag == *tag);
            if listed.is_empty() && outcome == Outcome::Fine {
                let dir = verify.dir.clone();
                return Err(CheckpointError::NoTag { dir, tag: tag.clone(), present }.into());
            }
        }
    }
    let mut verified = 0;
    for listed in listed {
        let tag = listed.tag.clone();
        let begun = Instant::now();
        match look(&checkpoints, listed, |listed| every_byte(&checkpoints, listed))? {
            Look::Whole(_, bytes) => {
                let seconds = begun.elapsed().as_secs_f64();
                writeln!(out, "{tag}: whole, {} read in {seconds:.1} s", size(bytes))?;
            }
            Look::Failed(_, e) => {
                let what =
                    if matches!(e, CheckpointError::Damaged { .. }) { "DAMAGED" } else { "NOT READABLE" };
                writeln!(out, "{tag}: {what}: {e}")?;
                outcome = Outcome::Damaged;
            }
            Look::Removed => {
                writeln!(out, "{tag}: removed meanwhile")?;
                continue;
            }
        }
        verified += 1;
    }
    if verified == 0 && outcome == Outcome::Fine {
        return Err(format!("no checkpoint in `{}`", verify.dir.display()).into());
    }
    Ok(outcome)
}

/// Reads all of a checkpoint. Returns how much that is.
fn every_byte(checkpoints: &Checkpoints, listed: &Listed) -> lightrft_ckpt::Result<u64> {
    let checkpoint = checkpoints.open_listed(listed)?;
    checkpoint.verify()?;
    Ok(checkpoint.files().map(|(_, bytes)| bytes).sum())
}
