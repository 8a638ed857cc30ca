"""Checks tools that use reflection (buf curl, ghz), grpc_health_probe, and grpcurl with the descriptor set.

grpcurl.py checks reflection with two versions of grpcurl.
"""

import json
import subprocess

from facade import EXAMPLE_TASK, INSTANCE_ID, PROJECT_ID, ROOT, SERVICE, WORKFLOW_ID, Checks, Facade, tool

METHOD = f"{SERVICE}/GetTaskDetail"
EXAMPLE_REQUEST = {"project_id": PROJECT_ID, "instance_id": INSTANCE_ID, "workflow_id": WORKFLOW_ID}
UNKNOWN_TASK = {**EXAMPLE_REQUEST, "workflow_id": "nope"}
DESCRIPTORS = ROOT / "target/ci/rds-task-facade.binpb"
CALLS = 200


def main():
    checks = Checks()
    with Facade("--sandbox") as facade:
        facade.wait_until_serving()
        check_buf_curl(checks, facade.address)
        check_health_probe(checks, facade.address)
        check_ghz(checks, facade.address)
    with Facade("--sandbox", "--reflection=false") as facade:
        facade.wait_until_serving()
        check_descriptors(checks, facade.address)
    checks.finish()


def check_buf_curl(checks, address):
    def buf_curl(path, *arguments):
        url = f"http://{address}{path}"
        return run("buf", "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments, url)

    listed = buf_curl("", "--list-methods")
    for method in (METHOD, f"{SERVICE}/WatchTaskDetail", "grpc.health.v1.Health/Check"):
        checks.that(f"buf curl lists {method}", method in listed.stdout.split(), listed)

    result = buf_curl(f"/{METHOD}", "--data", json.dumps(EXAMPLE_REQUEST))
    checks.that("buf curl gets the example task", EXAMPLE_TASK["job_name"] in result.stdout, result)

    failed = buf_curl(f"/{METHOD}", "--data", json.dumps(UNKNOWN_TASK))
    checks.that("buf curl fails for an unknown task", failed.returncode != 0, failed)
    for part in ('"not_found"', "google.rpc.ErrorInfo", "google.rpc.RequestInfo"):
        checks.that(f"buf curl shows {part} in the error", part in failed.stderr, failed)

    health = buf_curl("/grpc.health.v1.Health/Check", "--data", "{}")
    checks.that("buf curl reports the server as SERVING", "SERVING" in health.stdout, health)


def check_health_probe(checks, address):
    for name in ("", SERVICE):
        probed = run("grpc-health-probe", "-addr", address, "-service", name)
        checks.that(f"grpc_health_probe reports {name or 'the server'} as SERVING", "SERVING" in probed.stderr, probed)
        checks.equal("grpc_health_probe exits 0", probed.returncode, 0)
    probed = run("grpc-health-probe", "-addr", address, "-service", "unknown.Service")
    checks.that("grpc_health_probe fails for an unknown service", probed.returncode != 0, probed)


def check_ghz(checks, address):
    options = ["--insecure", "--call", METHOD, "--total", str(CALLS), "--concurrency", "8", "--format", "json"]
    measured = run("ghz", *options, "--data", json.dumps(EXAMPLE_REQUEST), address)
    report = json.loads(measured.stdout or "{}")
    checks.equal("ghz gets OK for each call", report.get("statusCodeDistribution"), {"OK": CALLS})

    measured = run("ghz", *options, "--data", json.dumps(UNKNOWN_TASK), address)
    report = json.loads(measured.stdout or "{}")
    checks.equal("ghz gets NotFound for each call for an unknown task", report.get("statusCodeDistribution"), {"NotFound": CALLS})


def check_descriptors(checks, address):
    options = ["-plaintext", "-max-time", "20", "-d", json.dumps(EXAMPLE_REQUEST)]
    result = run("grpcurl-new", *options, address, METHOD)
    checks.that("without reflection and descriptor set, grpcurl fails", result.returncode != 0, result)
    result = run("grpcurl-new", "-protoset", str(DESCRIPTORS), *options, address, METHOD)
    checks.that("with the descriptor set, grpcurl gets the example task", EXAMPLE_TASK["job_name"] in result.stdout, result)


def run(name, *arguments):
    return subprocess.run(
        [tool(name), *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )


if __name__ == "__main__":
    main()
