//! What prevented a complete response, and its cause for the log.

use std::{error::Error as StdError, io};

use tokio::time::error::Elapsed;

use super::resolver::LookupError;
use crate::{
    descriptors,
    error_chain::{chain, root_cause},
    reason::Reason,
};

/// A request without a complete response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// One of the transport reasons, `UpstreamResponseTooLarge`, or `Overloaded` if this process is out of descriptors.
    pub reason: Reason,
    /// Whether the same request may succeed on another connection.
    pub retryable: bool,
    /// Whether the connect timeout expired.
    pub timed_out: bool,
    /// The obstacle to the connection, if it is known more precisely than by the reason.
    pub obstacle: Option<Obstacle>,
    /// The innermost cause, for the log. Contains no URL, header or body.
    pub cause: String,
}

/// What prevented a connection, as far as the message for the caller depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    /// The proxy cannot be reached.
    ProxyUnreachable,
    /// The proxy replied to CONNECT with 407.
    ProxyLogin,
    /// The proxy replied to CONNECT with another status than 200 and 407, or with none.
    ProxyRejection,
    /// The certificate has expired or is not yet valid.
    CertificateDates,
    /// No trusted authority issued the certificate.
    CertificateIssuer,
    /// The certificate is for another host name.
    CertificateName,
    /// The certificate is invalid for another reason.
    Certificate,
    /// No common TLS version, cipher or key exchange.
    NoCommonTls,
    /// The peer does not speak TLS.
    NotTls,
}

impl Error {
    pub(super) fn new(reason: Reason, retryable: bool, cause: impl Into<String>) -> Self {
        Self {
            reason,
            retryable,
            timed_out: false,
            obstacle: None,
            cause: cause.into(),
        }
    }

    /// Whether no connection was opened.
    pub fn is_connect(&self) -> bool {
        matches!(
            self.reason,
            Reason::UpstreamDns
                | Reason::UpstreamConnect
                | Reason::UpstreamTls
                | Reason::Overloaded
        )
    }
}

/// The error of a connection that was not opened.
pub(super) fn connect_error(error: &(dyn StdError + 'static)) -> Error {
    let cause = describe(error);
    if let Some(tls) = chain(error).find_map(tls_error) {
        return tls_failure(tls, cause);
    }
    let is_lookup = chain(error).any(|cause| cause.is::<LookupError>());
    let io_errors = || chain(error).filter_map(|cause| cause.downcast_ref::<io::Error>());
    let timed_out =
        error.is::<Elapsed>() || io_errors().any(|error| error.kind() == io::ErrorKind::TimedOut);
    if io_errors().any(descriptors::is_shortage) || is_lookup && descriptors::are_exhausted() {
        return Error::new(Reason::Overloaded, false, cause);
    }
    let reason = match is_lookup {
        true => Reason::UpstreamDns,
        false => Reason::UpstreamConnect,
    };
    let obstacle = tunnel_error(error).map(|text| match text.as_str() {
        "proxy authorization required" => Obstacle::ProxyLogin,
        "failed to create underlying connection" => Obstacle::ProxyUnreachable,
        _ => Obstacle::ProxyRejection,
    });
    Error {
        timed_out,
        obstacle,
        ..Error::new(reason, obstacle != Some(Obstacle::ProxyLogin), cause)
    }
}

/// The error of a request that got no response head.
pub(super) fn request_error(error: &hyper::Error) -> Error {
    let cause = describe(error);
    if let Some(tls) = chain(error).find_map(tls_error) {
        return tls_failure(tls, cause);
    }
    let (reason, retryable) = if error.is_parse_too_large() {
        (Reason::UpstreamProtocol, false)
    } else if error.is_parse() {
        (Reason::UpstreamProtocol, true)
    } else {
        (Reason::UpstreamReset, true)
    };
    Error::new(reason, retryable, cause)
}

/// The error of a body that broke off.
pub(super) fn body_error(error: &hyper::Error) -> Error {
    let io_kind = chain(error)
        .find_map(|cause| cause.downcast_ref::<io::Error>())
        .map(io::Error::kind);
    let reason = match io_kind {
        // hyper reports a chunk size or extension that it cannot parse with these kinds.
        Some(io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) => Reason::UpstreamProtocol,
        _ => Reason::UpstreamTruncated,
    };
    Error::new(reason, true, describe(error))
}

/// The innermost cause: the message of the system, the TLS library, the HTTP parser or the proxy.
fn describe(error: &(dyn StdError + 'static)) -> String {
    if error.is::<Elapsed>() {
        return "no connection within the connect timeout".to_owned();
    }
    match tunnel_error(error).as_deref() {
        Some("proxy authorization required") => {
            "the proxy replied to CONNECT with HTTP 407".to_owned()
        }
        Some("unsuccessful") => {
            "the proxy rejected CONNECT, with another HTTP status than 407".to_owned()
        }
        _ => root_cause(error).to_string(),
    }
}

/// The error of a proxy's tunnel. The HTTP library does not export the type of this error, so it is recognized by its text.
fn tunnel_error(error: &(dyn StdError + 'static)) -> Option<String> {
    chain(error)
        .find_map(|error| Some(error.to_string().strip_prefix("tunnel error: ")?.to_owned()))
}

fn tls_failure(error: &rustls::Error, cause: String) -> Error {
    Error {
        obstacle: tls_obstacle(error),
        ..Error::new(Reason::UpstreamTls, false, cause)
    }
}

/// The TLS error in this error, possibly inside `io::Error`s. The source of an `io::Error` is the source of the error that it wraps, so the
/// error chain alone skips the wrapped error.
fn tls_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    let wrapped = || {
        error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
    };
    error
        .downcast_ref()
        .or_else(|| tls_error(wrapped()? as &(dyn StdError + 'static)))
}

fn tls_obstacle(error: &rustls::Error) -> Option<Obstacle> {
    use rustls::{AlertDescription as Alert, CertificateError as Certificate, Error as Tls};
    Some(match error {
        Tls::InvalidCertificate(
            Certificate::Expired
            | Certificate::ExpiredContext { .. }
            | Certificate::NotValidYet
            | Certificate::NotValidYetContext { .. },
        ) => Obstacle::CertificateDates,
        Tls::InvalidCertificate(Certificate::UnknownIssuer) => Obstacle::CertificateIssuer,
        Tls::InvalidCertificate(
            Certificate::NotValidForName | Certificate::NotValidForNameContext { .. },
        ) => Obstacle::CertificateName,
        Tls::InvalidCertificate(_) => Obstacle::Certificate,
        Tls::PeerIncompatible(_)
        | Tls::AlertReceived(
            Alert::HandshakeFailure | Alert::ProtocolVersion | Alert::InsufficientSecurity,
        ) => Obstacle::NoCommonTls,
        Tls::InvalidMessage(_) => Obstacle::NotTls,
        _ => return None,
    })
}
