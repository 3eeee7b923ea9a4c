//! Torch's client against our server, and our client against torch's server
//!
//! Needs a Python with torch, `python3` or the one that `LIGHTRFT_PYTHON` names; says so and does nothing where there is
//! none. What the two say to each other byte by byte is recorded in `store_bytes.rs`, which always runs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use lightrft_collectives::Error;
use lightrft_collectives::store::{PrefixStore, Store, StoreServer, TcpStore};

const LIMIT: Duration = Duration::from_secs(60);

/// Python with the torch side of this test, or `None`, said aloud, where there is no torch.
fn torch(args: &[&str]) -> Option<Command> {
    let python = std::env::var("LIGHTRFT_PYTHON").unwrap_or_else(|_| "python3".into());
    let has_torch = Command::new(&python).args(["-c", "import torch.distributed"]).output();
    if !has_torch.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: `{python}` has no torch; name a Python that has it in LIGHTRFT_PYTHON");
        return None;
    }
    let mut command = Command::new(python);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/store_torch.py")).args(args);
    Some(command)
}

/// Ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs a Python with torch, which takes seconds to start: --ignored, and LIGHTRFT_PYTHON for which"]
fn torchs_client_uses_our_server() {
    let server = StoreServer::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let port = server.address().port();
    let Some(mut client) = torch(&["client", &port.to_string()]) else { return };
    let store = Arc::new(TcpStore::connect("127.0.0.1", port, LIMIT).unwrap());
    store.set("from rust", b"\x00\xff").unwrap();
    let outer = Arc::new(PrefixStore::new("inner", store.clone()));
    PrefixStore::new("outer", outer).set("k", b"nested").unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            (0..2).for_each(|_| store.barrier("both", 2, LIMIT).unwrap());
            store.queue_push("to torch", b"first").unwrap();
        });
        let output = client.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    });
    assert_eq!(store.get("from torch", LIMIT).unwrap(), b"\xff\x00");
}

#[test]
#[ignore = "needs a Python with torch, which takes seconds to start: --ignored, and LIGHTRFT_PYTHON for which"]
fn our_client_uses_torchs_server() {
    let Some(mut command) = torch(&["server"]) else { return };
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut server = Running(child);
    let mut line = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let port = line.trim().parse().unwrap();
    let store = TcpStore::connect("127.0.0.1", port, LIMIT).unwrap();

    store.set("k", b"vv").unwrap();
    store.append("k", b"!").unwrap();
    assert_eq!(store.get("k", LIMIT).unwrap(), b"vv!");
    assert_eq!((store.add("ctr", -7).unwrap(), store.add("ctr", 9).unwrap()), (-7, 2));
    assert!(store.check(&["k", "ctr"]).unwrap() && !store.check(&["k", "missing"]).unwrap());
    assert_eq!(store.compare_set("c", b"", b"a").unwrap(), b"a");
    assert_eq!(store.compare_set("c", b"b", b"d").unwrap(), b"a");
    assert_eq!(store.compare_set("z", b"b", b"d").unwrap(), b"b");
    store.multi_set(&[("m", b"1"), ("n", b"")]).unwrap();
    assert_eq!(store.multi_get(&["m", "n"], LIMIT).unwrap(), [&b"1"[..], b""]);
    let keys = store.num_keys().unwrap();
    assert!(store.delete("m").unwrap() && !store.delete("m").unwrap());
    assert_eq!(store.num_keys().unwrap(), keys - 1);
    assert_eq!(store.list_keys().unwrap(), ["c", "ctr", "k", "n"]);
    store.queue_push("q", b"9").unwrap();
    assert_eq!((store.queue_len("q").unwrap(), store.queue_pop("q", LIMIT).unwrap()), (1, b"9".to_vec()));
    let short = Duration::from_millis(50);
    assert!(matches!(store.queue_pop("q", short), Err(Error::StoreTimeout { .. })));
    assert!(matches!(store.wait(&["missing"], short), Err(Error::StoreTimeout { .. })));
    assert!(matches!(store.barrier("b", 2, short), Err(Error::StoreTimeout { .. })));
    thread::scope(|scope| {
        let other = scope.spawn(|| (0..2).map(|_| store.barrier("both", 2, LIMIT)).collect::<Vec<_>>());
        (0..2).for_each(|_| store.barrier("both", 2, LIMIT).unwrap());
        other.join().unwrap().into_iter().for_each(|passed| passed.unwrap());
        // A wait holds nobody up.
        let waiting = scope.spawn(|| store.get("later", LIMIT));
        store.set("later", b"now").unwrap();
        assert_eq!(waiting.join().unwrap().unwrap(), b"now");
    });
}
