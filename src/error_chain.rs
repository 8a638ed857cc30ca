//! Walks an error and the sources behind it.

use std::error::Error;

/// The error, then its source, then the source's own source, down to the root cause.
pub fn chain<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// The innermost source: the message of the operating system, the TLS library or the peer.
pub fn root_cause<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    chain(error).last().unwrap_or(error)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] Middle);

    #[derive(Debug, thiserror::Error)]
    #[error("middle")]
    struct Middle(#[source] io::Error);

    #[test]
    fn the_chain_runs_from_the_error_to_its_root_cause() {
        let error = Outer(Middle(io::Error::from(io::ErrorKind::BrokenPipe)));

        let texts: Vec<_> = chain(&error).map(ToString::to_string).collect();

        assert_eq!(texts, ["outer", "middle", "broken pipe"]);
        assert_eq!(root_cause(&error).to_string(), "broken pipe");
    }
}
