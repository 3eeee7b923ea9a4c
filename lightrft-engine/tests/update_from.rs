//! Updates from a source: names checked first, gather and push at once, two buckets, and what a failure leaves behind.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Recorder, Seen, failure};
use lightrft_engine::testing::{ScriptedEngine, TensorBytes};
use lightrft_engine::{
    Dtype, Engine, EngineExt, Error, Event, HfFolder, Identity, Level, NamedTensor, Prefixes, Request,
    Result, Sampling, Staging, State, TensorInfo, TensorSlice, Version, WeightSource,
};
use proptest::prelude::*;

/// Long enough for any machine; a test that waits for it has failed.
const FOREVER: Duration = Duration::from_secs(60);

fn views(tensors: &[TensorBytes]) -> Vec<NamedTensor<'_>> {
    tensors.iter().map(|t| t.view().unwrap()).collect()
}

/// `count` tensors of `elems` numbers each, no two alike.
fn tensors(count: usize, elems: usize) -> Vec<TensorBytes> {
    let values = |tensor: usize| (0..elems).map(|i| (tensor * elems + i) as f32).collect::<Vec<_>>();
    (0..count).map(|t| TensorBytes::from_f32(format!("layer.{t}"), &[elems], &values(t))).collect()
}

/// A source that a test can make fail, lie, or tell what it is doing.
struct Scripted<F> {
    infos: Vec<TensorInfo>,
    give: F,
}

impl<F: FnMut(&mut Staging<'_>) -> Result<()>> Scripted<F> {
    fn new(tensors: &[TensorBytes], give: F) -> Self {
        Self { infos: views(tensors).iter().map(NamedTensor::info).collect(), give }
    }
}

impl<F: FnMut(&mut Staging<'_>) -> Result<()>> WeightSource for Scripted<F> {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn give(&mut self, staging: &mut Staging<'_>) -> Result<()> {
        (self.give)(staging)
    }
}

fn is_stale(engine: &dyn Engine) -> bool {
    matches!(engine.state(), State::Stale { .. }) && engine.version().is_none()
}

/// A failed update is mended by doing it again.
fn assert_a_repeat_mends(engine: &mut Recorder, weights: &[TensorBytes]) {
    assert!(is_stale(engine), "{}", engine.state());
    (engine.on_push, engine.fail_commit) = (None, false);
    engine.seen.clear();
    let views = views(weights);
    engine.update_from(Version(9), &mut TensorSlice::new(&views), &Identity, 1).unwrap();
    assert_eq!((engine.state(), engine.version()), (State::READY, Some(Version(9))));
    let expected: Vec<_> = weights.iter().map(|t| (t.name.clone(), t.bytes.clone())).collect();
    assert_eq!(engine.pushed(), expected);
}

#[test]
fn an_update_from_a_source_is_the_update_of_its_tensors() {
    let request = Request::new([1, 2, 3], Sampling::greedy(12));
    let mut pushed = ScriptedEngine::new(64);
    let weights = pushed.example_weights(5);
    pushed.replace_weights(Version(3), &views(&weights), 100).unwrap();
    let mut streamed = ScriptedEngine::new(64);
    let views = views(&weights);
    let report = streamed.update_from(Version(3), &mut TensorSlice::new(&views), &Identity, 100).unwrap();
    assert_eq!((report.tensors, report.bytes, report.buckets), (2, 65 * 16, 2));
    assert!(report.elapsed >= report.pushing && report.elapsed >= report.gathering, "{report:?}");
    let one = std::slice::from_ref(&request);
    assert_eq!(streamed.complete(one).unwrap(), pushed.complete(one).unwrap());
    assert_eq!(streamed.events(), [Event::BeginUpdate, Event::Commit, Event::Generate]);
}

proptest! {
    #[test]
    fn every_tensor_arrives_once_in_order_and_buckets_keep_their_size(
        sizes in proptest::collection::vec(0_usize..200, 0..20),
        bucket_bytes in 0_usize..600,
    ) {
        let weights: Vec<_> = sizes.iter().enumerate().map(|(at, bytes)| TensorBytes {
            name: format!("t{at}"), dtype: Dtype::U8, shape: vec![*bytes], bytes: vec![at as u8; *bytes],
        }).collect();
        let views = views(&weights);
        let mut engine = Recorder::default();
        let report =
            engine.update_from(Version(1), &mut TensorSlice::new(&views), &Identity, bucket_bytes).unwrap();
        let expected: Vec<_> = weights.iter().map(|t| (t.name.clone(), t.bytes.clone())).collect();
        prop_assert_eq!(engine.pushed(), expected);
        prop_assert_eq!(report.bytes, sizes.iter().sum::<usize>() as u64);
        prop_assert_eq!(engine.seen.len(), report.buckets + 2, "a begin, the pushes, a commit");
        for seen in &engine.seen {
            if let Seen::Push(bucket) = seen {
                let bytes: usize = bucket.iter().map(|(.., bytes)| bytes.len()).sum();
                prop_assert!(bucket.len() == 1 || bytes <= bucket_bytes, "{bytes} of {bucket_bytes}");
            }
        }
    }
}

#[test]
fn the_next_bucket_is_gathered_while_one_is_pushed() {
    let weights = tensors(6, 4);
    let (gathering, seen_gathering): (Sender<usize>, Receiver<usize>) = channel();
    // A push ends only once the gather of the next bucket has begun: one after the other, this would never end.
    let mut engine = Recorder::hooked(move |push, _| {
        let mut gathered = push;
        while gathered < (push + 1).min(5) {
            gathered = seen_gathering.recv_timeout(FOREVER).map_err(|_| failure("waiting for a gather"))?;
        }
        Ok(())
    });
    let views = views(&weights);
    let mut source = Scripted::new(&weights, |staging| {
        views.iter().enumerate().try_for_each(|(at, tensor)| {
            staging.fill(tensor.name(), |bytes| {
                gathering.send(at).ok();
                bytes.copy_from_slice(tensor.bytes());
                Ok(())
            })
        })
    });
    engine.update_from(Version(1), &mut source, &Identity, 16).unwrap();
    drop(source);
    assert_eq!(engine.pushed().len(), 6);
}

#[test]
fn there_are_two_buckets_and_the_source_waits_for_a_slow_engine() {
    let weights = tensors(12, 4);
    let gathered = Arc::new(AtomicUsize::new(0));
    let addresses = Arc::new(Mutex::new(BTreeSet::new()));
    let (counter, seen) = (Arc::clone(&gathered), Arc::clone(&addresses));
    let mut engine = Recorder::hooked(move |push, bucket| {
        // The source gets every chance to run ahead.
        for _ in 0..200 {
            std::thread::yield_now();
        }
        let ahead = counter.load(Ordering::SeqCst) - push;
        assert!(ahead <= 2, "{ahead} buckets are gathered and not yet pushed");
        seen.lock().unwrap().insert(bucket[0].bytes().as_ptr() as usize);
        Ok(())
    });
    let views = views(&weights);
    let mut source = Scripted::new(&weights, |staging| {
        views.iter().try_for_each(|tensor| {
            staging.fill(tensor.name(), |bytes| {
                gathered.fetch_add(1, Ordering::SeqCst);
                bytes.copy_from_slice(tensor.bytes());
                Ok(())
            })
        })
    });
    engine.update_from(Version(1), &mut source, &Identity, 16).unwrap();
    assert_eq!(addresses.lock().unwrap().len(), 2, "the same two buckets go to and fro");
}

#[test]
fn a_source_that_fails_anywhere_leaves_the_engine_stale() {
    let weights = tensors(5, 3);
    for fails_at in 0..5 {
        let mut engine = Recorder::default();
        let views = views(&weights);
        let mut source = Scripted::new(&weights, |staging| {
            for (at, tensor) in views.iter().enumerate() {
                if at == fails_at {
                    return Err(Error::Source("rank 3 is gone".into()));
                }
                staging.copy(tensor)?;
            }
            Ok(())
        });
        let error = engine.update_from(Version(1), &mut source, &Identity, 24).unwrap_err();
        assert!(matches!(&error, Error::Source(what) if what.to_string() == "rank 3 is gone"), "{error:?}");
        drop(source);
        assert_a_repeat_mends(&mut engine, &weights);
    }
}

#[test]
fn a_write_that_fails_is_the_updates_error_whatever_the_source_says() {
    let weights = tensors(3, 3);
    let mut engine = Recorder::default();
    let mut source = Scripted::new(&weights, |staging| {
        let name = std::path::PathBuf::from("disk");
        let broken = std::io::Error::other("broken");
        let failed = staging.fill("layer.0", |_| Err(Error::Io { path: name, source: broken }));
        assert!(staging.fill("layer.0", |_| Ok(())).is_err(), "refused from then on");
        failed
    });
    let error = engine.update_from(Version(1), &mut source, &Identity, 24).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
    drop(source);
    assert_a_repeat_mends(&mut engine, &weights);
}

#[test]
fn an_engine_that_fails_anywhere_is_stale_and_its_error_is_the_updates() {
    let weights = tensors(5, 3);
    for fails_at in 0..=5 {
        let mut engine =
            Recorder::hooked(move |push, _| if push == fails_at { Err(failure("push")) } else { Ok(()) });
        engine.fail_commit = fails_at == 5;
        // A collective source: it goes through all tensors for the sake of other ranks, and never says that it failed.
        let views = views(&weights);
        let mut offered = 0;
        let mut source = Scripted::new(&weights, |staging| {
            for tensor in &views {
                offered += 1;
                staging.copy(tensor).ok();
            }
            Ok(())
        });
        let error = engine.update_from(Version(1), &mut source, &Identity, 12).unwrap_err();
        let expected = if fails_at == 5 { "commit" } else { "push" };
        assert!(matches!(error, Error::Backend { operation, .. } if operation == expected), "{error:?}");
        drop(source);
        assert_eq!(offered, 5, "the engine's failure does not stop the source");
        assert_a_repeat_mends(&mut engine, &weights);
    }
}

#[test]
fn a_source_that_gives_other_tensors_than_it_announced_is_refused() {
    let weights = tensors(3, 3);
    let views = views(&weights);
    let shorter = NamedTensor::new("layer.0", Dtype::F32, &[2], &weights[0].bytes[..8]).unwrap();
    let orders: [(Vec<NamedTensor<'_>>, &str); 5] = [
        (vec![views[1]], "`layer.1` came where `layer.0` was announced"),
        (vec![views[0], views[0]], "`layer.0` came where `layer.1` was announced"),
        (vec![views[0], views[1]], "`layer.2` was announced and never came"),
        (vec![views[0], views[1], views[2], views[0]], "`layer.0` came after the last tensor announced"),
        (vec![shorter], "layer.0 F32[2] was announced as F32[3]"),
    ];
    for (given, expected) in orders {
        let mut engine = Recorder::default();
        let mut source =
            Scripted::new(&weights, |staging| given.iter().try_for_each(|tensor| staging.copy(tensor)));
        let error = engine.update_from(Version(1), &mut source, &Identity, 24).unwrap_err();
        assert!(matches!(error, Error::Source(_)), "{error:?}");
        assert!(error.to_string().ends_with(expected), "{error}");
        drop(source);
        assert_a_repeat_mends(&mut engine, &weights);
    }
}

#[test]
fn what_the_engine_cannot_take_is_refused_before_anything_is_asked_for() {
    let weights = tensors(3, 3);
    let known = |names: &[&str]| -> BTreeMap<String, Vec<usize>> {
        names.iter().map(|name| ((*name).to_owned(), vec![3])).collect()
    };
    let all = ["layer.0", "layer.1", "layer.2"];
    let refused = |engine: &mut Recorder, map: &dyn lightrft_engine::NameMap| {
        let mut source = Scripted::new(&weights, |_| panic!("nothing is gathered"));
        let error = engine.update_from(Version(1), &mut source, map, 24).unwrap_err();
        assert_eq!((engine.state(), engine.version()), (State::READY, Some(Version(0))));
        assert!(engine.seen.is_empty(), "nothing was sent");
        error
    };
    let mut engine = Recorder { parameters: Some(known(&all[..2])), ..Recorder::default() };
    let error = refused(&mut engine, &Identity);
    assert!(matches!(&error, Error::UnknownTensor { name } if name == "layer.2"), "{error:?}");

    let more = ["layer.0", "layer.1", "layer.2", "layer.3"];
    let mut engine = Recorder { parameters: Some(known(&more)), ..Recorder::default() };
    let error = refused(&mut engine, &Identity);
    assert!(
        matches!(&error, Error::MissingTensors { missing: 1, total: 4, examples, .. } if examples == &["layer.3"])
    );

    let mut shapes = known(&all);
    shapes.insert("layer.1".to_owned(), vec![3, 1]);
    let mut engine = Recorder { parameters: Some(shapes), ..Recorder::default() };
    let error = refused(&mut engine, &Identity);
    assert!(matches!(&error, Error::Shape { name, .. } if name == "layer.1"), "{error:?}");

    let mut shapes = known(&["layer.0", "norm"]);
    shapes.insert("layer.0".to_owned(), vec![4]);
    let mut engine = Recorder { parameters: Some(shapes), ..Recorder::default() };
    let error = refused(&mut engine, &Identity);
    assert!(matches!(error, Error::WrongModel { given: 3, unknown: 2, misshapen: 1, .. }), "{error:?}");

    let error = refused(&mut Recorder::default(), &Prefixes::qwen2_5_vl_to_sglang());
    assert!(matches!(&error, Error::Name { name, .. } if name == "layer.0"), "{error:?}");

    let mut asleep = Recorder::default();
    asleep.sleep(Level::One).unwrap();
    let mut source = Scripted::new(&weights, |_| panic!("nothing is gathered"));
    let error = asleep.update_from(Version(1), &mut source, &Identity, 24).unwrap_err();
    assert!(matches!(error, Error::Refused(_)), "{error:?}");
}

#[test]
fn names_are_mapped_on_the_way() {
    let weights = tensors(2, 3);
    let map = Prefixes::new([("layer.".to_owned(), "model.layers.".to_owned())]).unwrap();
    let views = views(&weights);
    let mut engine = Recorder::default();
    engine.update_from(Version(1), &mut TensorSlice::new(&views), &map, 24).unwrap();
    let names: Vec<_> = engine.pushed().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["model.layers.0", "model.layers.1"]);
}

/// A safetensors file of these tensors.
fn file(tensors: &[TensorBytes]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for t in tensors {
        let start = data.len();
        data.extend_from_slice(&t.bytes);
        let info = serde_json::json!({"dtype": "F32", "shape": t.shape, "data_offsets": [start, data.len()]});
        header.insert(t.name.clone(), info);
    }
    let header = serde_json::Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

const INDEX: &str = "model.safetensors.index.json";

fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn index(pairs: &[(&str, &str)]) -> Vec<u8> {
    let map: BTreeMap<_, _> = pairs.iter().copied().collect();
    serde_json::json!({"metadata": {}, "weight_map": map}).to_string().into_bytes()
}

#[test]
fn a_folder_in_one_file_or_in_two_gives_its_tensors() {
    let weights = tensors(4, 5);
    let one = folder(&[("model.safetensors", file(&weights))]);
    let (a, b) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let pairs = [("layer.0", a), ("layer.1", a), ("layer.2", b), ("layer.3", b)];
    let two = folder(&[(a, file(&weights[..2])), (b, file(&weights[2..])), (INDEX, index(&pairs))]);
    for folder in [&one, &two] {
        let mut source = HfFolder::open(folder.path()).unwrap();
        assert_eq!(source.bytes(), 4 * 5 * 4);
        let mut engine = Recorder::default();
        engine.update_from(Version(1), &mut source, &Identity, 50).unwrap();
        let expected: Vec<_> = weights.iter().map(|t| (t.name.clone(), t.bytes.clone())).collect();
        assert_eq!(engine.pushed(), expected);
        // A source that is asked again gives again.
        engine.update_from(Version(2), &mut source, &Identity, 50).unwrap();
    }
}

#[test]
fn a_head_that_is_stored_though_it_is_tied_is_left_out() {
    let mut weights = tensors(3, 5);
    weights[1].name = "lm_head.weight".to_owned();
    let names = |config: &str| {
        let files = [("model.safetensors", file(&weights)), ("config.json", config.into())];
        let folder = folder(&files);
        let mut source = HfFolder::open(folder.path()).unwrap();
        let mut engine = Recorder::default();
        engine.update_from(Version(1), &mut source, &Identity, 50).unwrap();
        let found: Vec<_> = engine.pushed().into_iter().collect();
        for (name, bytes) in &found {
            let stored = weights.iter().find(|t| t.name == *name).unwrap();
            assert_eq!(stored.bytes, *bytes, "{name}");
        }
        found.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
    };
    let tied = ["layer.0", "layer.2"];
    assert_eq!(names(r#"{"tie_word_embeddings":true}"#), tied);
    assert_eq!(names(r#"{"text_config":{"tie_word_embeddings":true}}"#), tied);
    for config in
        [r#"{"tie_word_embeddings":false,"text_config":{"tie_word_embeddings":true}}"#, "{}", "nonsense"]
    {
        assert_eq!(names(config).len(), 3, "{config}");
    }
}

#[test]
fn a_broken_folder_is_refused_by_the_file_that_is_wrong() {
    let weights = tensors(2, 5);
    let good = file(&weights);
    let model = "model.safetensors";
    let (a, b) = ("a.safetensors", "b.safetensors");
    let broken: Vec<(tempfile::TempDir, &str, &str)> = vec![
        (folder(&[]), model, ""),
        (folder(&[(model, vec![])]), model, ""),
        (folder(&[(model, good[..good.len() - 1].to_vec())]), model, "its header speaks of"),
        (folder(&[(model, [&good[..], &[0]].concat())]), model, "its header speaks of"),
        (folder(&[(model, vec![0xff; 64])]), model, "a header of"),
        (
            folder(&[(model, [&8_u64.to_le_bytes(), b"{\"a\":12}".as_slice()].concat())]),
            model,
            "no safetensors header",
        ),
        (folder(&[(model, good.clone()), (INDEX, b"{}".to_vec())]), INDEX, "weight_map"),
        (folder(&[(INDEX, index(&[("layer.0", "../a")]))]), INDEX, "not a plain file name"),
        (folder(&[(INDEX, index(&[("layer.0", a)]))]), a, ""),
        (folder(&[(a, good.clone()), (INDEX, index(&[("layer.9", a)]))]), INDEX, "`layer.9` is not in"),
        (
            folder(&[(a, good.clone()), (b, good), (INDEX, index(&[("layer.0", a), ("layer.1", b)]))]),
            b,
            "is in",
        ),
    ];
    for (folder, file, expected) in broken {
        let error = HfFolder::open(folder.path()).unwrap_err();
        let (Error::Io { path, .. } | Error::Malformed { path, .. }) = &error else { panic!("{error:?}") };
        assert_eq!(*path, folder.path().join(file), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn a_file_that_shrinks_under_way_is_named_and_leaves_the_engine_stale() {
    let weights = tensors(2, 5);
    let folder = folder(&[("model.safetensors", file(&weights))]);
    let mut source = HfFolder::open(folder.path()).unwrap();
    let path = folder.path().join("model.safetensors");
    let length = path.metadata().unwrap().len();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(length - 1).unwrap();
    let mut engine = Recorder::default();
    let error = engine.update_from(Version(1), &mut source, &Identity, 50).unwrap_err();
    assert!(matches!(&error, Error::Io { path: named, .. } if *named == path), "{error:?}");
    assert_a_repeat_mends(&mut engine, &weights);
}
