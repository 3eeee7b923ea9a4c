//! Inputs that a fuzzer began from, or has found: none of them breaks a reader.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod fuzzing;

use std::path::Path;

type Target = fn(&[u8]);

fn targets() -> Vec<(&'static str, Target)> {
    vec![
        ("vllm_replies", fuzzing::vllm_replies),
        ("sglang_replies", fuzzing::sglang_replies),
        ("vllm_listings", fuzzing::vllm_listings),
        ("sglang_listings", fuzzing::sglang_listings),
        ("metrics", fuzzing::metrics),
        ("errors", fuzzing::errors),
        ("folder", fuzzing::folder),
        ("names", fuzzing::names),
        #[cfg(feature = "embedded")]
        ("config", fuzzing::config),
    ]
}

#[test]
fn inputs_that_were_kept_break_nothing() {
    for (name, target) in targets() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fuzz").join(name);
        let mut paths: Vec<_> =
            std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        assert!(!paths.is_empty(), "{name} has no inputs");
        for path in paths {
            // Said before, so that the last line names the input that breaks the target.
            println!("{}", path.display());
            let bytes = std::fs::read(path).unwrap();
            target(&bytes);
            // Cut short, it is another input.
            (0..bytes.len()).step_by(1 + bytes.len() / 64).for_each(|n| target(&bytes[..n]));
        }
    }
}
