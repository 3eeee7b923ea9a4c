//! Resized sizes, grids and expanded prompts equal those of transformers' Qwen2-VL processor.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use lightrft_data::{
    Error, Grid, MediaKind, MediaProblem, MediumProblem, PixelBounds, VisionTokens, smart_resize,
};
use proptest::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Recorded {
    resize: Vec<(u32, u32, u32, u64, u64, Resized)>,
    tokens: Vec<(usize, u32, u32, u64, u64)>,
    prompts: Vec<Whole>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Resized {
    Size(u64, u64),
    Refused(String),
}

#[derive(Deserialize)]
struct Whole {
    text: String,
    images: Vec<(u32, u32)>,
    videos: Vec<(usize, u32, u32)>,
    image_grid_thw: Vec<(u64, u64, u64)>,
    video_grid_thw: Vec<(u64, u64, u64)>,
    expanded: String,
}

fn recorded() -> Recorded {
    serde_json::from_str(include_str!("data/vision_tokens.json")).unwrap()
}

const VISION: VisionTokens = VisionTokens::QWEN2_VL;

#[test]
fn every_resized_size_is_that_of_transformers() {
    let cases = recorded().resize;
    assert_eq!(cases.len(), 668);
    for (height, width, factor, min, max, expected) in cases {
        match (smart_resize(height, width, factor, PixelBounds { min, max }), expected) {
            (Ok(size), Resized::Size(h, w)) => assert_eq!(size, (h, w), "{height} x {width}, {factor}"),
            (Err(MediumProblem::AspectRatio { .. }), Resized::Refused(why)) => {
                assert_eq!(why, "aspect ratio")
            }
            (found, _) => panic!("{height} x {width}: {found:?}"),
        }
    }
}

#[test]
fn every_count_of_tokens_is_that_of_transformers() {
    let cases = recorded().tokens;
    assert_eq!(cases.len(), 150);
    for (frames, height, width, image, video) in cases {
        assert_eq!(VISION.tokens(VISION.image_grid(height, width).unwrap()), image, "{height} x {width}");
        let grid = VISION.video_grid(frames, height, width).unwrap();
        assert_eq!(VISION.tokens(grid), video, "{frames} x {height} x {width}");
    }
}

#[test]
fn whole_prompts_are_expanded_as_the_processor_expands_them() {
    let cases = recorded().prompts;
    assert_eq!(cases.len(), 4);
    let triple = |grid: &Grid| (grid.t, grid.h, grid.w);
    for case in cases {
        let images: Vec<_> = case.images.iter().map(|&(h, w)| VISION.image_grid(h, w).unwrap()).collect();
        let videos: Vec<_> =
            case.videos.iter().map(|&(n, h, w)| VISION.video_grid(n, h, w).unwrap()).collect();
        assert_eq!(images.iter().map(triple).collect::<Vec<_>>(), case.image_grid_thw);
        assert_eq!(videos.iter().map(triple).collect::<Vec<_>>(), case.video_grid_thw);
        let expanded = VISION.expand(0, &case.text, &images, &videos).unwrap();
        assert_eq!(expanded, case.expanded);
        // What is expanded already stays as it is.
        assert_eq!(VISION.expand(0, &expanded, &images, &videos).unwrap(), expanded);
    }
}

#[test]
fn blocks_that_do_not_fit_their_grids_are_refused_by_prompt_and_place() {
    let grid = Grid { t: 1, h: 4, w: 4 }; // 4 tokens
    let block = |pads: usize| format!("<|vision_start|>{}<|vision_end|>", "<|image_pad|>".repeat(pads));
    let refused = |text: &str, images: &[Grid]| match VISION.expand(7, text, images, &[]) {
        Err(Error::Media { prompt: 7, kind: MediaKind::Image, problem }) => problem,
        other => panic!("{other:?}"),
    };
    let two = block(1) + &block(3);
    assert_eq!(refused(&two, &[grid]), MediaProblem::Placeholders { media: 1, blocks: 2 });
    assert_eq!(refused(&two, &[grid, grid]), MediaProblem::PadCount { place: 1, pads: 3, tokens: 4 });
    assert_eq!(refused("a<|image_pad|>", &[]), MediaProblem::StrayTokens { byte: 1 });
    let absurd = Grid { t: u64::MAX, h: u64::MAX, w: 4 };
    let found = refused(&block(1), &[absurd]);
    assert!(matches!(found, MediaProblem::TooManyTokens { place: 0, .. }), "{found}");
}

#[test]
fn sizes_without_pixels_are_refused() {
    let bounds = VISION.image;
    for (height, width, factor, bounds) in [
        (0, 9, 28, bounds),
        (9, 0, 28, bounds),
        (9, 9, 0, bounds),
        (9, 9, 28, PixelBounds { min: 0, ..bounds }),
        (9, 9, 28, PixelBounds { max: 0, ..bounds }),
    ] {
        assert!(matches!(smart_resize(height, width, factor, bounds), Err(MediumProblem::Empty)));
    }
    assert!(matches!(VISION.video_grid(0, 56, 56), Err(MediumProblem::Empty)));
    let nothing = VisionTokens { patch: 0, merge: 0, temporal_patch: 0, ..VISION };
    assert!(matches!(nothing.image_grid(56, 56), Err(MediumProblem::Empty)));
}

proptest! {
    #[test]
    fn any_size_gives_multiples_of_the_factor_or_an_error(
        height: u32, width: u32, factor: u32, min: u64, max: u64, small in 1u32..4000, other in 1u32..4000,
    ) {
        let _ = smart_resize(height, width, factor, PixelBounds { min, max });
        if let Ok((h, w)) = smart_resize(small, other, 28, VISION.image) {
            prop_assert!(h > 0 && w > 0 && h % 28 == 0 && w % 28 == 0);
            // One side may stay at its least, which is what keeps a long and narrow image over the bound.
            prop_assert!(h * w >= VISION.image.min && (h * w <= VISION.image.max || h.min(w) == 28));
        }
    }
}

#[test]
fn a_checkpoints_configuration_sets_bounds_and_patches() {
    let read = VisionTokens::from_preprocessor_config;
    assert_eq!(read("{}", None).unwrap(), VISION);
    let published = r#"{"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.5, 0.5, 0.5]}"#;
    let bounds = PixelBounds { min: 3136, max: 12_845_056 };
    assert_eq!(read(published, None).unwrap(), VisionTokens { image: bounds, video: bounds, ..VISION });
    // Five times the tokens that the constant says for a large photograph.
    let tokens = |vision: VisionTokens| vision.tokens(vision.image_grid(3000, 4000).unwrap());
    assert!(tokens(read(published, None).unwrap()) > 5 * tokens(VISION));
    let newer = r#"{"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16}"#;
    let video = r#"{"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "patch_size": 16, "min_pixels": null}"#;
    let both = read(newer, Some(video)).unwrap();
    assert_eq!((both.patch, both.image.max, both.video.min), (16, 16_777_216, 4096));
    for (image, video) in [
        ("[]", None),
        ("{", None),
        (r#"{"patch_size": 0}"#, None),
        (r#"{"patch_size": 4294967296}"#, None),
        (r#"{"min_pixels": -1}"#, None),
        (r#"{"size": {"longest_edge": "big"}}"#, None),
        (newer, Some("{}")),
    ] {
        assert!(matches!(read(image, video), Err(Error::Other(_))), "{image}");
    }
}
