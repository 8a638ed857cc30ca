"""Checks exported traces: caller, facade and attempts share one trace, each poll of a watch has a trace of its own, and a bad
collector delays no call."""

import contextlib
import http.server
import json
import socket
import subprocess
import threading
import time
import urllib.request

import grpc
from collector import Collector
from facade import PROJECT_ID, SERVICE, Checks, Facade, free_port, tool
from metrics import scrape
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span
from rpc import call, request, watch

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
TEMPLATE = "/v3/{project_id}/instances/{instance_id}/task-center-detail"


def one_trace(checks):
    with Collector() as collector:
        environment = collector.environment(
            OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=checks",
            OTEL_EXPORTER_OTLP_HEADERS="x-tenant=a%20b",
        )
        with Facade("--sandbox", environment=environment) as facade:
            metadata = [("traceparent", TRACEPARENT), ("tracestate", "vendor=1"), ("x-request-id", "r-1")]
            with grpc.insecure_channel(facade.address) as channel:
                code, answer = call(channel, request("flaky-2"), metadata=metadata)
            spans = collector.wait_for(4)
            line = facade.wait_for("access line", lambda output: access_line(output, "r-1"))
    checks.equal("a call that fails twice upstream", code, "OK")
    checks.equal("spans in the caller's trace", [span.trace_id for span in spans], [TRACE] * 4)
    server = next(span for span in spans if span.is_server)
    attempts = sorted((span for span in spans if not span.is_server), key=lambda span: span.start)
    checks.equal("the server span's parent is the caller", server.parent, CALLER)
    checks.equal("tracestate", server.state, "vendor=1")
    checks.equal("the attempts' parent is the server span", {span.parent for span in attempts}, {server.span_id})
    checks.equal("kinds", {span.kind for span in attempts}, {3})
    resends = [span.attributes.get("http.request.resend_count") for span in attempts]
    checks.equal("http.request.resend_count", resends, [None, 1, 2])
    statuses = [span.attributes["http.response.status_code"] for span in attempts]
    checks.equal("http.response.status_code", statuses, [503, 503, 200])
    checks.equal("attempts in error", [span.error for span in attempts], [True, True, False])
    checks.equal("error.type", [span.attributes.get("error.type") for span in attempts], ["503", "503", None])
    checks.equal("name of an attempt", attempts[0].name, f"POST {TEMPLATE}")
    wanted = f"/v3/{PROJECT_ID}/instances/flaky-2/task-center-detail"
    checks.that("url.full", attempts[0].attributes["url.full"].endswith(wanted), attempts[0].attributes)
    checks.equal("rpc.method", server.attributes["rpc.method"], f"{SERVICE}/GetTaskDetail")
    checks.equal("code", server.attributes["rpc.response.status_code"], "OK")
    checks.equal("request id", server.attributes["rds_task_facade.request_id"], "r-1")
    ids = [span.attributes.get("rds_task_facade.upstream_request_id") for span in (server, attempts[-1])]
    checks.equal("upstream's request id", ids, [answer["x-upstream-request-id"]] * 2)
    checks.that("attempts lie within the call", server.start <= attempts[0].start and attempts[-1].end <= server.end)
    checks.equal("ids in the access line", (line["trace_id"], line["span_id"]), (TRACE, server.span_id))
    resource = server.resource
    checks.equal("service.name", resource["service.name"], "rds-task-facade")
    checks.equal("resource", resource["deployment.environment.name"], "checks")
    checks.equal("path", set(collector.paths), {"/v1/traces"})
    checks.equal("header", collector.headers[0]["x-tenant"], "a b")


def through_the_collector(checks):
    """Checks the trace of caller, facade and attempts as the OpenTelemetry collector forwards it."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    with Collector() as backend:
        config = {
            "receivers": {"otlp": {"protocols": {"http": {"endpoint": f"127.0.0.1:{port}"}}}},
            "exporters": {"otlp_http": {"endpoint": backend.url, "compression": "none"}},
            "service": {
                "telemetry": {"metrics": {"level": "none"}},
                "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["otlp_http"]}},
            },
        }
        command = [tool("otelcol"), f"--config=yaml:{json.dumps(config)}"]
        collector = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        try:
            wait_for_port(port)
            post_callers_span(endpoint)
            environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
            with Facade("--sandbox", environment=environment) as facade:
                with grpc.insecure_channel(facade.address) as channel:
                    call(channel, request("flaky-1"), metadata=[("traceparent", TRACEPARENT)])
            spans = backend.wait_for(4)
        finally:
            collector.terminate()
            collector.wait(30)
    checks.equal("collector: one trace", {span.trace_id for span in spans}, {TRACE})
    services = sorted(span.resource["service.name"] for span in spans)
    checks.equal("collector: services", services, ["caller", *["rds-task-facade"] * 3])
    parents = {span.span_id: span.parent for span in spans}
    server = next(span for span in spans if span.is_server)
    depths = sorted((parents[span.span_id] == CALLER, parents[span.span_id] == server.span_id) for span in spans)
    expected = [(False, False), (False, True), (False, True), (True, False)]
    checks.equal("collector: caller, facade, two attempts", depths, expected)


def wait_for_port(port):
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def post_callers_span(endpoint):
    now = time.time_ns()
    span = Span(
        trace_id=bytes.fromhex(TRACE),
        span_id=bytes.fromhex(CALLER),
        name="caller",
        kind=Span.SPAN_KIND_CLIENT,
        start_time_unix_nano=now,
        end_time_unix_nano=now + 1_000_000,
    )
    service = KeyValue(key="service.name", value=AnyValue(string_value="caller"))
    spans = ResourceSpans(resource=Resource(attributes=[service]), scope_spans=[ScopeSpans(spans=[span])])
    body = ExportTraceServiceRequest(resource_spans=[spans]).SerializeToString()
    headers = {"content-type": "application/x-protobuf"}
    urllib.request.urlopen(urllib.request.Request(endpoint + "/v1/traces", body, headers), timeout=10).close()


def access_line(output, request_id):
    lines = (json.loads(line) for line in output)
    return next((line for line in lines if line.get("request_id") == request_id), None)


def failures_and_sampling(checks):
    cases = [
        ("NOT_FOUND", "task-not-found", False),
        ("INTERNAL", "status-500", True),
        ("UNAVAILABLE", "reset", True),
        ("RESOURCE_EXHAUSTED", "status-429", False),
    ]
    with Collector() as collector, Facade("--sandbox", "--timeout=2s", environment=collector.environment()) as facade:
        with grpc.insecure_channel(facade.address) as channel:
            for code, instance, _ in cases[:-1]:
                checks.equal(f"{instance}: on the wire", call(channel, request(instance))[0], code)
            unsampled = [("traceparent", f"00-{TRACE}-{CALLER}-00")]
            call(channel, request("every-field"), metadata=unsampled)
            call(channel, request("every-field"), metadata=[("b3", f"{TRACE}-{CALLER}-1")])
            call(channel, request("slow-5000"))
            # Last, because throttling makes the facade hold back later calls.
            call(channel, request(cases[-1][1]))
        by_code = lambda: {span.attributes["rpc.response.status_code"]: span for span in collector.spans if span.is_server}
        deadline = time.monotonic() + 15
        while len(by_code()) < 6 and time.monotonic() < deadline:
            time.sleep(0.1)
    seen = by_code()
    for code, instance, error in cases:
        checks.equal(f"{instance}: span in error", code in seen and seen[code].error, error)
    checks.that("a passed deadline is an error", seen["DEADLINE_EXCEEDED"].error)
    checks.equal("B3 is accepted, an unsampled trace is not exported", seen["OK"].parent, CALLER)
    reset = [span for span in collector.spans if span.attributes.get("error.type") == "UPSTREAM_RESET"]
    checks.equal("attempts that were reset", len(reset), 3)
    cancelled = [span for span in collector.spans if span.attributes.get("error.type") == "cancelled"]
    checks.that("the attempt that a deadline cancelled has a span", cancelled)
    checks.equal("B3 continues the caller's trace", seen["OK"].trace_id, TRACE)


def bad_collectors(checks):
    for name, collector, endpoint in [
        ("dead", Collector(), "http://127.0.0.1:1"),
        ("slow", Collector(delay=60), None),
        ("full", Collector(statuses=[503] * 10_000), None),
    ]:
        environment = collector.environment(OTEL_BSP_MAX_QUEUE_SIZE="50", OTEL_EXPORTER_OTLP_TIMEOUT="1000")
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint or collector.url
        with collector, Facade("--sandbox", environment=environment) as facade:
            with grpc.insecure_channel(facade.address) as channel:
                call(channel)
                begun = time.monotonic()
                codes = {call(channel)[0] for _ in range(300)}
                took = time.monotonic() - begun
            families = scrape(facade.metrics)
            dropped = {
                sample.labels["reason"]: sample.value
                for sample in families["trace_spans_dropped"].samples
                if sample.name.endswith("_total")
            }
            begun = time.monotonic()
            exit_code = facade.stop()
            stopping = time.monotonic() - begun
        checks.equal(f"{name} collector: calls", codes, {"OK"})
        checks.that(f"{name} collector: 300 calls in {took:.2f} s", took < 10, took)
        checks.that(f"{name} collector: dropped spans are counted", dropped["queue_full"] > 0, dropped)
        checks.equal(f"{name} collector: exit", exit_code, 0)
        checks.that(f"{name} collector: stopped in {stopping:.1f} s", stopping < 8, stopping)


def end_of_the_process(checks):
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "60000"}
    with Collector() as collector:
        with Facade("--sandbox", environment={**collector.environment(), **environment}) as facade:
            with grpc.insecure_channel(facade.address) as channel:
                call(channel)
            facade.stop()
        checks.equal("shutdown exports the queued spans", len(collector.wait_for(2, 1)), 2)


def a_busy_collector(checks):
    with Collector(statuses=[503, 429]) as collector:
        with Facade("--sandbox", environment=collector.environment()) as facade:
            with grpc.insecure_channel(facade.address) as channel:
                call(channel)
            spans = collector.wait_for(2)
            checks.equal("a busy collector gets the spans later", len(spans), 2)
            checks.equal("export requests", collector.requests, 3)
            time.sleep(0.2)
            families = scrape(facade.metrics)
    lost = [sample.value for sample in families["trace_spans_dropped"].samples if sample.name.endswith("_total")]
    checks.equal("spans dropped because of a busy collector", sum(lost), 0)


@contextlib.contextmanager
def upstream(reply):
    """An upstream on a free port. `reply` maps the headers of a request to status and body. Yields the base URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            status, body = reply(self.headers)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def polls(checks):
    """Checks the spans of a watch with four polls, one of which fails."""
    replies = [(200, "Pending"), (200, "Running"), (503, ""), (200, "Completed")]

    def reply(_):
        status, state = replies.pop(0)
        return status, json.dumps({"job_id": "j", "status": state} if status == 200 else {}).encode()

    flags = ["--credentials=token", "--watch-interval=10ms", "--watch-rate=off", "--max-attempts=1"]
    with upstream(reply) as url, Collector() as collector:
        environment = collector.environment(RDS_TASK_FACADE_TOKEN="t")
        with Facade("--endpoint", url, *flags, environment=environment) as facade:
            with grpc.insecure_channel(facade.address) as channel:
                code, messages = watch(channel, metadata=[("traceparent", TRACEPARENT)])
            facade.stop()
    # A watch may skip a state that the next one follows quickly.
    checks.that("watch: OK after 1 to 3 states", code == "OK" and 1 <= len(messages) <= 3, (code, messages))
    streams = [span for span in collector.spans if span.is_server]
    checks.equal("watch: one span per stream, in the caller's trace", [(s.trace_id, s.parent) for s in streams], [(TRACE, CALLER)])
    polled = sorted((span for span in collector.spans if span.is_poll), key=lambda span: span.start)
    failed = [(p.error, p.attributes.get("error.type")) for p in polled]
    ok = (False, None)
    checks.equal("watch: one span per poll, with its error", failed, [ok, ok, (True, "UPSTREAM_UNAVAILABLE"), ok])
    checks.equal("watch: polls are root spans", [p.parent for p in polled], [""] * 4)
    checks.equal("watch: each poll has a trace of its own", len({p.trace_id for p in polled} - {TRACE}), 4)
    checks.equal("watch: each poll links to the stream", [p.links for p in polled], [[(TRACE, streams[0].span_id)]] * 4)
    parents = [(span.trace_id, span.parent) for span in sorted(collector.spans, key=lambda span: span.start) if span.is_attempt]
    checks.equal("watch: each attempt belongs to its poll", parents, [(p.trace_id, p.span_id) for p in polled])


def propagation(checks):
    """Checks the trace headers that upstream receives."""
    seen = []

    def reply(headers):
        seen.append({name.lower(): value for name, value in headers.items()})
        return 404, b""

    with upstream(reply) as url, Collector() as collector:
        for flags, expected in [((), None), (("--propagate-trace-upstream",), TRACE)]:
            environment = collector.environment(RDS_TASK_FACADE_TOKEN="t")
            with Facade("--endpoint", url, "--credentials=token", *flags, environment=environment) as facade:
                with grpc.insecure_channel(facade.address) as channel:
                    call(channel, metadata=[("traceparent", TRACEPARENT), ("tracestate", "vendor=1"), ("baggage", "a=1")])
                facade.stop()
            headers = seen.pop()
            trace = headers.get("traceparent", "--").split("-")[1] or None
            checks.equal(f"traceparent upstream {flags}", trace, expected)
            checks.equal(f"tracestate upstream {flags}", headers.get("tracestate"), expected and "vendor=1")
            checks.that(f"no baggage upstream {flags}", "baggage" not in headers, headers)
            attempt = next(span for span in reversed(collector.spans) if not span.is_server)
            if expected:
                checks.equal("the parent upstream is the span of the attempt", headers["traceparent"].split("-")[2], attempt.span_id)


def unusable_settings(checks):
    with Collector() as collector:
        environment = collector.environment(OTEL_EXPORTER_OTLP_PROTOCOL="grpc", OTEL_PROPAGATORS="xray", OTEL_TRACES_SAMPLER="Always_On")
        with Facade("--sandbox", environment=environment) as facade:
            with grpc.insecure_channel(facade.address) as channel:
                checks.equal("with unusable settings, calls", call(channel)[0], "OK")
        checks.equal("with unusable settings, spans", len(collector.wait_for(2)), 2)


def main():
    checks = Checks()
    one_trace(checks)
    through_the_collector(checks)
    failures_and_sampling(checks)
    bad_collectors(checks)
    end_of_the_process(checks)
    a_busy_collector(checks)
    polls(checks)
    propagation(checks)
    unusable_settings(checks)
    checks.finish()


if __name__ == "__main__":
    main()
