//! Looks up host names without starting threads.
//!
//! A thread of this module waits for the system's resolver, because a call must not fail when the system refuses new threads. Lookups of one
//! name share a thread and a result, so a resolver that hangs delays no other name.

use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, ToSocketAddrs as _},
    pin::Pin,
    sync::{
        Arc, LazyLock,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    task::{Context, Poll},
    thread,
    time::Duration,
};

use hyper_util::client::legacy::connect::dns;
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tower_service::Service;

/// As many as there are configured names: RDS or its proxy, IAM, the metadata service, the trace collector.
const THREADS: usize = 4;

/// Limit on lookups that wait for a thread, at most one per name.
const MAX_WAITING: usize = 16;

/// A result is used again for this long, so that many connects at once do not flood the name server.
const FRESH: Duration = Duration::from_millis(100);

/// Once a lookup takes longer, or has failed, connects use the addresses of the last successful lookup.
const MAX_DELAY: Duration = Duration::from_secs(1);

pub(super) type Addresses = Arc<[SocketAddr]>;

/// A failed lookup.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the name cannot be looked up: {0}")]
pub(super) struct LookupError(Arc<str>);

pub(super) type Outcome = Result<Addresses, LookupError>;
/// `None` until the lookup ends.
type Pending = watch::Receiver<Option<Outcome>>;

/// The threads and the latest lookup of each name. Names come from the configuration, which bounds their number.
#[derive(Debug, Clone)]
pub(super) struct Resolver {
    names: Arc<Mutex<HashMap<String, Latest>>>,
    jobs: SyncSender<Job>,
}

#[derive(Debug)]
struct Latest {
    outcome: Pending,
    started: Instant,
    /// Of the last successful lookup before this one.
    previous: Option<Addresses>,
}

#[derive(Debug)]
struct Job {
    name: String,
    outcome: watch::Sender<Option<Outcome>>,
}

impl Resolver {
    /// The system's resolver, shared by all clients of the process. The first call starts the threads.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub(super) fn system() -> Result<Self, &'static io::Error> {
        static SYSTEM: LazyLock<io::Result<Resolver>> =
            LazyLock::new(|| Resolver::start(|name| Ok((name, 0).to_socket_addrs()?.collect())));
        SYSTEM.as_ref().cloned()
    }

    fn start<L>(lookup: L) -> io::Result<Self>
    where
        L: Fn(&str) -> io::Result<Vec<SocketAddr>> + Clone + Send + 'static,
    {
        let (jobs, queue) = sync_channel(MAX_WAITING);
        let queue = Arc::new(Mutex::new(queue));
        for number in 0..THREADS {
            let (queue, lookup) = (Arc::clone(&queue), lookup.clone());
            thread::Builder::new()
                .name(format!("lookup-{number}"))
                .spawn(move || run(&queue, &lookup))?;
        }
        Ok(Self {
            names: Arc::default(),
            jobs,
        })
    }

    /// The addresses of `name`, with port 0.
    pub(super) async fn addresses(self, name: String) -> Outcome {
        let (mut outcome, previous, started) = self.join(&name)?;
        let lookup = async {
            let ended = outcome.wait_for(Option::is_some).await;
            // The sender is dropped early only by a panic of the thread.
            let ended = ended.map_err(|_| LookupError("it was interrupted".into()))?;
            ended.clone().expect("waited for it")
        };
        let Some(previous) = previous else {
            return lookup.await;
        };
        match timeout_at(started + MAX_DELAY, lookup).await {
            Ok(Ok(addresses)) => Ok(addresses),
            failed_or_late => {
                let cause = match failed_or_late {
                    Ok(Err(error)) => error.to_string(),
                    _ => format!("the name lookup takes more than {MAX_DELAY:?}"),
                };
                tracing::warn!(
                    name,
                    cause,
                    "connecting to the addresses of an earlier lookup"
                );
                Ok(previous)
            }
        }
    }

    /// The lookup of `name` that is in progress or has just succeeded, else a new one; the addresses known before; and when the lookup
    /// started.
    fn join(&self, name: &str) -> Result<(Pending, Option<Addresses>, Instant), LookupError> {
        let mut names = self.names.lock();
        let mut previous = None;
        if let Some(latest) = names.get(name) {
            previous.clone_from(&latest.previous);
            let is_usable = match &*latest.outcome.borrow() {
                None => latest.outcome.has_changed().is_ok(),
                Some(Err(_)) => false,
                Some(Ok(addresses)) => {
                    previous = Some(Arc::clone(addresses));
                    latest.started.elapsed() < FRESH
                }
            };
            if is_usable {
                return Ok((latest.outcome.clone(), previous, latest.started));
            }
        }
        let (sender, outcome) = watch::channel(None);
        let job = Job {
            name: name.to_owned(),
            outcome: sender,
        };
        let queued = self.jobs.try_send(job);
        queued.map_err(|_| LookupError("too many lookups are waiting".into()))?;
        let started = Instant::now();
        let latest = Latest {
            outcome: outcome.clone(),
            started,
            previous: previous.clone(),
        };
        names.insert(name.to_owned(), latest);
        Ok((outcome, previous, started))
    }
}

/// One thread.
fn run(queue: &Mutex<Receiver<Job>>, lookup: &dyn Fn(&str) -> io::Result<Vec<SocketAddr>>) {
    loop {
        let next = queue.lock().recv();
        let Ok(job) = next else {
            return;
        };
        let found = match lookup(&job.name) {
            Ok(addresses) if addresses.is_empty() => Err(LookupError("it has no address".into())),
            Ok(addresses) => Ok(addresses.into()),
            Err(error) => Err(LookupError(error.to_string().into())),
        };
        job.outcome.send_replace(Some(found));
    }
}

impl Service<dns::Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = LookupError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, LookupError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), LookupError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: dns::Name) -> Self::Future {
        let lookup = self.clone().addresses(name.as_str().to_owned());
        Box::pin(async { Ok(lookup.await?.to_vec().into_iter()) })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;
    use parking_lot::Condvar;

    use super::*;
    use crate::test_support::wait::within;

    const ADDRESS: &str = "192.0.2.1:0";

    /// A resolver whose lookups wait until it is open. Names that begin with "hung" wait forever.
    #[derive(Clone, Default)]
    struct Fake(Arc<FakeState>);

    #[derive(Default)]
    struct FakeState {
        open: Mutex<bool>,
        opened: Condvar,
        lookups: AtomicUsize,
        broken: Mutex<bool>,
    }

    impl Fake {
        fn open(&self) {
            *self.0.open.lock() = true;
            self.0.opened.notify_all();
        }

        fn start(&self) -> Resolver {
            let state = Arc::clone(&self.0);
            let lookup = move |name: &str| {
                state.lookups.fetch_add(1, Ordering::Relaxed);
                let mut open = state.open.lock();
                let waits = |open: &mut bool| !*open || name.starts_with("hung");
                state.opened.wait_while(&mut open, waits);
                drop(open);
                if *state.broken.lock() {
                    return Err(io::Error::other("no name server"));
                }
                Ok(vec![ADDRESS.parse().unwrap()])
            };
            Resolver::start(lookup).unwrap()
        }

        fn lookups(&self) -> usize {
            self.0.lookups.load(Ordering::Relaxed)
        }
    }

    fn expected() -> Addresses {
        Arc::new([ADDRESS.parse().unwrap()])
    }

    async fn look_up(resolver: &Resolver, name: &str) -> Outcome {
        within(name, resolver.clone().addresses(name.to_owned())).await
    }

    #[tokio::test]
    async fn connects_at_the_same_time_share_a_lookup() {
        let fake = Fake::default();
        let resolver = fake.start();

        let connects = join_all((0..50).map(|_| look_up(&resolver, "name")));
        let ((), found) = tokio::join!(async { fake.open() }, connects);

        assert!(
            found
                .iter()
                .all(|found| *found.as_ref().unwrap() == expected())
        );
        assert_eq!(fake.lookups(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_looked_up_again_once_its_result_is_old() {
        let fake = Fake::default();
        fake.open();
        let resolver = fake.start();

        for _ in 0..10 {
            resolver.clone().addresses("name".to_owned()).await.unwrap();
        }
        let before = fake.lookups();
        tokio::time::advance(FRESH).await;
        resolver
            .join("name")
            .unwrap()
            .0
            .wait_for(Option::is_some)
            .await
            .unwrap();

        assert_eq!((before, fake.lookups()), (1, 2));
    }

    #[tokio::test]
    async fn names_that_hang_delay_no_other_name() {
        let fake = Fake::default();
        fake.open();
        let resolver = fake.start();
        let hung = ["hung-1", "hung-2", "hung-3"].map(|name| resolver.join(name).unwrap());

        for number in 0..20 {
            look_up(&resolver, &format!("name-{number}")).await.unwrap();
        }

        assert!(hung.iter().all(|(outcome, ..)| outcome.borrow().is_none()));
    }

    #[tokio::test]
    async fn lookups_that_wait_for_a_thread_are_bounded() {
        let fake = Fake::default();
        let resolver = fake.start();

        let refused = (0..1000)
            .filter(|number| resolver.join(&format!("hung-{number}")).is_err())
            .count();

        assert!((1000 - THREADS - MAX_WAITING..=1000 - MAX_WAITING).contains(&refused));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_or_late_lookup_falls_back_to_the_addresses_of_the_previous_one() {
        let fake = Fake::default();
        fake.open();
        let resolver = fake.start();
        resolver.clone().addresses("name".to_owned()).await.unwrap();

        *fake.0.broken.lock() = true;
        for _ in 0..3 {
            tokio::time::advance(FRESH).await;
            let failed = resolver.clone().addresses("name".to_owned()).await;
            assert_eq!(failed.unwrap(), expected());
        }
        *fake.0.open.lock() = false;
        for _ in 0..3 {
            tokio::time::advance(FRESH).await;
            let late = resolver.clone().addresses("name".to_owned()).await;
            assert_eq!(late.unwrap(), expected());
        }
        fake.open();
    }

    #[tokio::test(start_paused = true)]
    async fn connects_wait_no_longer_than_the_delay_for_the_lookup_that_they_share() {
        let fake = Fake::default();
        fake.open();
        let resolver = fake.start();
        resolver.clone().addresses("name".to_owned()).await.unwrap();
        tokio::time::advance(FRESH).await;
        *fake.0.open.lock() = false;

        let begun = Instant::now();
        for _ in 0..3 {
            let found = resolver.clone().addresses("name".to_owned()).await;
            assert_eq!(found.unwrap(), expected());
        }

        assert!(begun.elapsed() < 2 * MAX_DELAY, "{:?}", begun.elapsed());
        fake.open();
    }

    #[tokio::test]
    async fn without_an_earlier_lookup_a_failure_is_an_error() {
        let fake = Fake::default();
        *fake.0.broken.lock() = true;
        fake.open();
        let resolver = fake.start();

        let found = look_up(&resolver, "name").await;
        *fake.0.broken.lock() = false;
        let later = look_up(&resolver, "name").await;

        assert!(found.unwrap_err().to_string().contains("no name server"));
        assert_eq!(later.unwrap(), expected());
    }
}
