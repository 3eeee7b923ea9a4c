//! Chat templates render what transformers renders with them, byte for byte.
#![cfg(feature = "templates")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::HashMap;

use lightrft_data::{ChatOptions, ChatTemplate, Error, GenerationPrompt, OrderedJson};
use serde::Deserialize;

#[derive(Deserialize)]
struct Recorded {
    templates: Vec<Named>,
    tools: String,
    chats: Vec<Chat>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

#[derive(Deserialize)]
struct Chat {
    name: String,
    messages: String,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    chat: String,
    tools: bool,
    add_generation_prompt: bool,
    text: Option<String>,
    error: Option<String>,
}

/// Every case that differs, and how many there are in all.
fn differences(recorded: &Recorded) -> (Vec<String>, usize) {
    let templates: HashMap<_, _> = recorded
        .templates
        .iter()
        .map(|named| {
            let template = ChatTemplate::new(&named.template).and_then(|t| t.with_date(2026, 7, 4));
            (
                named.name.as_str(),
                template.map(|t| t.with_variable("bos_token", "<s>").with_variable("eos_token", "</s>")),
            )
        })
        .collect();
    let chats: HashMap<_, _> = recorded
        .chats
        .iter()
        .map(|chat| (chat.name.as_str(), OrderedJson::parse(&chat.messages).unwrap()))
        .collect();
    let mut different = Vec::new();
    for case in &recorded.cases {
        let mut options = ChatOptions::default();
        if !case.add_generation_prompt {
            options.generation_prompt = GenerationPrompt::Omit;
        }
        if case.tools {
            options.tools = Some(OrderedJson::parse(&recorded.tools).unwrap());
            options.variables.push(("add_vision_id".into(), OrderedJson::of(&true)));
        }
        let what = format!(
            "{} / {} / tools {} / {}",
            case.template, case.chat, case.tools, case.add_generation_prompt
        );
        let rendered = match &templates[case.template.as_str()] {
            Ok(template) => template.render(&chats[case.chat.as_str()], &options).map_err(|e| e.to_string()),
            Err(e) => Err(e.to_string()),
        };
        match (rendered, &case.text, &case.error) {
            (Ok(found), Some(expected), _) if found == *expected => {}
            (Err(_), None, Some(_)) => {}
            (found, expected, error) => {
                different.push(format!("{what}\n  found    {found:?}\n  expected {expected:?} {error:?}"));
            }
        }
    }
    (different, recorded.cases.len())
}

#[test]
fn every_recorded_conversation_is_rendered_as_transformers_renders_it() {
    let recorded: Recorded = serde_json::from_str(include_str!("data/chat_templates.json")).unwrap();
    let (different, cases) = differences(&recorded);
    assert!(different.is_empty(), "{}", different.join("\n"));
    assert_eq!(cases, 64);
}

/// The templates of models are not kept here; `tools/make_chat_vectors.py` says how to compare with them.
#[test]
#[ignore = "reads the vectors named by LIGHTRFT_CHAT_VECTORS"]
fn templates_of_models_render_as_in_transformers() {
    let path = std::env::var("LIGHTRFT_CHAT_VECTORS").expect("LIGHTRFT_CHAT_VECTORS names a file");
    let recorded: Recorded = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let (different, cases) = differences(&recorded);
    assert!(different.is_empty(), "{}\n{} of {cases} differ", different.join("\n"), different.len());
}

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> (&'static str, String) {
    match result {
        Err(Error::Template { action, message }) => (action, message),
        other => panic!("{other:?}"),
    }
}

fn render(template: &str) -> Result<String, Error> {
    let messages = OrderedJson::parse(r#"[{"role": "user", "content": "a"}]"#).unwrap();
    ChatTemplate::new(template)?.render(&messages, &ChatOptions::default())
}

#[test]
fn what_a_template_raises_and_where_it_breaks_is_said() {
    let (action, message) = refused(render("\n\n{{ raise_exception('Roles must alternate') }}"));
    assert_eq!((action, message.as_str()), ("render", "Roles must alternate (line 3)"));
    let (action, message) = refused(render("a\n{% if %}"));
    assert!(action == "compile" && message.contains("line 2"), "{message}");
    assert_eq!(refused(render("{{ messages.nothing.more }}")).0, "render");
    assert_eq!(refused(render("{{ 'x' | no_such_filter }}")).0, "render");
    assert_eq!(refused(render("{{ messages | tojson(colour=1) }}")).0, "render");
    assert_eq!(refused(render("{{ strftime_now('%!') }}")).0, "render");
    assert_eq!(refused(OrderedJson::parse("[1,")).0, "read JSON");
}

#[test]
fn a_template_that_does_not_end_is_ended() {
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    assert!(refused(render(endless)).1.contains("fuel"));
    assert_eq!(refused(render("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}")).0, "render");
}

#[test]
fn a_template_that_prints_without_measure_is_ended() {
    let much = "{% set a = 'x' * 1048576 %}{% for i in range(N) %}{{ a }}{% endfor %}";
    assert_eq!(render(&much.replace('N', "64")).unwrap().len(), 64 << 20);
    let (action, message) = refused(render(&much.replace('N', "65")));
    assert!(action == "render" && message.contains("67108864 bytes"), "{message}");
}

#[test]
fn the_day_is_the_callers_or_todays() {
    let template = "{{ strftime_now('%Y-%m-%d %H:%M') }}";
    let messages = OrderedJson::parse("[]").unwrap();
    let fixed = ChatTemplate::new(template).unwrap().with_date(2024, 2, 29).unwrap();
    assert_eq!(fixed.render(&messages, &ChatOptions::default()).unwrap(), "2024-02-29 00:00");
    assert_eq!(render("{{ strftime_now('%Y')|int > 2025 }}").unwrap(), "True");
    assert_eq!(refused(ChatTemplate::new(template).unwrap().with_date(2023, 2, 29)).0, "set the day");
}

#[test]
fn a_tokenizers_configuration_brings_template_and_special_tokens() {
    let messages = OrderedJson::parse("[]").unwrap();
    let config = |chat_template: &str| {
        format!(
            r#"{{"bos_token": "<s>", "eos_token": {{"content": "</s>", "lstrip": false}}, "pad_token": null,
            "chat_template": {chat_template}}}"#
        )
    };
    let render = |template: ChatTemplate| template.render(&messages, &ChatOptions::default()).unwrap();
    let one = ChatTemplate::from_tokenizer_config(
        &config(r#""{{ bos_token }}{{ eos_token }}{{ pad_token }}""#),
        None,
    );
    assert_eq!(render(one.unwrap()), "<s></s>");
    let several = config(r#"[{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}]"#);
    assert_eq!(render(ChatTemplate::from_tokenizer_config(&several, None).unwrap()), "d");
    assert_eq!(render(ChatTemplate::from_tokenizer_config(&several, Some("rag")).unwrap()), "r");
    for (json, name) in [(several.as_str(), Some("none")), ("{}", None), (&config("null"), None)] {
        let (action, message) = refused(ChatTemplate::from_tokenizer_config(json, name));
        assert!(action == "find" && message.contains(name.unwrap_or("default")), "{message}");
    }
    assert_eq!(refused(ChatTemplate::from_tokenizer_config(&config("3"), None)).0, "read");
}

/// A folder of these files, each a path and its content.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
    folder
}

fn from(files: &[(&str, &str)], name: Option<&str>) -> Result<String, Error> {
    let folder = folder(files);
    let messages = OrderedJson::parse("[]").unwrap();
    ChatTemplate::from_folder(&folder, name)?.render(&messages, &ChatOptions::default())
}

const CONFIG: (&str, &str) = ("tokenizer_config.json", r#"{"chat_template": "config", "bos_token": "<s>"}"#);
const JINJA: (&str, &str) = ("chat_template.jinja", "jinja {{ bos_token }}\n");
const RAG: (&str, &str) = ("additional_chat_templates/rag.jinja", "rag");
const LEGACY: (&str, &str) = ("chat_template.json", r#"{"chat_template": "legacy"}"#);
const PROCESSOR: (&str, &str) = ("processor_config.json", r#"{"chat_template": "processor"}"#);

#[test]
fn a_folders_templates_are_taken_in_the_order_of_transformers() {
    for (files, name, expected) in [
        (vec![CONFIG], None, "config"),
        (vec![CONFIG], Some("default"), "config"),
        (vec![CONFIG, JINJA], None, "jinja <s>"),
        (vec![JINJA], None, "jinja "),
        (vec![CONFIG, JINJA, RAG], None, "jinja <s>"),
        (vec![CONFIG, JINJA, RAG], Some("rag"), "rag"),
        (vec![CONFIG, JINJA, LEGACY], None, "legacy"),
        (vec![CONFIG, JINJA, LEGACY, PROCESSOR], None, "processor"),
        (vec![("processor_config.json", "{}"), CONFIG], None, "config"),
        (vec![("additional_chat_templates/notes.txt", "{{"), CONFIG], None, "config"),
        (vec![("chat_template.jinja", "a\r\n{% if true %}\r\nb\rc{% endif %}\r\n")], None, "a\nb\nc"),
    ] {
        assert_eq!(from(&files, name).unwrap(), expected, "{files:?}");
    }
}

#[test]
fn files_of_a_folder_that_do_not_do_are_named() {
    let bad_jinja = ("chat_template.jinja", "a\n{% if %}");
    let bad_tool = ("additional_chat_templates/tool_use.jinja", "{{");
    for (files, name, action, named) in [
        (vec![CONFIG, RAG], None, "find", "rag, none named `default`"),
        (vec![CONFIG, JINJA, RAG], Some("cot"), "find", "default, rag, none named `cot`"),
        (vec![], None, "find", "no chat template"),
        (vec![CONFIG, LEGACY, RAG, PROCESSOR], None, "choose", "rag.jinja"),
        (vec![("chat_template.json", "{}"), JINJA], None, "find", "chat_template.json"),
        (vec![bad_jinja], None, "compile", "chat_template.jinja: "),
        (vec![JINJA, bad_tool], None, "compile", "tool_use.jinja: "),
        (vec![("tokenizer_config.json", "[]")], None, "read", "tokenizer_config.json: "),
        (vec![("tokenizer_config.json", r#"{"chat_template": 3}"#)], None, "read", "tokenizer_config.json: "),
        (vec![JINJA, ("special_tokens_map.json", "{")], None, "read", "special_tokens_map.json: "),
    ] {
        let (found, message) = refused(from(&files, name));
        assert!(found == action && message.contains(named), "{found}: {message}");
    }
    let no_text = folder(&[]);
    std::fs::write(no_text.path().join("chat_template.jinja"), [0xff]).unwrap();
    match ChatTemplate::from_folder(&no_text, None) {
        Err(Error::Io { action: "read", path, .. }) => assert!(path.ends_with("chat_template.jinja")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn conversations_with_tools_are_rendered_by_the_template_for_them() {
    let files = [
        ("chat_template.jinja", "plain {{ strftime_now('%Y') }}"),
        ("additional_chat_templates/tool_use.jinja", "tools {{ strftime_now('%Y') }} {{ eos_token }}"),
        ("tokenizer_config.json", r#"{"eos_token": {"content": "</s>"}}"#),
    ];
    let folder = folder(&files);
    let messages = OrderedJson::parse("[]").unwrap();
    let with_tools = ChatOptions { tools: Some(OrderedJson::parse("[]").unwrap()), ..ChatOptions::default() };
    let text = |name, options: &ChatOptions| {
        let template = ChatTemplate::from_folder(&folder, name).unwrap().with_date(2020, 1, 1).unwrap();
        template.render(&messages, options).unwrap()
    };
    assert_eq!(text(None, &ChatOptions::default()), "plain 2020");
    assert_eq!(text(None, &with_tools), "tools 2020 </s>");
    assert_eq!(text(Some("default"), &with_tools), "plain 2020");
    assert_eq!(text(Some("tool_use"), &ChatOptions::default()), "tools 2020 </s>");
}

#[test]
fn special_tokens_come_from_the_map_only_where_the_configuration_is_old() {
    let template = (
        "chat_template.jinja",
        "{{ bos_token }} {{ eos_token }} {{ pad_token }} {{ image_token }} {{ cat }}",
    );
    let map = ("special_tokens_map.json", r#"{"bos_token": {"content": "<map>"}, "pad_token": "<pad>"}"#);
    let config = |more: &str| {
        format!(
            r#"{{"bos_token": "<s>", "eos_token": {{"__type": "AddedToken", "content": "</s>"}}, "add_bos_token": true,
            "image_token": "<img>", "extra_special_tokens": {{"cat": "<cat>"}}{more}}}"#
        )
    };
    for (more, expected) in
        [("", "<map> </s> <pad> <img> <cat>"), (r#", "added_tokens_decoder": {}"#, "<s> </s>  <img> <cat>")]
    {
        let config = config(more);
        assert_eq!(from(&[template, map, ("tokenizer_config.json", &config)], None).unwrap(), expected);
    }
}
