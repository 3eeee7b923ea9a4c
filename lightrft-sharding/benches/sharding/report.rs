//! The table, and the JSON object of the last line

use serde_json::{Value, json};

/// Times of one contender at one case, in seconds.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) label: &'static str,
    sorted: Vec<f64>,
}

impl Measured {
    /// `None` of no times.
    pub(crate) fn of(label: &'static str, mut times: Vec<f64>) -> Option<Self> {
        times.sort_by(f64::total_cmp);
        (!times.is_empty()).then_some(Self { label, sorted: times })
    }

    pub(crate) fn median(&self) -> f64 {
        let middle = self.sorted.len() / 2;
        if self.sorted.len().is_multiple_of(2) {
            (self.sorted[middle - 1] + self.sorted[middle]) / 2.0
        } else {
            self.sorted[middle]
        }
    }
}

/// A promise about a case.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) text: String,
    pub(crate) met: bool,
}

/// A case with everybody's times.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) what: String,
    /// Bytes that the case reads and writes at least; 0 where that says nothing.
    pub(crate) bytes: usize,
    pub(crate) ours: Measured,
    pub(crate) others: Vec<Measured>,
    pub(crate) targets: Vec<Target>,
}

/// What the table does not say.
pub(crate) struct Setting {
    pub(crate) machine: String,
    pub(crate) threads: usize,
    pub(crate) priority: &'static str,
    pub(crate) load: [String; 2],
    pub(crate) peers: String,
}

pub(crate) fn print(rows: &[Row], setting: &Setting) {
    let mut lines = vec![["", "ms", "GB/s", "others, ms (times ours)", "targets"].map(str::to_owned)];
    for row in rows {
        let ours = row.ours.median();
        let rate = if row.bytes > 0 { digits(row.bytes as f64 / ours / 1e9) } else { "-".to_owned() };
        let other = |other: &Measured| {
            format!("{} {} ({}x)", other.label, digits(other.median() * 1e3), digits(other.median() / ours))
        };
        let others: Vec<String> = row.others.iter().map(other).collect();
        let said = |t: &Target| format!("{} {}", t.text, if t.met { "met" } else { "MISSED" });
        let targets: Vec<String> = row.targets.iter().map(said).collect();
        lines.push([row.what.clone(), digits(ours * 1e3), rate, others.join(", "), targets.join("; ")]);
    }
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2), width(3)];
    for [what, ms, rate, others, targets] in &lines {
        let [a, b, c, d] = widths;
        println!("{}", format!("{what:<a$}  {ms:>b$}  {rate:>c$}  {others:<d$}  {targets}").trim_end());
    }
    println!("{}; {} threads; priority {}", setting.machine, setting.threads, setting.priority);
    println!("load average {} before, {} after", setting.load[0], setting.load[1]);
    if !setting.peers.is_empty() {
        println!("peers: {}", setting.peers);
    }
}

pub(crate) fn json(rows: &[Row], setting: &Setting) -> Value {
    let row = |row: &Row| {
        let peers: serde_json::Map<_, _> =
            row.others.iter().map(|m| (m.label.to_owned(), rounded(m.median()).into())).collect();
        let ours = row.ours.median();
        let (fastest, slowest) = (row.ours.sorted.first(), row.ours.sorted.last());
        let mut object = json!({
            "what": row.what,
            "unit": "ms",
            "ours": rounded(ours),
            "range": [fastest.map(|t| rounded(*t)), slowest.map(|t| rounded(*t))],
            "peers": peers,
        });
        if row.bytes > 0 {
            object["gb_per_s"] = three_places(row.bytes as f64 / ours / 1e9).into();
        }
        if !row.targets.is_empty() {
            let targets = row.targets.iter().map(|t| json!({"target": t.text, "met": t.met}));
            object["targets"] = targets.collect();
        }
        object
    };
    json!({
        "bench": "sharding",
        "machine": setting.machine,
        "threads": setting.threads,
        "priority": setting.priority,
        "load": setting.load,
        "peers": setting.peers,
        "rows": rows.iter().map(row).collect::<Vec<_>>(),
    })
}

/// Seconds as milliseconds, to the microsecond.
fn rounded(seconds: f64) -> f64 {
    three_places(seconds * 1e3)
}

fn three_places(number: f64) -> f64 {
    (number * 1e3).round() / 1e3
}

/// Three digits that count, but no fewer than before the point.
fn digits(number: f64) -> String {
    let places = match number.abs() {
        x if x >= 100.0 => 0,
        x if x >= 10.0 => 1,
        _ => 2,
    };
    format!("{number:.places$}")
}
