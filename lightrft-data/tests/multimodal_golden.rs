//! In LightRFT's mode media fall to prompts as LightRFT deals them; in strict mode its traps are errors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use lightrft_data::{
    Error, Media, MediaColumn, MediaColumns, MediaKind, MediaProblem, Mode, MultimodalInput,
    build_multimodal_inputs, is_multimodal,
};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value;

#[derive(Debug, Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Debug, Deserialize)]
struct Case {
    id: usize,
    prompts: Vec<String>,
    images: Value,
    images_num: Option<Vec<Option<i64>>>,
    videos: Value,
    videos_num: Option<Vec<Option<i64>>>,
    is_multimodal: bool,
    output: Option<Vec<Output>>,
    error: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Output {
    prompt: String,
    #[serde(default)]
    multi_modal_data: Data,
}

#[derive(Debug, Default, Deserialize)]
struct Data {
    #[serde(default)]
    image: Value,
    #[serde(default)]
    video: Value,
}

fn media(value: &Value) -> Media<Value> {
    match value {
        Value::Null => Media::Missing,
        Value::Array(group) => Media::Group(group.iter().map(media).collect()),
        one => Media::One(one.clone()),
    }
}

/// A list of media; Python also takes a string for one, of characters.
fn list(value: &Value) -> Option<Vec<Media<Value>>> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.chars().map(|c| Media::One(c.to_string().into())).collect()),
        Value::Array(entries) => Some(entries.iter().map(media).collect()),
        other => panic!("{other}"),
    }
}

fn build(case: &Case, mode: Mode) -> Result<Vec<MultimodalInput<'static, Value>>, Error> {
    let (images, videos) = (list(&case.images), list(&case.videos));
    let images = MediaColumn { entries: images.as_deref(), counts: case.images_num.as_deref() };
    let videos = MediaColumn { entries: videos.as_deref(), counts: case.videos_num.as_deref() };
    let media = MediaColumns { images, videos, ..MediaColumns::default() };
    assert_eq!(is_multimodal(&media), case.is_multimodal, "case {}", case.id);
    let inputs = build_multimodal_inputs(&case.prompts, media, mode)?;
    Ok(inputs.into_iter().map(MultimodalInput::into_owned).collect())
}

fn golden() -> Vec<Case> {
    let golden: Golden = serde_json::from_str(include_str!("data/multimodal.json")).unwrap();
    assert_eq!(golden.cases.len(), 104);
    golden.cases
}

#[test]
fn every_case_of_lightrft_is_reproduced() {
    for case in golden() {
        match (build(&case, Mode::LightRft), &case.output) {
            (Ok(inputs), Some(output)) => {
                assert_eq!(inputs.len(), output.len(), "case {}", case.id);
                for (input, expected) in inputs.iter().zip(output) {
                    assert_eq!(input.prompt, expected.prompt, "case {}", case.id);
                    let data = &expected.multi_modal_data;
                    assert_eq!(*input.images, *list(&data.image).unwrap_or_default(), "case {}", case.id);
                    assert_eq!(*input.videos, *list(&data.video).unwrap_or_default(), "case {}", case.id);
                }
            }
            (Err(Error::Media { problem, .. }), None) => match case.error.as_deref().unwrap() {
                "IndexError" => assert!(matches!(problem, MediaProblem::CountsLength { .. })),
                "TypeError" => assert_eq!(problem, MediaProblem::MissingCount),
                other => panic!("{other}"),
            },
            (result, _) => panic!("case {}: {result:?}", case.id),
        }
    }
}

#[test]
fn what_strict_mode_lets_through_is_what_lightrft_gives() {
    let mut passed = Vec::new();
    for case in golden() {
        if let Ok(strict) = build(&case, Mode::Strict) {
            assert_eq!(strict, build(&case, Mode::LightRft).unwrap(), "case {}", case.id);
            passed.push(case.id);
        }
    }
    // Plain uses: no media, whole blocks stripped, nested, flat, both kinds, mixed batches, several samples a prompt.
    for id in [0, 1, 2, 3, 4, 5, 6, 15, 16, 17, 19, 23, 24, 39, 40, 60, 61, 64, 77] {
        assert!(passed.contains(&id), "case {id} is in order and must pass");
    }
}

const IMAGE: &str = "<|vision_start|><|image_pad|><|vision_end|>";
const VIDEO: &str = "<|vision_start|><|video_pad|><|vision_end|>";

fn texts(blocks: &[usize]) -> Vec<String> {
    blocks.iter().map(|&n| IMAGE.repeat(n) + "what?").collect()
}

fn one(name: &'static str) -> Media<&'static str> {
    Media::One(name)
}

fn group(names: &[&'static str]) -> Media<&'static str> {
    Media::Group(names.iter().copied().map(Media::One).collect())
}

fn of_images<M>(images: MediaColumn<'_, M>) -> MediaColumns<'_, M> {
    MediaColumns { images, ..MediaColumns::default() }
}

/// The prompt that strict mode names, and the problem that it sees.
fn refused(
    prompts: &[String],
    images: &[Media<&'static str>],
    counts: Option<&[Option<i64>]>,
) -> (usize, MediaProblem) {
    let images = MediaColumn { entries: Some(images), counts };
    match build_multimodal_inputs(prompts, of_images(images), Mode::Strict) {
        Err(Error::Media { prompt, problem, .. }) => (prompt, problem),
        other => panic!("{other:?}"),
    }
}

#[test]
fn strict_mode_names_the_prompt_of_every_trap() {
    use MediaProblem as P;
    let n = |counts: &[i64]| counts.iter().copied().map(Some).collect::<Vec<_>>();

    // A group with another number than its count would be cut out of the list of groups, and shift the rest.
    let found = refused(&texts(&[1, 1]), &[group(&["a"]), group(&["b", "c"])], Some(&n(&[1, 1])));
    assert_eq!(found, (1, P::WrongCount { count: 1, found: 2 }));
    // Images without counts would vanish, with the tokens that ask for them.
    let found = refused(&texts(&[1]), &[one("a")], None);
    assert_eq!(found, (0, P::NoCounts { entries: 1 }));
    // Flat and nested at once.
    let found = refused(&texts(&[1, 1]), &[group(&["a"]), one("b")], Some(&n(&[1, 1])));
    assert!(matches!(found, (1, P::MixedForms { entry: 1, .. })), "{found:?}");
    // An empty list for a prompt without images looks nested to LightRFT, whatever the others are.
    let found = refused(&texts(&[0, 1]), &[group(&[]), one("b")], Some(&n(&[0, 1])));
    assert!(matches!(found, (1, P::MixedForms { entry: 1, .. })), "{found:?}");
    // Counts that are negative, missing, too few, too many.
    let found = refused(&texts(&[0, 1]), &[one("a")], Some(&n(&[0, -1])));
    assert_eq!(found, (1, P::NegativeCount { count: -1 }));
    let found = refused(&texts(&[0, 1]), &[one("a")], Some(&[Some(0), None]));
    assert_eq!(found, (1, P::MissingCount));
    let found = refused(&texts(&[1, 1]), &[one("a"), one("b")], Some(&n(&[1])));
    assert_eq!(found, (1, P::CountsLength { counts: 1, prompts: 2 }));
    let found = refused(&texts(&[1]), &[one("a")], Some(&n(&[1, 5])));
    assert_eq!(found, (0, P::CountsLength { counts: 2, prompts: 1 }));
    // Too few and too many media.
    let found = refused(&texts(&[2, 2]), &[one("a"), one("b"), one("c")], Some(&n(&[2, 2])));
    assert_eq!(found, (1, P::WrongCount { count: 2, found: 1 }));
    let found = refused(&texts(&[1, 0]), &[one("a"), one("b"), one("c")], Some(&n(&[1, 0])));
    assert_eq!(found, (1, P::LeftOver { left: 2, entries: 3 }));
    let found = refused(&texts(&[1, 1]), &[group(&["a"])], Some(&n(&[1, 1])));
    assert_eq!(found, (1, P::GroupsLength { groups: 1, prompts: 2 }));
    // A placeholder for a text prompt would shift every image behind it.
    let found = refused(&texts(&[1, 0, 1]), &[one("a"), Media::Missing, one("c")], Some(&n(&[1, 0, 1])));
    assert_eq!(found, (2, P::Missing { place: 0, count: 1 }));
    // A missing first image would take the others with it, a missing later one would reach the engine.
    for (place, images) in [(0, [Media::Missing, one("b")]), (1, [one("a"), Media::Missing])] {
        let found = refused(&texts(&[2]), &[Media::Group(images.to_vec())], Some(&n(&[2])));
        assert_eq!(found, (0, P::Missing { place, count: 2 }));
        assert_eq!(refused(&texts(&[2]), &images, Some(&n(&[2]))), (0, P::Missing { place, count: 2 }));
    }
    let found = refused(&texts(&[1]), &[Media::Group(vec![group(&["a"])])], Some(&n(&[1])));
    assert_eq!(found, (0, P::Nested { place: 0 }));
    // Counts without media.
    let found = refused(&texts(&[0, 1]), &[], Some(&n(&[0, 1])));
    assert!(matches!(found, (1, P::WrongCount { count: 1, found: 0 })), "{found:?}");
    // Text and media that disagree.
    let found = refused(&texts(&[1, 2]), &[one("a"), one("b")], Some(&n(&[1, 1])));
    assert_eq!(found, (1, P::Placeholders { media: 1, blocks: 2 }));
    // Tokens that no pass would strip, or that stripping would join to a new block.
    for stray in [
        "<|vision_start|><|vision_end|>",
        "<|image_pad|>",
        "<|vision_start|><|image_pad|><|video_pad|><|vision_end|>",
        "<|vision_start|><|image_pad|> <|image_pad|><|vision_end|>",
        "<|vision_start|><|vision_start|><|image_pad|><|vision_end|><|video_pad|><|vision_end|>",
    ] {
        let prompts = ["ok".to_owned(), format!("ab{stray}c")];
        let none: MediaColumns<'_, ()> = MediaColumns::default();
        match build_multimodal_inputs(&prompts, none, Mode::Strict) {
            Err(Error::Media { prompt: 1, problem: P::StrayTokens { byte: 2 }, .. }) => {}
            other => panic!("{stray}: {other:?}"),
        }
    }
}

#[test]
fn stripping_must_not_spell_new_tokens() {
    let none: MediaColumns<'_, ()> = MediaColumns::default();
    let prompts = [format!("a<|image_{IMAGE}pad|>")];
    match build_multimodal_inputs(&prompts, none, Mode::Strict) {
        Err(Error::Media { prompt: 0, problem: MediaProblem::StrayTokens { byte: 1 }, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn blocks_of_the_other_kind_do_not_stay_behind_unseen() {
    let prompts = [format!("{IMAGE}{VIDEO}both")];
    let entries = [one("v")];
    let videos = MediaColumn { entries: Some(&entries), counts: Some(&[Some(1)]) };
    let media = MediaColumns { videos, ..MediaColumns::default() };
    let strict = build_multimodal_inputs(&prompts, media, Mode::Strict);
    let expected = MediaProblem::Placeholders { media: 0, blocks: 1 };
    match strict {
        Err(Error::Media { prompt: 0, kind: MediaKind::Image, problem }) => assert_eq!(problem, expected),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_needs_no_change_is_the_callers_own() {
    let prompts = texts(&[1, 0]);
    let groups = [group(&["a"]), group(&[])];
    let images = MediaColumn { entries: Some(&groups), counts: Some(&[Some(1), Some(0)]) };
    for mode in [Mode::Strict, Mode::LightRft] {
        let inputs = build_multimodal_inputs(&prompts, of_images(images), mode).unwrap();
        for (input, prompt) in inputs.iter().zip(&prompts) {
            assert!(std::ptr::eq(input.prompt.as_ptr(), prompt.as_ptr()), "{mode:?}");
        }
        let Media::Group(first) = &groups[0] else { unreachable!() };
        assert!(std::ptr::eq(input_ptr(&inputs[0]), first.as_ptr()));
    }
}

fn input_ptr<M: Clone>(input: &MultimodalInput<'_, M>) -> *const Media<M> {
    input.images.as_ptr()
}

#[test]
fn sounds_are_dealt_and_counted_like_images() {
    let prompts = [
        "<|audio_bos|><|AUDIO|><|audio_eos|>What is said?".to_owned(),
        format!("{IMAGE}And here? <|AUDIO|> or <|AUDIO|><|AUDIO|>"),
        "Hello".to_owned(),
    ];
    let counts = [Some(1), Some(2), Some(0)];
    let flat = [one("a.wav"), one("b.wav"), one("c.wav")];
    let nested = [group(&["a.wav"]), group(&["b.wav", "c.wav"]), group(&[])];
    let pictures = [one("a.png")];
    let images = MediaColumn { entries: Some(&pictures), counts: Some(&[Some(0), Some(1), Some(0)]) };
    for (form, entries) in [("flat", &flat), ("nested", &nested)] {
        let audios = MediaColumn { entries: Some(entries), counts: Some(&counts) };
        let media = MediaColumns { images, audios, ..MediaColumns::default() };
        assert!(is_multimodal(&media));
        let inputs = build_multimodal_inputs(&prompts, media, Mode::Strict).unwrap();
        assert_eq!(*inputs[0].audios, [one("a.wav")], "{form}");
        assert_eq!(*inputs[1].audios, [one("b.wav"), one("c.wav")], "{form}");
        assert_eq!((*inputs[1].images).len(), 1);
        assert!(inputs[2].audios.is_empty());
        assert_eq!(build_multimodal_inputs(&prompts, media, Mode::LightRft).unwrap(), inputs);
    }
    let refused = |prompts: &[String], audios| {
        let media = MediaColumns { audios, ..MediaColumns::default() };
        match build_multimodal_inputs(prompts, media, Mode::Strict) {
            Err(Error::Media { prompt, kind: MediaKind::Audio, problem }) => (prompt, problem),
            other => panic!("{other:?}"),
        }
    };
    let counts = [Some(1), Some(1)];
    let two = MediaColumn { entries: Some(&flat[..2]), counts: Some(&counts) };
    let texts = ["<|AUDIO|>".to_owned(), "no place".to_owned()];
    assert_eq!(refused(&texts, two), (1, MediaProblem::Placeholders { media: 1, blocks: 0 }));
    let one_short = MediaColumn { entries: Some(&flat[..1]), counts: Some(&counts) };
    assert_eq!(refused(&texts, one_short), (1, MediaProblem::WrongCount { count: 1, found: 0 }));
    // A place for a sound that is not there is not taken out: something was lost.
    let texts = ["fine".to_owned(), format!("{IMAGE}<|audio_bos|><|AUDIO|><|audio_eos|>what?")];
    assert_eq!(refused(&texts, MediaColumn::ABSENT), (1, MediaProblem::Placeholders { media: 0, blocks: 1 }));
}

proptest! {
    #[test]
    fn nested_and_flat_deal_alike_and_use_every_image_once(counts in proptest::collection::vec(0usize..4, 0..8)) {
        let mut next = 0;
        let groups: Vec<Vec<Media<usize>>> = counts.iter().map(|&count| {
            next += count;
            (next - count..next).map(Media::One).collect()
        }).collect();
        let flat: Vec<_> = groups.concat();
        let nested: Vec<_> = groups.iter().cloned().map(Media::Group).collect();
        let numbers: Vec<_> = counts.iter().map(|&count| Some(count as i64)).collect();
        let prompts = texts(&counts);
        for entries in [&flat, &nested] {
            let images = MediaColumn { entries: Some(entries), counts: Some(&numbers) };
            let inputs = build_multimodal_inputs(&prompts, of_images(images), Mode::Strict).unwrap();
            let dealt: Vec<_> = inputs.iter().map(|input| input.images.to_vec()).collect();
            prop_assert_eq!(&dealt, &groups);
            let lightrft = build_multimodal_inputs(&prompts, of_images(images), Mode::LightRft).unwrap();
            prop_assert_eq!(inputs, lightrft);
        }
    }

    #[test]
    fn any_text_and_any_lists_are_inputs_or_errors_never_a_panic(
        prompts in proptest::collection::vec(
            proptest::collection::vec(prop_oneof![
                Just("<|vision_start|>"), Just("<|vision_end|>"), Just("<|image_pad|>"), Just("<|video_pad|>"),
                Just("<|"), Just("é"), Just(" "),
            ], 0..8).prop_map(|parts| parts.concat()),
            0..5),
        shape in proptest::collection::vec(0u8..5, 0..6),
        counts in proptest::option::of(proptest::collection::vec(proptest::option::of(any::<i8>()), 0..6)),
    ) {
        let entries: Vec<_> = shape.iter().map(|&kind| match kind {
            0 => Media::Missing,
            1 | 2 => Media::One(kind),
            _ => Media::Group(vec![Media::One(kind); usize::from(kind) - 3]),
        }).collect();
        let counts: Option<Vec<_>> = counts.map(|c| c.into_iter().map(|c| c.map(i64::from)).collect());
        let images = MediaColumn { entries: Some(&entries), counts: counts.as_deref() };
        for mode in [Mode::Strict, Mode::LightRft] {
            if let Ok(inputs) = build_multimodal_inputs(&prompts, of_images(images), mode) {
                prop_assert_eq!(inputs.len(), prompts.len());
            }
        }
    }
}
