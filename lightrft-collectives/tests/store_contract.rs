//! All stores keep one contract: in memory, behind a server, behind a strict server, and as a part of each of them
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lightrft_collectives::store::{MemoryStore, PrefixStore, Store, StoreServer, TcpStore};
use lightrft_collectives::{Error, Token};

/// Long enough for a busy machine; nothing here takes so long.
const LIMIT: Duration = Duration::from_secs(30);

/// How long a wait that cannot be fulfilled goes on.
const SHORT: Duration = Duration::from_millis(20);

/// Runs `test` on an empty store of each kind.
fn on_every_store(test: impl Fn(Arc<dyn Store>)) {
    let local = (Ipv4Addr::LOCALHOST, 0).into();
    let token = Token::new("a token for the tests").unwrap();
    let server = StoreServer::bind(local).unwrap();
    let strict = StoreServer::bind_strict(local, &token).unwrap();
    let tcp = TcpStore::connect("127.0.0.1", server.address().port(), LIMIT).unwrap();
    let proved = TcpStore::connect_strict("127.0.0.1", strict.address().port(), &token, LIMIT).unwrap();
    for store in [Arc::new(MemoryStore::new()) as Arc<dyn Store>, Arc::new(tcp), Arc::new(proved)] {
        test(store.clone());
        // A part of a store that is not empty.
        let part = Arc::new(PrefixStore::new("part", store));
        test(part.clone());
        test(Arc::new(PrefixStore::new("of a part", part)));
    }
}

fn is_timeout<T>(result: lightrft_collectives::Result<T>, key: &str) -> bool {
    matches!(result, Err(Error::StoreTimeout { keys, .. }) if keys.len() == 1 && keys[0].ends_with(key))
}

#[test]
fn keys_hold_values() {
    on_every_store(|store| {
        assert!(!store.check(&["a"]).unwrap());
        assert!(is_timeout(store.get("a", SHORT), "a"));
        store.set("a", b"1").unwrap();
        store.append("a", b"2").unwrap();
        assert_eq!(store.get("a", LIMIT).unwrap(), b"12");
        assert_eq!(store.add("a", 30).unwrap(), 42);
        assert_eq!(store.add("n", -7).unwrap(), -7);
        assert_eq!(store.compare_set("a", b"7", b"8").unwrap(), b"42");
        assert_eq!(store.compare_set("a", b"42", b"8").unwrap(), b"8");
        assert_eq!(store.compare_set("b", b"7", b"8").unwrap(), b"7");
        assert_eq!(store.compare_set("b", b"", b"8").unwrap(), b"8");
        store.append("c", b"made by append").unwrap();
        store.set("empty", b"").unwrap();
        assert_eq!(store.get("empty", LIMIT).unwrap(), b"");
        store.wait(&["a", "b", "c", "n", "empty"], LIMIT).unwrap();
        store.wait(&[], Duration::ZERO).unwrap();
        // What is there needs no time.
        store.wait(&["a", "b"], Duration::ZERO).unwrap();
        assert_eq!(store.get("c", Duration::ZERO).unwrap(), b"made by append");
        assert!(store.check(&["a", "b"]).unwrap() && !store.check(&["a", "missing"]).unwrap());
        assert!(store.delete("b").unwrap() && !store.delete("b").unwrap());
        assert!(!store.check(&["b"]).unwrap());
    });
}

#[test]
fn several_keys_are_set_read_counted_and_listed() {
    on_every_store(|store| {
        let before = store.list_keys().unwrap();
        assert_eq!(store.num_keys().unwrap(), before.len());
        store.multi_set(&[("z", b"26"), ("m/n", b""), ("a", b"\x00\xff")]).unwrap();
        let values = store.multi_get(&["a", "z", "m/n", "a"], LIMIT).unwrap();
        assert_eq!(values, [&b"\x00\xff"[..], b"26", b"", b"\x00\xff"]);
        assert!(matches!(store.multi_get(&["a", "missing"], SHORT), Err(Error::StoreTimeout { .. })));
        assert_eq!(store.num_keys().unwrap(), before.len() + 3);
        let mut after = store.list_keys().unwrap();
        assert!(after.is_sorted());
        after.retain(|key| !before.contains(key));
        assert_eq!(after, ["a", "m/n", "z"]);
        store.multi_set(&[]).unwrap();
        assert!(store.multi_get(&[], Duration::ZERO).unwrap().is_empty());
    });
}

#[test]
fn queues_give_back_what_was_pushed_first() {
    on_every_store(|store| {
        assert_eq!(store.queue_len("q").unwrap(), 0);
        assert!(is_timeout(store.queue_pop("q", Duration::ZERO), "q"));
        assert!(is_timeout(store.queue_pop("q", SHORT), "q"));
        for value in [&b"first"[..], b"", b"third"] {
            store.queue_push("q", value).unwrap();
        }
        assert_eq!(store.queue_len("q").unwrap(), 3);
        // A queue that holds something counts as a key for those who wait, and for nobody else.
        assert!(store.check(&["q"]).unwrap());
        store.wait(&["q"], LIMIT).unwrap();
        assert!(!store.list_keys().unwrap().contains(&"q".to_owned()));
        assert_eq!(store.queue_pop("q", Duration::ZERO).unwrap(), b"first");
        assert_eq!(store.queue_pop("q", LIMIT).unwrap(), b"");
        assert_eq!(store.queue_pop("q", LIMIT).unwrap(), b"third");
        assert_eq!(store.queue_len("q").unwrap(), 0);
        assert!(!store.check(&["q"]).unwrap());
    });
}

#[test]
fn every_value_of_a_queue_goes_to_one_of_those_who_wait_for_it() {
    on_every_store(|store| {
        let mut got: Vec<Vec<u8>> = thread::scope(|scope| {
            let takers: Vec<_> =
                (0..4).map(|_| scope.spawn(|| store.queue_pop("q", LIMIT).unwrap())).collect();
            for n in 0..4u8 {
                store.queue_push("q", &[n]).unwrap();
            }
            takers.into_iter().map(|taker| taker.join().unwrap()).collect()
        });
        got.sort();
        assert_eq!(got, [[0], [1], [2], [3]]);
    });
}

#[test]
fn who_waits_is_woken_by_each_call_that_makes_a_key() {
    type Change = fn(&dyn Store);
    let changes: [(&str, Change); 6] = [
        ("set", |store| store.set("set", b"x").unwrap()),
        ("add", |store| assert_eq!(store.add("add", 1).unwrap(), 1)),
        ("append", |store| store.append("append", b"x").unwrap()),
        ("compare_set", |store| drop(store.compare_set("compare_set", b"", b"x").unwrap())),
        ("multi_set", |store| store.multi_set(&[("multi_set", b"x")]).unwrap()),
        ("queue_push", |store| store.queue_push("queue_push", b"x").unwrap()),
    ];
    on_every_store(|store| {
        for (key, change) in changes {
            thread::scope(|scope| {
                // On one store: a call that waits must not keep the other from being made.
                let waiting = scope.spawn(|| store.wait(&[key], LIMIT));
                change(&*store);
                waiting.join().unwrap().unwrap();
            });
        }
    });
}

#[test]
fn a_barrier_opens_when_all_have_come_and_again_the_next_time() {
    on_every_store(|store| {
        store.barrier("alone", 1, LIMIT).unwrap();
        assert!(is_timeout(store.barrier("b", 2, SHORT), "b"));
        // Who gave up does not count: two more must come, as often as they like.
        let passed = &std::sync::atomic::AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for round in 0..5 {
                        store.barrier("b", 2, LIMIT).unwrap();
                        passed.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        store.barrier("b", 2, LIMIT).unwrap();
                        let passed = passed.load(std::sync::atomic::Ordering::SeqCst);
                        assert!(passed >= 2 * (round + 1), "{passed} in round {round}");
                    }
                });
            }
        });
        assert!(is_timeout(store.barrier("b", 2, SHORT), "b"));
    });
}

#[test]
fn a_wait_ends_at_its_deadline_whatever_else_happens() {
    on_every_store(|store| {
        let begin = Instant::now();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| store.get("never", Duration::from_millis(300)));
            while !waiting.is_finished() {
                store.set("often", b"x").unwrap();
            }
            assert!(is_timeout(waiting.join().unwrap(), "never"));
        });
        let waited = begin.elapsed();
        assert!((Duration::from_millis(300)..LIMIT).contains(&waited), "{waited:?}");
        // The store is as good as before.
        store.set("never", b"now").unwrap();
        assert_eq!(store.get("never", LIMIT).unwrap(), b"now");
    });
}

#[test]
fn what_is_longer_than_the_limits_is_refused_and_nothing_else() {
    on_every_store(|store| {
        let room = "part/of a part/".len() + 1;
        let (long, longer) = ("k".repeat((8 << 10) - room), "k".repeat((8 << 10) + 1));
        let value = vec![7; 8 << 20];
        store.set(&long, &value).unwrap();
        assert_eq!(store.get(&long, LIMIT).unwrap(), value);
        for refused in [
            store.set(&longer, b""),
            store.set("a", &vec![7; value.len() + 1]),
            store.append(&long, b"x"),
            store.wait(&vec!["k"; (128 << 10) + 1], SHORT),
        ] {
            assert!(matches!(refused, Err(Error::Store { .. })), "{refused:?}");
        }
        assert_eq!(store.get(&long, LIMIT).unwrap().len(), value.len());
        store.delete(&long).unwrap();
    });
}

#[test]
fn counters_of_many_threads_lose_no_count() {
    on_every_store(|store| {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..50).for_each(|_| assert!(store.add("sum", 3).unwrap() > 0)));
            }
        });
        assert_eq!(store.add("sum", 0).unwrap(), 600);
    });
}

#[test]
fn a_prefix_is_torchs_and_hides_the_rest() {
    let store = Arc::new(MemoryStore::new());
    let outer = Arc::new(PrefixStore::new("a", store.clone()));
    let inner = PrefixStore::new("b", outer.clone());
    inner.set("k", b"v").unwrap();
    store.set("ab/k", b"").unwrap();
    assert_eq!(store.list_keys().unwrap(), ["a/b/k", "ab/k"]);
    assert_eq!(outer.list_keys().unwrap(), ["b/k"]);
    assert_eq!((inner.list_keys().unwrap(), inner.num_keys().unwrap()), (vec!["k".to_owned()], 1));
}
