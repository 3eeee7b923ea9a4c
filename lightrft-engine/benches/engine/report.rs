//! The table, and the JSON object of the last line

use std::error::Error;
use std::thread;

use serde_json::{Value, json};

/// A case in tokens a second, rising.
pub(crate) struct Row {
    what: &'static str,
    ours: Vec<f64>,
    peer: Vec<f64>,
    /// Least ratio of ours to the peer's.
    promised: Option<f64>,
}

impl Row {
    pub(crate) fn new(
        what: &'static str,
        mut ours: Vec<f64>,
        mut peer: Vec<f64>,
        promised: Option<f64>,
    ) -> Self {
        ours.sort_by(f64::total_cmp);
        peer.sort_by(f64::total_cmp);
        Self { what, ours, peer, promised }
    }

    fn ratio(&self) -> Option<f64> {
        Some(median(&self.ours)? / median(&self.peer)?)
    }

    /// What was promised, and whether it was met, where the peer ran.
    pub(crate) fn target(&self) -> Option<(String, bool)> {
        let (promised, ratio) = (self.promised?, self.ratio()?);
        Some((format!(">= {promised:.1}x transformers"), ratio >= promised))
    }
}

fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    let upper = sorted.get(middle)?;
    Some(if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + upper) / 2.0 } else { *upper })
}

/// What the table does not say.
pub(crate) struct Setting<'a> {
    pub(crate) machine: String,
    pub(crate) load: [String; 2],
    pub(crate) peers: &'a str,
}

pub(crate) fn print(rows: &[Row], setting: &Setting<'_>) {
    println!("{:<46} {:>12} {:>14} {:>8}  target", "tokens/s", "ours", "transformers", "ratio");
    for row in rows {
        let shown = |x: Option<f64>| x.map_or("-".to_owned(), |x| format!("{x:.1}"));
        let target = row
            .target()
            .map_or(String::new(), |(text, met)| format!("{text} {}", if met { "met" } else { "MISSED" }));
        let ratio = row.ratio().map_or("-".to_owned(), |x| format!("{x:.2}x"));
        let (ours, peer) = (shown(median(&row.ours)), shown(median(&row.peer)));
        println!("{}", format!("{:<46} {ours:>12} {peer:>14} {ratio:>8}  {target}", row.what).trim_end());
    }
    println!("{}", setting.machine);
    println!("load average {} before, {} after", setting.load[0], setting.load[1]);
    if !setting.peers.is_empty() {
        println!("peers: {}", setting.peers);
    }
}

pub(crate) fn json(rows: &[Row], setting: &Setting<'_>) -> Value {
    let round = |x: f64| (x * 1e3).round() / 1e3;
    let row = |row: &Row| {
        json!({
            "what": row.what,
            "unit": "tokens/s",
            "ours": median(&row.ours).map(round),
            "range": [row.ours.first().copied().map(round), row.ours.last().copied().map(round)],
            "peers": { "transformers": median(&row.peer).map(round) },
            "ratio": row.ratio().map(round),
            "targets": row.target().map(|(target, met)| json!({ "target": target, "met": met })),
        })
    };
    json!({
        "bench": "engine",
        "machine": setting.machine,
        "load": setting.load,
        "peers": setting.peers,
        "rows": rows.iter().map(row).collect::<Vec<_>>(),
    })
}

/// The processor, its cores and the kernel.
pub(crate) fn machine() -> Result<String, Box<dyn Error>> {
    let cores = thread::available_parallelism()?.get();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown processor", |(_, name)| name);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(format!("{model}, {cores} cores, Linux {}", kernel.trim()))
}

/// The load average of the last minute.
pub(crate) fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or("unknown").to_owned()
}
