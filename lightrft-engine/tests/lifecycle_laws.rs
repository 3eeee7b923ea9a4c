//! Laws of the state machine: the table against a small model of an engine's memory, and the suite on the scripted engine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use lightrft_engine::testing::{ScriptedEngine, Subject, conformance};
use lightrft_engine::{
    Cache, Engine, EngineExt, Event, FinishReason, Level, Parts, Request, Sampling, State,
};
use proptest::prelude::*;

#[test]
fn the_scripted_engine_keeps_the_contract() {
    conformance(|| {
        let engine = ScriptedEngine::new(64);
        let weights = engine.example_weights(1);
        Subject { engine: Box::new(engine), weights }
    });
}

#[test]
fn a_script_decides_the_completions() {
    let mut engine =
        ScriptedEngine::new(16).replying(|request, sample| vec![request.prompt[0], sample as u32, 9]);
    let sampling = Sampling { max_new_tokens: 4, stop_tokens: vec![9], ..Sampling::default() };
    let completions = engine.complete(&[Request::new([5], sampling).samples(2)]).unwrap();
    assert_eq!(completions[1].tokens, [5, 1, 9]);
    assert_eq!(completions[1].finish, FinishReason::Stop(9));
    assert_eq!(engine.events(), [Event::Generate]);
}

/// What an engine's memory holds, told without a word about states.
#[derive(Clone, Copy, Debug)]
struct Memory {
    weights: Content,
    weights_awake: bool,
    cache_awake: bool,
    update_open: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Content {
    Whole,
    Broken,
    Absent,
}

impl Memory {
    /// Whether the event makes sense, and its effect if so.
    fn apply(&mut self, event: Event) -> bool {
        let sensible = match event {
            Event::Generate | Event::Pause | Event::Resume | Event::ResetCaches => {
                self.weights == Content::Whole && self.weights_awake && self.cache_awake && !self.update_open
            }
            Event::Sleep(_) => !self.update_open,
            Event::Wake(Parts::Cache) => !self.update_open && self.weights_awake,
            Event::Wake(_) => !self.update_open,
            Event::BeginUpdate => self.weights_awake,
            Event::Commit | Event::Abandon => self.update_open,
            Event::LoseTrack => true,
            Event::Die => return false,
        };
        if !sensible {
            return false;
        }
        match event {
            Event::Generate | Event::Pause | Event::Resume | Event::ResetCaches => {}
            Event::Sleep(level) => {
                (self.weights_awake, self.cache_awake) = (false, false);
                if level == Level::Two || self.weights == Content::Broken {
                    self.weights = Content::Absent;
                }
            }
            Event::Wake(parts) => {
                self.weights_awake = true;
                self.cache_awake |= parts != Parts::Weights;
            }
            Event::BeginUpdate => (self.update_open, self.weights) = (true, Content::Broken),
            Event::Commit => (self.update_open, self.weights) = (false, Content::Whole),
            Event::Abandon => self.update_open = false,
            Event::LoseTrack => {
                // The worst is taken for true, and what sleeps is seen to by the next call.
                self.weights = Content::Broken;
                (self.weights_awake, self.cache_awake, self.update_open) = (true, true, false);
            }
            Event::Die => {}
        }
        true
    }

    fn state(&self) -> State {
        let cache = if self.cache_awake { Cache::Ready } else { Cache::Asleep };
        match (self.weights_awake, self.weights) {
            _ if self.update_open => State::Updating { cache },
            (true, Content::Whole) => State::Awake { cache },
            (true, Content::Broken | Content::Absent) => State::Stale { cache },
            (false, Content::Whole) => State::Asleep { level: Level::One },
            (false, Content::Broken | Content::Absent) => State::Asleep { level: Level::Two },
        }
    }
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Generate),
        prop_oneof![Just(Event::Pause), Just(Event::Resume), Just(Event::ResetCaches)],
        prop_oneof![Just(Level::One), Just(Level::Two)].prop_map(Event::Sleep),
        prop_oneof![Just(Parts::Weights), Just(Parts::Cache), Just(Parts::All)].prop_map(Event::Wake),
        Just(Event::BeginUpdate),
        Just(Event::Commit),
        Just(Event::Abandon),
        Just(Event::LoseTrack),
    ]
}

fn trace() -> impl Strategy<Value = Vec<Event>> {
    prop::collection::vec(event(), 0..60)
}

/// The state after a trace, refused events skipped.
fn reached(trace: &[Event]) -> State {
    trace.iter().fold(State::READY, |state, event| state.after(*event).unwrap_or(state))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_table_tells_what_the_memory_holds(trace in trace()) {
        let mut memory = Memory {
            weights: Content::Whole, weights_awake: true, cache_awake: true, update_open: false,
        };
        let mut state = State::READY;
        for event in trace {
            let sensible = memory.apply(event);
            match state.after(event) {
                Ok(next) => {
                    prop_assert!(sensible, "{:?} was allowed while {}", event, state);
                    state = next;
                }
                Err(refusal) => {
                    prop_assert!(!sensible, "{}", refusal);
                    prop_assert_eq!(refusal.state, state);
                    prop_assert!(!refusal.advice.is_empty());
                }
            }
            prop_assert_eq!(state, memory.state());
            prop_assert_eq!(state.has_weights(), memory.weights == Content::Whole);
        }
    }

    #[test]
    fn an_engine_dies_anywhere_and_stays_dead(trace in trace(), event in event()) {
        let dead = reached(&trace).after(Event::Die).unwrap();
        prop_assert_eq!(dead, State::Dead);
        prop_assert!(!dead.has_weights() && !dead.can_generate());
        let refusal = dead.after(event).unwrap_err();
        prop_assert!(refusal.to_string().contains("dead") && refusal.to_string().contains("another"));
    }

    #[test]
    fn nothing_is_generated_between_dropping_the_weights_and_a_commit(trace in trace()) {
        let mut state = State::READY;
        let mut dropped = false;
        for event in trace {
            let Ok(next) = state.after(event) else { continue };
            match event {
                Event::Sleep(Level::Two) | Event::BeginUpdate | Event::LoseTrack => dropped = true,
                Event::Commit => dropped = false,
                Event::Generate => prop_assert!(!dropped, "generated from dropped weights"),
                _ => {}
            }
            state = next;
        }
    }

    #[test]
    fn wherever_it_stands_wake_update_generate_is_a_way_out(trace in trace()) {
        let mut state = reached(&trace);
        for event in [Event::Wake(Parts::All), Event::BeginUpdate, Event::Commit, Event::Wake(Parts::All)] {
            state = state.after(event).unwrap_or(state);
        }
        prop_assert!(state.can_generate(), "{}", state);
    }

    #[test]
    fn sleeping_twice_is_sleeping_at_the_deeper_level(trace in trace(), a in 0..2_i32, b in 0..2_i32) {
        let level = |n: i32| if n == 0 { Level::One } else { Level::Two };
        let state = reached(&trace);
        if let Ok(once) = state.after(Event::Sleep(level(a.max(b)))) {
            let twice = state.after(Event::Sleep(level(a))).unwrap().after(Event::Sleep(level(b))).unwrap();
            prop_assert_eq!(once, twice);
        }
    }

    #[test]
    fn waking_in_parts_is_waking(trace in trace()) {
        let state = reached(&trace);
        if let Ok(all) = state.after(Event::Wake(Parts::All)) {
            let weights = state.after(Event::Wake(Parts::Weights)).unwrap();
            prop_assert_eq!(weights.after(Event::Wake(Parts::Cache)).unwrap(), all);
        }
    }

    #[test]
    fn a_refused_call_leaves_the_engine_as_it_was(trace in trace()) {
        let mut engine = ScriptedEngine::new(16);
        for event in trace {
            let (before, version) = (engine.state(), engine.version());
            let done = match event {
                Event::Generate => engine.complete(&[Request::new([1], Sampling::greedy(1))]).is_ok(),
                Event::Sleep(level) => engine.sleep(level).is_ok(),
                Event::Wake(parts) => engine.wake(parts).is_ok(),
                _ => continue,
            };
            if !done {
                prop_assert_eq!(engine.state(), before);
                prop_assert_eq!(engine.version(), version);
            }
        }
    }
}
