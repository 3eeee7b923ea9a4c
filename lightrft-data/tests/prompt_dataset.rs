//! Records become the prompts that LightRFT's data sets make of them; what LightRFT passes over in silence is an error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use lightrft_data::{
    BadLine, BadLines, DataLoader, Dataset, DistributedSampler, Error, InputTemplate, LineProblem,
    LoaderConfig, MediaKind, MediaProblem, MediaSource, PromptDataset, PromptFormat, PromptKeys,
    SamplerConfig, Shuffle, Tail, inputs_of,
};
use serde_json::{Value, json};

fn read(format: &PromptFormat, record: &Value) -> Result<lightrft_data::PromptRecord, LineProblem> {
    format.read(record.to_string().as_bytes())
}

#[cfg(feature = "templates")]
mod with_templates {
    use std::sync::Arc;

    use lightrft_data::{ChatTemplate, Media};
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Recorded {
        cases: Vec<Case>,
    }

    #[derive(Debug, Deserialize)]
    struct Case {
        record: String,
        input_template: Option<String>,
        chat: bool,
        system: Option<String>,
        prompt: String,
        label: Value,
        reference: Value,
        images: usize,
    }

    fn parts_template() -> Arc<ChatTemplate> {
        let templates: Value = serde_json::from_str(include_str!("data/chat_templates.json")).unwrap();
        let templates = templates["templates"].as_array().unwrap();
        let parts = templates.iter().find(|t| t["name"] == "parts").unwrap();
        Arc::new(ChatTemplate::new(parts["template"].as_str().unwrap()).unwrap())
    }

    fn chat() -> PromptFormat {
        PromptFormat { chat: Some(parts_template()), ..PromptFormat::default() }
    }

    #[test]
    fn every_recorded_prompt_of_lightrft_is_reproduced() {
        let recorded: Recorded = serde_json::from_str(include_str!("data/prompt_records.json")).unwrap();
        assert_eq!(recorded.cases.len(), 32);
        let mut marks_within = 0;
        for case in recorded.cases {
            let format = PromptFormat {
                input_template: case.input_template.as_deref().map(|t| InputTemplate::new(t).unwrap()),
                system_prompt: case.system.clone(),
                chat: case.chat.then(parts_template),
                ..PromptFormat::default()
            };
            let found = format.read(case.record.as_bytes()).unwrap();
            let image = "<|vision_start|><|image_pad|><|vision_end|>";
            if found.text == case.prompt {
                // Word for word.
            } else {
                // LightRFT puts the image in front wherever its mark stands; nothing else differs.
                let bare = |text: &str| text.replace(image, "");
                assert_eq!(bare(&found.text), bare(&case.prompt), "{case:?}");
                assert!(
                    case.record.contains("<image>") && found.text.matches(image).count() == 1,
                    "{case:?}"
                );
                marks_within += 1;
            }
            assert_eq!(found.label, case.label, "{case:?}");
            // An absent reference is "" in one of LightRFT's data sets and None in the other.
            let absent = case.reference.is_null() || case.reference == "";
            assert_eq!(
                found.reference,
                if absent { Value::Null } else { case.reference.clone() },
                "{case:?}"
            );
            assert_eq!(found.images.len(), case.images, "{case:?}");
        }
        assert_eq!(marks_within, 4, "the records with a mark behind other text");
    }

    #[test]
    fn every_image_and_video_has_its_place_in_the_conversation() {
        let record = json!({"label": 1, "images": ["1.png", {"path": "2.png"}], "videos": [["a.png", "b.png"]],
            "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "<image>what<video>?"},
                       {"role": "assistant", "content": "this"}, {"role": "user", "content": "<image>and?"}]});
        let found = read(&chat(), &record).unwrap();
        let (image, video) =
            ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>");
        assert_eq!(
            found.text,
            format!(
                "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{image}what{video}?<|im_end|>\n\
                <|im_start|>assistant\nthis<|im_end|>\n<|im_start|>user\n{image}and?<|im_end|>\n<|im_start|>assistant\n"
            )
        );
        let inputs = inputs_of(std::slice::from_ref(&found)).unwrap();
        assert_eq!(inputs[0].images[1], Media::One(MediaSource::Path("2.png".into())));
        assert_eq!(inputs[0].videos.len(), 1);
        // Without marks they stand in front of the first user's text.
        let text = |record: Value| read(&chat(), &record).map(|found| found.text);
        let front =
            text(json!({"label": 1, "images": ["1.png", "2.png"], "videos": ["a.mp4"], "prompt": "what?"}));
        assert!(front.unwrap().contains(&format!("user\n{image}{image}{video}what?")));
        // Marks for one kind do not speak for the other.
        let mixed =
            text(json!({"label": 1, "images": ["1.png"], "videos": ["a.mp4"], "prompt": "what<video>?"}));
        assert!(mixed.unwrap().contains(&format!("user\n{image}what{video}?")));
        let parts = json!([{"role": "user", "content": [{"type": "text", "text": "a<image>b"}]}]);
        let inside = text(json!({"label": 1, "images": ["1.png"], "prompt": parts}));
        assert!(inside.unwrap().contains(&format!("a{image}b")));
        for (prompt, parts) in [("<image>, <image> or <image>?", 3), ("<image>?", 1)] {
            let refused = text(json!({"label": 1, "images": ["1.png", "2.png"], "prompt": prompt}));
            assert_eq!(refused, Err(LineProblem::MediaParts { kind: MediaKind::Image, media: 2, parts }));
        }
        // Without media a mark is a word.
        assert!(
            text(json!({"label": 1, "prompt": "what is <image>?"})).unwrap().contains("what is <image>?")
        );
        // Parts that are there already are not doubled.
        let record = json!({"label": 1, "images": ["1.png"], "prompt": [{"role": "user", "content": [
            {"type": "text", "text": "see "}, {"type": "image"}, {"type": "text", "text": "?"}]}]});
        assert!(read(&chat(), &record).unwrap().text.contains(&format!("see {image}?")));
    }

    #[test]
    fn sounds_get_parts_where_their_marks_stand_and_are_counted() {
        // As Qwen2-Audio's template has them.
        let template = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}\
            {% if part.type == 'audio' or 'audio_url' in part %}<|audio_bos|><|AUDIO|><|audio_eos|>\
            {% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
            {% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}";
        let chat = Some(Arc::new(ChatTemplate::new(template).unwrap()));
        let format = PromptFormat { chat, ..PromptFormat::default() };
        let audio = "<|audio_bos|><|AUDIO|><|audio_eos|>";
        let image = "<|vision_start|><|image_pad|><|vision_end|>";
        let sounds = json!([{"audio": "a.wav"}, {"audio_url": {"url": "http://h/b.flac"}}]);
        let text = |prompt: Value, audios: Value, images: Value| {
            read(&format, &json!({"prompt": prompt, "label": 1, "audios": audios, "images": images}))
        };
        let found = text(json!("<audio>or<image>or<audio>?"), sounds.clone(), json!("i.png")).unwrap();
        assert_eq!(found.text, format!("{audio}or{image}or{audio}?"));
        let url = MediaSource::parse("http://h/b.flac").unwrap();
        assert_eq!(found.audios, [MediaSource::Path("a.wav".into()), url]);
        let batch = [found];
        let inputs = inputs_of(&batch).unwrap();
        assert_eq!((inputs[0].audios.len(), inputs[0].images.len()), (2, 1));
        let found = text(json!("which?"), sounds.clone(), Value::Null).unwrap();
        assert_eq!(found.text, format!("{audio}{audio}which?"));
        let kind = MediaKind::Audio;
        let one = text(json!("<audio>?"), sounds.clone(), Value::Null);
        assert_eq!(one, Err(LineProblem::MediaParts { kind, media: 2, parts: 1 }));
        let parts = json!([{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "?"}]}]);
        let none = text(parts, Value::Null, Value::Null);
        assert_eq!(none, Err(LineProblem::MediaParts { kind, media: 0, parts: 1 }));
        let list = text(json!("?"), json!([["a.wav"]]), Value::Null);
        assert!(
            matches!(list, Err(LineProblem::Medium { kind: MediaKind::Audio, place: 0, .. })),
            "{list:?}"
        );
        // A template that has no place for sounds loses them, which is seen at the batch.
        let deaf = ChatTemplate::new("{{ messages[0].role }}").unwrap();
        let deaf = PromptFormat { chat: Some(Arc::new(deaf)), ..PromptFormat::default() };
        let found = read(&deaf, &json!({"prompt": "?", "label": 1, "audios": sounds})).unwrap();
        let problem = MediaProblem::Placeholders { media: 2, blocks: 0 };
        match inputs_of(&[found]) {
            Err(Error::Media { prompt: 0, kind: MediaKind::Audio, problem: found }) => {
                assert_eq!(found, problem)
            }
            other => panic!("{other:?}"),
        };
    }

    #[test]
    fn messages_keep_their_fields_whichever_their_order_and_names() {
        let template = ChatTemplate::new("{{ messages | tojson }}").unwrap();
        let format = PromptFormat { chat: Some(Arc::new(template)), ..PromptFormat::default() };
        for (given, expected) in [
            (r#"{"role": "user", "content": "a", "z": 1, "y": 2}"#, None),
            (
                r#"{"content": "a", "z": 1, "role": "user"}"#,
                Some(r#"{"role": "user", "content": "a", "z": 1}"#),
            ),
            (
                r#"{"role": "user", "content": "a", "value": "b"}"#,
                Some(r#"{"role": "user", "content": "b"}"#),
            ),
            (
                r#"{"role": "x", "content": "a", "from": "gpt"}"#,
                Some(r#"{"role": "assistant", "content": "a"}"#),
            ),
        ] {
            // What stands under the same key before, and under others, is passed over.
            let line =
                format!(r#"{{"prompt": [], "other": [{{"role": 1}}], "label": 1, "prompt": [{given}]}}"#);
            let text = format.read(line.as_bytes()).unwrap().text;
            assert_eq!(text, format!("[{}]", expected.unwrap_or(given)));
        }
    }

    #[test]
    fn conversations_that_do_not_fit_are_refused_with_the_message() {
        let refused = |prompt: Value| read(&chat(), &json!({"prompt": prompt, "label": 1})).unwrap_err();
        let user = json!({"role": "user", "content": "a"});
        for (bad, wants) in [
            (json!({"content": "a"}), "role"),
            (json!({"from": "robot", "value": "a"}), "role"),
            (json!({"role": 3, "content": "a"}), "role"),
            (json!({"role": "user"}), "content"),
            (json!({"role": "user", "content": 3}), "content"),
            (json!(["a"]), "object"),
        ] {
            match refused(json!([user, bad])) {
                LineProblem::Message { index: 1, expected } => {
                    assert!(expected.contains(wants), "{expected}")
                }
                other => panic!("{bad}: {other}"),
            }
        }
        assert!(matches!(refused(json!([])), LineProblem::Message { index: 0, .. }));
        assert!(matches!(refused(json!(3)), LineProblem::WrongType { found: "a number", .. }));
        let parts = json!([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]);
        assert_eq!(
            refused(parts.clone()),
            LineProblem::MediaParts { kind: MediaKind::Image, media: 0, parts: 1 }
        );
        let two = json!({"prompt": parts, "label": 1, "images": ["a", "b"]});
        assert_eq!(
            read(&chat(), &two).unwrap_err(),
            LineProblem::MediaParts { kind: MediaKind::Image, media: 2, parts: 1 }
        );
        let nobody = json!({"prompt": [{"role": "assistant", "content": "a"}], "label": 1, "images": ["a"]});
        assert!(matches!(read(&chat(), &nobody), Err(LineProblem::MediaParts { media: 1, parts: 0, .. })));
        let strict = ChatTemplate::new("{{ raise_exception('no') }}").unwrap();
        let format = PromptFormat { chat: Some(Arc::new(strict)), ..PromptFormat::default() };
        let problem = read(&format, &json!({"prompt": "a", "label": 1})).unwrap_err();
        assert!(matches!(&problem, LineProblem::Template { message } if message.contains("no")), "{problem}");
    }

    #[test]
    fn calls_of_tools_keep_their_fields_in_order() {
        let record = r#"{"label": 1, "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null,
            "tool_calls": [{"zeta": 1, "alpha": {"y": 2, "b": 3.0}}]}]}"#;
        let template = ChatTemplate::new("{{ messages[1].tool_calls | tojson }}").unwrap();
        let format = PromptFormat { chat: Some(Arc::new(template)), ..PromptFormat::default() };
        let text = format.read(record.as_bytes()).unwrap().text;
        assert_eq!(text, r#"[{"zeta": 1, "alpha": {"y": 2, "b": 3.0}}]"#);
    }
}

#[test]
fn input_templates_are_pythons_without_its_silences() {
    let fill = |template: &str| InputTemplate::new(template).map(|t| t.fill("{p}"));
    assert_eq!(fill("a {} b").unwrap(), "a {p} b");
    assert_eq!(fill("{0}{0}{{}}").unwrap(), "{p}{p}{}");
    assert_eq!(fill("{{{}}}").unwrap(), "{{p}}");
    for bad in
        ["", "no place", "{{}}", "{} {}", "{{0}} {} {}", "{} {0}", "{0}{}", "{name}", "{1}", "{", "}", "{}}"]
    {
        assert!(matches!(fill(bad), Err(Error::Template { action: "read the input template", .. })), "{bad}");
    }
}

#[test]
fn keys_are_looked_for_where_lightrft_looks_and_missing_ones_are_named() {
    let plain = PromptFormat::default();
    let problem = |record: Value| read(&plain, &record).unwrap_err();
    let missing = |problem| match problem {
        LineProblem::MissingKey { key, present } => (key, present),
        other => panic!("{other}"),
    };
    assert_eq!(missing(problem(json!({"label": 1, "x": 2}))), ("prompt".into(), "label, x".into()));
    assert_eq!(missing(problem(json!({"prompt": "a", "label": null}))).0, "label");
    assert!(matches!(problem(json!({"prompt": 3, "label": 1})), LineProblem::WrongType { .. }));
    assert!(matches!(
        problem(json!({"prompt": [{"role": "user", "content": "a"}], "label": 1})),
        LineProblem::ChatPrompt { messages: 1, .. }
    ));
    assert!(matches!(problem(json!([1])), LineProblem::NotAnObject { .. }));
    let keys = PromptKeys {
        input: Some("q".into()),
        label: None,
        images: "i".into(),
        videos: "v".into(),
        audios: "audio_path".into(),
    };
    let own = PromptFormat { keys, ..PromptFormat::default() };
    let found = read(
        &own,
        &json!({"q": "a", "input": "b", "i": "x.png", "images": 3, "v": ["y.mp4"], "audio_path": "z.wav"}),
    )
    .unwrap();
    assert_eq!((found.text.as_str(), found.label), ("a", Value::Null));
    assert_eq!(found.images, [MediaSource::Path("x.png".into())]);
    assert_eq!(found.videos, [MediaSource::Path("y.mp4".into())]);
    assert_eq!(found.audios, [MediaSource::Path("z.wav".into())]);
}

#[test]
fn integers_that_would_lose_digits_are_refused_by_line() {
    let read = |label: &str| {
        PromptFormat::default().read(format!(r#"{{"prompt": "a", "label": {label}}}"#).as_bytes())
    };
    for kept in
        ["18446744073709551615", "-9223372036854775808", "1e30", "2.0e19", r#"["99999999999999999999"]"#]
    {
        assert!(read(kept).is_ok(), "{kept}");
    }
    assert_eq!(read("18446744073709551615").unwrap().label, u64::MAX);
    for lost in ["18446744073709551616", "-9223372036854775809"] {
        for label in [lost.to_owned(), format!(r#"{{"\" 1": [1e30, {lost}]}}"#)] {
            match read(&label) {
                Err(LineProblem::Integer { text }) => assert_eq!(text, lost),
                other => panic!("{label}: {other:?}"),
            }
        }
    }
}

#[test]
fn media_that_are_none_are_named_by_their_place() {
    for (images, at) in
        [(json!([3]), 0), (json!(["a.png", ""]), 1), (json!([["a.png"]]), 0), (json!(true), 0)]
    {
        match read(&PromptFormat::default(), &json!({"prompt": "a", "label": 1, "images": images})) {
            Err(LineProblem::Medium { kind: MediaKind::Image, place, .. }) => {
                assert_eq!(place, at, "{images}")
            }
            other => panic!("{images}: {other:?}"),
        }
    }
}

#[test]
fn records_without_a_place_for_their_image_do_not_reach_the_engine() {
    let record =
        read(&PromptFormat::default(), &json!({"prompt": "a", "label": 1, "images": ["a.png"]})).unwrap();
    let text = read(&PromptFormat::default(), &json!({"prompt": "b", "label": 1})).unwrap();
    match inputs_of(&[text, record]) {
        Err(Error::Media { prompt: 1, kind: MediaKind::Image, problem }) => {
            assert_eq!(problem, MediaProblem::Placeholders { media: 1, blocks: 0 });
        }
        other => panic!("{other:?}"),
    }
}

const LINES: &str = "{\"prompt\": \"a\", \"label\": 1}\n\n{\"prompt\": 2, \"label\": 1}\n{\"prompt\": \"c\", \"label\": 3}\nnonsense\n";

fn open(bad_lines: BadLines) -> Result<PromptDataset, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.jsonl");
    std::fs::write(&path, LINES).unwrap();
    PromptDataset::open(path, PromptFormat::default(), bad_lines)
}

fn bad_line(error: Error) -> BadLine {
    match error {
        Error::BadLine(bad) => bad,
        other => panic!("{other:?}"),
    }
}

#[test]
fn bad_records_are_refused_skipped_or_left_until_they_are_read() {
    let refused = bad_line(open(BadLines::Refuse).unwrap_err());
    assert_eq!(refused.line, 3);
    assert!(refused.to_string().contains("p.jsonl:3: `prompt` must be a string"), "{refused}");
    let skipping = open(BadLines::Skip).unwrap();
    assert_eq!((skipping.len(), skipping.skipped().count), (2, 2));
    assert_eq!(skipping.skipped().first[1].line, 5);
    assert_eq!(skipping.get(1).unwrap().label, 3);
    assert!(skipping.locate(1).ends_with("p.jsonl:4"));
    assert!(matches!(skipping.get(2), Err(Error::IndexOutOfRange { index: 2, len: 2 })));
    let late = open(BadLines::RefuseOnRead).unwrap();
    assert_eq!(late.len(), 4);
    assert_eq!(bad_line(late.get(3).unwrap_err()).line, 5);
    assert!(matches!(late.get(4), Err(Error::IndexOutOfRange { .. })));
}

#[test]
fn a_loader_hands_out_formatted_records() {
    let dataset = open(BadLines::Skip).unwrap();
    let config =
        SamplerConfig { len: 2, rank: 0, world: 1, seed: 0, shuffle: Shuffle::InOrder, tail: Tail::Pad };
    let sampler = DistributedSampler::new(config).unwrap();
    let mut loader =
        DataLoader::new(dataset, sampler, LoaderConfig { workers: 2, ..LoaderConfig::new(2) }).unwrap();
    let batch = loader.next_batch().unwrap().unwrap();
    assert_eq!(batch.samples.iter().map(|s| s.text.as_str()).collect::<Vec<_>>(), ["a", "c"]);
}
