//! JSON Lines files: finding their lines, and checking every one

use std::error::Error;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use lightrft_data::{BadLines, Dataset, JsonLines, JsonLinesOptions};

use crate::Options;
use crate::report::{Measured, Row, Target, Unit};

pub(crate) fn measure(options: &Options) -> Result<Vec<Row>, Box<dyn Error>> {
    let mib: usize = if options.quick { 32 } else { 512 };
    let threads = JsonLinesOptions::default().threads;
    let cases = [("index", BadLines::RefuseOnRead, Some(1.0)), ("check", BadLines::Refuse, None)];
    let named = cases.map(|(name, mode, target)| {
        (format!("jsonl/{name}/{mib} MiB, {threads} threads"), name, mode, target)
    });
    if !named.iter().any(|(what, ..)| options.wants(what)) {
        return Ok(Vec::new());
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("prompts.jsonl");
    let bytes = write(&path, mib << 20)?;
    let mut rows = Vec::new();
    for (what, name, bad_lines, target) in named {
        if !options.wants(&what) {
            continue;
        }
        let (mut ours, mut python) = (Vec::new(), Vec::new());
        for round in 0..=options.rounds {
            let begin = Instant::now();
            let file = JsonLines::open(&path, JsonLinesOptions { bad_lines, ..JsonLinesOptions::default() })?;
            let seconds = begin.elapsed().as_secs_f64();
            std::hint::black_box(file.len());
            if round == 0 {
                continue; // what was just written may still be on its way to the disk
            }
            ours.push(seconds);
            // Python takes seconds a round and varies little.
            if let Some(peer) = options.python.as_ref().filter(|_| round <= 2) {
                python.push(peer.take(name, &path.to_string_lossy())?);
            }
        }
        let ours = Measured::of("ours", ours).ok_or("no times")?;
        let mut row = Row::new(what, Unit::GigabytesPerSecond(bytes), ours);
        if let Some(least) = target {
            let met = row.unit.value(row.ours.median()) >= least;
            row.targets.push(Target { text: format!(">= {least} GB/s"), met });
        }
        row.others.extend(Measured::taken("python", &python));
        rows.push(row);
    }
    Ok(rows)
}

/// Writes about so many bytes of prompts, of 100 to 1200 bytes a line, and says how many it were.
pub(crate) fn write(path: &Path, about: usize) -> Result<usize, Box<dyn Error>> {
    let mut file = BufWriter::new(std::fs::File::create(path)?);
    let mut written = 0;
    let words = "Natalia sold clips to forty-eight of her friends in April, and then half as many in May. "
        .repeat(12);
    for line in 0.. {
        if written >= about {
            break;
        }
        let text = &words[..50 + line * 7919 % 1000];
        let text = format!("{{\"prompt\": \"{line}: {text}\", \"label\": \"{}\"}}\n", line % 1000);
        file.write_all(text.as_bytes())?;
        written += text.len();
    }
    file.into_inner()?.sync_all()?;
    Ok(written)
}
