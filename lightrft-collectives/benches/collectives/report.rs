//! The table, its targets, and the JSON object of the last line

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::cases::Case;
use crate::contender::{Conditions, Pin, Priority};

/// One implementation in one of its ways; a column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Column {
    /// Ours: shared memory, the caller's own buffers.
    Shm,
    /// Ours: shared memory, buffers from the group's heap.
    Heap,
    /// Ours: TCP over loopback.
    Tcp,
    Gloo,
    OpenMpi,
}

impl Column {
    pub(crate) const ALL: [Column; 5] =
        [Column::Shm, Column::Heap, Column::Tcp, Column::Gloo, Column::OpenMpi];

    /// As in the table and in JSON.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Column::Shm => "shm",
            Column::Heap => "heap",
            Column::Tcp => "tcp",
            Column::Gloo => "gloo",
            Column::OpenMpi => "openmpi",
        }
    }

    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Column::Shm | Column::Heap | Column::Tcp)
    }
}

/// Microseconds: the median of the rounds' medians, and the fastest and slowest of these.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Measured {
    pub(crate) median: f64,
    pub(crate) fastest: f64,
    pub(crate) slowest: f64,
}

impl Measured {
    /// Of the medians of several rounds; `None` of none.
    pub(crate) fn of(mut rounds: Vec<f64>) -> Option<Self> {
        rounds.sort_by(f64::total_cmp);
        let (fastest, slowest) = (*rounds.first()?, *rounds.last()?);
        Some(Measured { median: median(&rounds), fastest, slowest })
    }
}

/// Of sorted numbers, of which there is at least one.
pub(crate) fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + sorted[middle]) / 2.0 } else { sorted[middle] }
}

/// A case's times, by column.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) case: Case,
    pub(crate) measured: Vec<(Column, Measured)>,
}

/// A promise about one of our columns.
pub(crate) struct Target {
    pub(crate) column: Column,
    /// For the table: `< 1 us`, `>= 2.5x gloo`.
    pub(crate) text: String,
    pub(crate) met: bool,
}

impl Row {
    pub(crate) fn micros(&self, column: Column) -> Option<f64> {
        self.measured.iter().find(|(c, _)| *c == column).map(|(_, measured)| measured.median)
    }

    /// What this crate promises of the case, as far as it was measured together with what it is compared to.
    pub(crate) fn targets(&self) -> Vec<Target> {
        let below = |column, limit: f64| {
            let time = self.micros(column)?;
            Some(Target { column, text: format!("< {limit} us"), met: time < limit })
        };
        let faster = |column: Column, than: Column, times: f64| {
            let ratio = self.micros(than)? / self.micros(column)?;
            let text = match times {
                1.0 => format!("<= {}", than.label()),
                _ => format!(">= {times}x {}", than.label()),
            };
            Some(Target { column, text, met: ratio >= times })
        };
        use Column::{Gloo, Heap, OpenMpi, Shm, Tcp};
        let promises = match (self.case.label().as_str(), self.case.ranks) {
            ("all_reduce/f32/8B", 2) => {
                vec![below(Shm, 1.0), faster(Shm, Gloo, 100.0), faster(Tcp, Gloo, 2.0)]
            }
            ("all_reduce/f32/8B", _) => vec![faster(Shm, OpenMpi, 1.0), faster(Tcp, Gloo, 2.0)],
            ("all_reduce/f32/1MiB", _) => vec![faster(Shm, Gloo, 2.5), faster(Heap, Gloo, 6.0)],
            ("all_reduce/f32/16MiB", _) => vec![faster(Tcp, Gloo, 2.0)],
            ("all_reduce/f32/128MiB", _) => vec![faster(Shm, Gloo, 2.5), faster(Heap, Gloo, 4.0)],
            ("all_gather/f32/1MiB" | "broadcast/f32/1MiB" | "all_to_all/f32/1MiB", _) => {
                vec![faster(Shm, OpenMpi, 1.0)]
            }
            ("reduce_scatter/f32/1MiB", _) => vec![faster(Shm, OpenMpi, 2.0)],
            ("barrier", 2) => vec![below(Shm, 0.5)],
            ("failure/sigkill", _) => vec![below(Shm, 100e3), below(Tcp, 100e3)],
            ("failure/silence", _) => vec![below(Tcp, 5e6)],
            ("subgroup", 4) => vec![below(Shm, 5000.0), below(Tcp, 5000.0)],
            _ => vec![],
        };
        promises.into_iter().flatten().collect()
    }
}

/// What was measured where.
pub(crate) struct Setting {
    pub(crate) machine: String,
    pub(crate) conditions: Conditions,
    /// The load average before the first case and after the last.
    pub(crate) load: [String; 2],
    /// Name and version of each implementation.
    pub(crate) versions: Vec<(&'static str, String)>,
}

impl Setting {
    fn priority(&self) -> &'static str {
        match self.conditions.priority {
            Priority::Rr => "SCHED_RR 10",
            Priority::Normal => "normal",
        }
    }

    fn pins(&self) -> &'static str {
        match self.conditions.pin {
            Pin::Best => {
                "ranks of shm, heap and openmpi pinned to core rank % cores, those of tcp and gloo, faster without, not"
            }
            Pin::Cores => "all ranks pinned to core rank % cores",
            Pin::None => "no rank pinned",
        }
    }
}

/// The table of one number of ranks; columns that measured nothing are left out.
pub(crate) fn print(rows: &[Row]) {
    let columns: Vec<Column> =
        Column::ALL.into_iter().filter(|c| rows.iter().any(|row| row.micros(*c).is_some())).collect();
    let compared = [
        (Column::Shm, Column::Gloo),
        (Column::Shm, Column::OpenMpi),
        (Column::Heap, Column::Gloo),
        (Column::Tcp, Column::Gloo),
    ];
    let compared: Vec<_> =
        compared.into_iter().filter(|(a, b)| columns.contains(a) && columns.contains(b)).collect();

    let mut lines = Vec::new();
    let mut head = vec!["us (GB/s)".to_owned()];
    head.extend(columns.iter().map(|c| c.label().to_owned()));
    head.extend(compared.iter().map(|(a, b)| format!("{}/{}", b.label(), a.label())));
    head.push("targets".into());
    lines.push(head);
    for row in rows {
        let mut line = vec![row.case.name()];
        line.extend(columns.iter().map(|c| row.micros(*c).map_or("-".into(), |time| cell(&row.case, time))));
        line.extend(compared.iter().map(|(a, b)| match (row.micros(*a), row.micros(*b)) {
            (Some(a), Some(b)) => format!("{:.3}x", Digits(b / a)),
            _ => "-".into(),
        }));
        let targets = row.targets();
        let said = targets
            .iter()
            .map(|t| format!("{} {} {}", t.column.label(), t.text, if t.met { "met" } else { "MISSED" }));
        line.push(said.collect::<Vec<_>>().join("; "));
        lines.push(line);
    }
    let widths: Vec<usize> =
        (0..lines[0].len()).map(|i| lines.iter().map(|line| line[i].len()).max().unwrap_or(0)).collect();
    for line in lines {
        let mut text = format!("{:<1$}", line[0], widths[0]);
        for (cell, width) in line[1..line.len() - 1].iter().zip(&widths[1..]) {
            text += &format!("  {cell:>width$}");
        }
        println!("{}", format!("{text}  {}", line[line.len() - 1]).trim_end());
    }
}

/// A number with three digits that count, but no fewer than before its point.
struct Digits(f64);

impl std::fmt::Display for Digits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let places = match self.0.abs() {
            x if x >= 100.0 => 0,
            x if x >= 10.0 => 1,
            _ => 2,
        };
        write!(f, "{:.places$}", self.0)
    }
}

fn cell(case: &Case, micros: f64) -> String {
    match case.gigabytes(micros) {
        Some(gigabytes) => format!("{} ({})", Digits(micros), Digits(gigabytes)),
        None => Digits(micros).to_string(),
    }
}

/// What the table does not say.
pub(crate) fn print_setting(setting: &Setting) {
    println!("{}", setting.machine);
    println!("priority {}; {}", setting.priority(), setting.pins());
    println!("load average {} before, {} after", setting.load[0], setting.load[1]);
    for version in setting.versions.iter().map(|(_, version)| version).collect::<BTreeSet<_>>() {
        let labels: Vec<_> = setting.versions.iter().filter(|(_, v)| v == version).map(|(l, _)| *l).collect();
        println!("{}: {version}", labels.join(", "));
    }
}

/// The object of the last line.
pub(crate) fn json(rows: &[Row], setting: &Setting) -> Value {
    let rows: Vec<Value> = rows
        .iter()
        .flat_map(|row| row.measured.iter().map(move |m| (row, m)))
        .filter(|(_, (column, _))| column.is_ours())
        .map(|(row, (column, measured))| {
            let way = if *column == Column::Shm { String::new() } else { format!("/{}", column.label()) };
            let peers = row.measured.iter().filter(|(c, _)| !c.is_ours());
            let peers: serde_json::Map<_, _> =
                peers.map(|(c, m)| (c.label().to_owned(), rounded(m.median).into())).collect();
            let mut object = json!({
                "what": row.case.name() + &way,
                "unit": "us",
                "ours": rounded(measured.median),
                "range": [rounded(measured.fastest), rounded(measured.slowest)],
                "peers": peers,
            });
            if let Some(gigabytes) = row.case.gigabytes(measured.median) {
                object["gb_per_s"] = rounded(gigabytes).into();
            }
            let targets: Vec<Value> = row
                .targets()
                .into_iter()
                .filter(|t| t.column == *column)
                .map(|t| json!({"target": t.text, "met": t.met}))
                .collect();
            if !targets.is_empty() {
                object["targets"] = targets.into();
            }
            object
        })
        .collect();
    json!({
        "bench": "collectives",
        "machine": setting.machine,
        "priority": setting.priority(),
        "pins": setting.pins(),
        "load": setting.load,
        "versions": setting.versions.iter().map(|(l, v)| ((*l).to_owned(), v.clone().into())).collect::<serde_json::Map<_, _>>(),
        "rows": rows,
    })
}

/// To nanoseconds: no more is known.
fn rounded(micros: f64) -> f64 {
    (micros * 1e3).round() / 1e3
}
