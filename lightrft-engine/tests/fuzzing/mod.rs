//! What the fuzz targets do with any bytes: readers of files here, readers of what servers say in the crate's hidden
//! module `fuzzing`. Each function panics where the crate breaks its word; one that panics inside of the crate, or takes
//! memory or time without bound, is found by whoever calls.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use std::collections::BTreeMap;

pub(crate) use lightrft_engine::fuzzing::*;
use lightrft_engine::testing::ScriptedEngine;
use lightrft_engine::{
    EngineExt, Error, HfFolder, Identity, NameMap, Prefixes, Table, Version, WeightSource,
};

/// A folder of weights. Files are cut at bytes of 255: an index (none if it is empty), a `config.json`, two files of
/// safetensors.
pub(crate) fn folder(bytes: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let names = ["model.safetensors.index.json", "config.json", "model.safetensors", "b.safetensors"];
    for (name, file) in names.iter().zip(bytes.splitn(4, |byte| *byte == 255)) {
        if !file.is_empty() {
            std::fs::write(folder.path().join(name), file).unwrap();
        }
    }
    let Ok(mut source) = HfFolder::open(folder.path()) else { return };
    let total: u64 = source.tensors().iter().map(|t| t.bytes().unwrap() as u64).sum();
    assert_eq!(source.bytes(), total);
    assert!(total <= bytes.len() as u64, "no more than the files have");
    let names: BTreeMap<_, _> = source.tensors().iter().map(|t| (t.name.clone(), ())).collect();
    assert_eq!(names.len(), source.tensors().len(), "every name once");
    // Whatever is in it, it is given as announced or refused by name, and an engine takes it or does not.
    let mut engine = ScriptedEngine::new(32);
    if let Err(error) = engine.update_from(Version(1), &mut source, &Identity, 64) {
        assert!(!matches!(error, Error::Source(_)), "{error}");
    }
}

/// A table of names, or of prefixes, and names after it, cut at bytes of 255.
pub(crate) fn names(bytes: &[u8]) {
    let mut parts = bytes.split(|byte| *byte == 255);
    let table = parts.next().unwrap_or_default();
    let names: Vec<String> = parts.map(|part| String::from_utf8_lossy(part).into_owned()).collect();
    let (table, prefixes) =
        (serde_json::from_slice::<Table>(table), serde_json::from_slice::<Prefixes>(table));
    assert_eq!(table.is_ok(), prefixes.is_ok(), "the same JSON");
    let vl = Prefixes::qwen2_5_vl_to_sglang();
    let mut maps: Vec<&dyn NameMap> = vec![&vl];
    maps.extend(table.iter().map(|map| map as &dyn NameMap));
    maps.extend(prefixes.iter().map(|map| map as &dyn NameMap));
    for map in maps {
        if let Ok(found) = lightrft_engine::engine_names(map, names.iter().map(String::as_str)) {
            let distinct: BTreeMap<_, _> = found.iter().map(|name| (name, ())).collect();
            assert_eq!(distinct.len(), names.len(), "two parameters never share a name");
        }
    }
}

/// The `config.json` of a model for the embedded engine.
#[cfg(feature = "embedded")]
pub(crate) fn config(bytes: &[u8]) {
    use lightrft_engine::embedded::DecoderConfig;
    let Ok(config) = DecoderConfig::from_json(&String::from_utf8_lossy(bytes)) else { return };
    assert!(config.heads % config.kv_heads == 0 && config.vocab_size > 0, "{config:?}");
    let again = DecoderConfig::from_json(&config.to_json()).expect("what it writes it reads");
    assert_eq!(again, config);
}
