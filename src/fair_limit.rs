//! A concurrency limit that callers share fairly. It never waits: a permit is granted or denied at once.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::caller::Caller;

/// A caller is active while it holds a permit, and for this long after its last request or release, or up to a quarter longer.
const ACTIVE: Duration = Duration::from_secs(1);

/// A 64th of the limit, at least one permit, is reserved for each active caller.
const RESERVES: usize = 64;

/// Above this number, only callers that hold permits are tracked. The others have no reserve.
const MAX_CALLERS: usize = 4096;

/// At most `max` permits, all of which a single caller may hold. While at least half of them are held, a caller is denied a free permit
/// - if it holds its share: the limit divided by the number of active callers;
/// - if the free permits are reserved for other active callers.
#[derive(Debug)]
pub struct FairLimit {
    max: usize,
    /// Permits that are reserved for each active caller.
    reserve: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    held: usize,
    /// The unused part of all reserves.
    reserved: usize,
    /// The active callers.
    callers: HashMap<Caller, Activity>,
    /// The last removal of inactive callers.
    cleaned_at: Instant,
}

#[derive(Debug)]
struct Activity {
    held: usize,
    active_at: Instant,
}

/// One permit, released on drop.
#[derive(Debug)]
pub struct FairPermit {
    limit: Arc<FairLimit>,
    caller: Caller,
}

impl FairLimit {
    /// A limit of `max` permits.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self {
            max,
            reserve: (max / RESERVES).max(1),
            state: Mutex::new(State {
                held: 0,
                reserved: 0,
                callers: HashMap::new(),
                cleaned_at: Instant::now(),
            }),
        })
    }

    /// A permit for `caller`, unless the limit or fairness denies it.
    pub fn try_acquire(self: &Arc<Self>, caller: Caller) -> Option<FairPermit> {
        let now = Instant::now();
        let mut guard = self.state.lock();
        let state = &mut *guard;
        // Not at each request: it visits every caller.
        if now.saturating_duration_since(state.cleaned_at) >= ACTIVE / 4 {
            state.remove_inactive(self.reserve, now);
        }
        let own = state
            .callers
            .get(&caller)
            .map_or(0, |activity| activity.held);
        let is_granted = state.held < self.max
            && (2 * state.held < self.max || !self.is_kept_for_others(state, own));
        let is_tracked = state.callers.contains_key(&caller);
        if !is_tracked && !is_granted && state.callers.len() >= MAX_CALLERS {
            return None;
        }
        if !is_tracked {
            state.reserved += self.reserve;
        }
        let activity = state.callers.entry(caller).or_insert(Activity {
            held: 0,
            active_at: now,
        });
        activity.active_at = now;
        if !is_granted {
            return None;
        }
        state.held += 1;
        state.reserved -= usize::from(own < self.reserve);
        activity.held += 1;
        Some(FairPermit {
            limit: Arc::clone(self),
            caller,
        })
    }

    /// Whether the free permits are for callers other than one that holds `own` permits: it holds its share, or they are reserved.
    fn is_kept_for_others(&self, state: &State, own: usize) -> bool {
        let share = self.max.div_ceil(state.callers.len());
        let free = self.max - state.held;
        own >= share || (own >= self.reserve && free <= state.reserved)
    }

    /// The number of permits held now.
    pub fn held(&self) -> usize {
        self.state.lock().held
    }

    fn release(&self, caller: Caller) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.held -= 1;
        let Some(activity) = state.callers.get_mut(&caller) else {
            return;
        };
        activity.held -= 1;
        state.reserved += usize::from(activity.held < self.reserve);
        if activity.held == 0 {
            activity.active_at = Instant::now();
            if state.callers.len() > MAX_CALLERS {
                state.callers.remove(&caller);
                state.reserved -= self.reserve;
            }
        }
    }
}

impl State {
    fn remove_inactive(&mut self, reserve: usize, now: Instant) {
        let before = self.callers.len();
        self.callers.retain(|_, activity| {
            activity.held > 0 || now.saturating_duration_since(activity.active_at) < ACTIVE
        });
        self.reserved -= reserve * (before - self.callers.len());
        self.cleaned_at = now;
    }
}

impl Drop for FairPermit {
    fn drop(&mut self) {
        self.limit.release(self.caller);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ANN: Caller = Caller::Connection(1);
    const BOB: Caller = Caller::Connection(2);

    fn take(limit: &Arc<FairLimit>, caller: Caller, count: usize) -> Vec<FairPermit> {
        (0..count)
            .filter_map(|_| limit.try_acquire(caller))
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_single_caller_may_hold_the_whole_limit() {
        for max in [1, 3, 2048] {
            let limit = FairLimit::new(max);
            let mut held = take(&limit, ANN, max + 9);

            assert_eq!((held.len(), limit.held()), (max, max));
            assert!(limit.try_acquire(BOB).is_none());
            held.pop();
            assert!(limit.try_acquire(BOB).is_some());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_greedy_caller_leaves_callers_with_permits_their_share() {
        let limit = FairLimit::new(100);
        let others = [2, 3, 4].map(|number| take(&limit, Caller::Connection(number), 5));

        let hog = take(&limit, ANN, 1000);

        assert_eq!(
            hog.len(),
            35,
            "up to half of the limit with the others' fifteen"
        );
        assert_eq!(
            take(&limit, BOB, 1000).len(),
            20,
            "up to its own share of 25"
        );
        drop(others);
    }

    #[tokio::test(start_paused = true)]
    async fn equal_callers_can_use_the_whole_limit() {
        let limit = FairLimit::new(2048);
        let callers = (0..2048).map(|number| Caller::Connection(number % 21));

        let held: Vec<_> = callers.flat_map(|caller| take(&limit, caller, 1)).collect();

        assert_eq!(held.len(), 2048);
    }

    #[tokio::test(start_paused = true)]
    async fn a_greedy_caller_leaves_half_of_the_limit_to_recently_active_callers() {
        let limit = FairLimit::new(640);
        let held = [2, 3, 4].map(|number| take(&limit, Caller::Connection(number), 1));
        tokio::time::advance(2 * ACTIVE).await;
        drop(held);
        tokio::time::advance(ACTIVE / 2).await;

        let hog = take(&limit, ANN, 1000);

        assert_eq!(
            hog.len(),
            320,
            "up to half of the limit, although its share is 160"
        );
        assert_eq!(
            take(&limit, BOB, 1000).len(),
            160,
            "its share, although two of the four active callers hold no permit"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn callers_with_their_share_leave_permits_for_recently_active_callers() {
        let limit = FairLimit::new(640);
        drop([5, 6, 7].map(|number| take(&limit, Caller::Connection(number), 1)));

        let holders = [1, 2, 3, 4].map(|number| take(&limit, Caller::Connection(number), 1000));
        let late = take(&limit, Caller::Connection(5), 1000);

        let held = holders.map(|permits| permits.len());
        assert_eq!((held, late.len()), ([320, 128, 107, 55], 10));
    }

    #[tokio::test(start_paused = true)]
    async fn of_an_odd_limit_a_greedy_caller_gets_the_greater_half() {
        let limit = FairLimit::new(3);
        drop([2, 3].map(|number| take(&limit, Caller::Connection(number), 1)));

        assert_eq!(take(&limit, ANN, 3).len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn the_share_of_many_callers_is_smaller_than_the_reserve() {
        let limit = FairLimit::new(2048);
        let callers = || (0..100).map(Caller::Connection);
        for caller in callers() {
            drop(limit.try_acquire(caller));
        }

        let held: Vec<_> = callers().map(|caller| take(&limit, caller, 2048)).collect();

        let greedy = held[0].len();
        assert_eq!(greedy, 1024, "up to half of the limit");
        assert!(held[1..40].iter().all(|permits| permits.len() == 21));
    }

    #[tokio::test(start_paused = true)]
    async fn released_permits_of_a_full_limit_go_to_callers_below_their_share() {
        let limit = FairLimit::new(10);
        let mut hog = take(&limit, ANN, 10);
        assert!(limit.try_acquire(BOB).is_none(), "all are held");

        hog.truncate(9);

        assert!(limit.try_acquire(ANN).is_none());
        assert_eq!(take(&limit, BOB, 5).len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_number_of_tracked_callers_is_bounded_even_within_an_instant() {
        let limit = FairLimit::new(10);
        for number in 0..3 * MAX_CALLERS as u64 {
            let pair = [2 * number, 2 * number + 1].map(Caller::Connection);
            let pair = pair.map(|caller| limit.try_acquire(caller));
            assert!(pair.iter().all(Option::is_some), "free permits are granted");
        }
        assert_eq!(limit.state.lock().callers.len(), MAX_CALLERS);
        let callers = (0..10).map(Caller::Connection);
        let all: Vec<_> = callers.flat_map(|caller| take(&limit, caller, 1)).collect();
        assert_eq!(all.len(), 10);
        for number in 10..3 * MAX_CALLERS as u64 {
            assert!(limit.try_acquire(Caller::Connection(number)).is_none());
        }

        assert!(limit.state.lock().callers.len() <= MAX_CALLERS + 10);
        tokio::time::advance(ACTIVE).await;
        assert!(limit.try_acquire(Caller::Connection(99)).is_none());
        let state = limit.state.lock();
        assert_eq!((state.callers.len(), state.reserved), (11, 1));
    }

    proptest! {
        #[test]
        fn the_limit_holds_and_no_caller_is_denied_its_reserve_while_permits_are_free(
            max in 1..200usize,
            steps in prop::collection::vec((0..5u64, any::<bool>()), 0..600),
        ) {
            let limit = FairLimit::new(max);
            let mut held: HashMap<u64, Vec<FairPermit>> = HashMap::new();
            for (caller, acquires) in steps {
                let own = held.entry(caller).or_default();
                if !acquires {
                    own.pop();
                    continue;
                }
                let own_before = own.len();
                let total: usize = held.values().map(Vec::len).sum();
                let permit = limit.try_acquire(Caller::Connection(caller));
                prop_assert!(permit.is_none() || total < max);
                if own_before < (max / 64).max(1) && total < max {
                    prop_assert!(permit.is_some(), "{own_before} of {max}, {total} held");
                }
                held.entry(caller).or_default().extend(permit);
                prop_assert_eq!(limit.held(), held.values().map(Vec::len).sum::<usize>());
                let state = limit.state.lock();
                let unused = |activity: &Activity| limit.reserve.saturating_sub(activity.held);
                prop_assert_eq!(state.reserved, state.callers.values().map(unused).sum::<usize>());
            }
        }
    }
}
