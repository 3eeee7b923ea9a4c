//! Beyond one machine ranks prove a token to each other, and listen nowhere but where they meet
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use lightrft_collectives::store::{Store, StoreServer, TcpStore};
use lightrft_collectives::{CommunicatorExt, Error, ReduceOp, Rendezvous, Token, Transport};

const LIMIT: Duration = Duration::from_secs(60);

fn rendezvous(rank: usize, world: usize, host: IpAddr, port: u16, more: &[(&str, &str)]) -> Rendezvous {
    let mut variables: HashMap<&str, String> = [
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", world.to_string()),
        ("MASTER_ADDR", host.to_string()),
        ("MASTER_PORT", port.to_string()),
    ]
    .into();
    variables.extend(more.iter().map(|(name, value)| (*name, value.to_string())));
    let read = Rendezvous::from_variables(|name| variables.get(name).cloned()).unwrap();
    read.join_timeout(LIMIT).timeout(LIMIT)
}

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const TOKEN: (&str, &str) = ("LIGHTRFT_TOKEN", "the token of this job");

/// A port of this address that was free a moment ago.
fn free_port(host: IpAddr) -> u16 {
    TcpListener::bind((host, 0)).unwrap().local_addr().unwrap().port()
}

/// An address of this machine that others could reach; `None`, said aloud, if it has none.
fn outer_address() -> Option<IpAddr> {
    // Nothing is sent: the system only chooses the interface that would lead there.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let chosen = socket.connect((Ipv4Addr::new(198, 51, 100, 1), 9)).and_then(|()| socket.local_addr());
    let address =
        chosen.ok().map(|address| address.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified());
    if address.is_none() {
        eprintln!("SKIPPED: this machine has no address but the loopback's");
    }
    address
}

/// Runs `world` ranks as threads that meet at `host`, sums on all of them and in a group of two.
fn meet(world: usize, host: IpAddr, adapt: impl Fn(Rendezvous) -> Rendezvous + Sync, more: &[(&str, &str)]) {
    let port = free_port(host);
    thread::scope(|scope| {
        for rank in 0..world {
            let adapt = &adapt;
            scope.spawn(move || {
                let comm = adapt(rendezvous(rank, world, host, port, more)).init().unwrap();
                let mut sum = [rank as i64];
                comm.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
                assert_eq!(sum[0], (world * (world - 1) / 2) as i64);
                if let Some(pair) = comm.subgroup(&[0, world - 1]).unwrap() {
                    pair.barrier().unwrap();
                }
                comm.barrier().unwrap();
            });
        }
    });
}

#[test]
fn ranks_with_one_token_meet() {
    meet(3, HERE, |r| r, &[TOKEN]);
    meet(2, HERE, |r| r.transport(Transport::Tcp), &[TOKEN]);
    meet(2, HERE, |r| r.token(Token::new("given by the program").unwrap()), &[TOKEN]);
}

#[test]
fn a_strict_store_brings_ranks_with_a_token_together() {
    meet(2, HERE, Rendezvous::strict_store, &[TOKEN]);
    let error = rendezvous(0, 2, HERE, free_port(HERE), &[]).strict_store().init().unwrap_err();
    assert!(matches!(error, Error::Environment { variable: "LIGHTRFT_TOKEN", .. }), "{error}");
    let agent = ("TORCHELASTIC_USE_AGENT_STORE", "True");
    let error = rendezvous(0, 2, HERE, free_port(HERE), &[TOKEN, agent]).strict_store().init().unwrap_err();
    assert!(matches!(error, Error::Environment { variable: "TORCHELASTIC_USE_AGENT_STORE", .. }), "{error}");
}

#[test]
fn a_rank_with_another_token_or_none_is_named_by_all_at_once() {
    for other in [&[("LIGHTRFT_TOKEN", "the token of another job")][..], &[]] {
        let (port, begin) = (free_port(HERE), Instant::now());
        thread::scope(|scope| {
            let ranks = [&[TOKEN][..], other].into_iter().enumerate().map(|(rank, token)| {
                scope.spawn(move || rendezvous(rank, 2, HERE, port, token).init().map(drop))
            });
            for (rank, result) in ranks.collect::<Vec<_>>().into_iter().enumerate() {
                let result = result.join().unwrap();
                let named = format!("rank {}", 1 - rank);
                // Who is last finds the other gone, and perhaps its store with it.
                assert!(
                    matches!(&result, Err(Error::Token { peer }) if *peer == named)
                        || rank == 1 && matches!(result, Err(Error::Store { .. })),
                    "rank {rank}: {result:?}"
                );
            }
        });
        assert!(begin.elapsed() < LIMIT / 2);
    }
}

#[test]
fn a_forged_card_in_the_store_is_found_out() {
    let server = StoreServer::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let port = server.address().port();
    let agent = ("TORCHELASTIC_USE_AGENT_STORE", "True");
    let store = TcpStore::connect("127.0.0.1", port, LIMIT).unwrap();
    store.set("lightrft/0/0/1/rank/1", b"\x00forged").unwrap();
    let error = rendezvous(0, 2, HERE, port, &[TOKEN, agent]).init().unwrap_err();
    assert!(matches!(&error, Error::Token { peer } if peer == "rank 1"), "{error}");
}

#[test]
fn beyond_this_machine_a_token_or_trust_is_asked_for() {
    let Some(outer) = outer_address() else { return };
    // Rank 0 says so before it listens, and another as soon as it knows which way it meets the others.
    let error = rendezvous(0, 2, outer, free_port(outer), &[]).init().unwrap_err();
    assert!(matches!(error, Error::Environment { variable: "LIGHTRFT_TOKEN", .. }), "{error}");
    assert!(error.to_string().contains("LIGHTRFT_TRUST_NETWORK"), "{error}");
    let server = StoreServer::bind((outer, 0).into()).unwrap();
    let error = rendezvous(1, 2, outer, server.address().port(), &[]).init().unwrap_err();
    assert!(matches!(error, Error::Environment { variable: "LIGHTRFT_TOKEN", .. }), "{error}");

    meet(2, outer, |r| r, &[TOKEN]);
    meet(2, outer, Rendezvous::strict_store, &[TOKEN]);
    meet(2, outer, |r| r, &[("LIGHTRFT_TRUST_NETWORK", "1")]);
    meet(2, outer, Rendezvous::trust_network, &[]);
}

#[test]
fn the_ranks_of_one_machine_stay_within_it_though_an_agent_does_not() {
    let Some(outer) = outer_address() else { return };
    let agent = StoreServer::bind((outer, 0).into()).unwrap();
    let port = agent.address().port();
    let more = [("TORCHELASTIC_USE_AGENT_STORE", "True"), ("LOCAL_WORLD_SIZE", "2")];
    thread::scope(|scope| {
        for rank in 0..2 {
            scope.spawn(move || rendezvous(rank, 2, outer, port, &more).init().unwrap().barrier().unwrap());
        }
    });
}

/// Alone in its process, for it looks at all of the process's listeners.
#[test]
fn listeners_are_bound_to_the_interface_of_the_rendezvous_alone() {
    let role = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["process_that_listens", "--exact", "--ignored", "--test-threads=1"])
        .output()
        .unwrap();
    assert!(role.status.success(), "{}", String::from_utf8_lossy(&role.stdout));
}

#[test]
#[ignore = "started by the test above"]
fn process_that_listens() {
    for host in [Some(HERE), outer_address()].into_iter().flatten() {
        let port = free_port(host);
        thread::scope(|scope| {
            for rank in 0..2 {
                scope.spawn(move || {
                    let comm = rendezvous(rank, 2, host, port, &[TOKEN]).init().unwrap();
                    comm.barrier().unwrap();
                    // Of both ranks and the store; of these alone.
                    let listeners = listeners();
                    assert!(listeners.len() >= 3, "{listeners:?}");
                    assert!(listeners.iter().all(|ip| *ip == host), "{listeners:?}");
                    comm.barrier().unwrap();
                });
            }
        });
    }
}

/// Addresses that this process listens on, from the kernel's tables of sockets and this process's descriptors.
fn listeners() -> Vec<IpAddr> {
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    let own: Vec<String> = links
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()?.to_str().map(str::to_owned))
        .collect();
    let mut found = Vec::new();
    for file in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
        let table = std::fs::read_to_string(file).unwrap_or_default();
        // Column 1 is address:port in hexadecimal, column 3 the state (0A is LISTEN), column 9 the inode.
        for row in table.lines().skip(1).map(|row| row.split_whitespace().collect::<Vec<_>>()) {
            if row[3] == "0A" && own.contains(&format!("socket:[{}]", row[9])) {
                let (address, _) = row[1].split_once(':').unwrap();
                // Any address of the newer kind is not the one that was asked for here.
                let word = u32::from_str_radix(address, 16).unwrap_or_default();
                found.push(IpAddr::from(word.to_ne_bytes()));
            }
        }
    }
    found
}

/// What a rank publishes, as far as it matters here.
#[derive(serde::Deserialize)]
struct Card {
    address: SocketAddr,
}

/// With the nonce, which is no secret, but without the token.
#[test]
fn who_knows_all_but_the_token_gets_no_connection() {
    let server = StoreServer::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let port = server.address().port();
    let agent = ("TORCHELASTIC_USE_AGENT_STORE", "True");
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..2)
            .map(|rank| {
                scope.spawn(move || {
                    let comm = rendezvous(rank, 2, HERE, port, &[TOKEN, agent]).init().unwrap();
                    comm.barrier().unwrap();
                    // Held until the impostor has tried.
                    let store = TcpStore::connect("127.0.0.1", port, LIMIT).unwrap();
                    store.wait(&["tried"], LIMIT).unwrap();
                    comm.subgroup(&[1, 0]).unwrap().unwrap().barrier().unwrap();
                    comm.barrier().unwrap();
                })
            })
            .collect();
        let store = TcpStore::connect("127.0.0.1", port, LIMIT).unwrap();
        let nonce = store.get("lightrft/0/0/1/nonce", LIMIT).unwrap();
        let card = store.get("lightrft/0/0/1/rank/0", LIMIT).unwrap();
        // One byte says whether it is sealed.
        let Card { address } = rmp_serde::from_slice(&card[1..]).unwrap();
        let word = |n: u64| n.to_le_bytes().to_vec();
        let hello = |proof| {
            let head =
                [b"LRFTCOL\x02".to_vec(), nonce.clone(), word(1), word(0), word(1), word(0), word(proof)];
            head.concat()
        };
        for said in
            [hello(0), [hello(1), vec![7; 32], vec![7; 32]].concat(), vec![0; 88], hello(1)[..20].to_vec()]
        {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream.write_all(&said).unwrap();
            let mut answer = Vec::new();
            // An answer to the challenge at most, and then the end, with or without a reset.
            let _ = stream.read_to_end(&mut answer);
            assert!([0, 64].contains(&answer.len()), "{} bytes", answer.len());
        }
        store.set("tried", b"").unwrap();
        ranks.into_iter().for_each(|rank| rank.join().unwrap());
    });
}
