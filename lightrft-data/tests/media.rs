//! Images decode to Pillow's pixels, in the batch's order, and what is broken, absurd or out of bounds is named.
#![cfg(feature = "images")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use lightrft_data::{
    Audio, DecodeConfig, DecodedInput, Error, Fetch, Media, MediaDecoder, MediaKind, MediaSource,
    MediumProblem, MultimodalInput, PathPolicy, Pixels,
};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::json;

#[derive(Deserialize)]
struct Recorded {
    images: Vec<Recording>,
    bombs: Vec<Bomb>,
}

#[derive(Deserialize)]
struct Recording {
    name: String,
    file: String,
    height: u32,
    width: u32,
    off: u8,
    rgb: String,
}

#[derive(Deserialize)]
struct Bomb {
    name: String,
    file: String,
}

fn recorded() -> Recorded {
    serde_json::from_str(include_str!("data/images.json")).unwrap()
}

fn bytes(base64: &str) -> Vec<u8> {
    BASE64_STANDARD.decode(base64).unwrap()
}

fn source(base64: &str) -> MediaSource {
    MediaSource::Bytes(bytes(base64).into())
}

fn decoder(change: impl FnOnce(&mut DecodeConfig)) -> MediaDecoder {
    let mut config = DecodeConfig { threads: 2, ..DecodeConfig::default() };
    change(&mut config);
    MediaDecoder::new(config).unwrap()
}

/// An image of one colour, so that it can be told from others.
fn dot(value: u8) -> MediaSource {
    MediaSource::Pixels(Pixels::new(1, 1, 1, vec![value; 3]).unwrap())
}

#[test]
fn pixels_are_those_of_pillow() {
    let images = recorded().images;
    assert_eq!(images.len(), 14);
    for image in images {
        let found = decoder(|_| {}).image(&source(&image.file)).unwrap();
        assert_eq!((found.frames(), found.height(), found.width()), (1, image.height, image.width));
        let expected = bytes(&image.rgb);
        assert_eq!(found.rgb().len(), expected.len(), "{}", image.name);
        let off = found.rgb().iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(off <= image.off, "{}: off by {off}", image.name);
        let size = decoder(|_| {}).size(&source(&image.file)).unwrap();
        assert_eq!(size, (1, image.height, image.width), "{}", image.name);
    }
}

#[test]
fn headers_that_promise_too_many_pixels_are_refused_before_decoding() {
    for bomb in recorded().bombs {
        for result in [
            decoder(|_| {}).image(&source(&bomb.file)).map(|_| ()),
            decoder(|_| {}).size(&source(&bomb.file)).map(|_| ()),
        ] {
            match result {
                Err(MediumProblem::TooManyPixels { frames: 1, height, width, limit: 89_478_485 }) => {
                    assert!(height > 16_000 && width > 16_000, "{}", bomb.name);
                }
                other => panic!("{}: {other:?}", bomb.name),
            }
        }
    }
    let image = &recorded().images[0]; // 9 x 13
    let result = |max_pixels| decoder(|c| c.max_pixels = max_pixels).image(&source(&image.file));
    assert!(result(117).is_ok());
    assert!(matches!(result(116), Err(MediumProblem::TooManyPixels { .. })));
}

#[test]
fn encoded_bytes_are_limited_wherever_they_come_from() {
    let image = &recorded().images[0];
    let file = bytes(&image.file);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.png");
    std::fs::write(&path, &file).unwrap();
    let url = format!("data:image/png;base64,{}", image.file);
    for source in [
        MediaSource::Path(path),
        MediaSource::DataUrl(url.into()),
        MediaSource::Bytes(file.clone().into()),
        MediaSource::Url("https://example.org/a.png".into()),
    ] {
        let with_limit = |limit| decoder(|c| c.max_bytes = limit).with_fetch(Fixed(file.clone()));
        assert!(with_limit(file.len()).image(&source).is_ok(), "{source:?}");
        let refused = with_limit(file.len() - 1).image(&source).unwrap_err();
        assert!(matches!(refused, MediumProblem::TooManyBytes { .. }), "{source:?}: {refused}");
    }
}

/// Always the same bytes.
#[derive(Debug)]
struct Fixed(Vec<u8>);

impl Fetch for Fixed {
    fn fetch(&self, _: &str, _: usize) -> Result<Vec<u8>, MediumProblem> {
        Ok(self.0.clone())
    }
}

#[test]
fn strings_are_told_apart_as_paths_and_addresses() {
    let parse = |text| MediaSource::parse(text).unwrap();
    assert_eq!(parse("a b.png"), MediaSource::Path("a b.png".into()));
    assert_eq!(parse("file:///x/%20.png"), MediaSource::Path("/x/%20.png".into()));
    assert_eq!(parse("a:b.png"), MediaSource::Path("a:b.png".into()));
    assert_eq!(parse("HTTPS://h/a"), MediaSource::Url("HTTPS://h/a".into()));
    assert_eq!(parse("data:,x"), MediaSource::DataUrl("data:,x".into()));
    assert!(matches!(MediaSource::parse(""), Err(MediumProblem::Empty)));
    for refused in ["ftp://h/a", "s3://b/k", "gopher://h"] {
        assert!(matches!(MediaSource::parse(refused), Err(MediumProblem::Scheme { .. })));
    }
    for value in [json!("a.png"), json!({"image": "a.png"}), json!({"image_url": {"url": "a.png"}})] {
        assert_eq!(MediaSource::from_json(&value).unwrap(), parse("a.png"));
    }
    let video = MediaSource::from_json(&json!(["1.png", {"path": "2.png"}])).unwrap();
    assert_eq!(video, MediaSource::Frames(vec![parse("1.png"), parse("2.png")]));
    for refused in [json!(3), json!(null), json!({"a": 1}), json!([["a"]]), json!({"image": 3})] {
        assert!(
            matches!(MediaSource::from_json(&refused), Err(MediumProblem::NotAMedium { .. })),
            "{refused}"
        );
    }
}

#[test]
fn data_urls_that_are_none_say_what_they_lack() {
    for (url, lacks) in [
        ("data:image/png;base64", "comma"),
        ("data:image/png,abc", "base64"),
        ("data:text/html;base64,AAAA", "image/"),
        ("data:image/png;base64,A*AA", "base64"),
    ] {
        match decoder(|_| {}).image(&MediaSource::parse(url).unwrap()) {
            Err(MediumProblem::DataUrl { expected }) => {
                assert!(expected.contains(lacks), "{url}: {expected}")
            }
            other => panic!("{url}: {other:?}"),
        }
    }
    let file = &recorded().images[0].file;
    let odd = format!("data:image/x;charset=utf-8;BASE64, {} ", file.trim_end_matches('='));
    assert!(decoder(|_| {}).image(&MediaSource::parse(&odd).unwrap()).is_ok());
}

#[test]
fn addresses_are_off_unless_a_fetcher_is_set() {
    let url = MediaSource::parse("https://example.org/a.png").unwrap();
    assert!(matches!(decoder(|_| {}).image(&url), Err(MediumProblem::UrlsAreOff { .. })));
}

#[test]
fn paths_stay_under_the_root_that_is_set() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    std::fs::create_dir_all(root.join("in")).unwrap();
    let file = bytes(&recorded().images[0].file);
    std::fs::write(root.join("in/a.png"), &file).unwrap();
    std::fs::write(folder.path().join("secret.png"), &file).unwrap();
    let confined = decoder(|c| c.paths = PathPolicy::Under(root.clone()));
    let read = |path: &Path| confined.image(&MediaSource::Path(path.into()));
    assert!(read(Path::new("in/a.png")).is_ok());
    assert!(read(&root.join("in/a.png")).is_ok());
    let mut outside = vec![
        Path::new("../secret.png").to_owned(),
        Path::new("in/../in/a.png").to_owned(),
        folder.path().join("secret.png"),
    ];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(folder.path().join("secret.png"), root.join("link.png")).unwrap();
        outside.push("link.png".into());
    }
    for path in outside {
        assert!(matches!(read(&path), Err(MediumProblem::OutsideRoot { .. })), "{}", path.display());
    }
    assert!(matches!(read(Path::new("none.png")), Err(MediumProblem::Io { action: "open", .. })));
    assert!(matches!(read(Path::new("in")), Err(MediumProblem::NotAFile { .. })));
    assert!(matches!(read(Path::new("")), Err(MediumProblem::Empty)));
}

#[cfg(unix)]
#[test]
fn devices_and_pipes_are_not_opened() {
    let zero = decoder(|_| {}).image(&MediaSource::Path("/dev/zero".into()));
    assert!(matches!(zero, Err(MediumProblem::NotAFile { .. })), "{zero:?}");
}

type Input = MultimodalInput<'static, MediaSource>;

fn input(images: Vec<MediaSource>, videos: Vec<MediaSource>) -> Input {
    let ones = |sources: Vec<_>| sources.into_iter().map(Media::One).collect();
    MultimodalInput { prompt: "?".into(), images: ones(images), videos: ones(videos), audios: vec![].into() }
}

fn with_audios(audios: Vec<MediaSource>, input: Input) -> Input {
    Input { audios: audios.into_iter().map(Media::One).collect(), ..input }
}

fn first_values(media: &[Pixels]) -> Vec<u8> {
    media.iter().map(|pixels| pixels.rgb()[0]).collect()
}

#[test]
fn order_and_numbers_are_kept_whatever_the_threads() {
    let inputs: Vec<_> = (0..40u8)
        .map(|i| {
            let images = (0..i % 4).map(|k| dot(i * 4 + k)).collect();
            let videos = (0..i % 3).map(|k| MediaSource::Frames(vec![dot(200 - i), dot(k)])).collect();
            input(images, videos)
        })
        .collect();
    for threads in [1, 2, 7, 64] {
        let decoded = decoder(|c| c.threads = threads).decode(&inputs).unwrap();
        assert_eq!(decoded.len(), inputs.len());
        for (i, one) in (0u8..).zip(&decoded) {
            assert_eq!(first_values(&one.images), (0..i % 4).map(|k| i * 4 + k).collect::<Vec<_>>());
            assert_eq!(first_values(&one.videos), (0..i % 3).map(|_| 200 - i).collect::<Vec<_>>());
            assert_eq!(one.prompt, "?");
        }
    }
    assert!(decoder(|_| {}).decode(&[]).unwrap().is_empty());
}

/// Gives each image only once the next one has been asked for: the second thread takes the middle of three.
#[derive(Debug, Default)]
struct Turned {
    last_asked: Mutex<usize>,
    asked: Condvar,
}

/// Images that can be told apart, by the number at the end of their address.
const APART: [usize; 3] = [0, 7, 2];

impl Fetch for Turned {
    fn fetch(&self, url: &str, _: usize) -> Result<Vec<u8>, MediumProblem> {
        let place: usize = url.rsplit('/').next().unwrap().parse().unwrap();
        let mut last = self.last_asked.lock().unwrap();
        *last = place.max(*last);
        self.asked.notify_all();
        let next = (place + 1).min(APART.len() - 1);
        let (_last, wait) =
            self.asked.wait_timeout_while(last, Duration::from_secs(60), |last| *last < next).unwrap();
        assert!(!wait.timed_out(), "nobody asked for image {next}");
        Ok(bytes(&recorded().images[APART[place]].file))
    }
}

#[test]
fn images_that_come_late_keep_their_places() {
    let urls = (0..3).map(|place| MediaSource::parse(&format!("http://h/{place}")).unwrap());
    let turned = decoder(|c| c.threads = 2).with_fetch(Turned::default());
    let decoded = turned.decode(&[input(urls.collect(), vec![])]).unwrap();
    let expected = APART.map(|which| decoder(|_| {}).image(&source(&recorded().images[which].file)).unwrap());
    assert!(expected[0] != expected[1] && expected[1] != expected[2] && expected[0] != expected[2]);
    assert_eq!(decoded[0].images, expected);
}

/// Panics on one image, and gives the others.
#[derive(Debug)]
struct Panicking;

impl Fetch for Panicking {
    fn fetch(&self, url: &str, _: usize) -> Result<Vec<u8>, MediumProblem> {
        assert!(!url.ends_with("/5"), "no such shelf");
        Ok(bytes(&recorded().images[0].file))
    }
}

#[test]
fn a_fetcher_that_panics_loses_its_own_image_and_moves_no_other() {
    let batch: Vec<_> = (0..8)
        .map(|place| input(vec![MediaSource::parse(&format!("http://h/{place}")).unwrap()], vec![]))
        .collect();
    for threads in [1, 2, 8] {
        match decoder(|c| c.threads = threads).with_fetch(Panicking).decode(&batch) {
            Err(Error::Medium { prompt: 5, kind: MediaKind::Image, place: 0, at, problem }) => {
                assert_eq!(at, "http://h/5");
                let told =
                    matches!(&*problem, MediumProblem::Panicked { message } if message == "no such shelf");
                assert!(told, "{problem}");
            }
            other => panic!("{threads} threads: {other:?}"),
        }
    }
}

/// The prompts of a batch whose results are errors, and what these say.
fn failures(each: &[Result<DecodedInput<'_>, Error>]) -> Vec<(usize, String)> {
    let failed = each.iter().enumerate();
    failed.filter_map(|(at, one)| Some((at, one.as_ref().err()?.to_string()))).collect()
}

#[test]
fn broken_media_cost_their_own_prompts_and_no_others() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.png");
    std::fs::write(&broken, b"\x89PNG\r\n\x1a\n and no more").unwrap();
    let broken = || MediaSource::Path(broken.clone());
    let batch = [
        input(vec![dot(1)], vec![]),
        input(vec![dot(2), broken()], vec![]),
        input(vec![MediaSource::parse("http://h/5").unwrap(), dot(3)], vec![]),
        input(vec![dot(4)], vec![MediaSource::Frames(vec![dot(5), broken()])]),
        input(vec![], vec![]),
        input(vec![dot(6); 4], vec![]),
        with_audios(vec![broken(), MediaSource::Path("/nowhere/a.wav".into())], input(vec![dot(7)], vec![])),
        with_audios(vec![broken()], input(vec![dot(8)], vec![MediaSource::Frames(vec![dot(9)])])),
    ];
    let said = folder.path().join("broken.png").display().to_string();
    for threads in [1, 2, 8] {
        let decoder = decoder(|c| (c.threads, c.max_media) = (threads, 3)).with_fetch(Panicking);
        let each = decoder.decode_each(&batch).unwrap();
        let failed = failures(&each);
        let expected = [
            (1, format!("prompt 1: images: number 1 ({said}): broken")),
            (2, "prompt 2: images: number 0 (http://h/5): fetching or decoding panicked: no such".into()),
            (3, format!("prompt 3: videos: number 0 ({said}): frame 1: broken")),
            (5, "prompt 5: images: number 3 (".into()),
            (6, "prompt 6: audios: number 1 (/nowhere/a.wav): cannot open".into()),
        ];
        assert_eq!(failed.len(), expected.len(), "{failed:?}");
        for ((at, found), (expected_at, beginning)) in failed.iter().zip(&expected) {
            assert!(at == expected_at && found.starts_with(beginning), "{found}, expected {beginning}");
        }
        assert_eq!(first_values(&each[0].as_ref().unwrap().images), [1]);
        let last = each[7].as_ref().unwrap();
        assert_eq!((first_values(&last.images), first_values(&last.videos)), (vec![8], vec![9]));
        assert_eq!(last.audios[0].bytes(), std::fs::read(&said).unwrap());
        // What is whole is what `decode` gives.
        let whole = [batch[0].clone(), batch[7].clone()];
        let each = each.into_iter().filter_map(Result::ok).filter(|one| !one.images.is_empty());
        assert_eq!(decoder.decode(&whole).unwrap(), each.collect::<Vec<_>>());
    }
}

#[test]
fn a_batch_of_too_many_pixels_is_refused_as_a_whole_whatever_is_broken_in_it() {
    let image = &recorded().images[0]; // 9 x 13
    let broken = || MediaSource::Bytes(b"not an image".to_vec().into());
    let batch = [
        input(vec![broken()], vec![]),
        input(vec![source(&image.file)], vec![]),
        input(vec![dot(1)], vec![]),
    ];
    for threads in [1, 3] {
        let of_batch = |limit| {
            let limited = decoder(|c| (c.threads, c.max_batch_pixels) = (threads, limit));
            limited.decode_each(&batch)
        };
        assert_eq!(failures(&of_batch(9 * 13 + 1).unwrap()).len(), 1);
        let error = of_batch(9 * 13).unwrap_err();
        let Error::Medium { problem, .. } = error else { panic!("{error:?}") };
        assert!(matches!(*problem, MediumProblem::TooManyPixelsInBatch { limit: 117 }));
    }
}

#[test]
fn sounds_are_handed_on_as_they_are_in_their_order_and_within_limits() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.wav");
    std::fs::write(&path, b"RIFF and so on").unwrap();
    let samples = Audio::new(vec![7; 8], 16_000).unwrap();
    let sources = vec![
        MediaSource::Path(path),
        MediaSource::Audio(samples.clone()),
        MediaSource::parse("data:audio/wav;base64,UklGRg==").unwrap(),
        MediaSource::Bytes(b"fLaC".to_vec().into()),
    ];
    let decoder = decoder(|c| c.max_bytes = 14);
    let decoded = decoder.decode(&[with_audios(sources, input(vec![dot(1)], vec![]))]).unwrap();
    let file = |bytes: &[u8]| Audio::of_file(bytes).unwrap();
    let expected = [file(b"RIFF and so on"), samples.clone(), file(b"RIFF"), file(b"fLaC")];
    assert_eq!((decoded[0].audios.as_slice(), decoded[0].images.len()), (&expected[..], 1));

    let refused = |source| decoder.audio(&source).unwrap_err();
    for long in
        [MediaSource::Bytes(vec![1; 15].into()), MediaSource::Audio(Audio::new(vec![1; 15], 8000).unwrap())]
    {
        assert!(matches!(refused(long), MediumProblem::TooManyBytes { limit: 14 }));
    }
    let picture = MediaSource::parse("data:image/png;base64,UklGRg==").unwrap();
    assert!(matches!(refused(picture), MediumProblem::DataUrl { expected: "a type `audio/...`" }));
    assert!(matches!(refused(MediaSource::Frames(vec![dot(1)])), MediumProblem::NotAudio));
    assert!(matches!(refused(dot(1)), MediumProblem::NotAudio));
    let sound = MediaSource::Audio(samples);
    assert!(matches!(decoder.image(&sound), Err(MediumProblem::NotPixels)));
    assert!(matches!(decoder.video(&sound), Err(MediumProblem::NotPixels)));
    assert!(matches!(decoder.size(&sound), Err(MediumProblem::NotPixels)));
}

/// Counts how many fetches are under way at once.
#[derive(Clone, Debug, Default)]
struct Counting {
    now: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

impl Fetch for Counting {
    fn fetch(&self, _: &str, _: usize) -> Result<Vec<u8>, MediumProblem> {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        std::thread::yield_now();
        self.now.fetch_sub(1, Ordering::SeqCst);
        Ok(bytes(&recorded().images[0].file))
    }
}

#[test]
fn no_more_media_are_under_way_than_threads() {
    let url = || MediaSource::parse("http://h/a.png").unwrap();
    let counting = Counting::default();
    let limited = decoder(|c| c.threads = 3).with_fetch(counting.clone());
    limited.decode(&[input((0..50).map(|_| url()).collect(), vec![])]).unwrap();
    assert!((1..=3).contains(&counting.most.load(Ordering::SeqCst)));
}

#[test]
fn the_first_broken_medium_of_the_batch_is_named_by_prompt_kind_and_place() {
    let broken = || MediaSource::Bytes(b"not an image".to_vec().into());
    let mut batch = vec![input(vec![dot(1)], vec![]), input(vec![dot(2), dot(3)], vec![dot(4)])];
    for _ in 0..20 {
        batch.push(input(vec![dot(5), broken()], vec![broken()]));
    }
    for threads in [1, 4] {
        match decoder(|c| c.threads = threads).decode(&batch) {
            Err(Error::Medium { prompt: 2, kind: MediaKind::Image, place: 1, problem, .. }) => {
                assert!(matches!(&*problem, MediumProblem::Format { begins } if begins == b"not an image"));
            }
            other => panic!("{other:?}"),
        }
    }
    let error = decoder(|_| {}).decode(&batch).unwrap_err().to_string();
    assert!(error.starts_with("prompt 2: images: number 1 (12 bytes): neither PNG"), "{error}");
    for (odd, found) in [(Media::Missing, "nothing"), (Media::Group(vec![]), "a list")] {
        let batch = [MultimodalInput { images: vec![odd].into(), ..input(vec![], vec![]) }];
        match decoder(|_| {}).decode(&batch) {
            Err(Error::Medium { prompt: 0, place: 0, problem, .. }) => {
                assert!(matches!(*problem, MediumProblem::NotAMedium { found: f } if f == found));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn videos_are_frames_of_one_size_within_a_limit_of_their_own() {
    let frame = |height, width| {
        let area = (height * width) as usize;
        MediaSource::Pixels(Pixels::new(1, height, width, vec![7; area * 3]).unwrap())
    };
    let video = |frames: Vec<_>| decoder(|c| c.max_video_pixels = 12).video(&MediaSource::Frames(frames));
    let three = video(vec![frame(2, 2), frame(2, 2), frame(2, 2)]).unwrap();
    assert_eq!((three.frames(), three.height(), three.width(), three.rgb().len()), (3, 2, 2, 36));
    assert!(matches!(
        video((0..4).map(|_| frame(2, 2)).collect()),
        Err(MediumProblem::TooManyPixels { frames: 4, limit: 12, .. })
    ));
    assert!(matches!(
        video(vec![frame(1, 2), frame(2, 1)]),
        Err(MediumProblem::FrameSize {
            frame: 1,
            height: 2,
            width: 1,
            expected_height: 1,
            expected_width: 2
        })
    ));
    assert!(matches!(video(vec![]), Err(MediumProblem::Empty)));
    match video(vec![frame(1, 1), MediaSource::Bytes(vec![].into())]) {
        Err(MediumProblem::Frame { frame: 1, problem }) => assert!(matches!(*problem, MediumProblem::Empty)),
        other => panic!("{other:?}"),
    }
    let any = decoder(|_| {});
    assert!(matches!(any.video(&MediaSource::Path("a.mp4".into())), Err(MediumProblem::NotAVideo)));
    let frames = MediaSource::Frames(vec![frame(1, 1); 2]);
    assert!(matches!(any.image(&frames), Err(MediumProblem::NotAnImage { frames: 2 })));
    assert_eq!(any.size(&frames).unwrap(), (2, 1, 1));
    let tensor = MediaSource::Pixels(Pixels::new(2, 1, 1, vec![0; 6]).unwrap());
    assert!(matches!(any.image(&tensor), Err(MediumProblem::NotAnImage { frames: 2 })));
    assert_eq!(any.video(&tensor).unwrap().frames(), 2);
    assert_eq!(any.size(&tensor).unwrap(), (2, 1, 1));
    let inside = MediaSource::Frames(vec![tensor]);
    assert!(matches!(any.size(&inside), Err(MediumProblem::NotAnImage { frames: 2 })));
}

#[test]
fn every_image_that_is_cut_short_is_an_error() {
    for image in recorded().images {
        let file = bytes(&image.file);
        let whole = decoder(|_| {}).image(&source(&image.file));
        assert!(whole.is_ok(), "{}: {whole:?}", image.name);
        // The last bytes of a PNG are a chunk without content, which says nothing about the pixels.
        let needed = if file.starts_with(b"\x89PNG") { file.len() - 12 } else { file.len() };
        for len in 0..needed {
            let cut = decoder(|_| {}).image(&MediaSource::Bytes(file[..len].into()));
            assert!(cut.is_err(), "{}: {len} of {} bytes are taken for an image", image.name, file.len());
        }
    }
}

#[test]
fn a_batch_has_no_more_pixels_and_a_prompt_no_more_media_than_allowed() {
    let image = &recorded().images[0]; // 9 x 13
    let video = MediaSource::Frames(vec![source(&image.file), source(&image.file)]);
    let batch = [input(vec![source(&image.file)], vec![]), input(vec![dot(1)], vec![video])];
    let pixels = 9 * 13 * 3 + 1;
    for threads in [1, 3] {
        let of_batch = |limit| {
            let limited = decoder(|c| (c.threads, c.max_batch_pixels) = (threads, limit));
            limited.decode(&batch)
        };
        assert!(of_batch(pixels).is_ok());
        match of_batch(pixels - 1) {
            Err(Error::Medium { problem, .. }) => {
                let problem = match *problem {
                    MediumProblem::Frame { problem, .. } => *problem,
                    other => other,
                };
                assert!(
                    matches!(problem, MediumProblem::TooManyPixelsInBatch { limit } if limit == pixels - 1)
                );
            }
            other => panic!("{other:?}"),
        }
    }
    let of_prompt = |limit| decoder(|c| c.max_media = limit).decode(&batch);
    assert!(of_prompt(3).is_ok());
    match of_prompt(2) {
        Err(Error::Medium { prompt: 1, kind: MediaKind::Video, place: 0, problem, .. }) => {
            assert!(matches!(*problem, MediumProblem::TooManyMedia { limit: 2 }));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_vector_of_pixels_is_wrapped_and_not_copied() {
    let values = vec![0; 72];
    let at = values.as_ptr();
    let pixels = Pixels::new(2, 3, 4, values).unwrap();
    assert_eq!(pixels.clone().rgb().as_ptr(), at);
}

#[test]
fn tensors_and_sounds_have_the_length_that_they_say() {
    assert!(Pixels::new(2, 3, 4, vec![0; 72]).is_ok());
    for (frames, height, width, len) in [(2, 3, 4, 71), (0, 3, 4, 0), (1, 0, 4, 0), (usize::MAX, 9, 9, 3)] {
        let refused = Pixels::new(frames, height, width, vec![0; len]);
        assert!(matches!(refused, Err(MediumProblem::Shape { .. })), "{refused:?}");
    }
    let sound = Audio::new(vec![1, 2], 16_000).unwrap();
    assert_eq!((sound.bytes(), sound.sample_rate()), (&[1, 2][..], Some(16_000)));
    assert_eq!(Audio::of_file(*b"RIFF").unwrap().sample_rate(), None);
    assert!(matches!(Audio::of_file([]), Err(MediumProblem::Empty)));
    assert!(matches!(Audio::new(vec![], 16_000), Err(MediumProblem::Empty)));
    assert!(matches!(Audio::new(vec![1], 0), Err(MediumProblem::SampleRate)));
}

#[test]
fn limits_of_nothing_are_refused() {
    for change in [
        (|c| c.max_bytes = 0) as fn(&mut DecodeConfig),
        |c| c.max_pixels = 0,
        |c| c.max_video_pixels = 0,
        |c| c.max_batch_pixels = 0,
        |c| c.max_media = 0,
        |c| c.threads = 0,
    ] {
        let mut config = DecodeConfig::default();
        change(&mut config);
        assert!(matches!(MediaDecoder::new(config), Err(Error::Setting { value: 0, .. })));
    }
}

/// What the fetcher was asked for.
#[derive(Clone, Debug, Default)]
struct Asked(Arc<Mutex<Vec<String>>>);

impl Fetch for Asked {
    fn fetch(&self, url: &str, _: usize) -> Result<Vec<u8>, MediumProblem> {
        self.0.lock().unwrap().push(url.to_owned());
        Ok(bytes(&recorded().images[0].file))
    }
}

#[test]
fn nothing_is_opened_before_it_is_decoded() {
    let asked = Asked::default();
    let with = decoder(|_| {}).with_fetch(asked.clone());
    let batch = [input(vec![MediaSource::parse("http://h/1").unwrap()], vec![])];
    assert!(asked.0.lock().unwrap().is_empty());
    with.decode(&batch).unwrap();
    assert_eq!(*asked.0.lock().unwrap(), ["http://h/1"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn broken_files_are_pixels_or_errors_never_a_panic(
        which in 0usize..14, cut in 0.0f64..1.0, at in 0.0f64..1.0, with: u8, truncate: bool,
    ) {
        let mut file = bytes(&recorded().images[which].file);
        if truncate {
            file.truncate((file.len() as f64 * cut) as usize);
        }
        let place = (file.len() as f64 * at) as usize;
        if let Some(byte) = file.get_mut(place) {
            *byte ^= with;
        }
        let small = decoder(|c| c.max_pixels = 1 << 20);
        if let Err(problem) = small.image(&MediaSource::Bytes(file.into())) {
            // A panic inside of the image library is caught, but it would be news.
            prop_assert!(!matches!(problem, MediumProblem::Panicked { .. }), "{}", problem);
        }
    }
}
