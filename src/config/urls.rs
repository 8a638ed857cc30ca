//! URLs of settings, which hold scheme, host and port only. No sentence here quotes its text: a URL with a user in it
//! carries a password.

use http::{Uri, uri::Authority};
use secrecy::SecretString;

use super::{BaseUrl, Proxy, values::Parsed};

/// Where a base URL may use plain http.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PlainHttp {
    /// To loopback only.
    Loopback,
    /// To any host.
    Anywhere,
}

/// `https://host[:port]` or, where allowed, `http://host[:port]`: no user, path, query or fragment.
pub(super) fn base_url(text: &str, plain_http: PlainHttp) -> Parsed<BaseUrl> {
    let form =
        || "must be a URL of scheme, host and port only, like https://rds.example.com".to_owned();
    let uri: Uri = text.parse().map_err(|_| form())?;
    let authority = uri.authority().ok_or_else(form)?;
    let bare = matches!(uri.path(), "" | "/") && uri.query().is_none() && !text.contains('#');
    if !bare || authority.as_str().contains('@') || !port_is_sound(authority) {
        return Err(form());
    }
    match uri.scheme_str() {
        Some("https") => Ok(BaseUrl(format!("https://{authority}"))),
        Some("http") if plain_http == PlainHttp::Anywhere || is_loopback(authority.host()) => {
            Ok(BaseUrl(format!("http://{authority}")))
        }
        Some("http") => {
            Err("plain http is for loopback only; use https, or allow it with --allow-insecure-upstream".to_owned())
        }
        _ => Err(form()),
    }
}

/// `http://[user:password@]host:port`.
pub(super) fn proxy(text: &str) -> Parsed<Proxy> {
    let form = || "must be http://[user:password@]host:port".to_owned();
    let uri: Uri = text.parse().map_err(|_| form())?;
    let authority = uri.authority().ok_or_else(form)?;
    let bare = matches!(uri.path(), "" | "/") && uri.query().is_none() && !text.contains('#');
    if !bare
        || uri.scheme_str() != Some("http")
        || authority.port().is_none()
        || !port_is_sound(authority)
    {
        return Err(form());
    }
    let (user, host) = match authority.as_str().split_once('@') {
        // A password with an '@' of its own is not percent-encoded, and readers would not agree where it ends.
        Some((_, host)) if host.contains('@') => return Err(form()),
        Some((user, host)) => (Some(user), host),
        None => (None, authority.as_str()),
    };
    Ok(Proxy {
        url: SecretString::from(format!("http://{authority}")),
        shown: match user {
            Some(_) => format!("http://***@{host}"),
            None => format!("http://{host}"),
        },
    })
}

/// A host is there, and what follows it is nothing or a port that exists.
fn port_is_sound(authority: &Authority) -> bool {
    let host_and_port = authority
        .as_str()
        .rsplit_once('@')
        .map_or(authority.as_str(), |(_, host)| host);
    match host_and_port.strip_prefix(authority.host()) {
        Some("") => !authority.host().is_empty(),
        Some(port) => {
            !authority.host().is_empty()
                && authority
                    .port_u16()
                    .is_some_and(|known| known > 0 && port == format!(":{known}"))
        }
        None => false,
    }
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || address
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    #[test]
    fn base_urls_hold_scheme_host_and_port_only() {
        let cases = [
            ("https://rds.example.com", PlainHttp::Loopback, true),
            ("https://rds.example.com/", PlainHttp::Loopback, true),
            ("https://rds.example.com:8443", PlainHttp::Loopback, true),
            ("https://[::1]:8443", PlainHttp::Loopback, true),
            ("HTTPS://rds.example.com", PlainHttp::Loopback, true),
            ("http://127.0.0.1:8080", PlainHttp::Loopback, true),
            ("http://127.8.8.8", PlainHttp::Loopback, true),
            ("http://[::1]:8080", PlainHttp::Loopback, true),
            ("http://localhost:8080", PlainHttp::Loopback, true),
            ("http://rds.example.com", PlainHttp::Loopback, false),
            ("http://localhost.example.com", PlainHttp::Loopback, false),
            ("http://127.0.0.1.example.com", PlainHttp::Loopback, false),
            ("http://10.0.0.1:80", PlainHttp::Loopback, false),
            ("http://rds.example.com", PlainHttp::Anywhere, true),
            ("https://rds.example.com/v3", PlainHttp::Anywhere, false),
            ("https://rds.example.com?a=b", PlainHttp::Anywhere, false),
            ("https://rds.example.com#a", PlainHttp::Anywhere, false),
            ("https://u:p@rds.example.com", PlainHttp::Anywhere, false),
            ("https://rds.example.com:0", PlainHttp::Anywhere, false),
            ("https://rds.example.com:99999", PlainHttp::Anywhere, false),
            ("https://rds.example.com:", PlainHttp::Anywhere, false),
            ("https://", PlainHttp::Anywhere, false),
            ("rds.example.com", PlainHttp::Anywhere, false),
            ("ftp://rds.example.com", PlainHttp::Anywhere, false),
            ("/v3", PlainHttp::Anywhere, false),
            ("", PlainHttp::Anywhere, false),
        ];

        for (text, plain_http, expected) in cases {
            assert_eq!(base_url(text, plain_http).is_ok(), expected, "{text:?}");
        }
        assert_eq!(
            base_url("HTTPS://rds.example.com/", PlainHttp::Loopback)
                .unwrap()
                .as_str(),
            "https://rds.example.com"
        );
    }

    #[test]
    fn proxy_keeps_its_password_to_itself() {
        let proxy = proxy("http://ann:hunter2@proxy.example.com:3128").unwrap();

        assert_eq!(
            proxy.url.expose_secret(),
            "http://ann:hunter2@proxy.example.com:3128"
        );
        assert_eq!(proxy.shown, "http://***@proxy.example.com:3128");
        assert!(!format!("{proxy:?}").contains("hunter2"));
    }

    #[test]
    fn malformed_proxies_are_refused_without_being_quoted() {
        let cases = [
            "http://ann:hunter2@proxy.example.com",
            "https://ann:hunter2@proxy.example.com:3128",
            "socks5://ann:hunter2@proxy.example.com:3128",
            "http://ann:hunter2@proxy.example.com:3128/path",
            "http://ann:hunter2@@proxy.example.com:3128",
            "http://ann:hunter2@:3128",
            "ann:hunter2@proxy.example.com:3128",
        ];

        for text in cases {
            let problem = proxy(text).unwrap_err();
            assert!(!problem.contains("hunter2"), "{text}: {problem}");
        }
    }
}
