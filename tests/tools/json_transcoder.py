"""Checks JSON over HTTP through Envoy's transcoder: examples/json/envoy.yaml, with the descriptor set of examples/json/descriptors.

With a descriptor set that lacks the types of the error details, Envoy replies to a failed call with an empty body, as docs/clients.md
says.
"""

import json
import os
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


def main():
    checks = Checks()
    with tempfile.TemporaryDirectory() as folder, Facade("--sandbox") as facade:
        facade.wait_until_serving()
        os.symlink(tool("grpcurl-new"), f"{folder}/grpcurl")
        environment = {**os.environ, "PATH": folder + os.pathsep + os.environ["PATH"]}
        command = ["bash", ROOT / "examples/json/descriptors", facade.address]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=60)
        port = free_port()
        url = f"http://127.0.0.1:{port}/{SERVICE}/GetTaskDetail"
        with Envoy(folder, "json", configuration(port, facade, f"{folder}/rds-task-facade-json.binpb")):
            check(checks, url)
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
    filters[0]["typed_config"]["proto_descriptor"] = descriptors
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


def call(url, instance_id):
    fields = {"project_id": PROJECT_ID, "instance_id": instance_id, "workflow_id": WORKFLOW_ID}
    sent = urllib.request.Request(url, json.dumps(fields).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(sent, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


if __name__ == "__main__":
    main()
