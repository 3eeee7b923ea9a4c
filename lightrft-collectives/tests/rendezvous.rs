//! Ranks meet through the store of rank 0, of an agent, under mpirun, and at a URL
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use lightrft_collectives::store::StoreServer;
use lightrft_collectives::{CommunicatorExt, Error, ReduceOp, Rendezvous, Source, Transport};

/// Rank `rank` of `world`, meeting at `port`, where rank 0 serves the store.
fn rank(rank: usize, world: usize, port: u16) -> Rendezvous {
    rank_of_job(rank, world, port, "False")
}

/// Rank `rank` of `world`, meeting at `port`, where a store is served already.
fn rank_with_agent(rank: usize, world: usize, port: u16) -> Rendezvous {
    rank_of_job(rank, world, port, "True")
}

fn rank_of_job(rank: usize, world: usize, port: u16, agent: &str) -> Rendezvous {
    let variables: HashMap<&str, String> = [
        ("TORCHELASTIC_USE_AGENT_STORE", agent.to_owned()),
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", world.to_string()),
        ("MASTER_ADDR", "127.0.0.1".into()),
        ("MASTER_PORT", port.to_string()),
    ]
    .into();
    Rendezvous::from_variables(|name| variables.get(name).cloned())
        .unwrap()
        .join_timeout(Duration::from_secs(30))
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

#[test]
fn rank_0_serves_the_store_where_no_agent_does() {
    let port = free_port();
    let sums: Vec<i64> = thread::scope(|scope| {
        // The others come first and wait for rank 0's server.
        let ranks: Vec<_> = (0..3)
            .rev()
            .map(|r| {
                scope.spawn(move || {
                    let comm = rank(r, 3, port).init()?;
                    let mut sum = [r as i64];
                    comm.all_reduce(&mut sum, ReduceOp::Sum)?;
                    comm.barrier()?;
                    Ok::<_, Error>(sum[0])
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap().unwrap()).collect()
    });
    assert_eq!(sums, [3, 3, 3]);
}

#[test]
fn ranks_meet_at_a_url() {
    let url = &format!("tcp://localhost:{}?world_size=2", free_port());
    thread::scope(|scope| {
        for rank in 0..2 {
            scope.spawn(move || {
                let rendezvous = Rendezvous::from_url(&format!("{url}&rank={rank}")).unwrap();
                rendezvous.join_timeout(Duration::from_secs(30)).init().unwrap().barrier().unwrap();
            });
        }
    });
}

#[test]
fn ranks_that_mpirun_has_started_meet() {
    let there = std::process::Command::new("mpirun").arg("--version").output();
    if !there.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: there is no `mpirun`; Debian has it in openmpi-bin");
        return;
    }
    let output = std::process::Command::new("mpirun")
        .args(["-n", "2", "--oversubscribe", "--allow-run-as-root"])
        .arg(std::env::current_exe().unwrap())
        .args(["rank_under_mpirun", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("rank 0 of 2 under mpirun") && text.contains("rank 1 of 2 under mpirun"), "{text}");
}

#[test]
#[ignore = "a rank of the test above"]
fn rank_under_mpirun() {
    let rendezvous = Rendezvous::from_env().unwrap().join_timeout(Duration::from_secs(30));
    assert_eq!(rendezvous.source(), Source::OpenMpi);
    let comm = rendezvous.init().unwrap();
    let mut sum = [comm.rank() as i64 + 1];
    comm.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
    assert_eq!(sum, [3]);
    println!("rank {} of {} under mpirun", comm.rank(), comm.world_size());
}

#[test]
fn a_world_is_joined_again_on_the_store_of_an_agent() {
    let agent = StoreServer::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let port = agent.address().port();
    thread::scope(|scope| {
        for r in 0..2 {
            scope.spawn(move || {
                for _ in 0..5 {
                    let comm = rank_with_agent(r, 2, port).init().unwrap();
                    comm.barrier().unwrap();
                }
            });
        }
    });
}

#[test]
fn no_deadline_at_all_is_a_deadline_too() {
    let port = free_port();
    thread::scope(|scope| {
        for r in 0..2 {
            scope.spawn(move || {
                let rendezvous = rank(r, 2, port).timeout(Duration::MAX).transport(Transport::Tcp);
                let comm = rendezvous.init().unwrap();
                let mut data = vec![1f32; 1 << 20];
                comm.all_reduce(&mut data, ReduceOp::Sum).unwrap();
                assert_eq!(data[0], 2.0);
            });
        }
    });
}

#[test]
fn a_busy_port_is_an_error_with_address_and_port() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = taken.local_addr().unwrap();
    let error = rank(0, 2, address.port()).init().unwrap_err();
    assert!(matches!(error, Error::Bind { address: named, .. } if named == address), "{error}");
    assert!(error.to_string().contains(&address.to_string()));
}

#[test]
fn a_rank_that_never_comes_is_waited_for_until_the_deadline() {
    let error = rank(0, 2, free_port()).join_timeout(Duration::from_millis(200)).init().unwrap_err();
    assert!(matches!(&error, Error::StoreTimeout { keys, .. } if keys[0].ends_with("rank/1")), "{error}");
}

#[test]
fn strangers_at_a_ranks_listener_disturb_nobody() {
    let port = free_port();
    let (found, listeners) = std::sync::mpsc::channel::<u16>();
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..2)
            .map(|r| {
                let found = found.clone();
                scope.spawn(move || {
                    let comm = rank(r, 2, port).init().unwrap();
                    if r == 0 {
                        for port in listening_ports().into_iter().filter(|p| *p != port) {
                            found.send(port).unwrap();
                        }
                    }
                    drop(found);
                    // A group made while strangers knock needs connections of its own.
                    for _ in 0..20 {
                        comm.subgroup(&[1, 0]).unwrap().unwrap().barrier().unwrap();
                    }
                })
            })
            .collect();
        drop(found);
        let mut knocked = Vec::new();
        for port in listeners {
            for garbage in [&b"GET / HTTP/1.0\r\n\r\n............................"[..], &[0; 40], b"x"] {
                if let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
                    let _ = stream.write_all(garbage);
                    knocked.push(stream);
                }
            }
        }
        assert!(!knocked.is_empty());
        for rank in ranks {
            rank.join().unwrap();
        }
    });
}

/// Ports that this process listens on, from the kernel's table of sockets and this process's descriptors.
fn listening_ports() -> Vec<u16> {
    let links = std::fs::read_dir("/proc/self/fd").unwrap();
    let own: Vec<String> = links
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()?.to_str().map(str::to_owned))
        .collect();
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let rows = table.lines().skip(1).map(|row| row.split_whitespace().collect::<Vec<_>>());
    // Column 1 is address:port in hexadecimal, column 3 the state (0A is LISTEN), column 9 the inode.
    rows.filter(|row| row[3] == "0A" && own.contains(&format!("socket:[{}]", row[9])))
        .filter_map(|row| u16::from_str_radix(row[1].rsplit(':').next()?, 16).ok())
        .collect()
}
