//! Parquet: rows are the records that JSON Lines hold, at random and within limits, and what is broken is named.
#![cfg(feature = "parquet")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use lightrft_data::{
    BadLines, Concat, DataLoader, Dataset, DistributedSampler, Error, LineProblem, LoaderConfig, MediaSource,
    Parquet, ParquetOptions, PromptDataset, PromptFormat, SamplerConfig, Shuffle, Tail,
};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use proptest::prelude::*;
use serde_json::{Map, Value};
use tempfile::TempDir;

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/parquet").join(name)
}

fn open(path: impl AsRef<Path>) -> Parquet {
    Parquet::open(path, ParquetOptions::default()).unwrap()
}

fn records(name: &str) -> Vec<Map<String, Value>> {
    let lines = fs::read_to_string(data(&format!("{name}.jsonl"))).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A file of prompts `0`, `1` and so on, with labels alike.
fn numbers(rows: i64, rows_in_a_group: usize, prompt: impl Fn(i64) -> String) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("numbers.parquet");
    let prompts: ArrayRef = Arc::new(StringArray::from_iter_values((0..rows).map(prompt)));
    let labels: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows));
    let batch = RecordBatch::try_from_iter([("prompt", prompts), ("label", labels)]).unwrap();
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(rows_in_a_group)).build();
    let mut writer =
        ArrowWriter::try_new(fs::File::create(&path).unwrap(), batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    (folder, path)
}

fn label(record: &Map<String, Value>) -> i64 {
    record["label"].as_i64().unwrap()
}

#[test]
fn rows_of_every_type_are_the_records_that_pyarrow_wrote() {
    for (name, rows) in [("types", 3), ("types_v2", 3), ("chats", 40), ("images", 4)] {
        let expected = records(name);
        let file = open(data(&format!("{name}.parquet")));
        assert_eq!((file.len(), expected.len()), (rows, rows));
        for (index, expected) in expected.into_iter().enumerate() {
            assert_eq!(file.get(index).unwrap(), expected, "{name}, row {index}");
        }
        assert!(matches!(file.get(rows), Err(Error::IndexOutOfRange { .. })));
    }
}

fn prompts(name: &str, format: &PromptFormat) -> PromptDataset {
    PromptDataset::open(data(name), format.clone(), BadLines::Refuse).unwrap()
}

fn assert_the_same_prompts(name: &str, format: &PromptFormat) -> PromptDataset {
    let (lines, rows) =
        (prompts(&format!("{name}.jsonl"), format), prompts(&format!("{name}.parquet"), format));
    assert_eq!(lines.len(), rows.len());
    for index in 0..lines.len() {
        assert_eq!(rows.get(index).unwrap(), lines.get(index).unwrap(), "{name}, row {index}");
    }
    rows
}

#[cfg(feature = "templates")]
#[test]
fn the_same_conversations_give_the_same_prompts() {
    // Tools and messages as they are: what they hold, and in which order.
    let template = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}";
    let chat = lightrft_data::ChatTemplate::new(template).unwrap();
    let format = PromptFormat {
        chat: Some(Arc::new(chat)),
        system_prompt: Some("Think.".into()),
        ..PromptFormat::default()
    };
    let rows = assert_the_same_prompts("chats", &format);
    let third = rows.get(3).unwrap();
    assert!(third.text.contains(r#"{"role": "user", "content": "What is 3 + 3? 日本", "name": "a"}"#));
    assert_eq!(third.label, "6");
}

#[test]
fn images_come_as_bytes_or_paths() {
    let rows = assert_the_same_prompts("images", &PromptFormat::default());
    let second = rows.get(1).unwrap().images;
    assert!(matches!(&second[0], MediaSource::DataUrl(url) if url.starts_with("data:;base64,iVBORw0K")));
    assert_eq!(second[1], MediaSource::Path("b.png".into()));
    assert_eq!(rows.get(3).unwrap().images, []);
    #[cfg(feature = "images")]
    {
        let decoder = lightrft_data::MediaDecoder::new(lightrft_data::DecodeConfig::default()).unwrap();
        let first = rows.get(0).unwrap();
        assert_eq!(decoder.image(&first.images[0]).unwrap().rgb().len(), 3);
    }
}

#[test]
fn a_row_says_where_it_is() {
    let rows = prompts_of_numbers(BadLines::Refuse, |i| i.to_string()).unwrap();
    assert!(rows.locate(17).ends_with("numbers.parquet: row 17"), "{}", rows.locate(17));
    let (_folder, path) = numbers(20, 6, |i| i.to_string());
    let file = open(path);
    assert_eq!(file.row_groups(), 4);
    assert_eq!([5, 6, 19, 20].map(|row| file.row_group(row)), [Some(0), Some(1), Some(3), None]);
}

fn prompts_of_numbers(bad_lines: BadLines, prompt: impl Fn(i64) -> String) -> Result<PromptDataset, Error> {
    let (folder, path) = numbers(20, 6, prompt);
    let opened = PromptDataset::open(path, PromptFormat::default(), bad_lines);
    drop(folder); // what is open stays readable
    opened
}

#[test]
fn rows_that_are_no_prompts_are_refused_or_skipped_with_their_place() {
    let format = |images: &str| PromptFormat {
        keys: lightrft_data::PromptKeys { images: images.into(), ..Default::default() },
        ..PromptFormat::default()
    };
    let (_folder, path) = numbers(20, 6, |i| if i % 9 == 8 { String::new() } else { i.to_string() });
    // The prompt is taken for a path, and an empty one is none.
    let open = |bad_lines| PromptDataset::open(&path, format("prompt"), bad_lines);
    match open(BadLines::Refuse) {
        Err(Error::BadLine(bad)) => {
            assert_eq!((bad.line, bad.row_group), (8, Some(1)));
            assert!(matches!(bad.problem, LineProblem::Medium { .. }));
            assert!(bad.to_string().contains("numbers.parquet: row 8 (row group 1): "), "{bad}");
        }
        other => panic!("{other:?}"),
    }
    let skipping = open(BadLines::Skip).unwrap();
    let rows: Vec<_> = skipping.skipped().first.iter().map(|bad| bad.line).collect();
    assert_eq!((skipping.len(), skipping.skipped().count, rows), (18, 2, vec![8, 17]));
    assert_eq!(skipping.get(8).unwrap().label, 9);
    assert!(skipping.locate(8).ends_with("row 9"));
    assert!(matches!(open(BadLines::RefuseOnRead).unwrap().get(17), Err(Error::BadLine(_))));
}

#[test]
fn several_files_are_read_as_one_by_several_threads_in_the_samplers_order() {
    let (_a, first) = numbers(50, 7, |i| i.to_string());
    let (_b, second) = numbers(30, 100, |i| i.to_string());
    // So small a cache that threads push out each other's row groups.
    let options = ParquetOptions { cache_bytes: 1, ..ParquetOptions::default() };
    let parts = [first, second].map(|path| Parquet::open(path, options.clone()).unwrap());
    let both = Concat::new(parts.into()).unwrap();
    assert_eq!(label(&both.get(53).unwrap()), 3);
    let (shuffle, tail) = (Shuffle::Seekable, Tail::Drop);
    let config = SamplerConfig { len: 80, rank: 0, world: 1, seed: 1, shuffle, tail };
    let sampler = DistributedSampler::new(config).unwrap();
    let expected: Vec<_> = sampler.indices().unwrap().map(|index| (index % 50) as i64).collect();
    let config = LoaderConfig { workers: 3, ..LoaderConfig::new(8) };
    let mut loader = DataLoader::new(both, sampler, config).unwrap();
    let read: Vec<_> =
        loader.batches().flat_map(|batch| batch.unwrap().samples).map(|record| label(&record)).collect();
    assert_eq!(read, expected);
}

#[test]
fn a_row_group_above_the_limit_is_refused_by_the_footer_and_by_what_it_turns_out_to_be() {
    let (_folder, plain) = numbers(200, 100, |i| format!("{i:0>100}"));
    // One word of the dictionary makes a file of a few hundred bytes.
    let (_other, same) = numbers(200, 100, |_| "w".repeat(1000));
    for path in [plain, same] {
        let options = ParquetOptions { max_row_group_bytes: 5000, ..ParquetOptions::default() };
        let file = Parquet::open(&path, options).unwrap();
        match file.get(150) {
            Err(Error::Parquet { row_group: Some(1), row: Some(150), column, message, .. }) => {
                assert!(message.contains("max_row_group_bytes"), "{message}");
                assert_eq!(column.as_deref(), Some("prompt"));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(label(&open(&path).get(150).unwrap()), 150);
    }
}

#[test]
fn what_no_record_can_hold_is_refused_with_its_column() {
    match Parquet::open(data("odd_map.parquet"), ParquetOptions::default()) {
        Err(Error::Parquet { column: Some(column), .. }) => assert_eq!(column, "odd.a"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_parquet_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.parquet");
    let refused = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        match Parquet::open(&path, ParquetOptions::default()) {
            Err(Error::Parquet { path: at, row_group: None, message, .. }) => {
                assert_eq!(at, path);
                assert!(!message.is_empty());
            }
            other => panic!("{other:?}"),
        }
    };
    refused(b"");
    refused(b"PAR1");
    refused(b"{\"prompt\": \"a\"}\n");
    refused(b"PAR1\xff\xff\xff\xffPAR1");
    refused(b"PAR1\x00\x00\x00\x00PAR1");
    assert!(matches!(Parquet::open(folder.path(), ParquetOptions::default()), Err(Error::Io { .. })));
    let (_folder, none) = numbers(0, 1, |i| i.to_string());
    assert!(matches!(Parquet::open(none, ParquetOptions::default()), Err(Error::NoSamples { .. })));
}

#[test]
fn columns_nested_without_end_are_refused_before_they_are_followed() {
    // As Thrift writes a footer: a version, and a schema of groups of one child each.
    let groups = 100_000u32;
    let mut footer = vec![0x15, 2, 0x19, 0xfc];
    footer.extend([groups as u8 & 0x7f | 0x80, (groups >> 7) as u8 & 0x7f | 0x80, (groups >> 14) as u8]);
    (0..groups).for_each(|_| footer.extend([0x35, 0, 0x18, 1, b'a', 0x15, 2, 0]));
    footer.push(0);
    let mut bytes = b"PAR1".to_vec();
    bytes.extend(&footer);
    bytes.extend((footer.len() as u32).to_le_bytes());
    bytes.extend(b"PAR1");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep.parquet");
    fs::write(&path, bytes).unwrap();
    match Parquet::open(&path, ParquetOptions::default()) {
        Err(Error::Parquet { message, .. }) => assert!(message.contains("nested"), "{message}"),
        other => panic!("{other:?}"),
    }
}

/// Reads all that can be read, which must end and never panic.
fn read_all(bytes: &[u8]) -> (usize, usize) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("torn.parquet");
    fs::write(&path, bytes).unwrap();
    let options = ParquetOptions { max_row_group_bytes: 1 << 20, ..ParquetOptions::default() };
    match Parquet::open(&path, options) {
        Err(Error::Parquet { .. } | Error::NoSamples { .. }) => (0, 0),
        Err(other) => panic!("{other:?}"),
        // Rows may be said to be any number.
        Ok(file) => (0..file.len().min(50)).fold((0, 0), |(good, bad), row| match file.get(row) {
            Ok(_) => (good + 1, bad),
            Err(Error::Parquet { .. }) => (good, bad + 1),
            Err(other) => panic!("{other:?}"),
        }),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn a_torn_or_overwritten_file_is_an_error_and_no_panic(
        name in 0usize..4, changes in proptest::collection::vec((0.0f64..1.0, any::<u8>()), 0..6),
        cut in proptest::option::of(0.0f64..1.0),
    ) {
        let name = ["types", "types_v2", "chats", "images"][name];
        let mut bytes = fs::read(data(&format!("{name}.parquet"))).unwrap();
        let len = bytes.len();
        for (at, byte) in changes {
            bytes[(at * len as f64) as usize] = byte;
        }
        if let Some(at) = cut {
            bytes.truncate((at * len as f64) as usize);
        }
        read_all(&bytes);
    }
}

#[test]
fn a_broken_page_is_named_by_row_group_row_and_column() {
    let (_folder, path) = numbers(100, 50, |i| format!("prompt {i} of many"));
    let mut bytes = fs::read(&path).unwrap();
    // A word of the second row group's dictionary, which comes before all else that names it.
    let word = b"prompt 60 of many";
    let at = bytes.windows(word.len()).position(|found| found == word).unwrap();
    // Lengths stand before the words.
    bytes[at - 4..at].copy_from_slice(&[0xff; 4]);
    fs::write(&path, bytes).unwrap();
    let file = open(&path);
    assert_eq!(label(&file.get(49).unwrap()), 49);
    match file.get(60) {
        Err(error @ Error::Parquet { row_group: Some(1), row: Some(60), .. }) => {
            let shown = error.to_string();
            assert!(shown.contains("row 60 (row group 1): column `prompt`: "), "{shown}");
        }
        other => panic!("{other:?}"),
    }
}
