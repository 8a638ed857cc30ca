"""Checks that callers, metrics, log and traces count each call exactly once, and with the same code.

`reconcile.py [CALLS]` makes 5000 calls by default: successes, every class of failure of the sandbox, cancelled calls,
deadlines, overload, throttling, watches, unknown methods and health checks.
"""

import asyncio
import collections
import json
import random
import sys
import time

import grpc
from collector import Collector
from facade import SERVICE, Checks, Facade
from metrics import scrape
from rpc import METHOD, WATCH_METHOD, request

IN_FLIGHT = 64
ABANDONED = {"CANCELLED", "DEADLINE_EXCEEDED"}
OTHER = "other"
HEALTH = "grpc.health.v1.Health/Check"
TASK, WATCH = f"{SERVICE}/GetTaskDetail", f"{SERVICE}/WatchTaskDetail"
# Instance ids of the sandbox, and their weights.
MIXTURE = {
    "every-field": 600,
    "flaky-1": 10,
    "task-not-found": 60,
    "instance-not-found": 40,
    "instance-busy": 40,
    "policy-denial": 40,
    "html-200": 20,
    "huge": 2,
    "reset": 4,
    "cut-body": 4,
    "garbage": 4,
    "slow-10": 20,
    "slow-400": 2,
    "no/such id": 40,
    **{f"status-{status}": 12 for status in (400, 401, 402, 403, 404, 405, 406, 409, 412, 413, 418, 422, 423, 451, 501)},
    **{f"status-{status}": 3 for status in (201, 307, 408, 425, 500, 502, 503, 504, 505)},
}
# A task that ends, one that outlives the caller's deadline, and errors of the first poll.
WATCHED = ["lifecycle-1", "every-field", "task-not-found", "policy-denial", "status-503", "no/such id"]
WATCH_SECONDS = 3


class Caller:
    """Makes calls, and counts the results by method and code."""

    def __init__(self, address):
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(address, options) for _ in range(4)]
        self._next = 0
        self.made = collections.Counter()
        self.seen = collections.Counter()

    def start(self, instance_id=None, path=METHOD, message=None):
        self._next += 1
        channel = self._channels[self._next % len(self._channels)]
        if message is None:
            message = request(instance_id, workflow_id=f"task-{self._next}")
        method = {METHOD: TASK, f"/{HEALTH}": HEALTH}.get(path, OTHER)
        self.made[method] += 1
        return method, channel.unary_unary(path)(message, timeout=20)

    async def finish(self, started):
        method, call = started
        try:
            await call
        except (grpc.RpcError, asyncio.CancelledError):
            pass
        self.seen[method, (await call.code()).name] += 1

    async def watch(self, instance_id, cancels):
        """Watches a task, to its end or only to the first message."""
        self._next += 1
        self.made[WATCH] += 1
        channel = self._channels[self._next % len(self._channels)]
        message = request(instance_id, workflow_id=f"task-{self._next}")
        call = channel.unary_stream(WATCH_METHOD)(message, timeout=WATCH_SECONDS)
        try:
            async for _ in call:
                if cancels:
                    call.cancel()
        except (grpc.RpcError, asyncio.CancelledError):
            pass
        self.seen[WATCH, (await call.code()).name] += 1

    async def all(self, instance_ids):
        """One call for each id, at most 40 at once."""
        waiting = iter(instance_ids)

        async def work():
            for instance_id in waiting:
                if instance_id == OTHER:
                    await self.finish(self.start(path=f"/no.such.Service/{random.random()}", message=b""))
                elif instance_id == HEALTH:
                    await self.finish(self.start(path=f"/{HEALTH}", message=b""))
                else:
                    await self.finish(self.start(instance_id))

        await asyncio.gather(*(work() for _ in range(40)))

    async def close(self):
        for channel in self._channels:
            await channel.close()


def total(facade, family):
    return sum(s.value for s in scrape(facade.metrics)[family].samples if s.name.endswith("_total"))


async def until(holds, what):
    deadline = time.monotonic() + 120
    while not await asyncio.to_thread(holds):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within 120 s: {what}")
        await asyncio.sleep(0.02)


async def start_slow(facade, caller, count):
    """Starts slow calls, and returns when the facade has counted all of them as started."""
    calls = [caller.start("slow-30000") for _ in range(count)]
    made = sum(caller.made.values())
    await until(lambda: total(facade, "grpc_server_started") >= made, "all calls started")
    return calls


async def make_calls(facade, calls):
    caller = Caller(facade.address)
    part = lambda share: max(1, int(calls * share))
    mixed = random.choices(list(MIXTURE), MIXTURE.values(), k=part(0.86))
    mixed += [OTHER] * part(0.02) + [HEALTH] * part(0.02)
    random.shuffle(mixed)
    await caller.all(mixed)
    cancelled = overloaded = 0
    while cancelled < part(0.03):
        started = await start_slow(facade, caller, IN_FLIGHT - 8)
        for _, call in started:
            call.cancel()
        await asyncio.gather(*map(caller.finish, started))
        cancelled += len(started)
    while overloaded < part(0.04):
        # Cancelled calls may still hold permits; then a slow call is rejected as overload, too.
        started = await start_slow(facade, caller, IN_FLIGHT)
        more = min(500, part(0.04))
        await caller.all(["every-field"] * more)
        for _, call in started:
            call.cancel()
        await asyncio.gather(*map(caller.finish, started))
        overloaded += more
    await caller.all(["slow-5000"] * part(0.01))
    await asyncio.gather(*(caller.watch(id, cancels) for id in WATCHED for cancels in (False, True) for _ in range(part(0.001))))
    # After the first replies, the facade rejects the rest itself.
    await caller.all(["throttled-retry-after"] * part(0.02))
    await caller.close()
    return caller


def code_name(go_name):
    """DeadlineExceeded -> DEADLINE_EXCEEDED. Go spells CANCELLED with one L."""
    special = {"OK": "OK", "Canceled": "CANCELLED"}
    return special.get(go_name) or "".join("_" + c if c.isupper() else c for c in go_name).strip("_").upper()


def main():
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    seed = random.randrange(1 << 32)
    random.seed(seed)
    print(f"about {calls} calls, seed {seed}")
    checks = Checks()
    with Collector(keep=False) as collector:
        environment = collector.environment(OTEL_BSP_MAX_QUEUE_SIZE="1000000")
        flags = ["--timeout=1s", "--attempt-timeout=300ms", f"--max-in-flight={IN_FLIGHT}"]
        flags += ["--watch-interval=100ms", "--watch-rate=off"]
        with Facade("--sandbox", *flags, environment=environment) as facade:
            begun = time.monotonic()
            caller = asyncio.run(make_calls(facade, calls))
            made = sum(caller.made.values())
            print(f"{made} calls in {time.monotonic() - begun:.0f} s")
            asyncio.run(until(lambda: total(facade, "grpc_server_handled") >= made, "all calls handled"))
            watched_tasks = lambda: scrape(facade.metrics)["rds_watched_tasks"].samples[0].value
            asyncio.run(until(lambda: not watched_tasks(), "all pollers ended"))
            attempts, polls = (total(facade, name) for name in ("rds_upstream_requests", "rds_watch_polls"))
            asyncio.run(until(lambda: total(facade, "trace_spans_exported") >= made + attempts + polls, "all spans exported"))
            families = scrape(facade.metrics)
            facade.stop()
            facade.join()
    rows = lambda name: [sample for sample in families[name].samples if sample.name.endswith("_total")]
    method = lambda labels: OTHER if labels["grpc_method"] == OTHER else f"{labels['grpc_service']}/{labels['grpc_method']}"
    started, handled, logged, traced, messages = (collections.Counter() for _ in range(5))
    for sample in rows("grpc_server_started"):
        started[method(sample.labels)] += sample.value
    for sample in rows("grpc_server_handled"):
        handled[method(sample.labels), code_name(sample.labels["grpc_code"])] += sample.value
    for line in map(json.loads, facade.output):
        if line["target"].startswith("access"):
            logged[line["grpc_method"], code_name(line["grpc_code"])] += 1
            messages[line["grpc_method"]] += line.get("messages", 0)
    for (name, code), count in collector.codes.items():
        traced[OTHER if name == "_OTHER" else name, code] += count

    for what in ["log_lines_dropped", "trace_spans_dropped", "panics"]:
        checks.equal(what, sum(sample.value for sample in rows(what)), 0)
    checks.equal("started, by method", +started, caller.made)
    checks.equal("handled = access lines, by method and code", logged, +handled)
    checks.equal("handled = server spans, by method and code", traced, +handled)
    checks.equal("attempts = client spans", collector.attempts, attempts)
    checks.equal("polls = their spans", collector.polls, polls)
    watches = {sample.labels["grpc_type"]: sample.value for sample in rows("grpc_server_started") if method(sample.labels) == WATCH}
    checks.equal("watches are server streams", watches, {"server_stream": caller.made[WATCH]})
    checks.equal("watches = their ends, by cause", sum(sample.value for sample in rows("rds_watch_ended")), caller.made[WATCH])
    sent = sum(sample.value for sample in rows("rds_watch_messages"))
    checks.equal("messages of watches, in access lines and metrics", +messages, {WATCH: sent})
    checks.equal("handled = calls made", sum(handled.values()), made)
    # If a caller cancels while the facade replies, the two may count different codes.
    settled = lambda counts: {key: count for key, count in counts.items() if count and key[1] not in ABANDONED}
    checks.equal("codes at the caller = handled", settled(caller.seen), settled(handled))
    ended = lambda counts: sum(count for (_, code), count in counts.items() if code in ABANDONED)
    checks.equal("abandoned at the caller = handled", ended(caller.seen), ended(handled))
    seen = {code for name, code in handled if handled[name, code] and name == TASK}
    everything = set(map(code_name, "Canceled DeadlineExceeded OK NotFound Unavailable ResourceExhausted".split()))
    checks.that(f"the mixture reached {len(seen)} codes", everything <= seen and len(seen) >= 13, seen)
    for (name, code), count in sorted(handled.items()):
        if count:
            print(f"      {name} {code}: {count:.0f}")
    checks.finish()


if __name__ == "__main__":
    main()
