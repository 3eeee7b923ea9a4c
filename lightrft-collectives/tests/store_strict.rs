//! A strict store lets in who proves the token, and nobody else
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use lightrft_collectives::store::{Store, StoreServer, TcpStore};
use lightrft_collectives::{Error, Token};

const LIMIT: Duration = Duration::from_secs(30);

fn token() -> Token {
    Token::new("the token of this job").unwrap()
}

fn strict_server() -> StoreServer {
    StoreServer::bind_strict((Ipv4Addr::LOCALHOST, 0).into(), &token()).unwrap()
}

/// Sends `bytes` and returns all that comes back until the server closes.
fn say(server: &StoreServer, bytes: &[u8]) -> Vec<u8> {
    let mut stream = knock(server);
    stream.write_all(bytes).unwrap();
    rest_of(stream)
}

fn knock(server: &StoreServer) -> TcpStream {
    let stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

fn rest_of(mut stream: TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    // A reset is an end too; a timeout is none.
    if let Err(e) = stream.read_to_end(&mut all) {
        assert_ne!(e.kind(), ErrorKind::WouldBlock, "the server did not close");
    }
    all
}

/// Opens with `opening`, sends `proof` (of the answer) and a request, and expects that not to be served. Returns the
/// server's answer.
fn refused(server: &StoreServer, opening: &[u8], proof: impl FnOnce(&[u8; 64]) -> Vec<u8>) -> [u8; 64] {
    let mut stream = knock(server);
    stream.write_all(opening).unwrap();
    let mut answer = [0; 64];
    stream.read_exact(&mut answer).unwrap();
    let _ = stream.write_all(&[&proof(&answer)[..], &[0x0d, 1, 2, 3, 4]].concat());
    assert!(rest_of(stream).is_empty());
    answer
}

/// A client's opening with some challenge.
fn opening(challenge: u8) -> Vec<u8> {
    let mut opening = vec![0xA7, 0xce, 0xf7, 0x85, 0x3c];
    opening.extend_from_slice(&[challenge; 32]);
    opening
}

#[test]
fn a_client_with_the_token_is_served() {
    let server = strict_server();
    let store = TcpStore::connect_strict("127.0.0.1", server.address().port(), &token(), LIMIT).unwrap();
    store.set("k", b"v").unwrap();
    // A second connection, opened because the first one waits, proves the token as well.
    thread::scope(|scope| {
        let waiting = scope.spawn(|| store.get("later", LIMIT));
        store.set("later", b"now").unwrap();
        assert_eq!(waiting.join().unwrap().unwrap(), b"now");
    });
}

#[test]
fn another_token_is_an_error_at_once() {
    let server = strict_server();
    let other = Token::new("the token of another job").unwrap();
    let begin = Instant::now();
    let result = TcpStore::connect_strict("127.0.0.1", server.address().port(), &other, LIMIT);
    assert!(matches!(&result, Err(Error::Token { peer }) if peer.contains("127.0.0.1")), "{result:?}");
    assert!(begin.elapsed() < LIMIT / 2);
}

#[test]
fn torchs_hello_requests_and_garbage_get_no_answer() {
    let server = strict_server();
    let torchs_hello = [0, 0xce, 0xf7, 0x85, 0x3c, 0x0d, 1, 2, 3, 4];
    for said in [&torchs_hello[..], &[7], b"GET / HTTP/1.1\r\n\r\n", &[0xA7, 0xce, 0xf7, 0x85, 0x3d]] {
        assert!(say(&server, said).is_empty(), "{said:?}");
    }
    assert!(TcpStore::connect("127.0.0.1", server.address().port(), Duration::from_millis(300)).is_err());
}

#[test]
fn a_proof_is_good_once() {
    let server = strict_server();
    // What a client with the token says, overheard: the server's part is played through to it.
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (overheard, answered) = thread::scope(|scope| {
        scope.spawn(move || TcpStore::connect_strict("127.0.0.1", port, &token(), LIMIT).unwrap());
        let (mut client, _) = listener.accept().unwrap();
        let mut real = TcpStream::connect(server.address()).unwrap();
        let mut said = vec![0; 37];
        client.read_exact(&mut said).unwrap();
        real.write_all(&said).unwrap();
        let mut answer = [0; 64];
        real.read_exact(&mut answer).unwrap();
        client.write_all(&answer).unwrap();
        // The proof and a ping.
        let mut proof = [0; 37];
        client.read_exact(&mut proof).unwrap();
        real.write_all(&proof).unwrap();
        let mut pong = [0; 4];
        real.read_exact(&mut pong).unwrap();
        client.write_all(&pong).unwrap();
        said.extend_from_slice(&proof);
        (said, answer)
    });
    let replayed = refused(&server, &overheard[..37], |_| overheard[37..69].to_vec());
    assert_ne!(replayed[..32], answered[..32], "another challenge");
}

#[test]
fn a_wrong_proof_and_the_servers_own_are_refused() {
    let server = strict_server();
    refused(&server, &opening(7), |_| vec![0; 32]);
    refused(&server, &opening(7), |answer| answer[32..].to_vec());
}

#[test]
fn who_stops_half_way_is_cut_off_and_disturbs_nobody() {
    let server = strict_server();
    let half: Vec<TcpStream> = (0..50)
        .map(|n| {
            let mut stream = TcpStream::connect(server.address()).unwrap();
            stream.write_all(&opening(1)[..n % 38]).unwrap();
            stream
        })
        .collect();
    let store = TcpStore::connect_strict("127.0.0.1", server.address().port(), &token(), LIMIT).unwrap();
    store.set("k", b"v").unwrap();
    for mut stream in half {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).expect("closed within some seconds");
        assert!(rest.len() <= 64);
    }
    assert_eq!(store.get("k", LIMIT).unwrap(), b"v");
}

#[test]
fn a_plain_server_is_not_taken_for_a_strict_one() {
    let server = StoreServer::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let port = server.address().port();
    let result = TcpStore::connect_strict("127.0.0.1", port, &token(), Duration::from_millis(300));
    assert!(matches!(result, Err(Error::Store { .. })), "{result:?}");
}
