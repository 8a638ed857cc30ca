"""Checks JSON and gRPC-Web through Envoy: examples/json/envoy.yaml, with the descriptor set of examples/json/descriptors, and the client
of examples/clients/web.

With a descriptor set that lacks the types of the error details, Envoy replies to a failed call with an empty body, as docs/web.md
says.
"""

import itertools
import json
import os
import re
import subprocess
import tempfile
import urllib.error
import urllib.request

import yaml

from facade import EXAMPLE_TASK, INSTANCE_ID, PROJECT_ID, ROOT, SERVICE, WORKFLOW_ID, Checks, Facade, free_port, tool
from mesh.envoy import Envoy

# The HTTP status, the reason and the details of a failed call, by instance id.
FAILURES = {
    "task-not-found": (404, "TASK_NOT_FOUND", {"ResourceInfo"}),
    "no/such/id": (400, "INVALID_REQUEST", {"BadRequest"}),
    "throttled": (429, "THROTTLED", {"RetryInfo", "QuotaFailure"}),
    "policy-denial": (403, "PERMISSION_DENIED", set()),
    "status-503": (503, "UPSTREAM_UNAVAILABLE", set()),
}

# A task of the sandbox that takes 3 s.
COURSE, STATES = "lifecycle-3", ["TASK_STATE_PENDING", "TASK_STATE_RUNNING", "TASK_STATE_SUCCEEDED"]


def main():
    checks = Checks()
    flags = ["--sandbox", "--watch-interval=100ms", "--watch-rate=off"]
    with tempfile.TemporaryDirectory() as folder, Facade(*flags) as facade:
        facade.wait_until_serving()
        os.symlink(tool("grpcurl-new"), f"{folder}/grpcurl")
        environment = {**os.environ, "PATH": folder + os.pathsep + os.environ["PATH"]}
        command = ["bash", ROOT / "examples/json/descriptors", facade.address]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=60)
        port = free_port()
        base = f"http://127.0.0.1:{port}"
        url = f"{base}/{SERVICE}/GetTaskDetail"
        with Envoy(folder, "json", configuration(port, facade, f"{folder}/rds-task-facade-json.binpb")):
            check(checks, url)
            check_watch(checks, f"{base}/{SERVICE}/WatchTaskDetail")
            check_web(checks, base)
            check_cors(checks, url)
        with Envoy(folder, "json", configuration(port, facade, f"{folder}/service.binpb")):
            seen = call(url, "task-not-found")
            checks.equal("without the types of the details, the body of an error is empty", seen, (404, b""))
    checks.finish()


def configuration(port, facade, descriptors):
    """The example's configuration, with these ports and this descriptor set."""
    resources = yaml.safe_load((ROOT / "examples/json/envoy.yaml").read_text())["static_resources"]
    listener, cluster = resources["listeners"][0], resources["clusters"][0]
    listener["address"]["socket_address"]["port_value"] = port
    endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    endpoint["address"]["socket_address"]["port_value"] = int(facade.address.rpartition(":")[2])
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    transcoder = next(entry for entry in filters if entry["name"] == "envoy.filters.http.grpc_json_transcoder")
    transcoder["typed_config"]["proto_descriptor"] = descriptors
    return resources


def check(checks, url):
    status, body = call(url, INSTANCE_ID)
    checks.equal("the example task as JSON", (status, json.loads(body)), (200, EXAMPLE_TASK))
    for instance_id, (expected, reason, details) in FAILURES.items():
        status, body = call(url, instance_id)
        error = json.loads(body or b"{}")
        seen = {detail["@type"].rpartition(".")[2]: detail for detail in error.get("details", [])}
        checks.equal(f"{instance_id}: HTTP status", status, expected)
        checks.equal(f"{instance_id}: reason", seen.get("ErrorInfo", {}).get("reason"), reason)
        checks.equal(f"{instance_id}: details", set(seen), {"ErrorInfo", "RequestInfo"} | details)
        checks.that(f"{instance_id}: message", error.get("message"), error)
        if "RetryInfo" in details:
            checks.that(f"{instance_id}: delay", re.fullmatch(r"\d+(\.\d+)?s", seen["RetryInfo"]["retry_delay"]), error)


def check_watch(checks, url):
    with post(url, COURSE) as response:
        messages = [json.loads(line) for line in response]
    seen = [message["task"]["state"] for message in messages if "task" in message]
    checks.equal("the states of a watch, one JSON object per line", [state for state, _ in itertools.groupby(seen)], STATES)


def check_web(checks, base):
    result = web_client(base)
    checks.equal("gRPC-Web: the example task", json.loads(result.stdout or "{}"), EXAMPLE_TASK)
    for instance_id, expected in {"task-not-found": "NotFound", "throttled": "ResourceExhausted"}.items():
        failed = web_client(base, "--instance-id", instance_id)
        checks.equal(f"gRPC-Web: {instance_id} exits 1", failed.returncode, 1)
        reason, details = FAILURES[instance_id][1:]
        lines = [f"^{expected}: .", f"^reason: {reason}$", r"^request id: \w"]
        for line in lines + [r"^retry after: \d"] * ("RetryInfo" in details):
            checks.that(f"gRPC-Web: {instance_id} has {line}", re.search(line, failed.stderr, re.M), failed)
    watched = web_client(base, "watch", "--instance-id", COURSE, "--workflow-id", "web")
    seen = [f"TASK_STATE_{line.split()[0]}" for line in watched.stdout.splitlines()]
    checks.equal("gRPC-Web: the states of a watch", [state for state, _ in itertools.groupby(seen)], STATES)
    checks.equal("gRPC-Web: the watch of a task that succeeded exits 0", watched.returncode, 0)


def web_client(base, *arguments):
    watch, rest = arguments[:1] == ("watch",), [*arguments]
    command = ["node", ROOT / "examples/clients/web/client.js", *(["watch"] if watch else []), "--target", base, *rest[watch:]]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)


def check_cors(checks, url):
    """A page may call if the configuration names its origin."""
    for origin, allowed in {"https://console.example.com": True, "https://evil.example.com": False}.items():
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "x-grpc-web,content-type,grpc-timeout,x-auth-token",
        }
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method="OPTIONS"), timeout=60) as response:
                seen = response.headers["access-control-allow-origin"]
        except urllib.error.HTTPError as error:
            seen = error.headers["access-control-allow-origin"]
        checks.equal(f"CORS: the preflight of {origin}", seen, origin if allowed else None)


def call(url, instance_id):
    try:
        with post(url, instance_id) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def post(url, instance_id):
    fields = {"project_id": PROJECT_ID, "instance_id": instance_id, "workflow_id": WORKFLOW_ID}
    sent = urllib.request.Request(url, json.dumps(fields).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(sent, timeout=60)


if __name__ == "__main__":
    main()
