"""Checks the service with an old and a new grpcurl: reflection (v1alpha and v1), a call, a watch, error details, health.

grpcurl 1.8.6 supports reflection v1alpha only; the current version tries v1 first.
"""

import json
import re
import subprocess

from facade import EXAMPLE_TASK, INSTANCE_ID, PROJECT_ID, SERVICE, WORKFLOW_ID, WORKFLOW_NAME, Checks, Facade, tool

METHOD = f"{SERVICE}/GetTaskDetail"
EXAMPLE_REQUEST = {
    "project_id": PROJECT_ID,
    "instance_id": INSTANCE_ID,
    "workflow_id": WORKFLOW_ID,
    "workflow_name": WORKFLOW_NAME,
}


def main():
    checks = Checks()
    with Facade("--sandbox") as facade:
        facade.wait_until_serving()
        for version in ("grpcurl-new", "grpcurl-old"):
            check(checks, version, facade.address)
    checks.finish()


def check(checks, version, address):
    binary = tool(version)

    def grpcurl(*arguments, data=None):
        options = ["-plaintext", "-max-time", "20"]
        if data is not None:
            options += ["-d", json.dumps(data)]
        return subprocess.run(
            [binary, *options, address, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    listed = grpcurl("list")
    for service in (SERVICE, "grpc.health.v1.Health"):
        checks.that(f"{version} lists {service}", service in listed.stdout.split(), listed)

    described = grpcurl("describe", SERVICE)
    for method in ("GetTaskDetail", "WatchTaskDetail"):
        checks.that(f"{version} describes {method}", f"rpc {method}" in described.stdout, described)
    described = grpcurl("describe", "huaweicloud.rds.task.v1.GetTaskDetailRequest")
    checks.that(f"{version} describes the request", "string workflow_id = 3" in described.stdout, described)

    result = grpcurl(METHOD, data=EXAMPLE_REQUEST)
    checks.that(f"{version} gets the example task", result.returncode == 0, result)
    reply = json.loads(result.stdout or "null") or {}
    proto_names = {name: reply.get(camel_case(name)) for name in EXAMPLE_TASK}
    checks.equal(f"{version} prints the example reply of the RDS API reference", proto_names, EXAMPLE_TASK)
    checks.equal(f"{version} prints no other field", len(reply), len(EXAMPLE_TASK))

    # A workflow id of its own, because the task's clock starts with the first poll.
    watched = grpcurl(f"{SERVICE}/WatchTaskDetail", data={**EXAMPLE_REQUEST, "instance_id": "lifecycle-5", "workflow_id": version})
    checks.equal(f"{version} watches a task to its end", watched.returncode, 0)
    states = re.findall(r'^    "state": "TASK_STATE_(\w+)"', watched.stdout, re.MULTILINE)
    checks.that(f"{version} prints the states up to the last one", states[-1:] == ["SUCCEEDED"] and len(states) > 1, watched)

    failed = grpcurl(METHOD, data={**EXAMPLE_REQUEST, "workflow_id": "nope"})
    text = failed.stdout + failed.stderr
    checks.that(f"{version} fails for an unknown task", failed.returncode != 0, failed)
    for part in ("NotFound", "google.rpc.ErrorInfo", "google.rpc.RequestInfo", "TASK_NOT_FOUND", "rds-task-facade"):
        checks.that(f"{version} shows {part} in the error", part in text, failed)

    for name in ("", SERVICE):
        health = grpcurl("grpc.health.v1.Health/Check", data={"service": name})
        checks.that(f"{version} reports {name or 'the server'} as SERVING", '"SERVING"' in health.stdout, health)


def camel_case(name):
    first, *others = name.split("_")
    return first + "".join(part.capitalize() for part in others)


if __name__ == "__main__":
    main()
