//! The store's bytes on the wire are those of torch's TCPStore, on both sides
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use lightrft_collectives::Error;
use lightrft_collectives::store::{Store, StoreServer, TcpStore};

const SECOND: Duration = Duration::from_secs(1);

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|d| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap()).collect()
}

fn server() -> StoreServer {
    StoreServer::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap()
}

fn connect(server: &StoreServer) -> TcpStream {
    let stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(10 * SECOND)).unwrap();
    stream
}

/// Sends `request` and expects exactly `reply`.
fn expect(stream: &mut TcpStream, request: &str, reply: &str) {
    stream.write_all(&hex(request)).unwrap();
    let mut got = vec![0; hex(reply).len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(got, hex(reply), "reply to {request}");
}

const HELLO: &str = "00 cef7853c  0d 2a000000";

#[test]
fn the_server_answers_a_recorded_exchange_byte_by_byte() {
    let server = server();
    let mut s = connect(&server);
    expect(&mut s, HELLO, "2a000000");
    // set k=vv, get k
    expect(
        &mut s,
        "01 0200000000000000 2f6b 0200000000000000 7676  03 0200000000000000 2f6b",
        "0200000000000000 7676",
    );
    // add ctr -7
    expect(&mut s, "04 0400000000000000 2f637472 f9ffffffffffffff", "f9ffffffffffffff");
    expect(&mut s, "04 0400000000000000 2f637472 0900000000000000", "0200000000000000");
    // check: [k] there, [k, x] not
    expect(&mut s, "05 0100000000000000 0200000000000000 2f6b", "00");
    expect(&mut s, "05 0200000000000000 0200000000000000 2f6b 0100000000000000 78", "01");
    // compare_set: missing key and empty expectation; wrong expectation; missing key and some expectation
    expect(&mut s, "02 0100000000000000 63 0000000000000000 0100000000000000 61", "0100000000000000 61");
    expect(&mut s, "02 0100000000000000 63 0100000000000000 62 0100000000000000 64", "0100000000000000 61");
    expect(&mut s, "02 0100000000000000 7a 0100000000000000 62 0100000000000000 64", "0100000000000000 62");
    // append, multi_set, multi_get
    expect(
        &mut s,
        "09 0200000000000000 2f6b 0100000000000000 21  03 0200000000000000 2f6b",
        "0300000000000000 767621",
    );
    expect(
        &mut s,
        "0b 0200000000000000 0100000000000000 6d 0100000000000000 31 0100000000000000 6e 0100000000000000 32
         0a 0200000000000000 0100000000000000 6d 0100000000000000 6e",
        "0100000000000000 31 0100000000000000 32",
    );
    // number of keys: /k, /ctr, c, m, n; delete; again
    expect(&mut s, "07", "0500000000000000");
    expect(&mut s, "08 0100000000000000 6d", "0100000000000000");
    expect(&mut s, "08 0100000000000000 6d", "0000000000000000");
    // a wait that times out in the client is cancelled
    expect(&mut s, "06 0100000000000000 0800000000000000 2f6d697373696e67  0c", "01");
    // queue: push, length, pop (length before, value), pop when empty
    expect(&mut s, "0e 0100000000000000 71 0100000000000000 39  10 0100000000000000 71", "0100000000000000");
    expect(&mut s, "0f 0100000000000000 71", "0100000000000000 0100000000000000 39");
    expect(&mut s, "0f 0100000000000000 71", "0000000000000000");
    // a barrier of one
    expect(&mut s, "12 0100000000000000 62 0100000000000000", "00");
}

#[test]
fn a_wait_ends_when_another_client_sets_the_key() {
    let server = server();
    let (mut a, mut b) = (connect(&server), connect(&server));
    expect(&mut a, HELLO, "2a000000");
    expect(&mut b, HELLO, "2a000000");
    // The ping after the wait is answered only after the wait, so its absence would show.
    a.write_all(&hex("06 0100000000000000 0100000000000000 78")).unwrap();
    expect(&mut b, "01 0100000000000000 78 0000000000000000  0d 01000000", "01000000");
    expect(&mut a, "", "00");
}

#[test]
fn garbage_closes_its_own_connection_only() {
    let server = server();
    let mut good = connect(&server);
    expect(&mut good, HELLO, "2a000000");
    // No protocol at all; no hello; a key longer than any; an unknown request.
    for garbage in ["474554202f", "07", "00cef7853c 03 ffffffffffffffff", "00cef7853c ff"] {
        let mut bad = connect(&server);
        bad.write_all(&hex(garbage)).unwrap();
        let mut rest = Vec::new();
        // Closed with or without a reset; either way without an answer.
        let _ = bad.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{garbage}");
    }
    expect(&mut good, "07", "0000000000000000");
}

#[test]
fn the_client_says_what_torchs_client_says() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let pid = std::process::id().to_le_bytes();
    let script = thread::spawn(move || {
        let mut s = listener.accept().unwrap().0;
        s.set_read_timeout(Some(10 * SECOND)).unwrap();
        let mut turn = |request: &[u8], reply: &[u8]| {
            let mut got = vec![0; request.len()];
            s.read_exact(&mut got).unwrap();
            assert_eq!(got, request);
            s.write_all(reply).unwrap();
        };
        turn(&[&hex("00 cef7853c 0d")[..], &pid].concat(), &pid);
        // Torch's protocol does not answer a set; the ping behind it shows that it was done.
        turn(&[&hex("01 0200000000000000 2f6b 0200000000000000 7676 0d")[..], &pid].concat(), &pid);
        turn(&hex("06 0100000000000000 0200000000000000 2f6b"), &[0]);
        turn(&hex("03 0200000000000000 2f6b"), &hex("0200000000000000 7676"));
        turn(&hex("04 0400000000000000 2f637472 f9ffffffffffffff"), &hex("feffffffffffffff"));
        turn(&hex("06 0100000000000000 0800000000000000 2f6d697373696e67"), b"");
        turn(&hex("0c"), &[1]);
        // The answer to a wait may cross its end.
        turn(&hex("06 0100000000000000 0500000000000000 2f6c617465"), b"");
        turn(&hex("0c"), &[0, 1]);
        turn(
            &hex("02 0200000000000000 2f63 0000000000000000 0100000000000000 61"),
            &hex("0100000000000000 61"),
        );
        turn(&hex("08 0200000000000000 2f63"), &hex("0100000000000000"));
        turn(&hex("07"), &hex("0200000000000000"));
        turn(&[&hex("09 0200000000000000 2f6b 0100000000000000 21 0d")[..], &pid].concat(), &pid);
        let pairs = "0b 0200000000000000 0200000000000000 2f6d 0100000000000000 31
                     0200000000000000 2f6e 0000000000000000 0d";
        turn(&[&hex(pairs)[..], &pid].concat(), &pid);
        turn(&hex("06 0200000000000000 0200000000000000 2f6d 0200000000000000 2f6e"), &[0]);
        turn(
            &hex("0a 0200000000000000 0200000000000000 2f6d 0200000000000000 2f6e"),
            &hex("0100000000000000 31 0000000000000000"),
        );
        turn(&[&hex("0e 0200000000000000 2f71 0100000000000000 39 0d")[..], &pid].concat(), &pid);
        turn(&hex("10 0200000000000000 2f71"), &hex("0100000000000000"));
        turn(&hex("0f 0200000000000000 2f71"), &hex("0100000000000000 0100000000000000 39"));
        let keys = "0300000000000000 0500000000000000 696e69742f 0200000000000000 2f6e 0200000000000000 2f6d";
        turn(&hex("11"), &hex(keys));
        turn(&hex("12 0200000000000000 2f62 0100000000000000"), &[0]);
    });
    let store = TcpStore::connect("127.0.0.1", port, 10 * SECOND).unwrap();
    store.set("k", b"vv").unwrap();
    assert_eq!(store.get("k", 10 * SECOND).unwrap(), b"vv");
    assert_eq!(store.add("ctr", -7).unwrap(), -2);
    let timeout = Duration::from_millis(20);
    assert!(
        matches!(store.wait(&["missing"], timeout), Err(Error::StoreTimeout { keys, .. }) if keys == ["missing"])
    );
    store.wait(&["late"], timeout).unwrap();
    assert_eq!(store.compare_set("c", b"", b"a").unwrap(), b"a");
    assert!(store.delete("c").unwrap());
    assert_eq!(store.num_keys().unwrap(), 2);
    store.append("k", b"!").unwrap();
    store.multi_set(&[("m", b"1"), ("n", b"")]).unwrap();
    assert_eq!(store.multi_get(&["m", "n"], 10 * SECOND).unwrap(), [&b"1"[..], b""]);
    store.queue_push("q", b"9").unwrap();
    assert_eq!(store.queue_len("q").unwrap(), 1);
    assert_eq!(store.queue_pop("q", 10 * SECOND).unwrap(), b"9");
    // In their order, without the key in which torch's clients count themselves.
    assert_eq!(store.list_keys().unwrap(), ["m", "n"]);
    store.barrier("b", 1, 10 * SECOND).unwrap();
    script.join().unwrap();
}

#[test]
fn a_busy_port_is_named() {
    let server = server();
    let Err(error) = StoreServer::bind(server.address()) else { panic!("bound twice") };
    assert!(error.to_string().contains(&server.address().to_string()), "{error}");
}

#[test]
fn what_a_client_said_before_it_left_counts() {
    let server = server();
    let keys: Vec<String> = (0..100).map(|n| format!("last-word-{n}")).collect();
    for key in &keys {
        // Sets and hangs up, as torch's clients may; a set has no answer to wait for.
        let mut request = hex("00 cef7853c 01");
        for string in [format!("/{key}").as_bytes(), b"said"] {
            request.extend_from_slice(&(string.len() as u64).to_le_bytes());
            request.extend_from_slice(string);
        }
        connect(&server).write_all(&request).unwrap();
    }
    let store = TcpStore::connect("127.0.0.1", server.address().port(), 10 * SECOND).unwrap();
    for key in &keys {
        assert_eq!(store.get(key, 5 * SECOND).unwrap(), b"said");
    }
}

#[test]
fn a_port_is_free_as_soon_as_its_server_is_dropped() {
    let mut address = (Ipv4Addr::LOCALHOST, 0).into();
    for _ in 0..50 {
        let server = StoreServer::bind(address).unwrap();
        address = server.address();
        // Connections of the old server do not keep the port either.
        drop(TcpStore::connect("127.0.0.1", address.port(), 10 * SECOND).unwrap());
    }
}

#[test]
fn a_server_without_descriptors_rests_and_then_goes_on() {
    // Without descriptors no other test works, so this takes a process of its own.
    let role = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["process_without_descriptors", "--exact", "--ignored", "--test-threads=1"])
        .output()
        .unwrap();
    assert!(role.status.success(), "{}", String::from_utf8_lossy(&role.stdout));
}

#[test]
#[ignore = "started by the test above"]
fn process_without_descriptors() {
    let limit = rustix::process::Rlimit { current: Some(64), maximum: Some(64) };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    let server = server();
    let mut all = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        all.push(file);
    }
    // One for a client's end, none for the server's; and one to look at the clock of this process.
    drop(all.split_off(all.len() - 2));
    let clock = std::fs::File::open("/proc/self/stat").unwrap();
    let ticks = || {
        let mut text = [0; 1024];
        let n = std::os::unix::fs::FileExt::read_at(&clock, &mut text, 0).unwrap();
        let text = String::from_utf8_lossy(&text[..n]).into_owned();
        // User and system time, fields 14 and 15, in hundredths of a second.
        let fields = text.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(2);
        fields.map(|n| n.parse::<u64>().unwrap()).sum::<u64>()
    };
    let mut client = connect(&server);
    let before = ticks();
    let begin = std::time::Instant::now();
    client.set_read_timeout(Some(SECOND)).unwrap();
    client.write_all(&hex(HELLO)).unwrap();
    assert!(client.read(&mut [0]).is_err(), "nobody can have accepted");
    let (busy, waited) = (ticks() - before, begin.elapsed());
    assert!(busy < 20, "{busy} ticks of work in {waited:?} without any");
    drop(all);
    client.set_read_timeout(Some(10 * SECOND)).unwrap();
    expect(&mut client, "", "2a000000");
}
