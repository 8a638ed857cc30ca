"""Checks the names, types and labels of /metrics with the parsers of the Prometheus client library, in both text formats."""

import concurrent.futures
import urllib.request

import grpc
from facade import REASONS, SERVICE, Checks, Facade
from prometheus_client import parser
from prometheus_client.openmetrics.parser import text_string_to_metric_families

CODES = """OK Canceled Unknown InvalidArgument DeadlineExceeded NotFound AlreadyExists PermissionDenied ResourceExhausted
FailedPrecondition Aborted OutOfRange Unimplemented Internal Unavailable DataLoss Unauthenticated""".split()
METHODS = {
    ("unary", SERVICE, "GetTaskDetail"),
    ("server_stream", SERVICE, "WatchTaskDetail"),
    ("unary", "grpc.health.v1.Health", "Check"),
    ("server_stream", "grpc.health.v1.Health", "Watch"),
    ("bidi_stream", "grpc.reflection.v1.ServerReflection", "ServerReflectionInfo"),
    ("other", "other", "other"),
}
RPC = ("grpc_type", "grpc_service", "grpc_method")
OUTCOMES = "answer transport_error timeout cancelled".split()
CLASSES = "1xx 2xx 3xx 4xx 5xx none".split()
RETRIES = """UPSTREAM_DNS UPSTREAM_CONNECT UPSTREAM_RESET UPSTREAM_TRUNCATED UPSTREAM_PROTOCOL UPSTREAM_TIMEOUT
UPSTREAM_UNAVAILABLE UPSTREAM_INTERNAL CREDENTIAL_REJECTED CLOCK_SKEW""".split()
TASKS = "admin accept certificates credential health lateness quota_store spans".split()
POLLS = "changed unchanged failed throttled".split()
WATCH_ENDS = "over deadline cancelled expired drain error stale unread".split()
STORE_OPERATIONS = "admit poll share publish throttle key heartbeat".split()
STORE_OUTCOMES = "ok timeout error skipped rejected".split()
REFUSALS = "limit closed timeout tls alpn protocol".split()
NONE = ((), {()})
# Family to type, label names and sets of label values.
EXPECTED = {
    "grpc_server_started": ("counter", RPC, METHODS),
    "grpc_server_handled": (
        "counter",
        (*RPC, "grpc_code"),
        {(*method, code) for method in METHODS for code in CODES},
    ),
    "grpc_server_handling_seconds": ("histogram", RPC, METHODS),
    "grpc_server_connections": ("gauge", *NONE),
    "grpc_server_connections_refused": ("counter", ("reason",), {(reason,) for reason in REFUSALS}),
    "rds_upstream_requests": (
        "counter",
        ("outcome", "status_class"),
        {(outcome, status) for outcome in OUTCOMES for status in CLASSES},
    ),
    "rds_upstream_request_duration_seconds": ("histogram", *NONE),
    "rds_upstream_retries": ("counter", ("reason",), {(reason,) for reason in RETRIES}),
    "rds_upstream_in_flight": ("gauge", *NONE),
    "rds_coalesced_calls": ("counter", *NONE),
    "rds_cache_hits": ("counter", *NONE),
    "rds_throttled_calls": ("counter", *NONE),
    "rds_paced_calls": ("counter", *NONE),
    "rds_failed_calls": ("counter", ("reason",), {(reason,) for reason in REASONS}),
    "rds_upstream_mismatched_replies": ("counter", *NONE),
    "rds_watches": ("gauge", *NONE),
    "rds_watches_limit": ("gauge", *NONE),
    "rds_watched_tasks": ("gauge", *NONE),
    "rds_watch_polls": ("counter", ("outcome",), {(outcome,) for outcome in POLLS}),
    "rds_watch_messages": ("counter", ("kind",), {("state",), ("heartbeat",)}),
    "rds_watch_states_skipped": ("counter", *NONE),
    "rds_watch_ended": ("counter", ("cause",), {(cause,) for cause in WATCH_ENDS}),
    "rds_circuit_open": ("gauge", *NONE),
    "rds_circuit_open_instances": ("gauge", *NONE),
    "rds_credential_expiry_timestamp_seconds": ("gauge", *NONE),
    "rds_credential_rejected": ("counter", ("owner",), {("caller",), ("server",)}),
    "rds_caller_faults": ("counter", ("cause",), {("deadline",), ("http",)}),
    "rds_credential_refresh": ("counter", ("outcome",), {("success",), ("failure",)}),
    "tls_certificate_expiry_timestamp_seconds": ("gauge", *NONE),
    "quota_store_up": ("gauge", *NONE),
    "quota_store_replicas": ("gauge", *NONE),
    "quota_store_requests": (
        "counter",
        ("operation", "outcome"),
        {(operation, outcome) for operation in STORE_OPERATIONS for outcome in STORE_OUTCOMES},
    ),
    "quota_store_request_duration_seconds": ("histogram", *NONE),
    "panics": ("counter", *NONE),
    "background_task_restarts": ("counter", ("task",), {(task,) for task in TASKS}),
    "log_lines_dropped": ("counter", *NONE),
    "log_lines_suppressed": ("counter", *NONE),
    "trace_spans_exported": ("counter", *NONE),
    "trace_spans_dropped": ("counter", ("reason",), {("queue_full",), ("export_failed",)}),
    "process_cpu_seconds": ("counter", *NONE),
    "process_start_time_seconds": ("gauge", *NONE),
    "process_resident_memory_bytes": ("gauge", *NONE),
    "process_open_fds": ("gauge", *NONE),
    "process_max_fds": ("gauge", *NONE),
    "build": ("info", ("version",), None),
}


def scrape(address):
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return {family.name: family for family in text_string_to_metric_families(answer.read().decode())}


def scrape_classic(address):
    """The text and the samples of a scraper that does not accept OpenMetrics."""
    request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": "text/plain;version=0.0.4"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        text = reply.read().decode()
    return text, {family.name: family for family in parser.text_string_to_metric_families(text)}


def series(families):
    return {
        (sample.name, *sorted(sample.labels.items())) for family in families.values() for sample in family.samples
    }


def call(channel, path, metadata=()):
    try:
        channel.unary_unary(path)(b"\x0a\x00", timeout=5, metadata=metadata)
    except grpc.RpcError as error:
        return error.code()


def main():
    checks = Checks()
    with Facade("--sandbox") as facade:
        families = scrape(facade.metrics)
        checks.equal("metric families", sorted(families), sorted(EXPECTED))
        for name, (kind, labels, values) in EXPECTED.items():
            family = families[name]
            checks.equal(f"{name}: type", family.type, kind)
            own = [sample for sample in family.samples if not sample.name.endswith("_bucket")]
            seen = {tuple(sample.labels.get(label) for label in labels) for sample in own}
            names = {label for sample in own for label in sample.labels}
            checks.equal(f"{name}: label names", names, set(labels))
            if values is not None:
                checks.equal(f"{name}: all series exist from the start", seen, values)
        before = series(families)
        _, classic = scrape_classic(facade.metrics)
        checks.equal("series in the classic format", series(classic), before)
        kinds = {name: family.type for name, family in classic.items()}
        expected = {name: kind for name, (kind, _, _) in EXPECTED.items() if kind != "info"} | {"build_info": "gauge"}
        checks.equal("types in the classic format", kinds, expected)
        paths = [f"/{'x' * (number % 200)}/{number}" for number in range(500)] + ["/" + SERVICE + "/gettaskdetail"]
        with grpc.insecure_channel(facade.address, [("grpc.primary_user_agent", "unknown-agent/1")]) as channel:
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                codes = set(pool.map(lambda path: call(channel, path), paths))
            invalid = call(channel, f"/{SERVICE}/GetTaskDetail", [("x-request-id", "id-1")])
        checks.equal("unknown methods", codes, {grpc.StatusCode.UNIMPLEMENTED})
        checks.equal("an empty request", invalid, grpc.StatusCode.INVALID_ARGUMENT)
        families = scrape(facade.metrics)
        checks.equal("series added by calls", series(families) - before, set())
        handled = {
            (sample.labels["grpc_method"], sample.labels["grpc_code"]): sample.value
            for sample in families["grpc_server_handled"].samples
            if sample.name == "grpc_server_handled_total" and sample.value
        }
        checks.equal(
            "counted calls",
            handled,
            {("other", "Unimplemented"): len(paths), ("GetTaskDetail", "InvalidArgument"): 1},
        )
    checks.finish()


if __name__ == "__main__":
    main()
