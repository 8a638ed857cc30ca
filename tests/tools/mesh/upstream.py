"""RDS for watched tasks: states that grow older with time, and a record of the calls."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from facade import INSTANCE_ID

# The time between two versions of a task.
VERSION_SECONDS = 0.5


class Tasks:
    """Tasks that run until `complete`. Each has a version, which only grows; those named `still` have one version."""

    def __init__(self):
        self._begun = time.monotonic()
        self._completed = {}
        self._lock = threading.Lock()

    def version(self):
        return int((time.monotonic() - self._begun) / VERSION_SECONDS)

    def complete(self, workflow_ids):
        with self._lock:
            self._completed.update(dict.fromkeys(workflow_ids, self.version() + 1))

    def reply(self, workflow_id):
        with self._lock:
            completed = self._completed.get(workflow_id)
            version = 0 if workflow_id == "still" else completed or self.version()
        return {
            "instance_id": INSTANCE_ID,
            "instance_name": str(version),
            "job_id": workflow_id,
            "status": "Completed" if completed else "Running",
            "process": "" if completed else str(version // 2),
        }


class Upstream:
    """A server for one pod, as a context manager. `calls` counts the requests since it was last set to zero, `lookups` all requests
    by token and workflow id."""

    def __init__(self, tasks):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Head and body of a reply in one segment.
            wbufsize = -1

            def do_POST(self):
                workflow_id = json.loads(self.rfile.read(int(self.headers["content-length"])))["workflow_id"]
                outer.count(self.headers["x-auth-token"], workflow_id)
                reply = json.dumps(tasks.reply(workflow_id)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_):
                pass

        self.calls, self.lookups = 0, Counter()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def count(self, token, workflow_id):
        with self._lock:
            self.calls += 1
            self.lookups[token, workflow_id] += 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
