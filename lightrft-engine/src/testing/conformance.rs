//! The suite that every engine passes: the contract of the seam, tried on the engine itself.

// A suite says what broke by panicking, as a test does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use super::TensorBytes;
use crate::{
    Completion, Dtype, Engine, EngineExt, Error, Event, FinishReason, Level, LogProbs, MemoryBytes,
    NamedTensor, Parts, Progress, Request, Sampling, State, Version, Watch,
};

/// An engine to try, and weights to push into it.
#[derive(Debug)]
pub struct Subject {
    /// An awake engine with a vocabulary of at least 16 tokens and a context of at least 32.
    pub engine: Box<dyn Engine>,
    /// Every parameter of its model, with values that differ from those it was made with, under which it draws other
    /// greedy tokens after the prompt `[1, 2, 3]`, and under which no token is all but certain.
    pub weights: Vec<TensorBytes>,
}

/// Tries the whole contract of [`Engine`] on fresh engines made by `make`. Where all of them drive one server, each takes
/// it over as the one before has left it: awake, asleep, in parts or in the middle of an update.
///
/// # Panics
/// Where an engine breaks the contract; the message says which promise.
pub fn conformance(make: impl Fn() -> Subject) {
    requests_end_as_they_ask(make(), sampled(5));
    a_seed_decides_whatever_the_company(make());
    conformance_without_seeds(make);
}

/// The same for an engine whose draws no seed decides, as some servers are: all but what seeds promise.
///
/// # Panics
/// As there.
pub fn conformance_without_seeds(make: impl Fn() -> Subject) {
    completions_are_complete_and_in_order(make());
    requests_end_as_they_ask(make(), greedy());
    bad_requests_are_refused_whole(make());
    a_deadline_ends_a_call_and_not_the_engine(make());
    the_state_follows_the_table(make());
    a_refusal_says_where_and_what_now(make());
    an_update_replaces_the_weights_and_their_version(make());
    an_update_dropped_half_way_leaves_it_stale(make());
    a_leaked_update_is_mended_by_another(make());
    the_parameters_it_tells_are_those_it_takes(make());
    bad_tensors_are_refused_before_anything_changes(make());
    level_one_keeps_the_weights_and_level_two_does_not(make());
    sleep_frees_memory(make());
    what_one_engine_left_spoils_nothing_for_the_next(make);
}

impl Subject {
    fn views(&self) -> Vec<NamedTensor<'_>> {
        self.weights.iter().map(|t| t.view().expect("a test's tensor fills its shape")).collect()
    }

    fn update(&mut self, to: u64) {
        let views: Vec<_> = self.weights.iter().map(|t| t.view().expect("it fills its shape")).collect();
        self.engine.replace_weights(Version(to), &views, 4096).expect("a whole update commits");
    }
}

fn sampled(seed: u64) -> Request {
    Request::new([1, 2, 3], Sampling { seed, max_new_tokens: 12, ..Sampling::default() })
}

fn greedy() -> Request {
    Request::new([1, 2, 3], Sampling::greedy(12))
}

fn tokens(engine: &mut dyn Engine, request: Request) -> Vec<Vec<u32>> {
    let completions = engine.complete(&[request]).expect("an awake engine generates");
    completions.into_iter().map(|c| c.tokens).collect()
}

fn completions_are_complete_and_in_order(mut subject: Subject) {
    let requests: Vec<Request> = (1..4)
        .map(|n| {
            Request::new(vec![n as u32; n], Sampling { max_new_tokens: 3 + n, ..Sampling::default() })
                .samples(n)
        })
        .collect();
    let vocabulary = subject.engine.limits().vocabulary;
    let version = subject.engine.version().expect("an awake engine has a version");
    let mut seen = Vec::new();
    let mut listener = |progress: Progress| seen.push(progress);
    let mut watch = Watch::within(Duration::from_secs(600)).telling(&mut listener);
    let completions = subject.engine.generate(&requests, &mut watch).expect("good requests are answered");
    let order: Vec<_> = completions.iter().map(|c| (c.request, c.sample)).collect();
    assert_eq!(order, [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)], "request-major, then by sample");
    for c in &completions {
        assert_eq!(
            c.tokens.len(),
            requests[c.request].sampling.max_new_tokens,
            "nothing stops it early: {c:?}"
        );
        assert_eq!(c.finish, FinishReason::Length);
        assert_eq!(c.version, version, "a completion names the weights that drew it");
        assert_eq!(c.log_probs.len(), c.tokens.len(), "one log-probability for each token: {c:?}");
        assert!(c.log_probs.iter().all(|l| *l <= 0.0 && l.is_finite()), "log-probabilities: {c:?}");
        assert!(c.tokens.iter().all(|t| (*t as usize) < vocabulary), "tokens of the vocabulary: {c:?}");
    }
    let drawn = completions.iter().map(|c| c.tokens.len()).sum();
    let last = seen.last().copied().expect("progress is told");
    assert_eq!(last, Progress { done: 6, total: 6, tokens: drawn }, "the last progress is the whole call");
    assert!(
        seen.windows(2).all(|w| w[0].done <= w[1].done && w[0].tokens <= w[1].tokens),
        "progress never falls"
    );
    assert!(subject.engine.complete(&[]).expect("no request is no work").is_empty());
}

/// `request` draws the same tokens every time.
fn requests_end_as_they_ask(mut subject: Subject, mut request: Request) {
    let engine = subject.engine.as_mut();
    let free = tokens(engine, request.clone()).remove(0);
    let stop = free[free.len() / 2];
    let at = free.iter().position(|t| *t == stop).expect("it was drawn");
    request.sampling.stop_tokens = vec![stop];
    let stopped = engine.complete(&[request.clone()]).expect("generates").remove(0);
    assert_eq!(stopped.tokens, free[..=at], "the stop token is the last token");
    assert_eq!(stopped.finish, FinishReason::Stop(stop));
    assert_eq!(stopped.log_probs.len(), stopped.tokens.len());

    request.sampling.log_probs = LogProbs::None;
    assert!(engine.complete(&[request.clone()]).expect("generates").remove(0).log_probs.is_empty());

    // Without log-probabilities: not every engine has the model's own where it bans tokens.
    request.sampling.min_new_tokens = request.sampling.max_new_tokens;
    let longer = engine.complete(&[request.clone()]).expect("generates").remove(0);
    assert_eq!(longer.finish, FinishReason::Length, "no stop before min_new_tokens");
    assert_eq!(longer.tokens.len(), request.sampling.max_new_tokens);
    assert!(!longer.tokens.contains(&stop), "no stop token before min_new_tokens");

    let mut request = greedy();
    request.sampling.log_probs = LogProbs::Processed;
    let certain = engine.complete(&[request]).expect("generates").remove(0);
    assert!(certain.log_probs.iter().all(|l| *l == 0.0), "a greedy draw is certain: {certain:?}");
}

fn a_seed_decides_whatever_the_company(mut subject: Subject) {
    subject.update(1);
    let engine = subject.engine.as_mut();
    let pair = tokens(engine, sampled(7).samples(2));
    assert_eq!(pair, tokens(engine, sampled(7).samples(2)), "the same seed draws the same tokens");
    assert_ne!(pair[0], pair[1], "samples of one request differ");
    assert_ne!(pair, tokens(engine, sampled(8).samples(2)), "another seed draws other tokens");
    let three = tokens(engine, sampled(7).samples(3));
    assert_eq!(pair, three[..2], "a sample does not depend on how many there are");
    let rest = engine.complete(&[sampled(7).samples(2).from_sample(1)]).expect("generates");
    assert_eq!(rest.iter().map(|c| c.sample).collect::<Vec<_>>(), [1, 2], "samples keep their numbers");
    assert_eq!(
        (&rest[0].tokens, &rest[1].tokens),
        (&three[1], &three[2]),
        "a sample is the same in any call"
    );

    let other = Request::new([4; 9], Sampling { max_new_tokens: 3, ..Sampling::default() }).with_id(9);
    let mine = sampled(7).with_id(0);
    let with_company = engine.complete(&[other.clone(), mine, other]).expect("generates");
    assert_eq!(with_company[1].tokens, pair[0], "a request does not depend on its company");
    let same_prompt = engine.complete(&[sampled(7), sampled(7)]).expect("generates");
    assert_ne!(same_prompt[0].tokens, same_prompt[1].tokens, "a repeated request draws anew");
}

/// What makes a good request a bad one.
type Change = fn(&mut Request);

fn bad_requests_are_refused_whole(mut subject: Subject) {
    let limits = subject.engine.limits();
    let refused = |engine: &mut dyn Engine, request: Request, what: &str| {
        let error = engine.complete(&[sampled(0), request]).expect_err(what);
        assert!(error.to_string().contains(what), "`{error}` names `{what}`");
        error
    };
    let engine = subject.engine.as_mut();
    let with = |change: &dyn Fn(&mut Request)| {
        let mut request = sampled(0);
        change(&mut request);
        request
    };
    let bad: [(&str, Change); 14] = [
        ("prompt", |r| r.prompt.clear()),
        ("samples", |r| r.samples = 0),
        ("temperature", |r| r.sampling.temperature = -1.0),
        ("temperature", |r| r.sampling.temperature = f32::NAN),
        ("top_p", |r| r.sampling.top_p = 0.0),
        ("top_p", |r| r.sampling.top_p = 1.5),
        ("min_p", |r| r.sampling.min_p = 1.5),
        ("min_p", |r| r.sampling.min_p = f32::NAN),
        ("repetition_penalty", |r| r.sampling.repetition_penalty = 0.0),
        ("repetition_penalty", |r| r.sampling.repetition_penalty = f32::INFINITY),
        ("stop_strings", |r| r.sampling.stop_strings = vec!["a".into(), String::new()]),
        ("max_new_tokens", |r| r.sampling.max_new_tokens = 0),
        ("min_new_tokens", |r| r.sampling.min_new_tokens = 99),
        ("stop_tokens", |r| r.sampling.stop_tokens = vec![u32::MAX]),
    ];
    for (field, change) in bad {
        refused(engine, with(&change), field);
    }
    let vocabulary = limits.vocabulary as u32;
    let error = refused(engine, with(&|r| r.prompt[1] = vocabulary), &vocabulary.to_string());
    assert!(matches!(error, Error::OutsideVocabulary { request: 1, position: 1, .. }), "{error:?}");
    let long = with(&|r| r.sampling.max_new_tokens = limits.context_tokens - 2);
    let error = refused(engine, long, &limits.context_tokens.to_string());
    assert!(matches!(error, Error::ContextExceeded { request: 1, prompt_tokens: 3, .. }), "{error:?}");
    let fits = Request::new([1, 2, 3], Sampling { stop_tokens: vec![], ..Sampling::greedy(1) });
    engine.complete(&[fits]).expect("refusals leave the engine as it was");
}

fn a_deadline_ends_a_call_and_not_the_engine(mut subject: Subject) {
    let before = tokens(subject.engine.as_mut(), greedy());
    let error =
        subject.engine.generate(&[greedy()], &mut Watch::within(Duration::ZERO)).expect_err("no time");
    assert!(matches!(error, Error::Deadline { done: 0, total: 1, .. }), "{error:?}");
    assert_eq!(subject.engine.state(), State::READY);
    assert_eq!(tokens(subject.engine.as_mut(), greedy()), before, "the engine goes on");
}

/// Walks at random through every event, with [`State::after`] as the oracle.
fn the_state_follows_the_table(mut subject: Subject) {
    let events = [
        Event::Generate,
        Event::Sleep(Level::One),
        Event::Sleep(Level::Two),
        Event::Wake(Parts::Weights),
        Event::Wake(Parts::Cache),
        Event::Wake(Parts::All),
        Event::Commit,
        Event::Abandon,
    ];
    let mut state = State::READY;
    let mut version = subject.engine.version();
    assert_eq!(subject.engine.state(), state, "a fresh engine is awake");
    let mut random = 12_345_u64;
    for step in 0..120 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let event = events[(random >> 33) as usize % events.len()];
        let (engine, weights) = (subject.engine.as_mut(), &subject.weights);
        let views: Vec<_> = weights.iter().map(|t| t.view().expect("it fills its shape")).collect();
        let did = match event {
            Event::Generate => engine.complete(&[Request::new([1], Sampling::greedy(1))]).map(drop),
            Event::Sleep(level) => engine.sleep(level),
            Event::Wake(parts) => engine.wake(parts),
            Event::Commit => engine.replace_weights(Version(step), &views, usize::MAX),
            _ => engine.begin_update(Version(step)).map(drop),
        };
        // An update in one call is two events.
        let expected = match event {
            Event::Commit | Event::Abandon => {
                state.after(Event::BeginUpdate).and_then(|updating| updating.after(event))
            }
            other => state.after(other),
        };
        match expected {
            Ok(next) => {
                did.unwrap_or_else(|e| panic!("step {step}: {event:?} is allowed while {state}, got `{e}`"));
                state = next;
                if event == Event::Commit {
                    version = Some(Version(step));
                }
            }
            Err(refusal) => match did {
                Err(Error::Refused(got)) => assert_eq!(got, refusal, "step {step}"),
                other => panic!("step {step}: {event:?} is refused while {state}, got {other:?}"),
            },
        }
        assert_eq!(engine.state(), state, "step {step}: after {event:?}");
        assert_eq!(engine.version(), version.filter(|_| state.has_weights()), "step {step}: {state}");
    }
}

fn a_refusal_says_where_and_what_now(mut subject: Subject) {
    subject.engine.sleep(Level::Two).expect("an awake engine sleeps");
    let error = subject.engine.complete(&[greedy()]).expect_err("asleep");
    let text = error.to_string();
    assert!(text.contains("generate") && text.contains("asleep") && text.contains("wake"), "{text}");
    subject.engine.wake(Parts::All).expect("it wakes");
    let text = subject.engine.complete(&[greedy()]).expect_err("stale").to_string();
    assert!(text.contains("generate") && text.contains("stale") && text.contains("update"), "{text}");
}

fn an_update_replaces_the_weights_and_their_version(mut subject: Subject) {
    let before = tokens(subject.engine.as_mut(), greedy());
    let Subject { engine, weights } = &mut subject;
    let mut update = engine.begin_update(Version(41)).expect("an awake engine takes weights");
    // One buffer for every tensor: the engine must have copied or sent a bucket before `push` returns.
    let mut buffer = Vec::new();
    for tensor in weights.iter() {
        buffer.clear();
        buffer.extend_from_slice(&tensor.bytes);
        let view =
            NamedTensor::new(&tensor.name, tensor.dtype, &tensor.shape, &buffer).expect("it fills its shape");
        update.push(&[view]).expect("a good tensor is taken");
        buffer.fill(0xff);
    }
    update.commit().expect("every tensor was pushed");
    assert_eq!(subject.engine.version(), Some(Version(41)));
    assert_eq!(subject.engine.state(), State::READY);
    let completion = subject.engine.complete(&[greedy()]).expect("generates").remove(0);
    assert_eq!(completion.version, Version(41), "a completion names the new weights");
    assert_ne!(completion.tokens, before[0], "other weights draw other tokens");

    subject.update(42);
    let again: Completion = subject.engine.complete(&[greedy()]).expect("generates").remove(0);
    assert_eq!(again.version, Version(42));
    assert_eq!(again.tokens, completion.tokens, "the same weights, pushed in one bucket or in many");
}

fn an_update_dropped_half_way_leaves_it_stale(mut subject: Subject) {
    for pushed in [0, 1] {
        let Subject { engine, weights } = &mut subject;
        let mut update = engine.begin_update(Version(7)).expect("begins");
        let first: Vec<_> = weights[..pushed].iter().map(|t| t.view().expect("it fills its shape")).collect();
        update.push(&first).expect("a good bucket is taken");
        drop(update);
        assert!(matches!(engine.state(), State::Stale { .. }), "dropped after {pushed} tensors");
        assert_eq!(engine.version(), None, "stale weights have no version");
        let error = engine.complete(&[greedy()]).expect_err("stale");
        assert!(matches!(error, Error::Refused(_)), "{error:?}");
    }
    subject.update(8);
    subject.engine.complete(&[greedy()]).expect("another update mends it");
}

fn a_leaked_update_is_mended_by_another(mut subject: Subject) {
    std::mem::forget(subject.engine.begin_update(Version(3)).expect("begins"));
    assert!(matches!(subject.engine.state(), State::Updating { .. }), "nobody ended the update");
    assert!(subject.engine.complete(&[greedy()]).is_err() && subject.engine.sleep(Level::One).is_err());
    subject.update(4);
    assert_eq!(subject.engine.version(), Some(Version(4)));
}

fn the_parameters_it_tells_are_those_it_takes(subject: Subject) {
    let Some(told) = subject.engine.parameters() else { return };
    let taken = subject.weights.iter().map(|t| (t.name.clone(), t.shape.clone())).collect();
    assert_eq!(told, taken, "the names and shapes of a whole update");
}

fn bad_tensors_are_refused_before_anything_changes(mut subject: Subject) {
    subject.update(1);
    let expected = tokens(subject.engine.as_mut(), greedy());
    let Subject { engine, weights } = &mut subject;
    let good: Vec<_> = weights.iter().map(|t| t.view().expect("it fills its shape")).collect();
    let (first, rest) = good.split_first().expect("a model has parameters");
    let mut update = engine.begin_update(Version(2)).expect("begins");
    let mut refused = |bad: NamedTensor<'_>, what: &str| {
        // The good tensor of the same bucket must not be taken either, or pushing it later would be a repetition.
        let error = update.push(&[*first, bad]).expect_err(what);
        assert!(error.to_string().contains(bad.name()), "`{error}` names the tensor");
        error
    };
    let error = refused(rest.first().unwrap_or(first).renamed("no.such.tensor"), "unknown");
    assert!(matches!(error, Error::UnknownTensor { .. }), "{error:?}");
    assert!(matches!(refused(*first, "twice"), Error::RepeatedTensor { .. }));
    let longer = [&[1], first.shape()].concat();
    let bad =
        NamedTensor::new(first.name(), first.dtype(), &longer, first.bytes()).expect("as many elements");
    assert!(matches!(refused(bad, "misshapen"), Error::Shape { .. }));
    let both = [bad, bad.renamed("no.such.tensor"), bad.renamed("nor.this")];
    let elems: usize = first.shape().iter().product();
    let booleans = vec![0; elems];
    let bad =
        NamedTensor::new(first.name(), Dtype::BOOL, first.shape(), &booleans).expect("it fills its shape");
    assert!(matches!(refused(bad, "of another type"), Error::Dtype { .. }));
    let error = update.push(&both).expect_err("another model's");
    assert!(matches!(error, Error::WrongModel { given: 3, unknown: 2, misshapen: 1, .. }), "{error:?}");
    assert!(NamedTensor::new(first.name(), first.dtype(), first.shape(), &first.bytes()[1..]).is_err());

    update.push(&[*first]).expect("the refused buckets left no trace");
    let again = update.push(&[*first]).expect_err("pushed twice");
    assert!(matches!(again, Error::RepeatedTensor { .. }), "{again:?}");
    update.push(rest).expect("the rest is taken");
    update.commit().expect("every tensor was pushed once");
    assert_eq!(tokens(engine.as_mut(), greedy()), expected, "refused tensors changed nothing");

    let mut update = engine.begin_update(Version(3)).expect("begins");
    update.push(rest).expect("all but one");
    let error = update.commit().expect_err("one is missing");
    assert!(error.to_string().contains(first.name()), "`{error}` names the missing tensor");
    assert!(matches!(error, Error::MissingTensors { missing: 1, .. }), "{error:?}");
    assert!(matches!(engine.state(), State::Stale { .. }), "a commit that failed leaves it stale");
}

fn level_one_keeps_the_weights_and_level_two_does_not(mut subject: Subject) {
    subject.update(1);
    let expected = tokens(subject.engine.as_mut(), greedy());
    subject.engine.sleep(Level::One).expect("sleeps");
    subject.engine.wake(Parts::Weights).expect("weights wake");
    assert!(subject.engine.complete(&[greedy()]).is_err(), "without a cache nothing is generated");
    subject.engine.wake(Parts::Cache).expect("the cache wakes");
    assert_eq!(tokens(subject.engine.as_mut(), greedy()), expected, "level 1 brings the same weights back");

    // The order with the least memory at its peak: weights, update, cache.
    subject.engine.sleep(Level::Two).expect("sleeps");
    subject.engine.wake(Parts::Weights).expect("weights wake");
    subject.update(2);
    subject.engine.wake(Parts::Cache).expect("the cache wakes");
    assert_eq!(tokens(subject.engine.as_mut(), greedy()), expected, "the same weights, pushed again");
}

/// How an engine is left, and what leaves it so.
type Left = (&'static str, fn(&mut dyn Engine));

fn what_one_engine_left_spoils_nothing_for_the_next(make: impl Fn() -> Subject) {
    let left: [Left; 5] = [
        ("asleep at level 1", |engine| engine.sleep(Level::One).expect("sleeps")),
        ("asleep at level 2", |engine| engine.sleep(Level::Two).expect("sleeps")),
        ("with its cache asleep", |engine| {
            engine.sleep(Level::Two).expect("sleeps");
            engine.wake(Parts::Weights).expect("weights wake");
        }),
        ("stale", |engine| drop(engine.begin_update(Version(5)).expect("begins"))),
        ("in the middle of an update", |engine| {
            std::mem::forget(engine.begin_update(Version(6)).expect("begins"));
        }),
    ];
    let mut first = make();
    first.update(1);
    let expected = tokens(first.engine.as_mut(), greedy());
    drop(first);
    for (how, leave) in left {
        leave(make().engine.as_mut());
        let mut next = make();
        assert_eq!(next.engine.state(), State::READY, "made after one that was left {how}");
        next.update(1);
        assert_eq!(tokens(next.engine.as_mut(), greedy()), expected, "after one that was left {how}");
    }
}

fn sleep_frees_memory(mut subject: Subject) {
    subject.update(1);
    let Some(awake) = subject.engine.memory_bytes() else { return };
    let pushed: usize = subject.views().iter().map(|t| t.bytes().len()).sum();
    assert!(awake.weights > 0 && pushed > 0, "an awake engine holds its weights: {awake:?}");
    assert_eq!(awake.parked, 0, "nothing is put aside while awake");
    subject.engine.sleep(Level::One).expect("sleeps");
    let one = subject.engine.memory_bytes().expect("it knew before");
    assert_eq!((one.weights, one.cache), (0, 0), "level 1 leaves nothing in use");
    assert_eq!(one.parked, awake.weights, "level 1 keeps the weights on the host");
    subject.engine.wake(Parts::Weights).expect("weights wake");
    let woken = subject.engine.memory_bytes().expect("it knew before");
    assert_eq!(
        (woken.weights, woken.cache, woken.parked),
        (awake.weights, 0, 0),
        "weights back, no cache yet"
    );
    subject.engine.sleep(Level::Two).expect("sleeps");
    assert_eq!(subject.engine.memory_bytes(), Some(MemoryBytes::default()), "level 2 leaves nothing at all");
}
