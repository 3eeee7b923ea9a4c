//! Prints what the ranks of a job do now, and their last calls: `lightrft-flight [--calls N] PID...`
//!
//! The job need not answer: the recorders of its processes are read as the kernel keeps them, also of those that are
//! stopped or hang. All ranks of a machine are given at once, for instance `lightrft-flight $(pgrep -f train)`.
//! Processes that are no ranks are passed over. The last lines say which rank is missing where.

use std::process::ExitCode;

use lightrft_collectives::flight::{self, Flight};

const USAGE: &str = "usage: lightrft-flight [--calls N] PID...
Prints the last N calls (16 unless told otherwise) of each rank, what it does now, and who is missing where.";

fn main() -> ExitCode {
    let mut calls = 16;
    let mut pids = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let number = |text: Option<String>| text.and_then(|text| text.parse::<u32>().ok());
        if argument == "--help" || argument == "-h" {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        } else if argument == "--calls" {
            let Some(n) = number(arguments.next()) else { return refuse("--calls expects a number") };
            calls = n as usize;
        } else if let Some(pid) = number(Some(argument.clone())) {
            pids.push(pid);
        } else {
            return refuse(&format!("`{argument}` is no process id"));
        }
    }
    if pids.is_empty() {
        return refuse("no process id");
    }
    let mut flights: Vec<Flight> = Vec::new();
    for pid in pids {
        match flight::read(pid) {
            Ok(found) => flights.extend(found),
            Err(error) => eprintln!("process {pid}: {error}"),
        }
    }
    flights.sort_by_key(|flight| (flight.job, flight.rank));
    if flights.is_empty() {
        eprintln!("none of these processes is a rank");
        return ExitCode::FAILURE;
    }
    for job in flights.chunk_by(|one, next| one.job == next.job) {
        for flight in job {
            let mut short = flight.clone();
            short.records.drain(..short.records.len().saturating_sub(calls));
            println!("{short}");
        }
        for line in flight::diagnose(job) {
            println!("{line}");
        }
    }
    ExitCode::SUCCESS
}

fn refuse(why: &str) -> ExitCode {
    eprintln!("{why}\n{USAGE}");
    ExitCode::from(2)
}
