"""Makes calls at a constant rate and records the outcomes."""

import threading
import time
from dataclasses import dataclass

import grpc

from facade import PROJECT_ID, SERVICE

WORKERS = 10
# Each worker makes a call per period: 125 calls per second in all.
PERIOD_SECONDS = 0.08
DEADLINE_SECONDS = 10
# The sandbox replies after 40 ms, so that calls are always in flight.
INSTANCE_ID = "slow-40"


@dataclass
class Outcome:
    begun: float
    ended: float
    code: grpc.StatusCode
    message: str

    @property
    def failed(self):
        return self.code is not grpc.StatusCode.OK


class Load:
    """A context manager that makes calls. Times are those of time.monotonic."""

    def __init__(self, port):
        # Only the mesh may retry.
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_retries", 0)])
        self._call = self._channel.unary_unary(f"/{SERVICE}/GetTaskDetail")
        self._outcomes = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(WORKERS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._channel.close()

    def call(self, workflow_id):
        begun = time.monotonic()
        code, message = grpc.StatusCode.OK, ""
        try:
            self._call(request(workflow_id), timeout=DEADLINE_SECONDS)
        except grpc.RpcError as error:
            code, message = error.code(), error.details()
        return Outcome(begun, time.monotonic(), code, message)

    def _run(self, worker):
        due = time.monotonic() + PERIOD_SECONDS * worker / WORKERS
        number = 0
        while not self._stop.wait(max(0, due - time.monotonic())):
            # Distinct tasks, so that the facade coalesces no calls.
            self._outcomes.append(self.call(f"task-{worker}-{number}"))
            number += 1
            due = max(due + PERIOD_SECONDS, time.monotonic() - 1)

    def between(self, begin, end):
        """Calls that overlap this interval."""
        return [o for o in list(self._outcomes) if o.ended >= begin and o.begun <= end]

    def all(self):
        return list(self._outcomes)


def request(workflow_id):
    """Encodes a GetTaskDetailRequest; each string is shorter than 128 bytes."""
    fields = (PROJECT_ID, INSTANCE_ID, workflow_id)
    texts = [text.encode() for text in fields]
    return b"".join(bytes([number << 3 | 2, len(text)]) + text for number, text in enumerate(texts, 1))
