"""A collector of OTLP traces over HTTP for the checks. Decodes requests with OpenTelemetry's published messages."""

import collections
import http.server
import threading

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2


class Span:
    """One span with its attributes as a dictionary and its ids in hex."""

    def __init__(self, message, resource):
        self.name, self.kind = message.name, message.kind
        self.trace_id, self.span_id = message.trace_id.hex(), message.span_id.hex()
        self.parent = message.parent_span_id.hex()
        self.links = [(link.trace_id.hex(), link.span_id.hex()) for link in message.links]
        self.state = message.trace_state
        self.error = message.status.code == 2
        self.start, self.end = message.start_time_unix_nano, message.end_time_unix_nano
        self.resource = resource
        self.attributes = _values(message.attributes)

    @property
    def is_server(self):
        return self.kind == 2

    @property
    def is_attempt(self):
        return self.kind == 3

    @property
    def is_poll(self):
        return self.name == "poll"


class Collector:
    """Listens on a free loopback port. `keep=False` counts spans without storing them, for long runs.

    Waits `delay` seconds before each reply. The first requests get the status codes in `statuses`, and their spans are dropped.
    """

    def __init__(self, keep=True, delay=0.0, statuses=()):
        self.spans, self.codes, self.methods = [], collections.Counter(), collections.Counter()
        self.requests, self.bodies, self.headers, self.paths = 0, [], [], []
        self.attempts = self.polls = 0
        self._keep, self._delay, self._statuses = keep, delay, list(statuses)
        self._more = threading.Condition()
        self._stopped = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                status = outer._take(self.path, dict(self.headers), body)
                self.send_response(status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, **more):
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.url, "OTEL_BSP_SCHEDULE_DELAY": "100", **more}

    def wait_for(self, count, seconds=15):
        """Returns the spans when there are `count` of them, or after `seconds`."""
        with self._more:
            self._more.wait_for(lambda: len(self.spans) >= count, seconds)
            return list(self.spans)

    def _take(self, path, headers, body):
        self._stopped.wait(self._delay)
        with self._more:
            self.requests += 1
            if self._statuses:
                return self._statuses.pop(0)
            request = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
            if self._keep:
                self.bodies.append(body)
                self.headers.append(headers)
                self.paths.append(path)
            for resource_spans in request.resource_spans:
                resource = _values(resource_spans.resource.attributes)
                for scope_spans in resource_spans.scope_spans:
                    for message in scope_spans.spans:
                        self._count(Span(message, resource))
            self._more.notify_all()
            return 200

    def _count(self, span):
        if span.is_server:
            self.codes[span.attributes["rpc.method"], span.attributes["rpc.response.status_code"]] += 1
        self.attempts += span.is_attempt
        self.polls += span.is_poll
        if self._keep:
            self.spans.append(span)


def _values(attributes):
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}
