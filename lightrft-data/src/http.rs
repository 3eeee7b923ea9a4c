//! Images from `http(s)` addresses that stand in a data set, without reaching into the network that the run is in.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ureq::Agent;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

use crate::decode::Fetch;
use crate::media::{MediumProblem, shorten};

/// How addresses are fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpConfig {
    /// For everything from the name's look-up to the last byte, redirections included.
    pub timeout: Duration,
    /// Redirections that are followed.
    pub max_redirects: u32,
    /// Addresses that may be reached although they are not public: an image server of one's own.
    pub allow: Vec<SocketAddr>,
}

impl Default for HttpConfig {
    /// 20 seconds, 3 redirections, public addresses only.
    fn default() -> Self {
        Self { timeout: Duration::from_secs(20), max_redirects: 3, allow: Vec::new() }
    }
}

/// Fetches `http` and `https` addresses on the public network.
///
/// A data set is written by strangers, and an address in it could name the machine itself or a service beside it. So
/// the addresses that a name resolves to are checked, on each connection and for each redirection, and the very
/// addresses that were checked are connected to. Proxies that the environment names are not used: they would resolve
/// names themselves.
#[derive(Clone, Debug)]
pub struct HttpFetch {
    agent: Agent,
}

impl HttpFetch {
    /// Prepares fetching; nothing is connected yet.
    pub fn new(config: HttpConfig) -> Self {
        let settings = Agent::config_builder()
            .timeout_global(Some(config.timeout))
            .max_redirects(config.max_redirects)
            .proxy(None)
            .user_agent(concat!("lightrft-data/", env!("CARGO_PKG_VERSION")))
            .build();
        let resolver = PublicOnly { allow: config.allow, inner: DefaultResolver::default() };
        Self { agent: Agent::with_parts(settings, DefaultConnector::default(), resolver) }
    }
}

impl Fetch for HttpFetch {
    fn fetch(&self, url: &str, max_bytes: usize) -> Result<Vec<u8>, MediumProblem> {
        let failed = |e: ureq::Error| match e {
            ureq::Error::BodyExceedsLimit(_) => MediumProblem::TooManyBytes { limit: max_bytes },
            e => MediumProblem::Fetch { url: shorten(url), message: e.to_string() },
        };
        let mut response = self.agent.get(url).call().map_err(failed)?;
        let body = response.body_mut();
        if body.content_length().is_some_and(|length| length > max_bytes as u64) {
            return Err(MediumProblem::TooManyBytes { limit: max_bytes });
        }
        // The limit is that of the reader, which stops before it; one more lets exactly `max_bytes` pass.
        body.with_config().limit((max_bytes as u64).saturating_add(1)).read_to_vec().map_err(failed)
    }
}

/// Resolves names to public addresses, and to those that are allowed by name.
#[derive(Debug)]
struct PublicOnly {
    allow: Vec<SocketAddr>,
    inner: DefaultResolver,
}

impl Resolver for PublicOnly {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let found = self.inner.resolve(uri, config, timeout)?;
        let mut kept = self.inner.empty();
        for address in found.iter().filter(|a| self.allow.contains(a) || is_public(a.ip())) {
            kept.push(*address);
        }
        if kept.is_empty() {
            let host = uri.host().unwrap_or_default();
            let refused =
                format!("`{}` is not on the public network; see `HttpConfig::allow`", shorten(host));
            return Err(ureq::Error::Other(refused.into()));
        }
        Ok(kept)
    }
}

/// Whether an address can belong to a machine out on the internet: not one of the special blocks that IANA lists (RFC
/// 6890 and its successors), nor an IPv6 form that carries an IPv4 address of such a block.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_public_v4(v4),
        IpAddr::V6(v6) => is_public_v6(v6),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = match a {
        0 | 10 | 127 => true,          // this network, private, loopback
        100 => (64..128).contains(&b), // carriers' shared space
        169 => b == 254,               // link-local, where clouds serve credentials
        172 => (16..32).contains(&b),  // private
        192 => match b {
            0 => c == 0 || c == 2, // protocol assignments, documentation
            88 => c == 99,         // 6to4 relays
            168 => true,           // private
            _ => false,
        },
        198 => b == 18 || b == 19 || (b == 51 && c == 100), // benchmarks, documentation
        203 => b == 0 && c == 113,                          // documentation
        224.. => true,                                      // multicast, reserved, broadcast
        _ => false,
    };
    !special
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let inner =
        |high: u16, low: u16| is_public_v4(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)));
    match segments {
        [0, 0, 0, 0, 0, 0xffff, high, low] => inner(high, low), // mapped
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => inner(high, low), // NAT64
        [0x2002, high, low, ..] => inner(high, low),            // 6to4
        [0x2001, 0..0x200, ..] => false,                        // protocol assignments, Teredo among them
        [0x2001, 0xdb8, ..] => false,                           // documentation
        [0x3fff, 0..0x1000, ..] => false,                       // documentation
        // Of all else only 2000::/3 is handed out.
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::is_public;

    #[test]
    fn special_addresses_are_not_public_in_any_spelling() {
        let special = [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
            "3fff::1",
            "fc00::1",
            "fd12::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "100::1",
        ];
        for text in special {
            assert!(!is_public(text.parse().expect("an address")), "{text}");
        }
        let public = [
            "1.1.1.1",
            "8.8.8.8",
            "100.63.0.1",
            "100.128.0.1",
            "169.253.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "192.167.0.1",
            "198.17.0.1",
            "198.20.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00:1450::1",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
            "2002:808:808::1",
            "2001:4860::1",
        ];
        for text in public {
            assert!(is_public(text.parse().expect("an address")), "{text}");
        }
    }
}
