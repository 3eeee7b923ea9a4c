//! Inputs that a fuzzer began from, or has found: none of them breaks a reader
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use lightrft_collectives::fuzzing;

const TARGETS: [(&str, fn(&[u8])); 6] = [
    ("store_requests", fuzzing::store_requests),
    ("store_replies", fuzzing::store_replies),
    ("hello", fuzzing::hello),
    ("notes", fuzzing::notes),
    ("header", fuzzing::header),
    ("signature", fuzzing::signature),
];

#[test]
fn inputs_that_were_kept_break_nothing() {
    for (name, target) in TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fuzz").join(name);
        let mut inputs = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            // Said before, so that the last line names the input that breaks the target.
            println!("{}", path.display());
            target(&bytes);
            // Cut short, it is another input.
            (0..bytes.len()).for_each(|n| target(&bytes[..n]));
            inputs += 1;
        }
        assert!(inputs > 0, "{name} has no inputs");
    }
}
