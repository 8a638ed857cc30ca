//! The limit of open descriptors of this process, and whether the configured limits fit into it.

use std::{fs::File, io, thread};

use rustix::{
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

/// Descriptors for everything but gRPC connections and upstream requests: connections of the admin listener (256 at most wait for a
/// request), files, name lookups, signals, the log.
const RESERVE: usize = 320;
/// Descriptors of the runtime of one worker.
const PER_WORKER: usize = 4;

/// Limits that fit into the descriptors of the process, because the configured limits do not.
#[derive(Debug, PartialEq, Eq)]
pub struct Fitted {
    /// Open gRPC connections.
    pub connections: usize,
    /// Calls in flight, each of which may need an upstream connection.
    pub calls: usize,
    /// The descriptors that the configured limits need.
    pub needed: usize,
}

/// Raises the soft limit to the hard limit and returns it. A service manager sets the soft limit low for programs that use select(2),
/// which this one does not.
pub fn raise_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    let in_force = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => raised.current,
        Err(_) => limit.current,
    };
    in_force.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    })
}

/// Whether the configured limits fit into `limit` descriptors; if not, the limits that do. Without them, the idle connections of one
/// client could take the descriptors that upstream requests and probes need.
pub fn fit(limit: usize, connections: usize, calls: usize) -> Option<Fitted> {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let reserve = RESERVE + PER_WORKER * workers;
    let needed = connections.saturating_add(calls).saturating_add(reserve);
    if needed <= limit {
        return None;
    }
    let available = limit - reserve.min(limit / 2);
    // A limit that needs less than half leaves the rest to the other one.
    let half = available / 2;
    let calls = calls.min(half.max(available.saturating_sub(connections)));
    Some(Fitted {
        connections: connections.min(available - calls).max(1),
        calls: calls.max(1),
        needed,
    })
}

/// Whether this error of the system means that the process or the machine is out of descriptors, of local ports or of memory for sockets.
pub fn is_shortage(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(
        code,
        Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM | Errno::ADDRNOTAVAIL)
    )
}

/// Whether the process is out of descriptors now. The C library's name lookup reports that as a name that does not exist.
pub fn are_exhausted() -> bool {
    File::open("/dev/null").is_err_and(|error| is_shortage(&error))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn limits_that_fit_are_kept_and_others_share_the_descriptors() {
        let workers = thread::available_parallelism().map_or(1, usize::from);
        let reserve = RESERVE + PER_WORKER * workers;

        assert_eq!(fit(usize::MAX, 1000, 2048), None);
        assert_eq!(fit(3048 + reserve, 1000, 2048), None);
        for (limit, connections, calls) in [
            (1024 + reserve, 512, 512),
            (2600 + reserve, 1000, 1600),
            (3047 + reserve, 1000, 2047),
        ] {
            let expected = Fitted {
                connections,
                calls,
                needed: 3048 + reserve,
            };
            assert_eq!(fit(limit, 1000, 2048), Some(expected), "{limit}");
        }
    }

    proptest! {
        #[test]
        fn fitted_limits_leave_a_reserve_and_are_never_above_the_configured_ones(
            limit in 16..5000usize,
            connections in 1..5000usize,
            calls in 1..5000usize,
        ) {
            if let Some(fitted) = fit(limit, connections, calls) {
                prop_assert!((1..=connections).contains(&fitted.connections));
                prop_assert!((1..=calls).contains(&fitted.calls));
                prop_assert!(fitted.connections + fitted.calls < limit);
                prop_assert!(fitted.needed > limit);
            }
        }
    }
}
