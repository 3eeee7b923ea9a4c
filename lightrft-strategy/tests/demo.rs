//! The arithmetic example as its users run it: real processes, a SIGKILL, an exact resume, and every bad input it must
//! refuse.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// The example, which `cargo test` builds beside the tests.
fn program() -> PathBuf {
    let mut folder = std::env::current_exe().unwrap();
    folder.pop();
    if folder.ends_with("deps") {
        folder.pop();
    }
    let program = folder.join("examples").join("grpo_arithmetic");
    assert!(program.exists(), "{} is missing: cargo build --examples", program.display());
    program
}

fn run(out: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(program());
    command.args(["--out"]).arg(out).args(arguments);
    // As a user starts it, whatever started this test.
    for variable in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
        command.env_remove(variable);
    }
    command.output().unwrap()
}

/// A run small enough for a test: a few supervised steps, a few of RL.
fn small(out: &Path, ranks: usize, more: &[&str]) -> Output {
    let config = out.with_extension("toml");
    let rows = if ranks == 3 { 12 } else { 16 };
    std::fs::write(
        &config,
        format!(
            "seed = 5\nrollout_batch_size = {rows}\nn_samples_per_prompt = 4\ntrain_batch_size = {}\n\
             micro_train_batch_size = 4\nprompt_max_len = 12\ngenerate_max_len = 4\nenable_engine_sleep = true\n\
             actor_lr = 1e-3\nl2 = 1.0\nuse_kl_loss = true\nsave_steps = 2\nmax_ckpt_num = 2\nlog_parameters_hash = true\n\
             enable_ema = true\nema_beta = 0.5\nadam_offload = true\nactor_offload = true\nreference_offload = true\n",
            2 * rows
        ),
    )
    .unwrap();
    let ranks = ranks.to_string();
    let mut arguments = vec![
        "--ranks",
        &ranks,
        "--steps",
        "6",
        "--warm-up",
        "4",
        "--seed",
        "5",
        "--config",
        config.to_str().unwrap(),
    ];
    arguments.extend(more);
    run(out, &arguments)
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn last_line(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.lines().last().unwrap_or_default()).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn a_run_killed_with_sigkill_and_resumed_ends_as_an_unbroken_one_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, broken) = (folder.path().join("whole"), folder.path().join("broken"));
    let unbroken = small(&whole, 2, &["--kill-at", "0"]);
    assert!(unbroken.status.success(), "{}", text(&unbroken));
    assert_eq!(last_line(&unbroken)["resumed_exactly"], Value::Null);

    // The checkpoint of step 4 is there, step 5 is done, and rank 1 dies in the middle of step 6.
    let killed = small(&broken, 2, &["--kill-at", "6"]);
    assert!(killed.status.success(), "{}", text(&killed));
    let said = text(&killed);
    assert!(
        said.lines()
            .any(|l| l.starts_with("[rank 0] error:") && l.contains("rank 1 (") && l.ends_with(") died")),
        "the survivor names it: {said}"
    );
    assert!(said.contains("rank 1 failed first: signal: 9"), "{said}");
    assert_eq!(last_line(&killed)["resumed_exactly"], true, "{}", text(&killed));
    let model = |out: &Path| std::fs::read(out.join("trained/model.safetensors")).unwrap();
    assert!(model(&whole) == model(&broken), "the resumed run ended elsewhere");
    let average = |out: &Path| std::fs::read(out.join("trained_ema/model.safetensors")).unwrap();
    assert!(average(&whole) == average(&broken), "the average of the resumed run ended elsewhere");
    assert!(average(&whole) != model(&whole));
    let steps = |out: &Path| lightrft_strategy::MetricsLog::read(&out.join("metrics.jsonl")).unwrap();
    let states = |out| {
        steps(out).iter().map(|l| (l["step"].clone(), l["parameters_hash"].clone())).collect::<Vec<_>>()
    };
    assert_eq!(states(&whole), states(&broken));
    assert!(
        states(&whole).is_sorted_by(|(_, one), (_, next)| one != next),
        "every step moves the parameters"
    );
    assert_eq!(steps(&whole).len(), 6);
    assert!(steps(&whole).iter().all(|l| l["log_prob_gap"].as_f64().unwrap() < 1e-4));
    assert!(steps(&broken).iter().all(|l| l["offload"]["bytes"].as_u64().unwrap() > 0));

    // Rotation has kept two, and `latest` names the last.
    let mut kept: Vec<String> = std::fs::read_dir(broken.join("checkpoints"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("global_step"))
        .collect();
    kept.sort();
    assert_eq!(kept, ["global_step4", "global_step6"]);
    assert_eq!(std::fs::read_to_string(broken.join("checkpoints/latest")).unwrap().trim(), "global_step6");
    assert!(std::fs::read_to_string(broken.join("reward.svg")).unwrap().contains("<svg"));

    // A checkpoint of two ranks goes on with one.
    let config = broken.with_extension("toml");
    let more =
        ["--ranks", "1", "--steps", "7", "--seed", "5", "--resume", "--config", config.to_str().unwrap()];
    let resharded = run(&broken, &more);
    assert!(resharded.status.success(), "{}", text(&resharded));
    assert_eq!(last_line(&resharded)["steps"], 7);
}

#[test]
fn any_number_of_ranks_runs() {
    let folder = tempfile::tempdir().unwrap();
    for ranks in [1, 3, 4] {
        let output = small(&folder.path().join(ranks.to_string()), ranks, &["--kill-at", "0"]);
        assert!(output.status.success(), "{}", text(&output));
        let result = last_line(&output);
        assert_eq!((&result["ranks"], &result["steps"]), (&ranks.into(), &6.into()));
        assert!(result["accuracy_after"].as_f64().is_some() && result["tokens_per_s"].as_f64().is_some());
    }
}

/// Fails, names what it should, and leaves nothing behind.
fn refuses(arguments: &[&str], names: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let output = run(&out, arguments);
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    for name in names {
        assert!(said.contains(name), "{name:?} is not in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    let left: Vec<_> =
        std::fs::read_dir(&out).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[test]
fn bad_prompts_are_refused_with_file_and_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, lines: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, lines).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let good = "{\"prompt\": \"1+1=\", \"label\": \"2\"}\n";
    let broken = file("broken.jsonl", &format!("{good}{good}{{\"prompt\": \"1+\n{good}"));
    refuses(&["--prompts", &broken], &["broken.jsonl", "3"]);
    let without = file("without.jsonl", &format!("{good}{{\"prompt\": \"1+1=\"}}\n"));
    refuses(&["--prompts", &without], &["without.jsonl", "2", "label"]);
    refuses(&["--prompts", "/nowhere/at-all.jsonl"], &["/nowhere/at-all.jsonl"]);
    let empty = file("empty.jsonl", "");
    refuses(&["--held-out", &empty], &["empty.jsonl"]);
}

#[test]
fn prompts_that_do_not_fit_the_model_or_its_tokenizer_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let lines = |last: &str| {
        let mut text = String::new();
        for i in 0..80 {
            text += &format!("{{\"prompt\": \"{i}+1=\", \"label\": \"{}\"}}\n", i + 1);
        }
        text + &format!("{{\"prompt\": \"{last}\", \"label\": \"2\"}}\n")
    };
    for (name, prompt, names) in [
        ("long.jsonl", "1234567+1234567=", ["long.jsonl", "81", "16 tokens", "prompt_max_len = 12"]),
        ("letters.jsonl", "one+1=", ["letters.jsonl", "81", "one+1=", "tokenizer.json"]),
    ] {
        let path = folder.path().join(name);
        std::fs::write(&path, lines(prompt)).unwrap();
        for option in ["--prompts", "--held-out"] {
            refuses(&[option, path.to_str().unwrap()], &names);
        }
    }
}

#[test]
fn contradictions_are_refused_before_any_rank_starts() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("run.toml");
    std::fs::write(&config, "train_batch_size = 100\nmicro_train_batch_size = 3\n").unwrap();
    let config = config.to_str().unwrap();
    refuses(&["--config", config], &["train_batch_size = 100", "micro_train_batch_size = 3"]);
    refuses(&["--steps", "many"], &["many", "--steps"]);
    refuses(&["--stepps", "3"], &["--stepps"]);
    refuses(&["--ranks", "0"], &["--ranks"]);
}

#[test]
fn a_folder_that_holds_a_run_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    std::fs::create_dir_all(&out).unwrap();
    std::fs::write(out.join("metrics.jsonl"), "{\"step\": 1}\n").unwrap();
    let output = small(&out, 2, &["--kill-at", "0"]);
    assert!(!output.status.success() && text(&output).contains("--resume"), "{}", text(&output));
    assert_eq!(std::fs::read_to_string(out.join("metrics.jsonl")).unwrap(), "{\"step\": 1}\n");
}

#[test]
fn a_busy_port_is_an_error_that_names_it() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(program())
        .arg("--out")
        .arg(folder.path().join("out"))
        .envs([("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")])
        .env("MASTER_PORT", &port)
        .env_remove("TORCHELASTIC_USE_AGENT_STORE")
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(text(&output).contains(&port), "{}", text(&output));
}
