//! Addresses for servers that start later, or not at all.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpListener},
};

/// An address of loopback that was free a moment ago. Its port is below those that the system gives to clients and listeners, so that none
/// of them takes it; so is the port that a Redis cluster uses in addition, which is higher by 10 000.
pub(crate) fn free_address() -> SocketAddr {
    loop {
        match TcpListener::bind(("127.0.0.1", fastrand::u16(10_000..20_000))) {
            Ok(listener) => return listener.local_addr().expect("it is bound"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::AddrInUse),
        }
    }
}
