"""Checks that a blocked log pipe loses lines, which are counted, but blocks neither calls nor the exit."""

import asyncio
import os
import signal
import subprocess
import time

import grpc
from facade import PROGRAM, Checks, free_port
from metrics import scrape


class Unread:
    """`serve` with standard output on a pipe that is never read."""

    def __init__(self):
        self.address, self.metrics = (f"127.0.0.1:{free_port()}" for _ in range(2))
        arguments = ["serve", "--sandbox", "--listen", self.address, "--metrics-listen", self.metrics]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RDS_TASK_FACADE_")}
        self.process = subprocess.Popen([PROGRAM, *arguments], stdout=subprocess.PIPE, env=environment)

    def dropped(self):
        samples = scrape(self.metrics)["log_lines_dropped"].samples
        return sum(sample.value for sample in samples if sample.name.endswith("_total"))


async def flood(address, calls):
    """Calls an unknown method `calls` times, the cheapest way to log a line each. Returns the codes."""
    codes = set()
    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.wait_for(channel.channel_ready(), 15)
        left = iter(range(calls))

        async def work():
            for _ in left:
                try:
                    await channel.unary_unary("/a/b")(b"", timeout=5)
                except grpc.RpcError as error:
                    codes.add(error.code().name)

        await asyncio.gather(*(work() for _ in range(40)))
    return codes


def main():
    checks = Checks()
    unread = Unread()
    try:
        codes = asyncio.run(flood(unread.address, 100))
        made = 100
        # The pipe buffers 64 KiB, and the log writer queues 8192 lines.
        while unread.dropped() == 0 and made < 50_000:
            codes |= asyncio.run(flood(unread.address, 2000))
            made += 2000
        checks.equal(f"{made} calls", codes, {"UNIMPLEMENTED"})
        checks.that("dropped lines are counted", unread.dropped() > 0)
        begun = time.monotonic()
        unread.process.send_signal(signal.SIGTERM)
        checks.equal("exit code", unread.process.wait(30), 0)
        checks.that("the exit does not wait for the pipe", time.monotonic() - begun < 8)
    finally:
        unread.process.kill()
        unread.process.wait()
    checks.finish()


if __name__ == "__main__":
    main()
