//! Several engines behind one handle: the contract of one, dealing, deaths, restarts, failures of one of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod faulty;
mod laws;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use faulty::{Call, Faulty, failure};
use lightrft_engine::testing::{ScriptedEngine, Subject, TensorBytes, conformance};
use lightrft_engine::{
    Cache, DataParallel, Engine, EngineExt, Error, Level, NamedTensor, Parts, Progress, Replica,
    ReplicaEvent, Request, Restarts, Result, Sampling, Service, State, Version, Watch,
};

const LONG: Duration = Duration::from_secs(60);

pub(crate) fn boxed(engine: ScriptedEngine) -> Result<Box<dyn Engine>> {
    Ok(Box::new(engine))
}

pub(crate) fn views(weights: &[TensorBytes]) -> Vec<NamedTensor<'_>> {
    weights.iter().map(|t| t.view().unwrap()).collect()
}

/// Gives an engine the weights of a version, as the tests do.
pub(crate) fn give(engine: &mut dyn Engine, to: Version) -> Result<()> {
    let weights = ScriptedEngine::new(32).example_weights(to.0);
    engine.replace_weights(to, &views(&weights), 64)
}

/// Prompts of different lengths.
fn prompts(count: u32) -> Vec<Request> {
    (0..count)
        .map(|n| Request::new(vec![n % 32; 1 + n as usize % 7], Sampling::default()).samples(2))
        .collect()
}

/// What one engine answers.
fn alone(requests: &[Request]) -> Vec<lightrft_engine::Completion> {
    ScriptedEngine::new(32).complete(requests).unwrap()
}

fn services(engines: &DataParallel) -> Vec<Service> {
    engines.replicas().iter().map(|replica| replica.service).collect()
}

/// Counts how often each replica was made; `make` is given the index and the count, from 0.
fn counted(
    make: impl Fn(usize, usize) -> Result<Box<dyn Engine>> + Send + Sync + 'static,
) -> impl Fn(usize) -> Result<Box<dyn Engine>> + Send + Sync + 'static {
    let made: [AtomicUsize; 8] = Default::default();
    move |replica| make(replica, made[replica].fetch_add(1, Ordering::SeqCst))
}

/// No pause between restarts.
fn at_once(most: u32) -> Restarts {
    Restarts { most, pause: Duration::ZERO }
}

#[test]
fn the_handle_keeps_the_contract_of_an_engine() {
    for count in 1..4 {
        conformance(|| Subject {
            engine: Box::new(DataParallel::new(count, |_| boxed(ScriptedEngine::new(64))).unwrap()),
            weights: ScriptedEngine::new(64).example_weights(1),
        });
    }
}

#[test]
fn the_handle_keeps_the_contract_where_one_of_three_died() {
    conformance(|| {
        let make = |replica, count| {
            let engine = ScriptedEngine::new(64);
            boxed(if replica == 1 && count == 0 { engine.dying_at(0) } else { engine })
        };
        let mut engines = DataParallel::new(3, counted(make)).unwrap();
        engines.complete(&[Request::new([1], Sampling::default()).samples(3)]).unwrap();
        assert_eq!(services(&engines), [Service::In, Service::Down, Service::In]);
        Subject { engine: Box::new(engines), weights: ScriptedEngine::new(64).example_weights(1) }
    });
}

#[test]
fn completions_are_those_of_one_engine_and_every_replica_has_its_part() {
    let seen = Arc::new(Mutex::new(vec![0_usize; 3]));
    let heard = seen.clone();
    let mut engines = DataParallel::new(3, move |replica| {
        let heard = heard.clone();
        Ok(Faulty::boxed(ScriptedEngine::new(32), move |call| {
            if let Call::Generate(requests, _) = call {
                heard.lock().unwrap()[replica] += requests.len();
            }
            Ok(())
        }))
    })
    .unwrap();
    let requests = prompts(10);
    assert_eq!(engines.complete(&requests).unwrap(), alone(&requests));
    assert!(seen.lock().unwrap().iter().all(|count| (3..5).contains(count)), "{seen:?}");
    // One prompt is drawn by all of them.
    let one = [Request::new([1; 4], Sampling::default()).samples(7).from_sample(2)];
    assert_eq!(engines.complete(&one).unwrap(), alone(&one));
    assert!(seen.lock().unwrap().iter().all(|count| (4..6).contains(count)), "{seen:?}");
}

/// Waits until `of` threads are there; false if they do not come.
#[derive(Default)]
struct Meeting {
    there: Mutex<usize>,
    came: Condvar,
}

impl Meeting {
    fn wait_for(&self, of: usize) -> bool {
        let mut there = self.there.lock().unwrap();
        *there += 1;
        self.came.notify_all();
        let (there, _) = self.came.wait_timeout_while(there, LONG, |there| *there < of).unwrap();
        *there >= of
    }
}

#[test]
fn every_call_reaches_all_replicas_at_the_same_time() {
    // start, generate, sleep, wake, begin, push, commit
    let meetings: Arc<[Meeting; 7]> = Arc::default();
    let shared = meetings.clone();
    let mut engines = DataParallel::new(3, move |_| {
        assert!(shared[0].wait_for(3), "started one after the other");
        let shared = shared.clone();
        Ok(Faulty::boxed(ScriptedEngine::new(32), move |call| {
            let at = match call {
                Call::Generate(..) => 1,
                Call::Sleep => 2,
                Call::Wake => 3,
                Call::Begin => 4,
                Call::Push(_) => 5,
                Call::Commit => 6,
            };
            assert!(shared[at].wait_for(3), "one after the other: {at}");
            Ok(())
        }))
    })
    .unwrap();
    engines.complete(&prompts(6)).unwrap();
    engines.sleep(Level::Two).unwrap();
    engines.wake(Parts::All).unwrap();
    give(&mut engines, Version(1)).unwrap();
    let there: Vec<usize> = meetings.iter().map(|meeting| *meeting.there.lock().unwrap()).collect();
    assert!(there.iter().all(|there| *there >= 3), "{there:?}");
}

#[test]
fn a_bucket_goes_to_all_from_the_same_bytes() {
    let seen: Arc<Mutex<Vec<(usize, usize)>>> = Arc::default();
    let heard = seen.clone();
    let mut engines = DataParallel::new(3, move |_| {
        let heard = heard.clone();
        Ok(Faulty::boxed(ScriptedEngine::new(32), move |call| {
            if let Call::Push(bucket) = call {
                let places = bucket.iter().map(|t| (t.bytes().as_ptr().addr(), t.bytes().len()));
                heard.lock().unwrap().extend(places);
            }
            Ok(())
        }))
    })
    .unwrap();
    let weights = ScriptedEngine::new(32).example_weights(1);
    engines.replace_weights(Version(1), &views(&weights), 1).unwrap();
    let mut seen = seen.lock().unwrap().clone();
    seen.sort_unstable();
    let mut expected: Vec<_> =
        weights.iter().flat_map(|t| [(t.bytes.as_ptr().addr(), t.bytes.len()); 3]).collect();
    expected.sort_unstable();
    assert_eq!(seen, expected);
}

#[test]
fn a_dead_replicas_requests_are_answered_by_others_and_it_is_restarted_before_the_next_call() {
    let events: Arc<Mutex<Vec<String>>> = Arc::default();
    let heard = events.clone();
    let make = |replica, count| {
        let engine = ScriptedEngine::new(32);
        boxed(if replica == 1 && count == 0 { engine.dying_at(1) } else { engine })
    };
    let mut engines = DataParallel::new(2, counted(make)).unwrap().telling(move |event| {
        heard.lock().unwrap().push(match event {
            ReplicaEvent::Died { replica, operation, error } => {
                format!("{replica} died: {operation}: {error}")
            }
            ReplicaEvent::Repeated { replica, requests } => format!("{requests} of {replica} repeated"),
            ReplicaEvent::Restarted { replica, restarts, service, error: None } => {
                format!("{replica} restarted {restarts}: {service:?}")
            }
            other => format!("{other:?}"),
        });
    });
    let requests = prompts(8);
    for _ in 0..3 {
        assert_eq!(engines.complete(&requests).unwrap(), alone(&requests));
    }
    let refused = "cannot generate while dead: its server or its GPU is gone: make another engine";
    let told = [&format!("1 died: generate: {refused}"), "4 of 1 repeated", "1 restarted 1: In"];
    assert_eq!(*events.lock().unwrap(), told);
    let well = Replica { state: State::READY, version: Some(Version(0)), service: Service::In, restarts: 0 };
    assert_eq!(engines.replicas(), [well; 2]);
}

#[test]
fn a_restarted_replica_is_given_the_current_weights_by_the_callers_source() {
    let make = |replica, count| {
        let engine = ScriptedEngine::new(32);
        // After an update of four calls: begin, push, push, commit.
        boxed(if (replica, count) == (0, 0) { engine.dying_at(4) } else { engine })
    };
    let mut engines = DataParallel::new(2, counted(make)).unwrap().with_weights(give);
    give(&mut engines, Version(5)).unwrap();
    let requests = prompts(4);
    let mut expected = ScriptedEngine::new(32);
    give(&mut expected, Version(5)).unwrap();
    let expected = expected.complete(&requests).unwrap();
    assert_eq!(engines.complete(&requests).unwrap(), expected);
    assert_eq!(services(&engines), [Service::Down, Service::In]);
    assert_eq!(engines.complete(&requests).unwrap(), expected);
    assert_eq!(engines.replicas().iter().map(|r| r.version).collect::<Vec<_>>(), [Some(Version(5)); 2]);
}

#[test]
fn without_a_source_of_weights_the_others_go_on_and_the_next_update_brings_it_back() {
    let made = Arc::new(AtomicUsize::new(0));
    let count = made.clone();
    let make = move |replica| {
        let first = count.fetch_add(1, Ordering::SeqCst) < 2;
        let engine = ScriptedEngine::new(32);
        boxed(if replica == 0 && first { engine.dying_at(4) } else { engine })
    };
    let mut engines = DataParallel::new(2, make).unwrap();
    give(&mut engines, Version(5)).unwrap();
    for _ in 0..3 {
        assert!(engines.complete(&prompts(4)).unwrap().iter().all(|c| c.version == Version(5)));
        assert_eq!(services(&engines), [Service::Down, Service::In]);
    }
    assert_eq!(made.load(Ordering::SeqCst), 2, "nothing was started in vain");
    engines.sleep(Level::Two).unwrap();
    engines.wake(Parts::Weights).unwrap();
    give(&mut engines, Version(6)).unwrap();
    assert_eq!(engines.state(), State::Awake { cache: Cache::Asleep });
    let memory = engines.memory_bytes().unwrap();
    assert_eq!(memory.cache, 0, "the new one's cache sleeps as the others' do");
    engines.wake(Parts::Cache).unwrap();
    assert_eq!(services(&engines), [Service::In; 2]);
    assert!(engines.complete(&prompts(4)).unwrap().iter().all(|c| c.version == Version(6)));
}

#[test]
fn a_replica_that_cannot_be_given_the_weights_stays_behind_until_the_next_update() {
    let make = |replica, count| {
        let engine = ScriptedEngine::new(32);
        boxed(if (replica, count) == (0, 0) { engine.dying_at(4) } else { engine })
    };
    let mut engines = DataParallel::new(2, counted(make)).unwrap().with_weights(|_, _| Err(failure()));
    give(&mut engines, Version(5)).unwrap();
    engines.complete(&prompts(4)).unwrap();
    for _ in 0..2 {
        let found = engines.complete(&prompts(4)).unwrap();
        assert!(found.iter().all(|c| c.version == Version(5)), "nothing is drawn by former weights");
        assert_eq!(services(&engines), [Service::Behind, Service::In]);
        assert_eq!((engines.state(), engines.version()), (State::READY, Some(Version(5))));
    }
    engines.sleep(Level::One).unwrap();
    engines.wake(Parts::All).unwrap();
    give(&mut engines, Version(6)).unwrap();
    assert_eq!(services(&engines), [Service::In; 2]);
}

#[test]
fn weights_of_an_update_are_not_taken_for_those_that_replicas_are_made_with_by_their_number() {
    let make = |replica, count| {
        let engine = ScriptedEngine::new(32);
        boxed(if (replica, count) == (1, 0) { engine.dying_at(4) } else { engine })
    };
    // The number that engines are made with, and other weights.
    let give = |engine: &mut dyn Engine, to| {
        let weights = ScriptedEngine::new(32).example_weights(9);
        engine.replace_weights(to, &views(&weights), 64)
    };
    let mut one = ScriptedEngine::new(32);
    give(&mut one, Version(0)).unwrap();
    let expected = one.complete(&prompts(4)).unwrap();
    for (with_weights, service) in [(true, Service::In), (false, Service::Down)] {
        let mut engines = DataParallel::new(2, counted(make)).unwrap();
        if with_weights {
            engines = engines.with_weights(give);
        }
        give(&mut engines, Version(0)).unwrap();
        for _ in 0..3 {
            assert_eq!(engines.complete(&prompts(4)).unwrap(), expected);
        }
        assert_eq!(services(&engines), [Service::In, service]);
    }
}

#[test]
fn one_that_was_left_behind_does_not_keep_the_dead_from_coming_back() {
    let make = |replica, count| {
        let engine = ScriptedEngine::new(32);
        // After an update of four calls: in the first call of `generate`, and in the third.
        boxed(if count == 0 { engine.dying_at([4, 6][replica]) } else { engine })
    };
    let asked = AtomicUsize::new(0);
    let source = move |engine: &mut dyn Engine, to| {
        if asked.fetch_add(1, Ordering::SeqCst) == 0 { Err(failure()) } else { give(engine, to) }
    };
    let mut engines =
        DataParallel::new(2, counted(make)).unwrap().with_weights(source).with_restarts(at_once(3));
    give(&mut engines, Version(5)).unwrap();
    for expected in
        [[Service::Down, Service::In], [Service::Behind, Service::In], [Service::Behind, Service::In]]
    {
        assert!(engines.complete(&prompts(4)).unwrap().iter().all(|c| c.version == Version(5)));
        assert_eq!(services(&engines), expected);
    }
    assert_eq!(engines.replicas()[1].version, Some(Version(5)));
    // Nobody is left but the one behind, and it is asked for nothing that it cannot do.
    engines.sleep(Level::One).unwrap();
    engines.wake(Parts::All).unwrap();
    give(&mut engines, Version(6)).unwrap();
    assert_eq!(services(&engines), [Service::In; 2]);
}

#[test]
fn a_sleep_that_all_have_failed_is_forgotten_by_the_next_call_of_generate() {
    let make = |_, count| {
        let engine = ScriptedEngine::new(32);
        let engine = if count == 0 { engine.dying_at(4) } else { engine };
        Ok(Faulty::boxed(engine, |call| if matches!(call, Call::Sleep) { Err(failure()) } else { Ok(()) }))
    };
    let mut engines = DataParallel::new(2, counted(make)).unwrap().with_weights(give);
    give(&mut engines, Version(5)).unwrap();
    engines.sleep(Level::One).unwrap_err();
    assert_eq!(engines.state(), State::READY);
    let found = engines.complete(&prompts(4)).unwrap();
    assert!(found.iter().all(|c| c.version == Version(5)), "both died, and came back");
}

#[test]
fn a_call_with_less_time_than_a_restart_takes_goes_on_with_the_living() {
    let make = |replica, count| {
        if count == 0 {
            // What it takes to make one is what is measured here.
            std::thread::sleep(Duration::from_millis(1500));
        }
        let engine = ScriptedEngine::new(32);
        boxed(if (replica, count) == (1, 0) { engine.dying_at(0) } else { engine })
    };
    let mut engines = DataParallel::new(2, counted(make)).unwrap();
    engines.complete(&prompts(4)).unwrap();
    engines.generate(&prompts(4), &mut Watch::within(Duration::from_millis(1400))).unwrap();
    assert_eq!(services(&engines), [Service::In, Service::Down]);
    engines.complete(&prompts(4)).unwrap();
    assert_eq!(services(&engines), [Service::In; 2]);
}

#[test]
fn one_that_dies_in_an_update_is_left_out_of_it() {
    // begin, push, push, commit
    for call in 0..4 {
        let make = move |replica, count| {
            let engine = ScriptedEngine::new(32);
            boxed(if (replica, count) == (1, 0) { engine.dying_at(call) } else { engine })
        };
        let mut engines = DataParallel::new(3, counted(make)).unwrap();
        give(&mut engines, Version(1)).unwrap();
        assert_eq!((engines.state(), engines.version()), (State::READY, Some(Version(1))), "at call {call}");
        assert_eq!(services(&engines), [Service::In, Service::Down, Service::In]);
        give(&mut engines, Version(2)).unwrap();
        assert_eq!(services(&engines), [Service::In; 3]);
    }
}

#[test]
fn one_that_fails_in_an_update_leaves_all_stale_and_another_update_mends_it() {
    for fault in 0..3 {
        let make = move |replica, _| {
            let mut calls = 0;
            Ok(Faulty::boxed(ScriptedEngine::new(32), move |call| {
                let counts =
                    matches!((&call, fault), (Call::Begin, 0) | (Call::Push(_), 1) | (Call::Commit, 2));
                calls += usize::from(counts);
                if replica == 1 && counts && calls == 1 { Err(failure()) } else { Ok(()) }
            }))
        };
        let mut engines = DataParallel::new(3, counted(make)).unwrap();
        let error = give(&mut engines, Version(1)).unwrap_err();
        assert!(matches!(error, Error::Replica { replica: 1, .. }), "{error}");
        assert_eq!((engines.state(), engines.version()), (State::EMPTY, None));
        let error = engines.complete(&prompts(1)).unwrap_err();
        assert!(matches!(error, Error::Refused(_)), "{error}");
        give(&mut engines, Version(2)).unwrap();
        assert_eq!((engines.state(), engines.version()), (State::READY, Some(Version(2))));
        engines.complete(&prompts(4)).unwrap();
    }
}

#[test]
fn after_a_bucket_that_only_some_have_taken_the_update_is_over() {
    let mut engines = DataParallel::new(2, |replica| {
        Ok(Faulty::boxed(ScriptedEngine::new(32), move |call| match call {
            Call::Push(_) if replica == 1 => Err(failure()),
            _ => Ok(()),
        }))
    })
    .unwrap();
    let weights = ScriptedEngine::new(32).example_weights(1);
    let views = views(&weights);
    let mut update = engines.begin_update(Version(1)).unwrap();
    update.push(&views[..1]).unwrap_err();
    assert!(update.push(&views[1..]).unwrap_err().to_string().contains("earlier bucket"));
    assert!(update.commit().unwrap_err().to_string().contains("earlier bucket"));
    assert_eq!(engines.state(), State::EMPTY);
}

#[test]
fn a_sleep_that_one_failed_is_brought_to_its_end_by_another() {
    let mut engines = DataParallel::new(3, |replica| {
        let mut failed = false;
        Ok(Faulty::boxed(ScriptedEngine::new(32), move |call| {
            let fails = replica == 2 && !failed && matches!(call, Call::Sleep);
            failed |= fails;
            if fails { Err(failure()) } else { Ok(()) }
        }))
    })
    .unwrap();
    let error = engines.sleep(Level::One).unwrap_err();
    assert!(matches!(error, Error::Replica { replica: 2, .. }), "{error}");
    let states: Vec<State> = engines.replicas().iter().map(|r| r.state).collect();
    let asleep = State::Asleep { level: Level::One };
    assert_eq!((engines.state(), states), (asleep, vec![asleep, asleep, State::READY]));
    engines.sleep(Level::One).unwrap();
    assert!(engines.replicas().iter().all(|r| r.state == asleep));
    engines.wake(Parts::All).unwrap();
    assert_eq!(engines.complete(&prompts(4)).unwrap(), alone(&prompts(4)));
}

#[test]
fn the_dead_are_left_out_of_sleeping_and_waking() {
    for call in 0..2 {
        let make = move |replica, count| {
            let engine = ScriptedEngine::new(32);
            boxed(if (replica, count) == (0, 0) { engine.dying_at(call) } else { engine })
        };
        let mut engines = DataParallel::new(2, counted(make)).unwrap();
        engines.sleep(Level::One).unwrap();
        engines.wake(Parts::All).unwrap();
        assert_eq!(services(&engines), [Service::Down, Service::In]);
        assert_eq!(engines.complete(&prompts(4)).unwrap(), alone(&prompts(4)));
        assert_eq!(services(&engines), [Service::In; 2]);
    }
}

#[test]
fn an_engine_that_dies_alone_while_asleep_comes_back_with_the_next_update() {
    let make = |_, count| {
        let engine = ScriptedEngine::new(32);
        boxed(if count == 0 { engine.dying_at(1) } else { engine })
    };
    let mut engines = DataParallel::new(1, counted(make)).unwrap();
    engines.sleep(Level::Two).unwrap();
    engines.wake(Parts::Weights).unwrap();
    assert_eq!(
        (engines.state(), services(&engines)),
        (State::Stale { cache: Cache::Asleep }, vec![Service::Down])
    );
    give(&mut engines, Version(1)).unwrap();
    engines.wake(Parts::Cache).unwrap();
    assert_eq!(engines.complete(&prompts(2)).unwrap()[0].version, Version(1));
}

#[test]
fn when_all_are_dead_and_none_comes_back_it_is_an_error_and_then_the_end() {
    let make =
        |_, count| if count == 0 { boxed(ScriptedEngine::new(32).dying_at(0)) } else { Err(failure()) };
    let mut engines = DataParallel::new(2, counted(make)).unwrap().with_restarts(at_once(2));
    for restarts in 1..3 {
        let error = engines.complete(&prompts(4)).unwrap_err();
        assert!(matches!(error, Error::NoReplica { count: 2, .. }), "{error}");
        assert!(error.to_string().contains("as the test wants"), "{error}");
        assert!(engines.replicas().iter().all(|r| r.restarts == restarts), "{:?}", engines.replicas());
    }
    assert_eq!(services(&engines), [Service::GivenUp; 2]);
    assert_eq!((engines.state(), engines.version()), (State::Dead, None));
    assert!(engines.complete(&prompts(4)).unwrap_err().is_death());
    assert!(engines.sleep(Level::One).unwrap_err().is_death());
    assert!(give(&mut engines, Version(1)).unwrap_err().is_death());
}

#[test]
fn a_replica_that_keeps_dying_is_left_alone_for_a_while() {
    let make = |replica, count| match (replica, count) {
        (1, 0) => boxed(ScriptedEngine::new(32).dying_at(0)),
        (1, _) => Err(failure()),
        _ => boxed(ScriptedEngine::new(32)),
    };
    let restarts = Restarts { most: 3, pause: Duration::from_secs(3600) };
    let mut engines = DataParallel::new(2, counted(make)).unwrap().with_restarts(restarts);
    for expected in [0, 1, 1, 1] {
        assert_eq!(engines.complete(&prompts(4)).unwrap(), alone(&prompts(4)));
        assert_eq!(engines.replicas()[1].restarts, expected);
        assert_eq!(services(&engines)[1], Service::Down);
    }
}

#[test]
fn a_request_that_engines_die_of_ends_the_call_and_not_the_handle() {
    let make = |_, _| {
        boxed(ScriptedEngine::new(32).replying(|request, _| {
            assert_ne!(request.prompt[0], 13, "a prompt that it cannot bear");
            vec![request.prompt[0]; 4]
        }))
    };
    let mut engines = DataParallel::new(4, counted(make)).unwrap().with_restarts(at_once(9));
    let good: Vec<Request> = (0..8).map(|n| Request::new([n], Sampling::greedy(4))).collect();
    let mut bad = good.clone();
    bad[5].prompt = vec![13];
    let error = engines.complete(&bad).unwrap_err();
    assert!(matches!(error, Error::Deadly { deaths: 3, .. }), "{error}");
    assert!(error.to_string().contains("a prompt that it cannot bear"), "{error}");
    assert_eq!(engines.complete(&good).unwrap().len(), 8);
    assert_eq!(services(&engines), [Service::In; 4]);
}

#[test]
fn a_panic_is_the_death_of_its_engine() {
    // generate, sleep, wake, begin, push, commit
    for fault in 0..6 {
        let make = move |replica, count| {
            Ok(Faulty::boxed(ScriptedEngine::new(32), move |call| {
                let at = match call {
                    Call::Generate(..) => 0,
                    Call::Sleep => 1,
                    Call::Wake => 2,
                    Call::Begin => 3,
                    Call::Push(_) => 4,
                    Call::Commit => 5,
                };
                assert!((replica, count, at) != (1, 0, fault), "on purpose");
                Ok(())
            }))
        };
        let deaths: Arc<Mutex<Vec<String>>> = Arc::default();
        let heard = deaths.clone();
        let mut engines = DataParallel::new(2, counted(make)).unwrap().telling(move |event| {
            if let ReplicaEvent::Died { replica, error, .. } = event {
                heard.lock().unwrap().push(format!("{replica}: {error}"));
            }
        });
        assert_eq!(engines.complete(&prompts(4)).unwrap(), alone(&prompts(4)));
        engines.sleep(Level::One).unwrap();
        engines.wake(Parts::All).unwrap();
        give(&mut engines, Version(1)).unwrap();
        assert_eq!(engines.state(), State::READY);
        let deaths = deaths.lock().unwrap();
        assert_eq!(deaths.len(), 1, "{deaths:?}");
        assert!(deaths[0].starts_with("1: ") && deaths[0].contains("on purpose"), "{deaths:?}");
    }
}

#[test]
fn a_factory_that_panics_is_an_error_that_names_the_replica() {
    let error = DataParallel::new(2, |replica| {
        assert_ne!(replica, 1, "no such card");
        boxed(ScriptedEngine::new(32))
    })
    .unwrap_err();
    assert!(matches!(error, Error::Replica { replica: 1, .. }), "{error}");
    assert!(error.to_string().contains("no such card"), "{error}");
}

#[test]
fn engines_of_different_models_are_refused() {
    let refused = |make: fn(usize) -> ScriptedEngine| {
        DataParallel::new(3, move |replica| boxed(make(replica))).unwrap_err().to_string()
    };
    let text = refused(|replica| ScriptedEngine::new(32 + replica));
    assert!(text.contains("replica 1") && text.contains("vocabulary") && text.contains("33"), "{text}");
    let text = refused(|replica| {
        let mut engine = ScriptedEngine::new(32);
        if replica == 2 {
            give(&mut engine, Version(1)).unwrap();
        }
        engine
    });
    assert!(text.contains("replica 2") && text.contains("version"), "{text}");
    assert!(DataParallel::new(0, |_| boxed(ScriptedEngine::new(32))).is_err());
}

#[test]
fn the_strictest_limits_are_the_handles() {
    let make = |replica: usize| boxed(ScriptedEngine::new(32).with_context(64 - 8 * (replica % 2)));
    let mut engines = DataParallel::new(3, make).unwrap();
    assert_eq!(engines.limits().context_tokens, 56);
    let error = engines.complete(&[Request::new([1; 50], Sampling::greedy(10))]).unwrap_err();
    assert!(matches!(error, Error::ContextExceeded { context_tokens: 56, .. }), "{error}");
}

#[test]
fn another_model_is_not_taken_for_a_restarted_replica() {
    let make = |replica, count| match (replica, count) {
        (1, 0) => boxed(ScriptedEngine::new(32).dying_at(0)),
        (1, _) => boxed(ScriptedEngine::new(33)),
        _ => boxed(ScriptedEngine::new(32)),
    };
    let mut engines = DataParallel::new(2, counted(make)).unwrap();
    for _ in 0..3 {
        assert_eq!(engines.complete(&prompts(4)).unwrap(), alone(&prompts(4)));
        assert_eq!(services(&engines), [Service::In, Service::Down]);
    }
}

#[test]
fn a_failure_of_one_stops_the_others_and_speaks_of_the_callers_request() {
    let mut engines = DataParallel::new(2, |replica| {
        Ok(Faulty::boxed(ScriptedEngine::new(32), move |call| {
            let Call::Generate(requests, watch) = call else { return Ok(()) };
            if replica == 0 {
                let request = requests.iter().position(|r| r.prompt[0] == 4).unwrap();
                return Err(Error::CacheExceeded { request, tokens: 1, needed_bytes: 2, cache_bytes: 1 });
            }
            while !watch.left().is_zero() {
                std::thread::yield_now();
            }
            Ok(())
        }))
    })
    .unwrap();
    // The longest goes to replica 0, and with it the last of the others.
    let mut requests: Vec<Request> = (0..5).map(|n| Request::new([n; 3], Sampling::default())).collect();
    requests[4].prompt = vec![4; 20];
    let started = Instant::now();
    let error = engines.generate(&requests, &mut Watch::within(LONG * 60)).unwrap_err();
    assert!(matches!(error, Error::CacheExceeded { request: 4, .. }), "{error}");
    assert!(started.elapsed() < LONG, "the other was not waited for");
    assert_eq!(services(&engines), [Service::In; 2]);
}

#[test]
fn the_callers_deadline_is_every_replicas() {
    let mut engines = DataParallel::new(2, |_| {
        Ok(Faulty::boxed(ScriptedEngine::new(32), |call| {
            if let Call::Generate(_, watch) = call {
                while !watch.left().is_zero() {
                    std::thread::yield_now();
                }
            }
            Ok(())
        }))
    })
    .unwrap();
    let error = engines.generate(&prompts(4), &mut Watch::within(Duration::from_millis(50))).unwrap_err();
    assert!(matches!(error, Error::Deadline { done: 0, total: 8, .. }), "{error:?}");
    assert_eq!(engines.state(), State::READY);
}

#[test]
fn progress_is_told_of_all_together_and_never_falls_whoever_dies() {
    let make = |replica, count| {
        let engine = ScriptedEngine::new(32);
        boxed(if (replica, count) == (0, 0) { engine.dying_at(0) } else { engine })
    };
    let mut engines = DataParallel::new(3, counted(make)).unwrap();
    let mut seen = Vec::new();
    let mut listener = |progress: Progress| seen.push(progress);
    let mut watch = Watch::within(LONG).telling(&mut listener);
    let found = engines.generate(&prompts(12), &mut watch).unwrap();
    assert_eq!(services(&engines)[0], Service::Down);
    let tokens = found.iter().map(|c| c.tokens.len()).sum();
    assert_eq!(seen.first(), Some(&Progress { done: 0, total: 24, tokens: 0 }));
    assert_eq!(seen.last(), Some(&Progress { done: 24, total: 24, tokens }));
    assert!(seen.windows(2).all(|w| w[0].done <= w[1].done && w[0].tokens <= w[1].tokens), "{seen:?}");
    assert!(seen.len() > 12, "told in between");
}

#[test]
fn a_completion_of_other_weights_is_not_passed_on() {
    // One that forgets to tell of an update: its server was replaced behind its back.
    let mut engines = DataParallel::new(2, |replica| {
        let engine = ScriptedEngine::new(32);
        Ok(Box::new(Forgetful { engine, forgets: replica == 1 }) as Box<dyn Engine>)
    })
    .unwrap();
    give(&mut engines, Version(1)).unwrap();
    let error = engines.complete(&prompts(4)).unwrap_err();
    assert!(matches!(error, Error::Replica { replica: 1, .. }), "{error}");
}

/// Tells of version 1 and draws with version 0.
#[derive(Debug)]
struct Forgetful {
    engine: ScriptedEngine,
    forgets: bool,
}

impl Engine for Forgetful {
    fn generate(
        &mut self,
        requests: &[Request],
        watch: &mut Watch<'_>,
    ) -> Result<Vec<lightrft_engine::Completion>> {
        let mut found = self.engine.generate(requests, watch)?;
        if self.forgets {
            found.iter_mut().for_each(|c| c.version = Version(0));
        }
        Ok(found)
    }

    fn sleep(&mut self, level: Level) -> Result<()> {
        self.engine.sleep(level)
    }

    fn wake(&mut self, parts: Parts) -> Result<()> {
        self.engine.wake(parts)
    }

    fn begin_update(&mut self, to: Version) -> Result<Box<dyn lightrft_engine::Update + '_>> {
        self.engine.begin_update(to)
    }

    fn state(&self) -> State {
        self.engine.state()
    }

    fn version(&self) -> Option<Version> {
        self.engine.version()
    }

    fn memory_bytes(&self) -> Option<lightrft_engine::MemoryBytes> {
        self.engine.memory_bytes()
    }

    fn limits(&self) -> lightrft_engine::Limits {
        self.engine.limits()
    }
}
