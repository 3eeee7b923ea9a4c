//! The command `lightrft-ckpt`, run as it is: what it prints, and the exit code that a script goes by.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::Path;
use std::process::Command;

use lightrft_ckpt::{Alone, Checkpoints, HfFolder, Part, Region, Rotation, Saver, Snapshot, Verify, Which};
use serde_json::{Value, json};

/// Exit code, standard output, standard error.
fn run(args: &[&dyn AsRef<std::ffi::OsStr>]) -> (i32, String, String) {
    let done = Command::new(env!("CARGO_BIN_EXE_lightrft-ckpt"))
        .args(args.iter().map(|a| a.as_ref()))
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (done.status.code().unwrap(), text(done.stdout), text(done.stderr))
}

/// Two checkpoints of a weight, its momentum and its average.
fn save(dir: &Path) {
    let saver = Saver::open(dir, &Alone).unwrap();
    for step in [20, 100] {
        let values: Vec<f32> = (0..600).map(|i| i as f32 + step as f32).collect();
        let mut snapshot = Snapshot::of_step(step);
        for name in ["model.w", "optimizer.exp_avg.model.w", "ema.model.w"] {
            snapshot.parts.push(Part::new(name, vec![30, 20], Region::Whole, &values));
        }
        snapshot.shared = json!({"consumed_samples": step * 8, "long": "x".repeat(1000)});
        snapshot.rank_state = json!({"rng": [1, 2]});
        saver.save(&Alone, &snapshot, &Rotation::KEEP_ALL).unwrap();
    }
}

fn damage(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    bytes[5000] ^= 4;
    fs::write(file, bytes).unwrap();
}

#[test]
fn list_tells_whole_damaged_and_latest_apart() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path());
    let (code, out, err) = run(&[&"list", &dir.path()]);
    assert_eq!((code, err.as_str()), (0, ""));
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].starts_with("tag") && lines.len() == 3, "{out}");
    assert!(lines[1].starts_with("global_step100 ") && lines[1].ends_with("complete, latest"), "{out}");
    assert!(lines[2].starts_with("global_step20 ") && lines[2].ends_with("complete"), "{out}");

    fs::remove_file(dir.path().join("global_step100/rank-00000.safetensors")).unwrap();
    fs::create_dir(dir.path().join("copied")).unwrap();
    fs::write(dir.path().join("copied/rank-00000.safetensors"), "half").unwrap();
    let (code, out, _) = run(&[&"list", &dir.path()]);
    assert_eq!(code, 1);
    let line = |tag: &str| out.lines().find(|l| l.starts_with(tag)).unwrap().to_owned();
    assert!(line("global_step100").contains("rank-00000.safetensors"), "{out}");
    assert!(line("copied").contains("manifest") && line("global_step20").ends_with("complete"), "{out}");
    let (code, out, _) = run(&[&"list", &"--json", &dir.path()]);
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (code, &json["latest"], &json["refused"][0]["name"]),
        (1, &json!("global_step100"), &json!("copied"))
    );
    assert_eq!(json["checkpoints"][1]["problem"], Value::Null);

    assert_eq!(json["checkpoints"][1]["saved"].as_str().unwrap().len(), "2026-01-02T03:04:05.678Z".len());
    assert!(json["checkpoints"][1]["saved"].as_str().unwrap().ends_with('Z'));
    fs::write(dir.path().join("latest"), "copied").unwrap();
    let (code, out, _) = run(&[&"list", &dir.path()]);
    assert!(code == 1 && out.contains("`latest` names `copied`, which is no complete checkpoint"), "{out}");

    let empty = tempfile::tempdir().unwrap();
    assert_eq!(run(&[&"list", &empty.path()]).0, 0);
    fs::write(empty.path().join("latest"), "global_step3").unwrap();
    let (code, out, _) = run(&[&"list", &empty.path()]);
    assert!(code == 1 && out.contains("`global_step3`, which is not there"), "{out}");
    let (code, _, err) = run(&[&"list", &empty.path().join("gone")]);
    assert!(code == 1 && err.contains("gone"), "{err}");
}

#[test]
fn inspect_shows_tensors_files_and_states() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path());
    let (code, out, err) = run(&[&"inspect", &dir.path(), &"global_step20", &"--regions"]);
    assert_eq!((code, err.as_str()), (0, ""));
    for part in [
        "step 20",
        "rank-00000.safetensors",
        "model.w",
        "F32",
        "[30, 20]",
        "0..600 in",
        "consumed_samples",
        "rank 0: {\"rng\":[1,2]}",
        "--json",
    ] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let (code, out, _) = run(&[&"inspect", &"--json", &dir.path()]);
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &json["step"], &json["rank_states"]), (0, &json!(100), &json!([{"rng": [1, 2]}])));
    assert_eq!(json["tensors"].as_array().unwrap().len(), 3);
    let bytes = json["tensors"][0]["regions"][0]["bytes"].as_array().unwrap().clone();
    assert_eq!(bytes[1].as_u64().unwrap() - bytes[0].as_u64().unwrap(), 2400);
    let (code, _, err) = run(&[&"inspect", &dir.path(), &"step7"]);
    assert!(code == 1 && err.contains("step7") && err.contains("global_step100"), "{err}");
}

#[test]
fn verify_names_what_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path());
    let (code, out, _) = run(&[&"verify", &dir.path(), &"--all"]);
    assert_eq!((code, out.lines().filter(|l| l.contains(": whole")).count()), (0, 2), "{out}");
    damage(&dir.path().join("global_step20/rank-00000.safetensors"));
    assert_eq!(run(&[&"verify", &dir.path()]).0, 0, "the newest is whole");
    assert_eq!(run(&[&"list", &dir.path()]).0, 0, "list does not read the data");
    for args in [
        &[&"verify" as &dyn AsRef<std::ffi::OsStr>, &dir.path(), &"--all"][..],
        &[&"verify", &dir.path(), &"global_step20"],
    ] {
        let (code, out, _) = run(args);
        let line = out.lines().find(|l| l.starts_with("global_step20")).unwrap();
        assert!(code == 1 && line.contains("DAMAGED") && line.contains("rank-00000.safetensors"), "{out}");
    }
    assert_eq!(run(&[&"verify", &dir.path(), &"nothing"]).0, 1);
    // One flipped bit in the first line of the newest's manifest: nobody knows any more that it is the newest.
    let manifest = dir.path().join("global_step100/manifest.json");
    let mut bytes = fs::read(&manifest).unwrap();
    bytes[20] ^= 4;
    fs::write(&manifest, bytes).unwrap();
    let (code, _, err) = run(&[&"verify", &dir.path()]);
    assert!(code == 1 && err.contains("global_step100"), "{err}");
    let (code, out, _) = run(&[&"verify", &dir.path(), &"global_step100"]);
    assert!(code == 1 && out.starts_with("global_step100: DAMAGED"), "{out}");
    assert_eq!(run(&[&"verify", &dir.path(), &"global_step20", &"--all"]).0, 2);
}

#[test]
fn a_reader_who_has_read_enough_does_not_change_the_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path());
    damage(&dir.path().join("global_step20/rank-00000.safetensors"));
    for (args, expected) in [(&["verify", "--all"][..], 1), (&["list"], 0)] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_lightrft-ckpt"));
        let done = command.args(args).arg(dir.path()).stdout(writer).status().unwrap();
        assert_eq!(done.code(), Some(expected), "{args:?}");
    }
}

#[test]
fn export_writes_a_folder_in_the_dtype_and_the_shards_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    save(&dir.path().join("c"));
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hf_tiny_qwen2");
    let (c, out_dir) = (dir.path().join("c"), dir.path().join("model"));
    let (code, out, err) =
        run(&[&"export", &c, &"global_step20", &out_dir, &"--dtype", &"bf16", &"--from", &golden]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.contains("1 tensor,") && out.contains("1.2 KiB"), "{out}");
    let folder = HfFolder::open(&out_dir).unwrap();
    assert_eq!(folder.config().unwrap().unwrap()["dtype"], "bfloat16");
    assert!(out_dir.join("generation_config.json").exists());
    let mut first = [0.0f32; 2];
    folder.read_f32("model.w", &Region::Flat(0..2), &mut first).unwrap();
    assert_eq!(first, [20.0, 21.0]);
    // Foreign files stay, and so does the folder.
    fs::write(out_dir.join("notes"), "mine").unwrap();
    let (code, _, err) = run(&[&"export", &c, &out_dir, &"--from", &golden]);
    assert!(code == 1 && err.contains("notes"), "{err}");
    let other = dir.path().join("other");
    let (code, _, err) = run(&[&"export", &c, &other, &"--ema", &"--max-shard-size", &"1KB"]);
    assert!(code == 0 && err.contains("config.json"), "{err}");
    assert_eq!(HfFolder::open(&other).unwrap().tensors().next().unwrap().name, "model.w");
    for wrong in
        [["--dtype", "int8"], ["--max-shard-size", "many"], ["--max-shard-size", "0"], ["--shards", "2"]]
    {
        assert_eq!(run(&[&"export", &c, &other, &wrong[0], &wrong[1]]).0, 2, "{wrong:?}");
    }
}

#[test]
fn convert_imports_a_folder_and_writes_a_checkpoint_anew() {
    let dir = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hf_tiny_qwen2");
    let imported = dir.path().join("imported");
    let (code, out, err) = run(&[&"convert", &golden, &imported, &"--world", &"2", &"--step", &"5"]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let (checkpoint, _) = Checkpoints::open(&imported).load(Which::Newest, Verify::Everything).unwrap();
    assert_eq!((checkpoint.step(), checkpoint.world_size(), checkpoint.tensors().len()), (5, 2, 26));

    let from = dir.path().join("c");
    save(&from);
    let (code, ..) = run(&[&"convert", &from, &"global_step20", &dir.path().join("d"), &"--world", &"3"]);
    assert_eq!(code, 0);
    // In place, and back to one rank.
    let d = dir.path().join("d");
    let (code, _, err) = run(&[&"convert", &d, &d, &"--world", &"1"]);
    assert!(code == 0 && err.contains("ranks 1 to 2"), "{err}");
    let load =
        |dir: &Path| Checkpoints::open(dir).load(Which::Tag("global_step20"), Verify::Everything).unwrap().0;
    let (old, new) = (load(&from), load(&d));
    assert_eq!((new.step(), new.shared(), new.rank_states()), (20, old.shared(), old.rank_states()));
    for (name, ..) in old.tensors() {
        let read = |c: &lightrft_ckpt::Checkpoint| c.read_vec::<f32>(name, &Region::Whole).unwrap();
        assert_eq!(read(&old), read(&new), "{name}");
    }
    let busy = Saver::open(&d, &Alone).unwrap();
    let (code, _, err) = run(&[&"convert", &from, &d]);
    assert!(code == 1 && err.contains("another process"), "{err}");
    drop(busy);
    assert_eq!(run(&[&"convert", &from, &d, &"--world", &"0"]).0, 2);
    assert_eq!(run(&[&"convert", &from, &d, &"--step", &"3"]).0, 2);
    assert_eq!(run(&[&"convert", &from, &d, &"--world", &"1000000"]).0, 2);
    // What a run would go on from stays so when an older one is written anew in place.
    let latest = || fs::read_to_string(from.join("latest")).unwrap();
    assert_eq!(latest(), "global_step100");
    assert_eq!(run(&[&"convert", &from, &"global_step20", &from, &"--world", &"2"]).0, 0);
    assert_eq!(latest(), "global_step100");
}

#[test]
fn help_goes_to_the_output_and_mistakes_to_the_error() {
    for args in
        [&["--help"][..], &["help"], &["list", "--help"], &["export", "-h"], &["convert", "a", "--help"]]
    {
        let args: Vec<&dyn AsRef<std::ffi::OsStr>> =
            args.iter().map(|a| a as &dyn AsRef<std::ffi::OsStr>).collect();
        let (code, out, err) = run(&args);
        assert!(code == 0 && out.contains("lightrft-ckpt") && err.is_empty(), "{out} {err}");
        assert!(out.lines().all(|line| line.len() <= 110), "{out}");
    }
    for args in [
        &[][..],
        &["lst", "."],
        &["list"],
        &["list", "a", "b"],
        &["list", "--all", "."],
        &["export", "a"],
        &["-x"],
    ] {
        let args: Vec<&dyn AsRef<std::ffi::OsStr>> =
            args.iter().map(|a| a as &dyn AsRef<std::ffi::OsStr>).collect();
        let (code, out, err) = run(&args);
        assert!(code == 2 && out.is_empty() && err.contains("--help"), "{err}");
    }
}
