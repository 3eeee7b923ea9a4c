//! The table, and the JSON object of the last line

use std::error::Error;
use std::thread;

use serde_json::{Value, json};

/// What was measured once or more often, rising.
#[derive(Debug)]
pub(crate) struct Measured(Vec<f64>);

impl Measured {
    /// `None` of nothing.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        (!values.is_empty()).then_some(Self(values))
    }

    pub(crate) fn median(&self) -> f64 {
        let middle = self.0.len() / 2;
        let even = self.0.len().is_multiple_of(2);
        if even { (self.0[middle - 1] + self.0[middle]) / 2.0 } else { self.0[middle] }
    }
}

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Row {
    what: String,
    unit: &'static str,
    ours: Measured,
    /// What was measured beside, by name.
    others: Vec<(&'static str, Measured)>,
    /// What was promised, and whether it was met.
    targets: Vec<(String, bool)>,
}

impl Row {
    pub(crate) fn new(what: impl Into<String>, unit: &'static str, ours: Measured) -> Self {
        Self { what: what.into(), unit, ours, others: Vec::new(), targets: Vec::new() }
    }

    pub(crate) fn beside(mut self, name: &'static str, other: Measured) -> Self {
        self.others.push((name, other));
        self
    }

    pub(crate) fn promise(mut self, text: impl Into<String>, met: bool) -> Self {
        self.targets.push((text.into(), met));
        self
    }

    /// Whether ours is so many times another.
    pub(crate) fn is_at_least(&self, times: f64, other: &Measured) -> bool {
        self.ours.median() >= times * other.median()
    }

    /// Whether something that was promised was not met.
    pub(crate) fn missed(&self) -> bool {
        self.targets.iter().any(|(_, met)| !met)
    }
}

/// What the table does not say.
pub(crate) struct Setting<'a> {
    pub(crate) machine: String,
    pub(crate) load: [String; 2],
    pub(crate) peers: &'a str,
}

pub(crate) fn print(rows: &[Row], unseen: &[String], setting: &Setting<'_>) {
    let shown = |x: f64| if x < 10.0 { format!("{x:.2}") } else { format!("{x:.1}") };
    for row in rows {
        let ours = row.ours.median();
        let others: Vec<_> = row.others.iter().map(|(name, other)| (name, other.median())).collect();
        let others: Vec<_> =
            others.iter().map(|(name, x)| format!("{name} {} ({:.2}x)", shown(*x), ours / x)).collect();
        let met = |(text, met): &(String, bool)| format!("{text} {}", if *met { "met" } else { "MISSED" });
        let targets: Vec<_> = row.targets.iter().map(met).collect();
        let measured = format!("{} {}", shown(ours), row.unit);
        let line =
            format!("{:<46} {measured:>15}  {:<46} {}", row.what, others.join("; "), targets.join("; "));
        println!("{}", line.trim_end());
    }
    for target in unseen {
        println!("NOT LOOKED AT: {target}");
    }
    println!("{}", setting.machine);
    println!("load average {} before, {} after", setting.load[0], setting.load[1]);
    if !setting.peers.is_empty() {
        println!("peers: {}", setting.peers);
    }
}

pub(crate) fn json(rows: &[Row], unseen: &[String], setting: &Setting<'_>) -> Value {
    let round = |x: f64| (x * 1e3).round() / 1e3;
    let row = |row: &Row| {
        let others =
            row.others.iter().map(|(name, other)| ((*name).to_owned(), round(other.median()).into()));
        let targets = row.targets.iter().map(|(target, met)| json!({ "target": target, "met": met }));
        json!({
            "what": row.what,
            "unit": row.unit,
            "ours": round(row.ours.median()),
            "range": [row.ours.0.first().copied().map(round), row.ours.0.last().copied().map(round)],
            "others": others.collect::<serde_json::Map<String, Value>>(),
            "targets": targets.collect::<Vec<_>>(),
        })
    };
    json!({
        "bench": "engine",
        "machine": setting.machine,
        "load": setting.load,
        "peers": setting.peers,
        "rows": rows.iter().map(row).collect::<Vec<_>>(),
        "not looked at": unseen,
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
