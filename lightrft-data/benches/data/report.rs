//! The table, and the JSON object of the last line

use serde_json::{Value, json};

use crate::peer::Taken;

/// Times of one contender at one case.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    pub(crate) label: &'static str,
    /// Seconds, rising.
    sorted: Vec<f64>,
    /// Most memory it took, where that was measured.
    pub(crate) peak_mib: Option<f64>,
}

impl Measured {
    /// `None` of no times, in seconds.
    pub(crate) fn of(label: &'static str, mut times: Vec<f64>) -> Option<Self> {
        times.sort_by(f64::total_cmp);
        (!times.is_empty()).then_some(Self { label, sorted: times, peak_mib: None })
    }

    /// The same of measurements in processes of their own.
    pub(crate) fn taken(label: &'static str, taken: &[Taken]) -> Option<Self> {
        let peak_mib = taken.iter().map(|taken| taken.peak_mib).max_by(f64::total_cmp);
        let times = taken.iter().map(|taken| taken.seconds).collect();
        Some(Self { peak_mib, ..Self::of(label, times)? })
    }

    /// In seconds.
    pub(crate) fn median(&self) -> f64 {
        let middle = self.sorted.len() / 2;
        if self.sorted.len().is_multiple_of(2) {
            (self.sorted[middle - 1] + self.sorted[middle]) / 2.0
        } else {
            self.sorted[middle]
        }
    }
}

/// What a row counts in.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unit {
    Seconds,
    Milliseconds,
    /// Of so many.
    NanosecondsEach(usize),
    /// Of so many bytes.
    GigabytesPerSecond(usize),
    /// Of so many.
    SamplesPerSecond(usize),
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Unit::Seconds => "s",
            Unit::Milliseconds => "ms",
            Unit::NanosecondsEach(_) => "ns",
            Unit::GigabytesPerSecond(_) => "GB/s",
            Unit::SamplesPerSecond(_) => "samples/s",
        }
    }

    pub(crate) fn value(self, seconds: f64) -> f64 {
        match self {
            Unit::Seconds => seconds,
            Unit::Milliseconds => seconds * 1e3,
            Unit::NanosecondsEach(count) => seconds * 1e9 / count as f64,
            Unit::GigabytesPerSecond(bytes) => bytes as f64 / seconds / 1e9,
            Unit::SamplesPerSecond(samples) => samples as f64 / seconds,
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
    pub(crate) unit: Unit,
    pub(crate) ours: Measured,
    pub(crate) others: Vec<Measured>,
    pub(crate) targets: Vec<Target>,
}

impl Row {
    pub(crate) fn new(what: String, unit: Unit, ours: Measured) -> Self {
        Self { what, unit, ours, others: Vec::new(), targets: Vec::new() }
    }
}

/// What the table does not say.
pub(crate) struct Setting {
    pub(crate) machine: String,
    pub(crate) load: [String; 2],
    pub(crate) peers: String,
}

pub(crate) fn print(rows: &[Row], setting: &Setting) {
    let mut lines = vec![["", "ours", "others (time, times ours)", "targets"].map(str::to_owned)];
    for row in rows {
        let shown = |measured: &Measured| {
            let peak = measured.peak_mib.map_or(String::new(), |mib| format!(", {mib:.0} MiB"));
            format!("{} {}{peak}", digits(row.unit.value(measured.median())), row.unit.name())
        };
        let ours = row.ours.median();
        let other = |other: &Measured| {
            format!("{} {} ({}x)", other.label, shown(other), digits(other.median() / ours))
        };
        let others: Vec<String> = row.others.iter().map(other).collect();
        let said = |t: &Target| format!("{} {}", t.text, if t.met { "met" } else { "MISSED" });
        let targets: Vec<String> = row.targets.iter().map(said).collect();
        lines.push([row.what.clone(), shown(&row.ours), others.join("; "), targets.join("; ")]);
    }
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    for [what, ours, others, targets] in &lines {
        let [a, b, c] = widths;
        println!("{}", format!("{what:<a$}  {ours:>b$}  {others:<c$}  {targets}").trim_end());
    }
    println!("{}", setting.machine);
    println!("load average {} before, {} after", setting.load[0], setting.load[1]);
    if !setting.peers.is_empty() {
        println!("peers: {}", setting.peers);
    }
}

pub(crate) fn json(rows: &[Row], setting: &Setting) -> Value {
    let row = |row: &Row| {
        let value = |seconds: f64| three_places(row.unit.value(seconds));
        let peers: serde_json::Map<_, _> =
            row.others.iter().map(|other| (other.label.to_owned(), value(other.median()).into())).collect();
        // Rising as the times do, or falling: fastest first.
        let (fastest, slowest) = (row.ours.sorted.first(), row.ours.sorted.last());
        let mut object = json!({
            "what": row.what,
            "unit": row.unit.name(),
            "ours": value(row.ours.median()),
            "range": [fastest.map(|t| value(*t)), slowest.map(|t| value(*t))],
            "peers": peers,
        });
        if let Some(peak) = row.ours.peak_mib {
            let others = row.others.iter().map(|other| (other.label, other.peak_mib.map(three_places)));
            let others: serde_json::Map<_, _> =
                others.map(|(label, peak)| (label.to_owned(), peak.into())).collect();
            object["peak_mib"] = json!({ "ours": three_places(peak), "peers": others });
        }
        if !row.targets.is_empty() {
            let targets = row.targets.iter().map(|t| json!({"target": t.text, "met": t.met}));
            object["targets"] = targets.collect();
        }
        object
    };
    json!({
        "bench": "data",
        "machine": setting.machine,
        "load": setting.load,
        "peers": setting.peers,
        "rows": rows.iter().map(row).collect::<Vec<_>>(),
    })
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
