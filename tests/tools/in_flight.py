"""Calls in flight fit into the memory that the manifest gives a pod: as many as may be, with answers of ordinary length, and
as many of the longest answers as docs/operations.md says.

An upstream holds back the last byte of every answer until all of them are there.
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
# The default of --max-in-flight, and a task with some forty parts.
AT_ONCE, ORDINARY_BYTES = 2048, 8_000
# Just under what the facade reads of an answer. Half of the calls that docs/operations.md names, which are plenty.
LONGEST_AT_ONCE, LONGEST_BYTES = 75, 1_000_000


class Upstream:
    """Answers with so many bytes, the last of them when `calls` requests have come and `finish` is set."""

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
    """The memory of the facade at rest and with so many calls in flight, in MiB, and the codes of the calls."""
    upstream = Upstream(calls, length)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0, backlog=4096)
    url = "http://127.0.0.1:%d" % server.sockets[0].getsockname()[1]
    arguments = ["--endpoint", url, "--credentials=token", "--timeout=60s", "--attempt-timeout=60s", "--max-attempts=1"]
    with Facade(*arguments, environment={"RDS_TASK_FACADE_TOKEN": "token"}) as facade:
        at_rest = resident(facade)
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(facade.address, options) for _ in range(calls // 100 + 1)]
        started = [
            channels[number % len(channels)].unary_unary(METHOD)(request(workflow_id=f"task-{number}"), timeout=60)
            for number in range(calls)
        ]
        await asyncio.wait_for(upstream.all_here.wait(), 60)
        in_flight = await grown(facade)
        upstream.finish.set()
        codes = {(await call.code()).name for call in started}
        for channel in channels:
            await channel.close()
    server.close()
    return at_rest, in_flight, codes


async def grown(facade):
    """The memory once it has stopped growing: what was written last is still on its way into the facade."""
    readings = []
    for _ in range(60):
        readings.append(resident(facade))
        last = readings[-3:]
        if len(last) == 3 and max(last) - min(last) < 1:
            return readings[-1]
        await asyncio.sleep(0.5)
    raise TimeoutError(f"the memory has not come to rest in half a minute: {readings[-3:]}")


def resident(facade):
    return scrape(facade.metrics)["process_resident_memory_bytes"].samples[0].value / MIB


def main():
    checks = Checks()
    # A descriptor for each connection, here and in the facade.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    deployment = yaml.safe_load((ROOT / "deploy/kubernetes/base/deployment.yaml").read_text())
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Mi"))

    at_rest, in_flight, codes = asyncio.run(hold(AT_ONCE, ORDINARY_BYTES))
    checks.equal(f"{AT_ONCE} calls at once", codes, {"OK"})
    seen = f"{at_rest:.0f} MiB at rest, {in_flight:.0f} MiB with {AT_ONCE} calls, answers of {ORDINARY_BYTES} bytes"
    print(f"      {seen}")
    checks.that(f"they take less than two thirds of the pod's {limit} MiB", in_flight < limit * 2 / 3, seen)

    at_rest, in_flight, codes = asyncio.run(hold(LONGEST_AT_ONCE, LONGEST_BYTES))
    checks.equal(f"{LONGEST_AT_ONCE} calls with the longest answers", codes, {"OK"})
    a_call = (in_flight - at_rest) / LONGEST_AT_ONCE
    seen = f"{a_call:.1f} MiB a call with an answer of {LONGEST_BYTES} bytes"
    print(f"      {seen}")
    promised = int(re.search(r"256 MiB hold some (\d+)", (ROOT / "docs/operations.md").read_text()).group(1))
    checks.that(f"{promised} of them fit into the pod's {limit} MiB", at_rest + promised * a_call < limit, seen)
    checks.finish()


if __name__ == "__main__":
    main()
