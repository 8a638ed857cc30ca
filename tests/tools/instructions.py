"""Checks the CPU instructions of the facade per call. callgrind counts them under two loads of different length, and the
difference excludes startup and shutdown. Unlike times, they hardly depend on the machine, so each kind of call has a bound.

When a count exceeds its bound, find the cause, or raise the bound and give the reason. docs/performance.md has the counts and
the bounds. Instructions in the kernel, half of the time of a call on its own, are not counted.
"""

import json
import os
import re
import subprocess
import sys

from facade import (
    INSTANCE_ID,
    PROJECT_ID,
    SANDBOX_AK,
    SANDBOX_SK,
    SANDBOX_TOKEN,
    SERVICE,
    Checks,
    Facade,
    Sandbox,
    tool,
)

FEW, MANY = 500, 2500
TOKEN = {"RDS_TASK_FACADE_TOKEN": SANDBOX_TOKEN}
KEY = {"HUAWEICLOUD_SDK_AK": SANDBOX_AK, "HUAWEICLOUD_SDK_SK": SANDBOX_SK}
OK, NOT_FOUND = "OK", "NotFound"
DISTINCT = "task-{{.RequestNumber}}"

# Name, options, environment, instance, workflow, expected code, bound. The bounds are 10 % above the measured counts, to allow
# for other patch versions of the compiler and of libc.
CASES = [
    ("token", ["--credentials=token"], TOKEN, "finished", DISTINCT, OK, 153_000),
    ("signature", ["--credentials=env"], KEY, "finished", DISTINCT, OK, 192_000),
    ("error", ["--credentials=token"], TOKEN, INSTANCE_ID, DISTINCT, NOT_FOUND, 160_000),
    ("cached reply", ["--credentials=token", "--cache-ttl=1h"], TOKEN, "finished", "one", OK, 61_000),
]


def main():
    checks = Checks()
    with Sandbox() as sandbox:
        for name, options, environment, instance, workflow, outcome, bound in CASES:
            counts = [
                count([f"--endpoint={sandbox.url}", *options], environment, load(instance, workflow, calls), outcome, calls)
                for calls in (FEW, MANY)
            ]
            per_call = round((counts[1] - counts[0]) / (MANY - FEW))
            checks.that(f"{name}: {per_call} instructions per call, at most {bound}", per_call <= bound, counts)
    checks.finish()


def load(instance, workflow, calls):
    request = {"project_id": PROJECT_ID, "instance_id": instance, "workflow_id": workflow}
    shape = ["--total", str(calls), "--connections", "4", "--concurrency", "64"]
    return [tool("ghz"), "--insecure", "--call", f"{SERVICE}/GetTaskDetail", *shape, "--data", json.dumps(request)]


def count(options, environment, command, outcome, calls):
    """Runs the facade under this load and returns the instructions of the whole run."""
    # On one processor the facade starts one worker. Contention between workers would make the count vary.
    processor = str(min(os.sched_getaffinity(0)))
    callgrind = ["taskset", "-c", processor, "valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    with Facade(*options, environment=environment, under=callgrind) as facade:
        facade.wait_until_serving()
        done = subprocess.run(
            [*command, "--timeout", "60s", "--format", "json", facade.address], capture_output=True, text=True, timeout=300
        )
        report = json.loads(done.stdout or "{}")
        if report.get("statusCodeDistribution") != {outcome: calls}:
            sys.exit(f"unexpected codes under load: {report.get('statusCodeDistribution')} {done.stderr}")
        facade.stop()
        facade.join()
    return int(re.search(r"Collected : (\d+)", "\n".join(facade.output)).group(1))


if __name__ == "__main__":
    main()
