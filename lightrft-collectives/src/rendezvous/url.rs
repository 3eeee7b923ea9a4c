//! The URLs that torch's `init_process_group` takes: `env://` and `tcp://host:port?rank=0&world_size=2`

use crate::error::{Error, Result};

/// What a URL says; the environment says the rest.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    master: Option<(String, u16)>,
    rank: Option<usize>,
    world_size: Option<usize>,
}

const EXPECTED: &str = "`env://` or `tcp://host:port`, and after a `?` perhaps `rank=0&world_size=2`";

impl Told {
    /// Reads `url`, and adds the rank and the number of ranks that the caller gives beside it.
    pub(super) fn by(url: &str, given: Option<(usize, usize)>) -> Result<Self> {
        let wrong = |what: String| Error::Url { url: url.into(), what, expected: EXPECTED };
        let (scheme, rest) = url.split_once("://").ok_or_else(|| wrong("no scheme".into()))?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let place = place.strip_suffix('/').unwrap_or(place);
        let mut told = Told::default();
        match scheme {
            "env" if place.is_empty() => {}
            "env" => return Err(wrong(format!("a place, `{place}`, which the environment tells"))),
            "tcp" => {
                let (host, port) = place.rsplit_once(':').ok_or_else(|| wrong("no port".into()))?;
                let port = port.parse().ok().filter(|port| *port != 0);
                let port = port.ok_or_else(|| wrong("no port from 1 to 65535".into()))?;
                let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
                let host = bare.unwrap_or(host);
                if host.is_empty() || bare.is_none() && host.contains([':', '[', ']', '@', '/']) {
                    return Err(wrong(format!("the host `{host}`")));
                }
                told.master = Some((host.to_owned(), port));
            }
            other => return Err(wrong(format!("the scheme `{other}`"))),
        }
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let number = || value.parse().map_err(|_| wrong(format!("`{name}` as `{value}`")));
            let place = match name {
                "rank" => &mut told.rank,
                "world_size" => &mut told.world_size,
                _ => return Err(wrong(format!("`{name}`"))),
            };
            if place.replace(number()?).is_some() {
                return Err(wrong(format!("`{name}` twice")));
            }
        }
        if let Some((rank, world_size)) = given {
            let differs = |told: Option<usize>, given| told.is_some_and(|told| told != given);
            if differs(told.rank, rank) || differs(told.world_size, world_size) {
                return Err(wrong(format!(
                    "another rank or world size than the {rank} of {world_size} given"
                )));
            }
            (told.rank, told.world_size) = (Some(rank), Some(world_size));
        }
        match (told.rank, told.world_size) {
            (Some(rank), Some(world)) if rank >= world => Err(wrong(format!("rank {rank} of {world}"))),
            _ => Ok(told),
        }
    }

    /// The variable as the URL would have set it.
    pub(super) fn variable(&self, name: &str) -> Option<String> {
        match (name, &self.master) {
            ("MASTER_ADDR", Some((host, _))) => Some(host.clone()),
            ("MASTER_PORT", Some((_, port))) => Some(port.to_string()),
            ("RANK", _) => self.rank.map(|rank| rank.to_string()),
            ("WORLD_SIZE", _) => self.world_size.map(|world| world.to_string()),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16, rank: Option<usize>, world_size: Option<usize>) -> Told {
        Told { master: Some((host.into(), port)), rank, world_size }
    }

    #[test]
    fn torchs_urls_are_read() {
        for (url, told) in [
            ("env://", Told::default()),
            ("env://?rank=1&world_size=2", Told { rank: Some(1), world_size: Some(2), master: None }),
            ("tcp://10.0.0.1:2222?rank=0&world_size=2", tcp("10.0.0.1", 2222, Some(0), Some(2))),
            ("tcp://node-1.example:80/", tcp("node-1.example", 80, None, None)),
            ("tcp://[::1]:2222?world_size=2", tcp("::1", 2222, None, Some(2))),
        ] {
            assert_eq!(Told::by(url, None).unwrap(), told, "{url}");
        }
        assert_eq!(Told::by("tcp://a:1", Some((1, 2))).unwrap(), tcp("a", 1, Some(1), Some(2)));
        assert_eq!(Told::by("tcp://a:1?rank=1", Some((1, 2))).unwrap(), tcp("a", 1, Some(1), Some(2)));
    }

    #[test]
    fn other_urls_are_errors_that_repeat_them() {
        for url in [
            "",
            "env:",
            "env://here",
            "file:///somewhere",
            "tcp://a",
            "tcp://:1",
            "tcp://a:0",
            "tcp://a:65536",
            "tcp://a:b",
            "tcp://::1:2222",
            "tcp://a:1?rank=x",
            "tcp://a:1?rank=-1",
            "tcp://a:1?rank=2&world_size=2",
            "tcp://a:1?rank=0&rank=0",
            "tcp://a:1?ranks=2",
        ] {
            let error = Told::by(url, None).unwrap_err();
            assert!(matches!(&error, Error::Url { url: told, .. } if told == url), "{error}");
        }
        assert!(Told::by("tcp://a:1?rank=0", Some((1, 2))).is_err());
        assert!(Told::by("tcp://a:1", Some((2, 2))).is_err());
    }

    proptest! {
        #[test]
        fn no_url_makes_the_reader_panic(url in "(tcp|env)?(://)?[a-z0-9:?&=\\[\\]/]{0,24}") {
            let _ = Told::by(&url, None);
        }
    }
}
