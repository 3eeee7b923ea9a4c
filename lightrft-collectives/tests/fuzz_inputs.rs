//! Inputs that a fuzzer began from, or has found: none of them breaks a reader
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use lightrft_collectives::fuzzing;

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 6] = [
    ("store_requests", fuzzing::store_requests),
    ("store_replies", fuzzing::store_replies),
    ("hello", fuzzing::hello),
    ("notes", fuzzing::notes),
    ("header", fuzzing::header),
    ("signature", fuzzing::signature),
];

fn inputs_of(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fuzz").join(name);
    let files = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let mut inputs: Vec<_> =
        files.map(|path| (path.display().to_string(), std::fs::read(&path).unwrap())).collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{name} has no inputs");
    inputs
}

#[test]
fn inputs_that_were_kept_break_nothing() {
    for (name, target) in TARGETS {
        for (path, bytes) in inputs_of(name) {
            // Said before, so that the last line names the input that breaks the target.
            println!("{path}");
            target(&bytes);
            // Cut short, it is another input.
            (0..bytes.len()).for_each(|n| target(&bytes[..n]));
        }
    }
}

/// A few seconds of what a fuzzer does for hours, without a fuzzer: the same inputs every time.
#[test]
fn inputs_that_were_bent_break_nothing() {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = move |below: usize| {
        // Xorshift (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below.max(1) as u64) as usize
    };
    for (name, target) in TARGETS {
        let inputs = inputs_of(name);
        for _ in 0..2000 {
            let mut bytes = inputs[random(inputs.len())].1.clone();
            for _ in 0..=random(4) {
                let at = random(bytes.len());
                match random(5) {
                    0 if !bytes.is_empty() => bytes[at] ^= 1 << random(8),
                    1 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random(5)],
                    2 => bytes.truncate(at),
                    3 => bytes.insert(at, random(256) as u8),
                    _ => {
                        let other = &inputs[random(inputs.len())].1;
                        bytes.splice(at..at, other[random(other.len())..].iter().copied());
                    }
                }
            }
            if std::panic::catch_unwind(|| target(&bytes)).is_err() {
                panic!("{name} breaks at {bytes:02x?}");
            }
        }
    }
}
