"""Checks that each test id of docs/sandbox.md has its documented outcome, in any order and at any pace: one server
gets calls for all ids in the order of the page, in reverse and in random order.

`test_ids.py [SEED]` repeats a random order.
"""

import contextlib
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
from facade import INSTANCE_ID, PROJECT_ID, ROOT, SANDBOX_AK, SANDBOX_SK, WORKFLOW_ID, Checks, Facade
from rpc import METHOD, request

ROW = re.compile(r"^\| `([\w-]+)` \| [^|]+ \| (OK|[A-Z_]+ / [A-Z_]+) \|$", re.M)
TASK = re.compile(r"^\| `([\w-]+)` \| `([\w-]+)` \| [^|]+ \| (OK) \|$", re.M)
REASON = re.compile(rb"\x0a.([A-Z_]+)\x12\x0frds-task-facade", re.S)
# The slow ids take half a minute each. The others overtake them, as many at once as callers in a hurry make.
AT_ONCE = 32
# Fewer rows than the table has.
ROWS = 110


def main():
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(1 << 32)
    print(f"seed {seed}")
    checks = Checks()
    text = (ROOT / "docs/sandbox.md").read_text()
    rows = [(instance_id, None, outcome) for instance_id, outcome in ROW.findall(text)] + TASK.findall(text)
    checks.that(f"docs/sandbox.md has {len(rows)} ids", len(rows) >= ROWS, rows)
    checks.that("docs/sandbox.md has the two tasks", (INSTANCE_ID, WORKFLOW_ID, "OK") in rows, rows)
    shuffled = random.Random(seed).sample(rows, len(rows))
    orders = {"in order": rows, "in reverse": rows[::-1], "in random order": shuffled}
    key = {"HUAWEICLOUD_SDK_AK": SANDBOX_AK, "HUAWEICLOUD_SDK_SK": SANDBOX_SK}
    # At the same time, because the slow ids take half a minute.
    with ThreadPoolExecutor() as pool:
        walks = [pool.submit(walk, checks, orders, *mode) for mode in {"token": {}, "env": key}.items()]
    for done in walks:
        done.result()
    checks.finish()


def walk(checks, orders, credentials, environment):
    with contextlib.ExitStack() as stack:
        facade = stack.enter_context(Facade("--sandbox", f"--credentials={credentials}", environment=environment))
        facade.wait_until_serving()
        said = any("scoped to the instance id" in line for line in facade.output)
        checks.that(f"{credentials}: the log names the scope", said, facade.output)
        pool = stack.enter_context(ThreadPoolExecutor(AT_ONCE))
        calls = []
        for number, (order, rows) in enumerate(orders.items()):
            # A connection for each order: calls of one connection wait for each other while their key has not been accepted, and the
            # last one would be left with about the time of one attempt.
            channel = grpc.insecure_channel(facade.address, [("grpc.use_local_subchannel_pool", 1)])
            stack.enter_context(channel)
            # A workflow id for each order: calls for the same task would share the deadline of the first one.
            calls += [(order, row, pool.submit(outcome, channel, row[0], row[1] or f"w-{number}")) for row in rows]
        wrong = {order: [] for order in orders}
        for order, (instance_id, _, documented), seen in calls:
            if seen.result() != documented:
                wrong[order].append((instance_id, documented, seen.result()))
    for order, different in wrong.items():
        checks.equal(f"{credentials}: {len(orders[order])} documented outcomes, {order}", different, [])


def outcome(channel, instance_id, workflow_id):
    try:
        channel.unary_unary(METHOD)(request(instance_id, workflow_id, PROJECT_ID), timeout=60)
        return "OK"
    except grpc.RpcError as error:
        details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
        reason = REASON.search(details)
        return f"{error.code().name} / {reason.group(1).decode() if reason else 'none'}"


if __name__ == "__main__":
    main()
