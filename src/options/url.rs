//! URLs in options: scheme, host and port only. Errors never echo a URL with a user, which can include a password.

use std::fmt;

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use rustls::pki_types::ServerName;
use url::{Host, Url};

use super::{Parsed, not};

/// Parses `http://host[:port]` or `https://host[:port]`, without user, path, query or fragment.
///
/// # Errors
/// The rest of an error sentence.
pub fn base(text: &str) -> Parsed<Url> {
    split(text)
        .filter(|(_, authority)| !authority.contains('@'))
        .and_then(|_| parse(text))
        .ok_or_else(|| {
            not(
                text,
                "a URL of scheme, host and port only, like https://rds.example.com",
            )
        })
}

/// The base URL without the final slash that [`Url`] adds.
pub fn without_slash(base: &Url) -> &str {
    base.as_str().trim_end_matches('/')
}

/// Rejects plain HTTP to hosts other than loopback unless it is allowed, because it exposes credentials.
///
/// # Errors
/// The rest of an error sentence.
pub fn check_plain_http(base: &Url, allowed: bool) -> Parsed<()> {
    if base.scheme() == "https" || allowed || is_loopback(base) {
        return Ok(());
    }
    Err(format!(
        "\"{}\" is plain http, which is allowed for loopback only; use https, or set --allow-insecure-upstream",
        without_slash(base)
    ))
}

/// A forward proxy. [`fmt::Debug`] omits the URL, which counts as a secret.
#[derive(Clone)]
pub struct Proxy(Url);

impl Proxy {
    /// Parses `http://[user[:password]@]host:port`, user and password percent-encoded.
    ///
    /// # Errors
    /// The rest of an error sentence.
    pub fn parse(text: &str) -> Parsed<Self> {
        split(text)
            .filter(|(scheme, authority)| {
                let (_, host) = authority.split_once('@').unwrap_or(("", authority));
                let port = host.rsplit_once(':').map(|(_, port)| port.parse::<u16>());
                // An unencoded '@' in the password is ambiguous: parsers disagree on where the password ends.
                scheme.eq_ignore_ascii_case("http")
                    && !host.contains('@')
                    && matches!(port, Some(Ok(_)))
            })
            .and_then(|_| parse(text))
            .map(Self)
            .ok_or_else(|| "must be http://[user[:password]@]host:port".to_owned())
    }

    /// Adds the password of the user.
    ///
    /// # Errors
    /// The rest of an error sentence, when the URL has no user or another password.
    pub fn set_password(&mut self, password: &str) -> Parsed<()> {
        if self.0.username().is_empty() || self.0.password().is_some() {
            return Err("requires a user without a password in --upstream-proxy".to_owned());
        }
        // `Url` leaves `%` as it is, which would be decoded later.
        let password = percent_encode(password.as_bytes(), NON_ALPHANUMERIC).to_string();
        self.0
            .set_password(Some(&password))
            .expect("an http URL with a host can have a password");
        Ok(())
    }

    /// The URL with user and password.
    pub fn url(&self) -> &Url {
        &self.0
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proxy")
    }
}

/// Splits a URL into scheme and authority; `None` if more than a slash follows. Needed because [`Url`] drops tabs and line breaks and
/// accepts backslashes as slashes.
fn split(text: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = text.split_once("://")?;
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    let bare = text.bytes().all(|b| b.is_ascii_graphic())
        && !authority.contains(['/', '\\', '?', '#'])
        && !authority.ends_with(':');
    bare.then_some((scheme, authority))
}

/// Parses a URL that every library accepts: hyper needs a `Uri`, and TLS needs a valid name. A host name that no
/// library can use would only show as a service that never gets a reply.
pub fn parse(text: &str) -> Option<Url> {
    let url = Url::parse(text).ok()?;
    let host = url.host_str()?.trim_matches(['[', ']']);
    let usable = matches!(url.scheme(), "http" | "https")
        && url.port() != Some(0)
        && ServerName::try_from(host).is_ok()
        && url.as_str().parse::<http::Uri>().is_ok();
    usable.then_some(url)
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_urls_have_scheme_host_and_port_only() {
        let cases = [
            ("https://rds.example.com", true),
            ("https://rds.example.com/", true),
            ("https://rds.example.com:8443", true),
            ("https://[::1]:8443", true),
            ("HTTPS://rds.example.com", true),
            ("http://rds.example.com", true),
            ("https://xn--mnchen-3ya.example", true),
            ("https://rds.example.com/v3", false),
            ("https://rds.example.com//", false),
            ("https://rds.example.com?a=b", false),
            ("https://rds.example.com#a", false),
            ("https://u:p@rds.example.com", false),
            ("https://@rds.example.com", false),
            ("https://rds.example.com:0", false),
            ("https://rds.example.com:99999", false),
            ("https://rds.example.com:", false),
            ("https://rds.example.com:/", false),
            ("https://rds .example.com", false),
            ("https://rds.example\n.com", false),
            ("https:\\\\rds.example.com", false),
            ("https:rds.example.com", false),
            ("https:///rds.example.com", false),
            ("https://", false),
            ("https://:443", false),
            ("rds.example.com", false),
            ("ftp://rds.example.com", false),
            ("/v3", false),
            ("", false),
        ];

        for (text, expected) in cases {
            assert_eq!(base(text).is_ok(), expected, "{text:?}");
        }
        let url = base("HTTPS://rds.example.com/").unwrap();
        assert_eq!(without_slash(&url), "https://rds.example.com");
    }

    #[test]
    fn hosts_that_only_one_url_library_accepts_are_rejected() {
        let hosts = [
            "10.0.0.256",
            "1.2.3.4.5",
            "[::g]",
            "[fe80::1%25eth0]",
            "xn--a",
            "a`b",
            "a{b}",
            "a%zz",
            "a%00b",
            "[::1",
            "a]b",
            "a..b",
            ".a",
            ".",
            "a,b",
            "a+b",
            "a.1.2",
            "xn--",
            &"a".repeat(64),
        ];

        for host in hosts {
            assert!(base(&format!("https://{host}")).is_err(), "{host}");
            assert!(
                Proxy::parse(&format!("http://{host}:3128")).is_err(),
                "{host}"
            );
        }
    }

    #[test]
    fn plain_http_beyond_loopback_must_be_allowed() {
        let cases = [
            ("https://rds.example.com", true),
            ("http://127.0.0.1:8080", true),
            ("http://127.8.8.8", true),
            ("http://[::1]:8080", true),
            ("http://localhost:8080", true),
            ("http://rds.example.com", false),
            ("http://localhost.example.com", false),
            ("http://127.0.0.1.example.com", false),
            ("http://10.0.0.1:80", false),
        ];

        for (text, expected) in cases {
            let url = base(text).unwrap();
            assert_eq!(check_plain_http(&url, false).is_ok(), expected, "{text}");
            assert!(check_plain_http(&url, true).is_ok(), "{text}");
        }
    }

    #[test]
    fn a_proxy_gets_its_password_from_one_place_and_does_not_show_it() {
        let mut proxy = Proxy::parse("http://ann@proxy.example.com:3128").unwrap();
        proxy.set_password("a:b@c/d%65 \u{e4}").unwrap();

        assert_eq!(
            proxy.url().as_str(),
            "http://ann:a%3Ab%40c%2Fd%2565%20%C3%A4@proxy.example.com:3128/"
        );
        assert_eq!(format!("{proxy:?}"), "Proxy");
        for text in [
            "http://ann:x@proxy:3128",
            "http://proxy:3128",
            "http://:x@proxy:3128",
        ] {
            let mut proxy = Proxy::parse(text).unwrap();
            assert!(proxy.set_password("hunter2").is_err(), "{text}");
        }
    }

    #[test]
    fn malformed_proxies_are_rejected_without_echo() {
        let cases = [
            "http://ann:hunter2@proxy.example.com",
            "https://ann:hunter2@proxy.example.com:3128",
            "socks5://ann:hunter2@proxy.example.com:3128",
            "http://ann:hunter2@proxy.example.com:3128/path",
            "http://ann:hunter2@@proxy.example.com:3128",
            "http://ann:hunter2@proxy.example.com:0",
            "http://ann:hunter2@:3128",
            "ann:hunter2@proxy.example.com:3128",
        ];

        for text in cases {
            let problem = Proxy::parse(text).unwrap_err();
            assert!(!problem.contains("hunter2"), "{text}: {problem}");
        }
    }
}
