"""Instructions of the facade's process for one call, counted by callgrind: the difference of two loads, so that neither the
start nor the end is in it. Unlike times they hardly depend on the machine, so each kind of call has a bound.

A figure over its bound is a change to look at: find what it buys, or raise the bound and say why. docs/performance.md
tells what the instructions are spent on. Without the kernel's: of a lone call that is half of the time.
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
EACH_ITS_OWN = "task-{{.RequestNumber}}"

# Name, options, environment, instance, workflow, outcome, bound. The bounds are a tenth above what was measured, for other
# patch versions of the compiler and of libc.
CASES = [
    ("a token", ["--credentials=token"], TOKEN, "finished", EACH_ITS_OWN, OK, 160_000),
    ("a signature", ["--credentials=env"], KEY, "finished", EACH_ITS_OWN, OK, 200_000),
    ("a failure", ["--credentials=token"], TOKEN, INSTANCE_ID, EACH_ITS_OWN, NOT_FOUND, 222_000),
    ("a kept answer", ["--credentials=token", "--cache-ttl=1h"], TOKEN, "finished", "one", OK, 65_000),
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
            checks.that(f"{name}: {per_call} instructions, at most {bound}", per_call <= bound, counts)
    checks.finish()


def load(instance, workflow, calls):
    request = {"project_id": PROJECT_ID, "instance_id": instance, "workflow_id": workflow}
    shape = ["--total", str(calls), "--connections", "4", "--concurrency", "64"]
    return [tool("ghz"), "--insecure", "--call", f"{SERVICE}/GetTaskDetail", *shape, "--data", json.dumps(request)]


def count(options, environment, command, outcome, calls, told=("--callgrind-out-file=/dev/null",)):
    """Instructions of one run of the facade with this load on it; `told` says what else callgrind tells, and where."""
    # One processor, so one worker: calls that meet from two workers cost a little more, as they happen to meet.
    processor = str(min(os.sched_getaffinity(0)))
    callgrind = ["taskset", "-c", processor, "valgrind", "--tool=callgrind", *told]
    with Facade(*options, environment=environment, under=callgrind) as facade:
        facade.wait_until_serving()
        done = subprocess.run(
            [*command, "--timeout", "60s", "--format", "json", facade.address], capture_output=True, text=True, timeout=300
        )
        report = json.loads(done.stdout or "{}")
        if report.get("statusCodeDistribution") != {outcome: calls}:
            sys.exit(f"the load went wrong: {report.get('statusCodeDistribution')} {done.stderr}")
        facade.stop()
        facade.join()
    return int(re.search(r"Collected : (\d+)", "\n".join(facade.output)).group(1))


if __name__ == "__main__":
    main()
