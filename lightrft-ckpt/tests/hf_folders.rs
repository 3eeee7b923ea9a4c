//! Hugging Face folders: what `transformers` wrote is read, what is written is whole, and what lies is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::bf16;
use lightrft_ckpt::testing::Observed;
use lightrft_ckpt::{
    Dtype, Error, FileSystem, Floats, HfFolder, HfOptions, HfReport, HfWriter, OsFileSystem, Region,
    SafetensorsFile, TensorSpec, write_safetensors,
};
use serde_json::{Value, json};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hf_tiny_qwen2")
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn options(change: impl FnOnce(&mut HfOptions)) -> HfOptions {
    let mut options = HfOptions::default();
    change(&mut options);
    options
}

/// The values of a tensor of `n` elements.
fn values(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| (seed * 131 + i * 17 % 97) as f32 / 64.0 - 3.3).collect()
}

const MODEL: [(&str, &[usize]); 4] = [
    ("model.embed_tokens.weight", &[10, 4]),
    ("model.layers.0.w", &[4, 4]),
    ("model.layers.0.b", &[0]),
    ("model.norm.weight", &[]),
];

fn specs() -> Vec<TensorSpec> {
    MODEL.iter().map(|(name, shape)| TensorSpec::new(*name, Dtype::F32, *shape)).collect()
}

fn write(path: &Path, options: &HfOptions) -> Result<HfReport, Error> {
    let mut writer = HfWriter::create(path, specs(), options)?;
    for (seed, (name, shape)) in MODEL.iter().enumerate() {
        writer.push(name, bytemuck::cast_slice(&values(seed, shape.iter().product())))?;
    }
    writer.finish()
}

fn read(folder: &HfFolder, name: &str) -> Vec<f32> {
    let mut into = vec![0.0; folder.tensor(name).unwrap().shape.iter().product()];
    folder.read_f32(name, &Region::Whole, &mut into).unwrap();
    into
}

#[test]
fn a_sharded_folder_of_transformers_is_read_with_its_values() {
    let folder = HfFolder::open(golden()).unwrap();
    let expected: Value =
        serde_json::from_slice(&fs::read(golden().with_extension("json")).unwrap()).unwrap();
    let expected = expected["tensors"].as_object().unwrap();
    assert_eq!(folder.tensors().count(), expected.len());
    for (name, expected) in expected {
        let spec = folder.tensor(name).unwrap();
        assert_eq!((spec.dtype, json!(spec.shape)), (Dtype::BF16, expected["shape"].clone()), "{name}");
        let values = read(&folder, name);
        assert_eq!(json!(values[..3]), json!(expected["first"].as_array().unwrap()), "{name}");
        assert_eq!(Some(f64::from(values[values.len() - 1])), expected["last"].as_f64(), "{name}");
        let sum: f64 = values.iter().map(|v| f64::from(*v)).sum();
        assert!((sum - expected["sum"].as_f64().unwrap()).abs() < 1e-9, "{name}");
    }
    // Tied, and therefore not stored: the embedding stands for it.
    assert!(!expected.contains_key("lm_head.weight"));
    assert_eq!(read(&folder, "lm_head.weight"), read(&folder, "model.embed_tokens.weight"));
    let mut row = [0.0; 8];
    let second = Region::Box { start: vec![1, 0], extent: vec![1, 8] };
    folder.read_f32("lm_head.weight", &second, &mut row).unwrap();
    assert_eq!(row[..], read(&folder, "lm_head.weight")[8..16]);
    assert!(matches!(folder.read("x", &Region::Whole, &mut []), Err(Error::NoTensor { .. })));
}

#[test]
fn a_copy_of_a_folder_of_transformers_has_the_same_shards_and_bytes() {
    let source = HfFolder::open(golden()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("copy");
    // The order of the model, which decides the shards, as it was when it was saved.
    let expected: Value =
        serde_json::from_slice(&fs::read(golden().with_extension("json")).unwrap()).unwrap();
    let order = fs::read_to_string(golden().with_extension("json")).unwrap();
    let mut names: Vec<&String> = expected["tensors"].as_object().unwrap().keys().collect();
    names.sort_by_key(|name| order.find(&format!("\"{name}\"")).unwrap());
    let given = names.iter().map(|name| source.tensor(name).unwrap().clone());
    let options = options(|o| {
        o.max_shard_bytes = 1000;
        o.source = Some(golden());
    });
    let mut writer = HfWriter::create(&path, given, &options).unwrap();
    for name in names {
        let mut bytes = vec![0; source.tensor(name).unwrap().bytes().unwrap()];
        source.read(name, &Region::Whole, &mut bytes).unwrap();
        writer.push(name, &bytes).unwrap();
    }
    let report = writer.finish().unwrap();
    assert_eq!((report.shards, report.tensors, report.bytes), (3, 26, 2448));
    assert_eq!(names_in(&path), names_in(&golden()));
    let json = |dir: &Path, name: &str| -> Value {
        serde_json::from_slice(&fs::read(dir.join(name)).unwrap()).unwrap()
    };
    let index = "model.safetensors.index.json";
    assert_eq!(json(&path, index)["weight_map"], json(&golden(), index)["weight_map"]);
    assert_eq!(json(&path, index)["metadata"]["total_size"], 2448);
    assert_eq!(json(&path, "config.json"), json(&golden(), "config.json"));
    for name in names_in(&golden()).iter().filter(|n| n.ends_with(".safetensors")) {
        let (ours, theirs) = (fs::read(path.join(name)).unwrap(), fs::read(golden().join(name)).unwrap());
        let parse = |bytes| -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
            let read = safetensors::SafeTensors::deserialize(bytes).unwrap();
            let of = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
                (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
            };
            read.tensors().into_iter().map(of).collect()
        };
        assert_eq!(parse(&ours), parse(&theirs), "{name}");
        let about = SafetensorsFile::open(path.join(name)).unwrap().metadata().clone();
        assert_eq!(about, BTreeMap::from([("format".into(), "pt".into())]));
    }
}

#[test]
fn what_is_written_is_read_in_every_dtype_and_in_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/model");
    for (floats, shards) in
        [(Floats::AsGiven, 5_000_000_000), (Floats::Bf16, 90), (Floats::F16, 1), (Floats::F32, 100)]
    {
        let mut writer = HfWriter::create(
            &path,
            specs(),
            &options(|o| {
                o.floats = floats;
                o.max_shard_bytes = shards;
                o.config = json!({"model_type": "llama"}).as_object().cloned();
            }),
        )
        .unwrap();
        for (seed, (name, shape)) in MODEL.iter().enumerate() {
            let values = values(seed, shape.iter().product());
            let bytes: &[u8] = bytemuck::cast_slice(&values);
            let (first, second) = bytes.split_at(bytes.len() / 8 * 4);
            assert!(matches!(writer.push_piece(name, &[1]), Err(Error::Request { .. })), "half an element");
            writer.push_piece(name, first).unwrap();
            if !second.is_empty() {
                writer.push_piece(name, second).unwrap();
            }
        }
        let report = writer.finish().unwrap();
        assert_eq!(names_in(path.parent().unwrap()), ["model"]);
        let folder = HfFolder::open(&path).unwrap();
        let (dtype, name) = match floats {
            Floats::Bf16 => (Dtype::BF16, "bfloat16"),
            Floats::F16 => (Dtype::F16, "float16"),
            _ => (Dtype::F32, "float32"),
        };
        assert_eq!(folder.config().unwrap().unwrap()["torch_dtype"], name);
        assert_eq!(report.shards == 1, path.join("model.safetensors").exists());
        assert_eq!(report.shards > 1, path.join("model.safetensors.index.json").exists());
        for (seed, (name, shape)) in MODEL.iter().enumerate() {
            assert_eq!(folder.tensor(name), Some(&TensorSpec::new(*name, dtype, *shape)));
            let mut expected = values(seed, shape.iter().product());
            match floats {
                Floats::Bf16 => expected.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32()),
                Floats::F16 => expected.iter_mut().for_each(|v| *v = half::f16::from_f32(*v).to_f32()),
                _ => {}
            }
            assert_eq!(read(&folder, name), expected, "{floats:?} {name}");
        }
    }
}

#[test]
fn tokenizer_files_are_copied_and_weights_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::create_dir(source.join("onnx.json")).unwrap();
    fs::write(dir.path().join("blob"), "{}").unwrap();
    // As in a cache of downloads.
    std::os::unix::fs::symlink("../blob", source.join("tokenizer.json")).unwrap();
    for (name, text) in [
        ("config.json", r#"{"eps": 1e-06, "dtype": "float64"}"#),
        ("merges.txt", "a b"),
        ("chat_template.jinja", "{{x}}"),
        ("modeling_x.py", "pass"),
        ("tokenizer.model", "\0"),
        ("pytorch_model.bin", "weights"),
        ("model.safetensors", "weights"),
        ("README.md", "of the source"),
    ] {
        fs::write(source.join(name), text).unwrap();
    }
    let path = dir.path().join("model");
    write(&path, &options(|o| o.source = Some(source.clone()))).unwrap();
    let expected = [
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "modeling_x.py",
        "tokenizer.json",
        "tokenizer.model",
    ];
    assert_eq!(names_in(&path), expected);
    assert_eq!(fs::read_to_string(path.join("tokenizer.json")).unwrap(), "{}");
    let config: Value = serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap();
    assert_eq!(config, json!({"eps": 1e-6, "dtype": "float32"}));
    fs::write(source.join("config.json"), "[1]").unwrap();
    let told = write(&path, &options(|o| o.source = Some(source.clone()))).unwrap_err();
    assert!(matches!(&told, Error::Damaged { path, .. } if path.ends_with("source/config.json")), "{told}");
}

#[test]
fn tied_embeddings_are_written_once_and_only_if_they_are_equal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let given = [
        TensorSpec::new("lm_head.weight", Dtype::F32, [3]),
        TensorSpec::new("model.embed_tokens.weight", Dtype::F32, [3]),
    ];
    let write = |tied: bool, head: [f32; 3], pushed: usize| {
        let config = json!({"tie_word_embeddings": tied});
        let options = options(|o| o.config = config.as_object().cloned());
        let mut writer = HfWriter::create(&path, given.clone(), &options)?;
        writer.push_piece("lm_head.weight", bytemuck::cast_slice(&head[..pushed]))?;
        writer.push("model.embed_tokens.weight", bytemuck::cast_slice(&[1f32, 2.0, 3.0]))?;
        writer.finish()
    };
    assert_eq!(write(true, [1.0, 2.0, 3.0], 3).unwrap().tensors, 1);
    let folder = HfFolder::open(&path).unwrap();
    assert_eq!(folder.tensors().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["model.embed_tokens.weight"]);
    assert_eq!(read(&folder, "lm_head.weight"), [1.0, 2.0, 3.0]);
    for told in [write(true, [1.0, 2.0, 4.0], 3), write(true, [1.0, 2.0, 3.0], 2)] {
        assert!(matches!(told, Err(Error::Request { name, .. }) if name == "lm_head.weight"));
    }
    assert_eq!(write(false, [1.0, 2.0, 4.0], 3).unwrap().tensors, 2);
    assert_eq!(read(&HfFolder::open(&path).unwrap(), "lm_head.weight"), [1.0, 2.0, 4.0]);
    assert_eq!(names_in(dir.path()), ["model"]);
}

#[test]
fn a_configuration_that_does_not_say_whether_embeddings_are_tied_leaves_it_to_the_weights() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let write = |config: Value, names: &[&str]| {
        let _none_yet = fs::remove_dir_all(&path);
        let options = options(|o| o.config = config.as_object().cloned());
        let given = names.iter().map(|name| TensorSpec::new(*name, Dtype::F32, [1]));
        let mut writer = HfWriter::create(&path, given, &options).unwrap();
        names.iter().zip(1u8..).for_each(|(name, i)| writer.push(name, &[i; 4]).unwrap());
        writer.finish().unwrap();
        HfFolder::open(&path).unwrap()
    };
    let (head, embedding) = ("lm_head.weight", "model.embed_tokens.weight");
    let named = |folder: &HfFolder| folder.tensor(head).map(|spec| spec.name.clone());
    // As older releases of transformers wrote it for classes whose embeddings are tied unless it is said.
    let folder = write(json!({"model_type": "gemma"}), &[embedding]);
    assert_eq!(named(&folder).as_deref(), Some(embedding));
    let folder = write(json!({"tie_word_embeddings": false}), &[embedding]);
    assert_eq!(named(&folder), None);
    let folder = write(json!({"model_type": "llama"}), &[embedding, head]);
    assert_eq!(named(&folder).as_deref(), Some(head));
    let folder =
        write(json!({"model_type": "t5"}), &["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]);
    assert_eq!(named(&folder), None, "which of them?");
    let folder = write(Value::Null, &[embedding]);
    assert_eq!(named(&folder), None, "nothing says that it is a language model");
}

#[test]
fn numbers_that_only_python_writes_in_a_configuration_hinder_nobody_who_wants_the_weights() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    write(&path, &HfOptions::default()).unwrap();
    fs::write(path.join("config.json"), r#"{"attn_logit_cap": Infinity}"#).unwrap();
    let folder = HfFolder::open(&path).unwrap();
    assert_eq!(read(&folder, MODEL[1].0), values(1, 16));
    assert_eq!(folder.tensor("lm_head.weight").unwrap().name, MODEL[0].0);
    let told = folder.config().unwrap_err();
    assert!(matches!(&told, Error::Damaged { path, .. } if path.ends_with("config.json")), "{told}");
}

#[test]
fn a_push_out_of_turn_is_forgotten_by_the_comparison_of_tied_embeddings() {
    let dir = tempfile::tempdir().unwrap();
    let (head, embedding) = ("lm_head.weight", "model.embed_tokens.weight");
    let given = ["first", head, embedding].map(|name| TensorSpec::new(name, Dtype::F32, [2]));
    let tied = json!({"tie_word_embeddings": true});
    let options = options(|o| o.config = tied.as_object().cloned());
    let mut writer = HfWriter::create(dir.path().join("model"), given, &options).unwrap();
    for (name, bytes) in [(embedding, 8), (head, 12)] {
        assert!(matches!(writer.push_piece(name, &vec![7; bytes]), Err(Error::Request { .. })), "{name}");
    }
    for name in ["first", embedding, head] {
        writer.push(name, &[7; 8]).unwrap();
    }
    assert_eq!(writer.finish().unwrap().tensors, 2);
}

#[test]
fn a_shape_that_readers_of_the_format_refuse_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let create = |shape: [usize; 3]| {
        HfWriter::create(
            dir.path().join("m"),
            [TensorSpec::new("a", Dtype::U8, shape)],
            &HfOptions::default(),
        )
    };
    assert!(matches!(create([1 << 63, 4, 0]), Err(Error::Request { name, .. }) if name == "a"));
    let mut writer = create([0, 1 << 63, 4]).unwrap();
    writer.push("a", &[]).unwrap();
    writer.finish().unwrap();
    assert_eq!(HfFolder::open(dir.path().join("m")).unwrap().tensors().count(), 1);
}

#[test]
fn mixed_dtypes_lie_aligned_whatever_the_order() {
    let dir = tempfile::tempdir().unwrap();
    let given = [
        TensorSpec::new("half", Dtype::BF16, [1]),
        TensorSpec::new("flags", Dtype::U8, [3]),
        TensorSpec::new("wide", Dtype::I64, [1]),
        TensorSpec::new("float", Dtype::F32, [1]),
    ];
    let mut writer = HfWriter::create(dir.path().join("m"), given.clone(), &HfOptions::default()).unwrap();
    let order: Vec<String> = writer.order().map(str::to_owned).collect();
    assert!(matches!(writer.push("half", &[0; 2]), Err(Error::Request { .. })), "not its turn");
    assert!(matches!(writer.push("other", &[0; 2]), Err(Error::NoTensor { .. })));
    for name in &order {
        let spec = given.iter().find(|s| s.name == *name).unwrap();
        writer.push(name, &vec![7; spec.bytes().unwrap()]).unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(order, ["wide", "float", "half", "flags"]);
    let folder = HfFolder::open(dir.path().join("m")).unwrap();
    assert!(matches!(folder.read_f32("wide", &Region::Whole, &mut [0.0]), Err(Error::Request { .. })));
}

#[test]
fn only_weights_and_what_is_written_anew_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let small = options(|o| {
        o.max_shard_bytes = 1;
        o.source = Some(golden());
    });
    write(&path, &small).unwrap();
    assert!(path.join("model-00001-of-00004.safetensors").exists());
    let whole = options(|o| o.source = Some(golden()));
    write(&path, &whole).unwrap();
    assert_eq!(names_in(&path), ["config.json", "generation_config.json", "model.safetensors"]);

    for (foreign, options) in [("notes.txt", &whole), ("generation_config.json", &HfOptions::default())] {
        fs::write(path.join(foreign), "mine").unwrap();
        let told = write(&path, options).unwrap_err();
        let named = if foreign == "notes.txt" { "notes.txt" } else { "config.json" };
        assert!(matches!(&told, Error::Foreign { found, .. } if found == named), "{told}");
        assert_eq!(fs::read_to_string(path.join(foreign)).unwrap(), "mine");
        fs::remove_file(path.join(foreign)).unwrap();
    }
    // What appears while an export is in work is not lost either.
    let mut writer = HfWriter::create(&path, specs(), &whole).unwrap();
    for (seed, (name, shape)) in MODEL.iter().enumerate() {
        writer.push(name, bytemuck::cast_slice(&values(seed, shape.iter().product()))).unwrap();
    }
    fs::write(path.join("notes.txt"), "mine").unwrap();
    assert!(matches!(writer.finish(), Err(Error::Foreign { .. })));
    assert_eq!(fs::read_to_string(path.join("notes.txt")).unwrap(), "mine");
    assert_eq!(names_in(dir.path()), ["model"]);

    let file = dir.path().join("file");
    fs::write(&file, "mine").unwrap();
    assert!(matches!(write(&file, &whole), Err(Error::Foreign { .. })));
}

#[test]
fn an_unfinished_folder_leaves_the_old_one_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    write(&path, &HfOptions::default()).unwrap();
    let before = fs::read(path.join("model.safetensors")).unwrap();
    let mut writer = HfWriter::create(&path, specs(), &HfOptions::default()).unwrap();
    writer.push(MODEL[0].0, &[0; 160]).unwrap();
    assert!(matches!(writer.push(MODEL[1].0, &[0; 60]), Err(Error::Request { .. })));
    assert!(matches!(writer.finish(), Err(Error::Request { name, .. }) if name == MODEL[1].0));
    assert_eq!(names_in(dir.path()), ["model"]);
    assert_eq!(fs::read(path.join("model.safetensors")).unwrap(), before);
    let none = HfWriter::create(dir.path().join("none"), [], &HfOptions::default());
    assert!(matches!(none, Err(Error::Request { .. })));
    let twice = [specs()[0].clone(), specs()[0].clone()];
    assert!(matches!(
        HfWriter::create(dir.path().join("none"), twice, &HfOptions::default()),
        Err(Error::Request { .. })
    ));
    assert!(!dir.path().join("none").exists());
}

#[test]
fn leftovers_of_a_dead_export_are_swept_and_one_in_work_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let dead = dir.path().join("model.tmp-0123456789abcdef");
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join("model.safetensors"), "half").unwrap();
    let not_ours = dir.path().join("model.tmp-old");
    fs::create_dir(&not_ours).unwrap();
    let in_work = HfWriter::create(&path, specs(), &HfOptions::default()).unwrap();
    assert!(!dead.exists());
    write(&path, &HfOptions::default()).unwrap();
    assert_eq!(names_in(dir.path()).len(), 3, "{:?}", names_in(dir.path()));
    drop(in_work);
    assert_eq!(names_in(dir.path()), ["model", "model.tmp-old"]);
}

#[test]
fn an_export_that_begins_while_another_publishes_takes_nothing_from_it() {
    for replaced in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model");
        if replaced {
            write(&path, &HfOptions::default()).unwrap();
        }
        let other = path.clone();
        // Sweeps, as any export does, just before the finished folder gets its name, and just after.
        let fs = Observed::new(OsFileSystem::new(), move |operation| {
            if ["rename", "exchange", "sync_dir"].contains(&operation.kind) {
                HfWriter::create(&other, specs(), &HfOptions::default())
                    .map(drop)
                    .map_err(io::Error::other)?;
            }
            Ok(())
        });
        let mut writer = HfWriter::create_on(Arc::new(fs), &path, specs(), &HfOptions::default()).unwrap();
        for (seed, (name, shape)) in MODEL.iter().enumerate() {
            writer.push(name, bytemuck::cast_slice(&values(seed, shape.iter().product()))).unwrap();
        }
        let report = writer.finish().unwrap();
        assert_eq!(report.not_removed, []);
        assert_eq!(read(&HfFolder::open(&path).unwrap(), MODEL[0].0), values(0, 40));
        assert_eq!(names_in(&path), ["model.safetensors"]);
        assert_eq!(names_in(dir.path()), ["model"]);
    }
}

#[test]
fn what_is_added_to_the_old_folder_at_the_last_moment_is_kept_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let write_on = |fs: Arc<dyn FileSystem>| {
        let mut writer = HfWriter::create_on(fs, &path, specs(), &HfOptions::default()).unwrap();
        for (seed, (name, shape)) in MODEL.iter().enumerate() {
            writer.push(name, bytemuck::cast_slice(&values(seed, shape.iter().product()))).unwrap();
        }
        writer.finish().unwrap()
    };
    write(&path, &HfOptions::default()).unwrap();
    let notes = path.join("notes.txt");
    let fs = Observed::new(OsFileSystem::new(), move |operation| match operation.kind {
        "exchange" => fs::write(&notes, "mine"),
        _ => Ok(()),
    });
    let report = write_on(Arc::new(fs));
    let [left] = &report.not_removed[..] else { panic!("{report:?}") };
    assert!(left.reason.contains("notes.txt"), "{left:?}");
    // Neither this export nor the next one, which sweeps, and might write a file of that name, takes it away.
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("notes.txt"), "theirs").unwrap();
    write(&path, &options(|o| o.source = Some(source))).unwrap();
    assert_eq!(fs::read_to_string(Path::new(&left.name).join("notes.txt")).unwrap(), "mine");
    assert!(Path::new(&left.name).join("model.safetensors").exists());
}

#[test]
fn folders_that_lie_are_refused_by_name() {
    let tensor = |name: &str| (TensorSpec::new(name, Dtype::U8, [2]), &[1u8, 2][..]);
    let none = BTreeMap::new();
    let with = |index: &str, files: &[(&str, &[&str])]| {
        let dir = tempfile::tempdir().unwrap();
        for (file, tensors) in files {
            write_safetensors(dir.path().join(file), tensors.iter().map(|t| tensor(t)), &none).unwrap();
        }
        if !index.is_empty() {
            fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        }
        let opened = HfFolder::open(dir.path());
        (dir, opened)
    };
    let two: &[(&str, &[&str])] = &[("a.safetensors", &["x"]), ("b.safetensors", &["y"])];
    let (_kept, whole) = with(r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#, two);
    assert_eq!(whole.unwrap().tensors().count(), 2);
    let both: &[(&str, &[&str])] = &[("a.safetensors", &["x"]), ("model.safetensors", &["x"])];
    let twice: &[(&str, &[&str])] = &[("a.safetensors", &["x"]), ("b.safetensors", &["x", "y"])];
    let outside = r#"{"weight_map": {"x": "../a.safetensors"}}"#;
    for (what, index, files, named) in [
        (
            "a file that is missing",
            r#"{"weight_map": {"x": "a.safetensors", "z": "c.safetensors"}}"#,
            two,
            "c.safetensors",
        ),
        (
            "a tensor that is not in its file",
            r#"{"weight_map": {"x": "a.safetensors", "z": "a.safetensors"}}"#,
            two,
            "`z`",
        ),
        (
            "a tensor in two files",
            r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#,
            twice,
            "`x`",
        ),
        ("a tensor that is not named", r#"{"weight_map": {"y": "b.safetensors"}}"#, twice, "`x`"),
        (
            "a tensor named twice",
            r#"{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}"#,
            two,
            "`x`",
        ),
        ("a path up", outside, two, "../a.safetensors"),
        ("an absolute path", r#"{"weight_map": {"x": "/etc/passwd"}}"#, two, "/etc/passwd"),
        ("a hidden file", r#"{"weight_map": {"x": ".."}}"#, two, ".."),
        ("no names", r#"{"weight_map": {}}"#, two, "no tensor"),
        ("no map", r#"{"metadata": {}}"#, two, "weight_map"),
        ("a number for a file", r#"{"weight_map": {"x": 1}}"#, two, "index.json"),
        ("no JSON", "{", two, "index.json"),
        ("two models", r#"{"weight_map": {"x": "a.safetensors"}}"#, both, "model.safetensors"),
    ] {
        let told = with(index, files).1.map(drop);
        assert!(matches!(&told, Err(Error::Damaged { .. })), "{what}: {told:?}");
        let text = told.unwrap_err().to_string();
        assert!(text.contains(named), "{what}: {text}");
    }
    let dir = tempfile::tempdir().unwrap();
    assert!(
        matches!(HfFolder::open(dir.path()), Err(Error::Io { path, .. }) if path.ends_with("model.safetensors"))
    );
}
