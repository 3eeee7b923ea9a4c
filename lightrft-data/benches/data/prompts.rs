//! Prompts with their media, beside LightRFT's steps in Python, and chat templates, beside the tokenizer alone

use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use lightrft_data::{Media, MediaColumn, MediaColumns, Mode, MultimodalInput, build_multimodal_inputs};

use crate::Options;
use crate::peer::Taken;
use crate::report::{Measured, Row, Target, Unit};

pub(crate) fn measure(options: &Options) -> Result<Vec<Row>, Box<dyn Error>> {
    let rows = multimodal(options)?;
    #[cfg(all(feature = "templates", feature = "tokenizer"))]
    let rows = rows.into_iter().chain(chat(options)?).collect();
    Ok(rows)
}

/// A prompt of about 400 bytes; `benches/peers/prompts.py` makes the same ones. Of three, one has two images, one has
/// one, and one has none but a block to be taken out.
fn prompt(index: usize) -> String {
    const IMAGE: &str = "<|vision_start|><|image_pad|><|vision_end|>";
    let blocks = IMAGE.repeat([2, 1, 1][index % 3]);
    let words = "What do the pictures show, and how many of the things in them are red? ".repeat(4);
    format!("<|im_start|>user\n{blocks}{index}: {words}<|im_end|>\n<|im_start|>assistant\n")
}

fn multimodal(options: &Options) -> Result<Vec<Row>, Box<dyn Error>> {
    const PROMPTS: usize = 10_000;
    let mut rows = Vec::new();
    for (name, nested) in [("nested", true), ("flat", false)] {
        let what = format!("multimodal/{name}/{PROMPTS} prompts");
        if !options.wants(&what) {
            continue;
        }
        let prompts: Vec<_> = (0..PROMPTS).map(prompt).collect();
        let images = |index: usize| (0..[2, 1, 0][index % 3]).map(|_| Media::One("image.png"));
        let counts: Vec<_> = (0..PROMPTS).map(|index| Some([2, 1, 0][index % 3])).collect();
        let entries: Vec<_> = match nested {
            true => (0..PROMPTS).map(|index| Media::Group(images(index).collect())).collect(),
            false => (0..PROMPTS).flat_map(images).collect(),
        };
        let images = MediaColumn { entries: Some(&entries), counts: Some(&counts) };
        let media = MediaColumns { images, ..MediaColumns::default() };
        let (mut strict, mut lightrft, mut python) = (Vec::new(), Vec::new(), Vec::new());
        let mut owned = Vec::new();
        for round in 0..=options.rounds * 4 {
            for (mode, times) in [(Mode::Strict, &mut strict), (Mode::LightRft, &mut lightrft)] {
                let begin = Instant::now();
                let inputs = build_multimodal_inputs(&prompts, media, mode)?;
                let seconds = begin.elapsed().as_secs_f64();
                black_box(inputs);
                if round > 0 {
                    times.push(seconds);
                }
            }
            let begin = Instant::now();
            let inputs = build_multimodal_inputs(&prompts, media, Mode::Strict)?;
            let inputs: Vec<_> = inputs.into_iter().map(MultimodalInput::into_owned).collect();
            let seconds = begin.elapsed().as_secs_f64();
            black_box(inputs);
            if round > 0 {
                owned.push(seconds);
            }
            if options.python.is_some() && round > 0 && round.is_multiple_of(4) {
                python.push(peer_once(name, PROMPTS)?);
            }
        }
        let mut row = Row::new(what, Unit::Milliseconds, Measured::of("ours", strict).ok_or("no times")?);
        if let Some(python) = Measured::taken("python", &python) {
            let met = python.median() >= 10.0 * row.ours.median();
            row.targets.push(Target { text: "10x python".into(), met });
            row.others.push(python);
        }
        row.others.extend(Measured::of("LightRft mode", lightrft));
        row.others.extend(Measured::of("texts and lists copied", owned));
        rows.push(row);
    }
    Ok(rows)
}

/// The peer's time for as many prompts, in a process of its own.
fn peer_once(name: &str, prompts: usize) -> Result<Taken, Box<dyn Error>> {
    let program = std::env::var("LIGHTRFT_PYTHON").unwrap_or_else(|_| "python3".into());
    let mut command = Command::new(program);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/prompts.py"));
    command.args([name, &prompts.to_string()]);
    Taken::of(command)
}

/// A conversation is read, rendered and tokenized; the tokenizer alone is given the text.
#[cfg(all(feature = "templates", feature = "tokenizer"))]
fn chat(options: &Options) -> Result<Vec<Row>, Box<dyn Error>> {
    use std::sync::Arc;

    use lightrft_data::{ChatTemplate, PromptFormat, PromptTokenizer, TokenizeConfig, Truncation};
    use serde_json::Value;
    use tokenizers::Tokenizer;

    const PROMPTS: usize = 1_000;
    let what = format!("chat template and tokens/{PROMPTS} prompts");
    if !options.wants(&what) {
        return Ok(Vec::new());
    }
    let recorded: Value = serde_json::from_str(include_str!("../../tests/data/tokenizer.json"))?;
    let tokenizer = std::env::var("LIGHTRFT_TOKENIZER").ok().map(std::fs::read).transpose()?;
    let tokenizer = tokenizer.unwrap_or_else(|| recorded["tokenizer"].to_string().into_bytes());
    let alone = Tokenizer::from_bytes(&tokenizer).map_err(|e| e.to_string())?;
    let config = TokenizeConfig { max_tokens: 1 << 20, truncation: Truncation::Refuse };
    let tokenizer = PromptTokenizer::from_bytes(&tokenizer, config)?;
    let templates: Value = serde_json::from_str(include_str!("../../tests/data/chat_templates.json"))?;
    let template = templates["templates"][0]["template"].as_str().ok_or("no template")?;
    let chat = Some(Arc::new(ChatTemplate::new(template)?));
    let format = PromptFormat { chat, ..PromptFormat::default() };

    let words = "A train leaves at nine and another one an hour later, twice as fast. ".repeat(6);
    let line = |index| {
        let messages = [
            serde_json::json!({"role": "system", "content": "Think step by step, then give the answer alone."}),
            serde_json::json!({"role": "user", "content": format!("{index}: {words} When do they meet?")}),
        ];
        serde_json::json!({"prompt": messages, "label": "noon"}).to_string()
    };
    let lines: Vec<String> = (0..PROMPTS).map(line).collect();
    let texts = lines.iter().map(|line| Ok(format.read(line.as_bytes())?.text));
    let texts = texts.collect::<Result<Vec<_>, lightrft_data::LineProblem>>()?;
    let (mut both, mut only, mut read) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=options.rounds * 2 {
        let begin = Instant::now();
        for text in &texts {
            let encoding = alone.encode_fast(text.as_str(), false).map_err(|e| e.to_string())?;
            black_box(encoding.get_ids().to_vec());
        }
        let alone = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        for line in &lines {
            black_box(tokenizer.encode(&format.read(line.as_bytes())?.text)?);
        }
        let ours = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        for line in &lines {
            black_box(format.read(line.as_bytes())?);
        }
        if round > 0 {
            read.push(begin.elapsed().as_secs_f64());
            both.push(ours);
            only.push(alone);
        }
    }
    let mut row = Row::new(what, Unit::Milliseconds, Measured::of("ours", both).ok_or("no times")?);
    let only = Measured::of("tokenizers alone", only).ok_or("no times")?;
    let met = only.median() >= 0.9 * row.ours.median();
    row.targets.push(Target { text: "0.9x tokenizers".into(), met });
    row.others.push(only);
    row.others.extend(Measured::of("template without tokens", read));
    Ok(vec![row])
}
