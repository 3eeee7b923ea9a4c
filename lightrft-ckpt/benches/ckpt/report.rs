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
        median_of_sorted(&self.sorted)
    }

    fn least(&self) -> f64 {
        self.sorted.first().copied().unwrap_or(f64::NAN)
    }
}

/// The median of some numbers; of none, not a number.
pub(crate) fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    median_of_sorted(&numbers)
}

fn median_of_sorted(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    match sorted.get(middle) {
        None => f64::NAN,
        Some(upper) if sorted.len().is_multiple_of(2) => (sorted[middle - 1] + upper) / 2.0,
        Some(middle) => *middle,
    }
}

/// The fastest by median.
pub(crate) fn best(all: &[Measured]) -> Option<&Measured> {
    all.iter().min_by(|a, b| a.median().total_cmp(&b.median()))
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
    /// Bytes of the state; 0 where that says nothing.
    pub(crate) bytes: u64,
    pub(crate) ours: Measured,
    pub(crate) others: Vec<Measured>,
    pub(crate) targets: Vec<Target>,
}

/// What the table does not say.
pub(crate) struct Setting {
    pub(crate) machine: String,
    pub(crate) ground: String,
    pub(crate) rounds: usize,
    pub(crate) load: [String; 2],
    pub(crate) peers: String,
}

pub(crate) fn print(rows: &[Row], setting: &Setting) {
    println!("median ms (least), GB/s of the median, times ours; {} rounds", setting.rounds);
    for row in rows {
        println!("\n{}", row.what);
        let ours = row.ours.median();
        for one in [&row.ours].into_iter().chain(&row.others) {
            let rate = match row.bytes {
                0 => String::new(),
                bytes => format!("{} GB/s", digits(bytes as f64 / one.median() / 1e9)),
            };
            let times = format!("{}x", digits(one.median() / ours));
            let least = format!("({})", digits(one.least() * 1e3));
            let label = one.label;
            println!("  {label:<24}{:>8} {least:<9} {rate:>10}  {times:>6}", digits(one.median() * 1e3));
        }
        for target in &row.targets {
            println!("  {} {}", if target.met { "met:   " } else { "MISSED:" }, target.text);
        }
    }
    println!("\n{}; {}", setting.machine, setting.ground);
    println!("load average {} before, {} after", setting.load[0], setting.load[1]);
    if !setting.peers.is_empty() {
        println!("peers: {}", setting.peers);
    }
}

pub(crate) fn json(rows: &[Row], setting: &Setting) -> Value {
    let times = |m: &Measured| json!({"median": rounded(m.median()), "least": rounded(m.least())});
    let row = |row: &Row| {
        let peers: serde_json::Map<_, _> =
            row.others.iter().map(|m| (m.label.to_owned(), times(m))).collect();
        let targets: Vec<_> = row.targets.iter().map(|t| json!({"target": t.text, "met": t.met})).collect();
        let mut object = json!({
            "what": row.what,
            "unit": "ms",
            "ours": times(&row.ours),
            "peers": peers,
            "targets": targets,
        });
        if row.bytes > 0 {
            object["gb_per_s"] = three_places(row.bytes as f64 / row.ours.median() / 1e9).into();
        }
        object
    };
    json!({
        "bench": "ckpt",
        "machine": setting.machine,
        "ground": setting.ground,
        "rounds": setting.rounds,
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
