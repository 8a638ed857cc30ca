"""Checks watches behind the proxies of a service mesh: silence, timeouts and rolling restarts.

    watchers -> Envoy of the caller -> mutual TLS -> Envoy of each pod -> instances -> scripted upstream

Two meshes run at the same time. In the quiet one, a watch without changes must survive the proxies' limit on silence. In the
other one, two pods restart in turn while their watchers continue their watches, until the last task is over.
"""

import argparse
import contextlib
import math
import tempfile
import threading
import time
from collections import Counter

import grpc

from facade import INSTANCE_ID, SERVICE, Checks, free_port
from mesh.certificates import Identities
from mesh.envoy import Envoy, client_side, everything, istio_routes, listener
from mesh.pod import CALLER, SERVER, Pod, wait_for_health
from mesh.upstream import Tasks, Upstream
from mesh.watchers import Watchers
from rpc import WATCH_METHOD, request

HEARTBEAT_SECONDS = 25
RESTARTS = 6
TASKS, WATCHERS_OF_A_TASK = 20, 10
# Without the limit, an instance would poll each of the 20 tasks about once a second.
POLLS, WINDOW_SECONDS = 10, 2
FLAGS = (
    "--watch-interval=1s",
    f"--watch-rate={POLLS}/{WINDOW_SECONDS}s",
    "--max-watch-duration=5s",
    # Watches end within half of it.
    "--shutdown-grace=6s",
)
PATIENCE_SECONDS = 30


class Stream:
    """A server stream that is read in a thread."""

    def __init__(self, port, method, message):
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._call = self._channel.unary_stream(method)(message)
        self.messages, self.end = [], None
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        code = "OK"
        try:
            for message in self._call:
                self.messages.append(message)
        except grpc.RpcError as error:
            code = error.code().name
        self.end = f"{code} after {time.monotonic() - self._begun:.1f} s"

    def close(self):
        self._call.cancel()
        self._thread.join()
        self._channel.close()


class QuietMesh:
    """A pod whose task does not change, behind three listeners of the caller's proxy, for `seconds`."""

    def __init__(self, stack, folder, identities, seconds, idle_seconds):
        self._seconds, self._idle_seconds = seconds, idle_seconds
        idle = f"{idle_seconds}s"
        upstream = stack.enter_context(Upstream(Tasks()))
        self._pod = Pod("quiet", folder, identities, upstream.url, idle_timeout=idle)
        stack.callback(self._pod.close)
        self._pod.start()
        ports = [free_port() for _ in range(3)]
        resources = client_side(ports[0], [self._pod.port], identities.path(CALLER), SERVER, idle_timeout=idle)
        watch, general = istio_routes()
        # Listeners whose routes differ in one respect each.
        resources["listeners"] += [
            listener(ports[1], [general], idle_timeout=idle),
            listener(ports[2], [everything(watch["route"])], idle_timeout=idle),
        ]
        self._client = stack.enter_context(Envoy(folder, "quiet-caller", resources))
        wait_for_health(self._client, 1)
        self._begun = time.monotonic()
        still = request(INSTANCE_ID, "still")
        health = bytes([1 << 3 | 2, len(SERVICE)]) + SERVICE.encode()
        self._watch = Stream(ports[0], WATCH_METHOD, still)
        self._unrouted = Stream(ports[1], WATCH_METHOD, still)
        # No heartbeats.
        self._silent = Stream(ports[2], "/grpc.health.v1.Health/Watch", health)
        for stream in (self._watch, self._unrouted, self._silent):
            stack.callback(stream.close)

    def check(self, checks):
        time.sleep(max(0, self._begun + self._seconds - time.monotonic()))
        seconds = time.monotonic() - self._begun
        watch, heartbeats = self._watch, self._seconds // HEARTBEAT_SECONDS
        checks.that(
            f"a watch without a change is open after {seconds:.0f} s, with {len(watch.messages) - 1} heartbeats",
            watch.end is None and len(watch.messages) > heartbeats,
            (watch.end, len(watch.messages)),
        )
        proxies = (self._client, self._pod.proxy)
        idle = sum(proxy.stat("http.inbound.downstream_rq_idle_timeout") for proxy in proxies)
        checks.that(
            f"the proxies cut off a stream without heartbeats, by their limit of {self._idle_seconds} s: {self._silent.end}",
            self._silent.end is not None and len(self._silent.messages) == 1 and idle,
            (self._silent.messages, idle),
        )
        # The proxy resets the stream, or the instance, which gets the same time as the deadline, ends it first.
        end = self._unrouted.end or "not ended"
        limited = self._client.stat("cluster.facade.upstream_rq_timeout") == 1 or end.startswith("DEADLINE_EXCEEDED")
        checks.that(
            f"without its route, the timeout of unary calls cuts off a watch: {end}",
            self._unrouted.end is not None and limited and len(self._unrouted.messages) > 1,
            self._unrouted.messages,
        )


def rolling_restarts(stack, checks, folder, identities):
    tasks = Tasks()
    upstreams = [stack.enter_context(Upstream(tasks)) for _ in range(2)]
    pods = [Pod(f"pod-{number}", folder, identities, upstream.url, *FLAGS) for number, upstream in enumerate(upstreams, 1)]
    started = []
    for pod in pods:
        stack.callback(pod.close)
        started.append(time.monotonic())
        pod.start()
    port = free_port()
    resources = client_side(port, [pod.port for pod in pods], identities.path(CALLER), SERVER)
    client = stack.enter_context(Envoy(folder, "caller", resources))
    wait_for_health(client, len(pods))
    workflow_ids = [f"task-{number}" for number in range(TASKS)]
    watchers = stack.enter_context(Watchers(port, workflow_ids, WATCHERS_OF_A_TASK))
    watchers.wait_until_all("a second watch", lambda watcher: watcher.ends["WATCH_EXPIRED"], PATIENCE_SECONDS)

    begun = time.monotonic()
    polls, slowest, codes = [], 0, Counter()

    def stop(number):
        code, took = pods[number].stop()
        codes[code] += 1
        # The lifetime is measured from outside, so that a busy machine cannot make the rate look higher.
        polls.append((upstreams[number].calls, time.monotonic() - started[number]))
        return took

    for restart in range(RESTARTS):
        number = restart % len(pods)
        # Some tasks are over while their watchers are between two pods.
        tasks.complete(workflow_ids[restart::TASKS // 2])
        slowest = max(slowest, stop(number))
        upstreams[number].calls, started[number] = 0, time.monotonic()
        pods[number].start()
        wait_for_health(client, len(pods))
    seconds = time.monotonic() - begun
    tasks.complete(workflow_ids)
    watchers.wait_until_all("the end", lambda watcher: watcher.ends["OK"], PATIENCE_SECONDS)
    for number in range(len(pods)):
        stop(number)

    ends = sum((watcher.ends for watcher in watchers.all), Counter())
    faults = [fault for watcher in watchers.all for fault in watcher.faults]
    states = sum(len(watcher.versions) for watcher in watchers.all)
    count = len(watchers.all)
    checks.equal("each instance exits with 0", codes, {0: RESTARTS + len(pods)})
    checks.that(
        f"{RESTARTS} rolling restarts in {seconds:.0f} s, the slowest drain {slowest:.1f} s: {count} watchers received the final "
        f"state, after {states} states, each newer than the one before",
        not faults and all(watcher.is_final for watcher in watchers.all),
        (Counter(faults).most_common(5), len(faults)),
    )
    checks.that(
        f"watches ended, and continued with their etag: {dict(ends)}",
        ends["OK"] == count and ends["SHUTTING_DOWN"],
    )
    # At most POLLS in any window, so at most this many in a lifetime.
    limits = [POLLS * math.ceil(lifetime / WINDOW_SECONDS) for _, lifetime in polls]
    made = [count for count, _ in polls]
    checks.that(f"polls of each process, within --watch-rate: {made} of {limits}", all(m <= l for m, l in zip(made, limits)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--idle-seconds", type=int, default=30)
    options = parser.parse_args()
    checks = Checks()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        identities = Identities(folder, [CALLER, SERVER])
        quiet = QuietMesh(stack, folder, identities, options.seconds, options.idle_seconds)
        with contextlib.ExitStack() as restarted:
            rolling_restarts(restarted, checks, folder, identities)
        quiet.check(checks)
    checks.finish()


if __name__ == "__main__":
    main()
