"""Clients that watch tasks until they are over, and continue an interrupted watch with the etag of its last message."""

import asyncio
import random
import threading
import time
from collections import Counter

import grpc

from facade import INSTANCE_ID
from rpc import WATCH_METHOD, request

CHANNELS = 4
MAX_PAUSE_SECONDS = 1
REASONS = ("SHUTTING_DOWN", "WATCH_EXPIRED")
# Final values of TaskState.
FINAL = (3, 4, 5)


class Watcher:
    def __init__(self, workflow_id):
        self.workflow_id = workflow_id
        self.etag = ""
        self.versions = []
        self.is_final = False
        self.ends = Counter()
        # Violations of the contract.
        self.faults = []

    async def run(self, method):
        """Returns when the server has ended the watch with OK, or with a code other than UNAVAILABLE."""
        while True:
            message = request(INSTANCE_ID, self.workflow_id) + bytes([5 << 3 | 2, len(self.etag)]) + self.etag.encode()
            self._is_first = True
            try:
                async for received in method(message):
                    self._receive(fields(received))
                self.ends["OK"] += 1
                if not self.is_final:
                    self.faults.append("OK without a final state")
                return
            except grpc.aio.AioRpcError as error:
                details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
                reason = next((reason for reason in REASONS if reason.encode() in details), error.code().name)
                self.ends[reason] += 1
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    self.faults.append(f"{error.code().name}: {error.details()}")
                    return
                await asyncio.sleep(random.uniform(0.1, MAX_PAUSE_SECONDS))

    def _receive(self, message):
        known, self.etag = self.etag, message.get(2, b"").decode()
        is_first, self._is_first = self._is_first, False
        if 1 not in message:
            if self.etag != known:
                self.faults.append("a new etag without its state")
            return
        task = fields(message[1])
        version, state = int(task[2]), task.get(10, 0)
        # Only a client whose stream broke before OK receives the final state again.
        again = self.is_final and is_first and self.etag == known
        if self.versions and version <= self.versions[-1] and not again:
            self.faults.append(f"version {version} after {self.versions[-1]}, {'first' if is_first else 'later'} message")
        self.versions.append(version)
        self.is_final = state in FINAL


class Watchers:
    """A context manager that runs watchers in a thread. `every` of them watch each task."""

    def __init__(self, port, workflow_ids, every):
        self._port = port
        self.all = [Watcher(workflow_id) for workflow_id in workflow_ids for _ in range(every)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self):
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{self._port}", options) for _ in range(CHANNELS)]
        methods = [channel.unary_stream(WATCH_METHOD) for channel in channels]
        runs = [asyncio.create_task(w.run(methods[number % CHANNELS])) for number, w in enumerate(self.all)]
        while not self._stop.is_set() and not all(run.done() for run in runs):
            await asyncio.sleep(0.05)
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
        for channel in channels:
            await channel.close()

    def wait_until_all(self, what, holds, seconds):
        deadline = time.monotonic() + seconds
        while not all(holds(watcher) or watcher.faults for watcher in self.all):
            if time.monotonic() > deadline:
                missing = [watcher.workflow_id for watcher in self.all if not holds(watcher)]
                raise AssertionError(f"{what}: {len(missing)} watchers not within {seconds} s: {missing[:5]}")
            time.sleep(0.05)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def fields(message):
    """The last value of each field of an encoded message: a number or bytes."""
    found, at = {}, 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        value = varint()
        if key & 7 == 2:
            at, value = at + value, message[at : at + value]
        elif key & 7:
            raise ValueError(f"wire type {key & 7}")
        found[key >> 3] = value
    return found
