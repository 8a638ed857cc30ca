"""Checks that calls in flight fit into the memory limit of the pod: with replies of ordinary length, as many calls as
--max-in-flight allows; with the longest replies, as many as docs/operations.md states.

The upstream holds back the last byte of each reply until every call has received the rest.
"""

import asyncio
import json
import re
import resource

import grpc
import yaml
from facade import ROOT, Checks, Facade
from metrics import scrape
from rpc import METHOD, request

MIB = 2**20
# The default of --max-in-flight, and the length of a reply with about seventy parts.
CALLS, ORDINARY_BYTES = 2048, 8_000
# Half as many calls as docs/operations.md states, which is enough to measure one; just below the facade's limit of 1 MiB.
LONGEST_CALLS, LONGEST_BYTES = 75, 1_000_000


class Upstream:
    """Replies with some `length` bytes. Sets `all_here` after `calls` requests, and sends the last byte after `finish`."""

    def __init__(self, calls, length):
        part = {"sub_task_name": "part", "percent": "10", "executed_time": "2026-01-05T12:00:00+0800", "status": "Running"}
        parts = [part] * (length // (len(json.dumps(part)) + 2))
        self._body = json.dumps({"job_id": "j", "sub_task_list": parts}).encode()
        self._left = calls
        self.all_here, self.finish = asyncio.Event(), asyncio.Event()

    async def serve(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head).group(1)))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(self._body) + self._body[:-1])
        await writer.drain()
        self._left -= 1
        if not self._left:
            self.all_here.set()
        await self.finish.wait()
        writer.write(self._body[-1:])
        await writer.drain()
        writer.close()


async def hold(calls, length):
    """Returns the memory of the facade in MiB, idle and with `calls` calls in flight, and the codes of the calls."""
    upstream = Upstream(calls, length)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0, backlog=4096)
    url = "http://127.0.0.1:%d" % server.sockets[0].getsockname()[1]
    arguments = ["--endpoint", url, "--credentials=token", "--timeout=60s", "--attempt-timeout=60s", "--max-attempts=1"]
    with Facade(*arguments, environment={"RDS_TASK_FACADE_TOKEN": "token"}) as facade:
        idle = resident(facade)
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(facade.address, options) for _ in range(calls // 100 + 1)]
        started = [
            channels[number % len(channels)].unary_unary(METHOD)(request(workflow_id=f"task-{number}"), timeout=60)
            for number in range(calls)
        ]
        await asyncio.wait_for(upstream.all_here.wait(), 60)
        in_flight = await stable_memory(facade)
        upstream.finish.set()
        codes = {(await call.code()).name for call in started}
        for channel in channels:
            await channel.close()
    server.close()
    return idle, in_flight, codes


async def stable_memory(facade):
    """The memory when it no longer changes: the facade has not yet read the bytes that the upstream wrote last."""
    readings = []
    for _ in range(60):
        readings.append(resident(facade))
        last = readings[-3:]
        if len(last) == 3 and max(last) - min(last) < 1:
            return readings[-1]
        await asyncio.sleep(0.5)
    raise TimeoutError(f"memory still changes after 30 s: {readings[-3:]}")


def resident(facade):
    return scrape(facade.metrics)["process_resident_memory_bytes"].samples[0].value / MIB


def main():
    checks = Checks()
    # Each connection takes a descriptor here and one in the facade.
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    deployment = yaml.safe_load((ROOT / "deploy/kubernetes/base/deployment.yaml").read_text())
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Mi"))

    idle, in_flight, codes = asyncio.run(hold(CALLS, ORDINARY_BYTES))
    checks.equal(f"{CALLS} calls in flight succeed", codes, {"OK"})
    seen = f"{idle:.0f} MiB idle, {in_flight:.0f} MiB with {CALLS} calls and replies of {ORDINARY_BYTES} bytes"
    print(f"      {seen}")
    checks.that(f"they use less than two thirds of the pod's {limit} MiB", in_flight < limit * 2 / 3, seen)

    idle, in_flight, codes = asyncio.run(hold(LONGEST_CALLS, LONGEST_BYTES))
    checks.equal(f"{LONGEST_CALLS} calls with the longest replies succeed", codes, {"OK"})
    per_call = (in_flight - idle) / LONGEST_CALLS
    seen = f"{per_call:.1f} MiB per call with a reply of {LONGEST_BYTES} bytes"
    print(f"      {seen}")
    promised = int(re.search(r"256 MiB hold some (\d+)", (ROOT / "docs/operations.md").read_text()).group(1))
    checks.that(f"{promised} of these calls fit into the pod's {limit} MiB", idle + promised * per_call < limit, seen)
    checks.finish()


if __name__ == "__main__":
    main()
