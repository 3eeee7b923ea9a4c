//! JSON Lines: what is read, and that everything bad is named with its file and line.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::fs;
use std::path::PathBuf;

use lightrft_data::{
    BadLine, BadLines, Dataset, Error, JsonLines, JsonLinesOptions, Keys, LineProblem, Skipped,
};
use proptest::prelude::*;
use tempfile::TempDir;

fn file(bytes: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("prompts.jsonl");
    fs::write(&path, bytes).unwrap();
    (folder, path)
}

fn open(bytes: impl AsRef<[u8]>, options: JsonLinesOptions) -> Result<JsonLines, Error> {
    let (folder, path) = file(bytes);
    let opened = JsonLines::open(path, options);
    drop(folder); // what was read at once stays readable
    opened
}

fn with(bad_lines: BadLines) -> JsonLinesOptions {
    JsonLinesOptions { bad_lines, ..JsonLinesOptions::default() }
}

fn bad_line(result: Result<impl std::fmt::Debug, Error>) -> BadLine {
    match result {
        Err(Error::BadLine(bad)) => bad,
        other => panic!("a bad line expected, got {other:?}"),
    }
}

#[test]
fn prompts_labels_and_other_fields_are_read_across_blank_lines_and_line_ends() {
    let text = "\u{feff}{\"prompt\":\"a\",\"label\":\"1\",\"level\":3}\r\n\n   \n{\"label\":\"\",\"prompt\":\"日本\"}";
    for bad_lines in [BadLines::Refuse, BadLines::Skip, BadLines::RefuseOnRead] {
        let set = open(text, with(bad_lines)).unwrap();
        assert_eq!(set.len(), 2);
        let first = set.get(0).unwrap();
        assert_eq!((first.text.as_str(), first.label.as_deref()), ("a", Some("1")));
        assert_eq!(first.fields.into_iter().collect::<Vec<_>>(), [("level".into(), 3.into())]);
        assert_eq!(set.get(1).unwrap().text, "日本");
        assert_eq!(set.get(1).unwrap().label.as_deref(), Some(""));
        assert_eq!((set.line(0), set.line(1), set.line(2)), (Some(1), Some(4), None));
        assert!(set.locate(1).ends_with("prompts.jsonl:4"));
        assert!(matches!(set.get(2), Err(Error::IndexOutOfRange { index: 2, len: 2 })));
    }
}

#[test]
fn what_is_not_a_regular_file_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let mut others = vec![folder.path().to_owned()];
    if cfg!(unix) {
        // Without end, and without anybody who writes.
        others.push("/dev/zero".into());
        let pipe = folder.path().join("pipe");
        if std::process::Command::new("mkfifo").arg(&pipe).status().is_ok_and(|status| status.success()) {
            others.push(pipe);
        }
    }
    for other in others {
        match JsonLines::open(&other, with(BadLines::Refuse)) {
            Err(Error::Io { action: "open", path, source }) => {
                assert!(path == other && source.to_string().contains("regular"), "{source}");
            }
            result => panic!("{}: {result:?}", other.display()),
        }
    }
}

#[test]
fn keys_are_the_callers_and_a_label_may_be_absent() {
    let text = r#"{"question": "q", "answer": 7}"#;
    let keys = |label: Option<&str>| JsonLinesOptions {
        keys: Keys { input: "question".into(), label: label.map(Into::into) },
        ..JsonLinesOptions::default()
    };
    let sample = open(text, keys(None)).unwrap().get(0).unwrap();
    assert_eq!((sample.text.as_str(), sample.label), ("q", None));
    assert_eq!(sample.fields["answer"], 7);
    let problem = bad_line(open(text, keys(Some("answer")))).problem;
    assert!(matches!(problem, LineProblem::WrongType { key, found: "a number", .. } if key == "answer"));
    // One key may be both.
    let same = open(text, keys(Some("question"))).unwrap().get(0).unwrap();
    assert_eq!(same.label.as_deref(), Some("q"));
}

/// Lines that are no samples, and whether a problem is the right one.
#[allow(clippy::type_complexity)]
fn bad_lines() -> Vec<(&'static [u8], fn(&LineProblem) -> bool)> {
    vec![
        (b"{\"prompt\": \"a\", ", |p| matches!(p, LineProblem::Json { .. })),
        (b"{\"prompt\":\"a\",\"label\":\"b\"} x", |p| matches!(p, LineProblem::Json { column: 28, .. })),
        (b"nonsense", |p| matches!(p, LineProblem::Json { column: 2, .. })),
        (b"[1, 2]", |p| matches!(p, LineProblem::NotAnObject { found: "an array" })),
        (b"\"text\"", |p| matches!(p, LineProblem::NotAnObject { found: "a string" })),
        (
            b"{\"label\":\"b\",\"x\":1}",
            |p| matches!(p, LineProblem::MissingKey { key, present } if key == "prompt" && present == "label, x"),
        ),
        (b"{\"prompt\":\"a\"}", |p| matches!(p, LineProblem::MissingKey { key, .. } if key == "label")),
        (
            b"{\"prompt\":3,\"label\":\"b\"}",
            |p| matches!(p, LineProblem::WrongType { key, found: "a number", .. } if key == "prompt"),
        ),
        (
            b"{\"prompt\":\"a\",\"label\":null}",
            |p| matches!(p, LineProblem::WrongType { key, found: "null", .. } if key == "label"),
        ),
        (b"{\"prompt\":[\"a\"],\"label\":\"b\"}", |p| matches!(p, LineProblem::WrongType { .. })),
        (
            b"{\"prompt\":[{\"role\":\"user\",\"content\":\"a\"}],\"label\":\"b\"}",
            |p| matches!(p, LineProblem::ChatPrompt { key, messages: 1 } if key == "prompt"),
        ),
        (b"{\"prompt\":\"\xff\",\"label\":\"b\"}", |p| matches!(p, LineProblem::InvalidUtf8 { byte: 11 })),
        (b"{\"prompt\":\"\\ud800\",\"label\":\"b\"}", |p| matches!(p, LineProblem::Json { .. })),
    ]
}

const GOOD: &[u8] = b"{\"prompt\":\"a\",\"label\":\"b\"}";

#[test]
fn a_bad_line_is_named_with_its_file_and_line_when_opening_or_when_reading() {
    for (bad, is_right) in bad_lines() {
        let text = [GOOD, b"\n\n", bad, b"\n", GOOD].concat();
        let opening = bad_line(open(&text, with(BadLines::Refuse)));
        let late = open(&text, with(BadLines::RefuseOnRead)).unwrap();
        assert_eq!(late.len(), 3);
        assert!(late.get(0).is_ok() && late.get(2).is_ok());
        let reading = bad_line(late.get(1));
        for found in [opening, reading] {
            assert!(is_right(&found.problem), "{found}");
            assert_eq!(found.line, 3);
            assert!(found.to_string().contains("prompts.jsonl:3"), "{found}");
        }
    }
}

#[test]
fn skipped_lines_are_counted_and_the_first_are_kept() {
    let mut text = Vec::new();
    for (bad, _) in bad_lines().iter().cycle().take(30) {
        text.extend_from_slice(bad);
        text.push(b'\n');
    }
    text.extend_from_slice(GOOD);
    let set = open(&text, with(BadLines::Skip)).unwrap();
    assert_eq!((set.len(), set.line(0)), (1, Some(31)));
    assert_eq!(set.skipped().count, 30);
    assert_eq!(set.skipped().first.len(), Skipped::KEPT);
    assert_eq!(set.skipped().first[19].line, 20);
    assert!(set.get(0).is_ok());
}

#[test]
fn files_without_samples_and_files_that_cannot_be_read_are_errors() {
    for text in ["", "\n", " \r\n\n"] {
        for bad_lines in [BadLines::Refuse, BadLines::Skip, BadLines::RefuseOnRead] {
            let opened = open(text, with(bad_lines));
            assert!(matches!(opened, Err(Error::NoSamples { bad_lines: 0, .. })), "{text:?}: {opened:?}");
        }
    }
    assert!(matches!(open("x\ny", with(BadLines::Skip)), Err(Error::NoSamples { bad_lines: 2, .. })));
    let (folder, path) = file("");
    let missing = JsonLines::open(path.with_file_name("missing"), JsonLinesOptions::default());
    assert!(matches!(missing, Err(Error::Io { action: "open", .. })));
    assert!(matches!(JsonLines::open(folder.path(), JsonLinesOptions::default()), Err(Error::Io { .. })));
}

#[test]
fn a_line_beyond_the_limit_is_refused_without_being_kept() {
    let long = format!("{{\"prompt\":\"{}\",\"label\":\"b\"}}", "x".repeat(100));
    let text = [GOOD, b"\n", long.as_bytes()].concat();
    for bad_lines in [BadLines::Refuse, BadLines::RefuseOnRead] {
        let options = JsonLinesOptions { max_line_bytes: 100, ..with(bad_lines) };
        let bad = bad_line(open(&text, options));
        assert_eq!((bad.line, bad.problem), (2, LineProblem::TooLong { limit: 100 }));
    }
    let exact = JsonLinesOptions { max_line_bytes: long.len(), ..JsonLinesOptions::default() };
    assert_eq!(open(&text, exact).unwrap().len(), 2);
}

#[test]
fn a_large_file_is_read_by_position_from_several_threads() {
    let filler = "x".repeat(20_000);
    let lines: Vec<String> = (0..1000)
        .map(|i| match i % 10 {
            9 => String::new(),
            _ => format!("{{\"prompt\":\"p{i}\",\"label\":\"l{i}\",\"filler\":\"{filler}\"}}"),
        })
        .collect();
    let (_folder, path) = file(lines.join("\n"));
    assert!(fs::metadata(&path).unwrap().len() > 16 << 20, "must not fit what is read at once");
    let set = JsonLines::open(&path, JsonLinesOptions::default()).unwrap();
    let numbers: Vec<_> = (0..1000).filter(|i| i % 10 != 9).collect();
    assert_eq!(set.len(), numbers.len());
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (set, numbers) = (&set, &numbers);
            scope.spawn(move || {
                for (index, number) in numbers.iter().enumerate().skip(thread).step_by(4) {
                    let sample = set.get(index).unwrap();
                    assert_eq!(sample.text, format!("p{number}"));
                    assert_eq!(sample.label, Some(format!("l{number}")));
                    assert_eq!(set.line(index), Some(number + 1));
                }
            });
        }
    });
    // Cut behind the reader's back: an error, not a wrong sample.
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    assert!(matches!(set.get(set.len() - 1), Err(Error::Io { action: "read", .. })));
}

proptest! {
    #[test]
    fn any_bytes_are_samples_or_errors_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        for bad_lines in [BadLines::Refuse, BadLines::Skip, BadLines::RefuseOnRead] {
            if let Ok(set) = open(&bytes, with(bad_lines)) {
                for index in 0..set.len() {
                    prop_assert!(set.get(index).is_ok() || bad_lines == BadLines::RefuseOnRead);
                }
            }
        }
    }

    #[test]
    fn what_was_written_is_read_back(texts in proptest::collection::vec((".*", ".*", 0usize..3), 1..20)) {
        let mut file = String::new();
        for (prompt, label, blanks) in &texts {
            file += &serde_json::json!({"prompt": prompt, "label": label}).to_string();
            file += &"\n".repeat(blanks + 1);
        }
        for bad_lines in [BadLines::Refuse, BadLines::RefuseOnRead] {
            let set = open(&file, with(bad_lines)).unwrap();
            prop_assert_eq!(set.len(), texts.len());
            let mut line = 1;
            for (index, (prompt, label, blanks)) in texts.iter().enumerate() {
                let sample = set.get(index).unwrap();
                prop_assert_eq!((&sample.text, sample.label.as_ref()), (prompt, Some(label)));
                prop_assert_eq!(set.line(index), Some(line));
                line += *blanks as u64 + 1;
            }
        }
    }
}
