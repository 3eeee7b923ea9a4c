//! Addresses are fetched within limits, and never from where the run itself lives.
#![cfg(feature = "http")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use lightrft_data::{Fetch, HttpConfig, HttpFetch, MediumProblem};

/// Answers each connection with these bytes, and keeps it open where told to.
fn server(answer: Vec<u8>, hold: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = answer.clone();
            std::thread::spawn(move || {
                let mut lines = BufReader::new(&stream).lines();
                while lines.next().is_some_and(|line| line.is_ok_and(|line| !line.is_empty())) {}
                let _ = (&stream).write_all(&answer);
                std::thread::park_timeout(hold);
            });
        }
    });
    address
}

fn ok(body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
}

fn fetch(url: &str, allow: &[SocketAddr], max_bytes: usize) -> Result<Vec<u8>, MediumProblem> {
    let config =
        HttpConfig { timeout: Duration::from_secs(20), allow: allow.to_vec(), ..HttpConfig::default() };
    HttpFetch::new(config).fetch(url, max_bytes)
}

fn message(result: Result<Vec<u8>, MediumProblem>) -> String {
    match result {
        Err(MediumProblem::Fetch { message, .. }) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_address_that_is_allowed_gives_its_bytes() {
    let address = server(ok(b"picture"), Duration::ZERO);
    assert_eq!(fetch(&format!("http://{address}/a.png"), &[address], 7).unwrap(), b"picture");
}

#[test]
fn local_addresses_are_refused_in_every_spelling() {
    let address = server(ok(b"secret"), Duration::ZERO);
    let port = address.port();
    for host in ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0"] {
        // Names that do not resolve at all are as good.
        let refused = fetch(&format!("http://{host}:{port}/"), &[], 100);
        assert!(matches!(refused, Err(MediumProblem::Fetch { .. })), "{host}: {refused:?}");
    }
    assert!(
        message(fetch(&format!("http://127.0.0.1:{port}/"), &[], 100)).contains("not on the public network")
    );
}

#[test]
fn a_redirection_does_not_lead_where_its_address_could_not() {
    let secret = server(ok(b"secret"), Duration::ZERO);
    let to = |target: &str| {
        format!("HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n").into_bytes()
    };
    let door = server(to(&format!("http://{secret}/")), Duration::ZERO);
    assert!(message(fetch(&format!("http://{door}/"), &[door], 100)).contains("not on the public network"));
    // The same way is open where both ends are allowed; a circle ends.
    assert_eq!(fetch(&format!("http://{door}/"), &[door, secret], 100).unwrap(), b"secret");
    let circle = server(to("/again"), Duration::ZERO);
    message(fetch(&format!("http://{circle}/"), &[circle], 100));
}

#[test]
fn long_answers_are_cut_off_whether_they_say_so_or_not() {
    let long = server(ok(&[7; 5000]), Duration::ZERO);
    let silent = server([b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), vec![7; 5000]].concat(), Duration::ZERO);
    for address in [long, silent] {
        let url = format!("http://{address}/");
        assert!(matches!(fetch(&url, &[address], 4999), Err(MediumProblem::TooManyBytes { limit: 4999 })));
        assert_eq!(fetch(&url, &[address], 5000).unwrap().len(), 5000);
    }
}

#[test]
fn a_server_that_never_ends_its_answer_is_left_behind() {
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc".to_vec();
    let slow = server(answer, Duration::from_secs(600));
    let config =
        HttpConfig { timeout: Duration::from_millis(300), allow: vec![slow], ..HttpConfig::default() };
    let before = Instant::now();
    message(HttpFetch::new(config).fetch(&format!("http://{slow}/"), 100));
    assert!(before.elapsed() < Duration::from_secs(30));
}

#[test]
fn errors_and_broken_addresses_are_errors() {
    let gone = server(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec(), Duration::ZERO);
    assert!(message(fetch(&format!("http://{gone}/"), &[gone], 100)).contains("404"));
    for url in ["http://", "http://a b/", "https://:99999/", "http://[::1"] {
        message(fetch(url, &[], 100));
    }
}
