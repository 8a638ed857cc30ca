"""Starts and stops the program for the checks in this folder.

The program is target/dist/rds-task-facade, or the one that the variable FACADE names. Other binaries (grpcurl, h2spec) are
looked up in the folders of the variable CI_TOOLS, separated by colons, and then in PATH.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("FACADE", str(ROOT / "target/dist/rds-task-facade"))
SERVICE = "huaweicloud.rds.task.v1.TaskService"

# The reasons of failed calls.
REASONS = [re.sub("(?<=[a-z])(?=[A-Z])", "_", name).upper() for name in re.findall(r"^    (\w+),$", (ROOT / "src/reason.rs").read_text(), re.M)]

# Fields of the first log line of `serve`: the addresses that it listens on.
LISTEN_FIELD, METRICS_FIELD = "listen", "metrics_listen"

# The example task of the RDS API reference, "Obtaining Task Information".
PROJECT_ID = "0483b6b16e954cb88930a360d2c4e663"
INSTANCE_ID = "1ffc4167903840cb93a3da56d28c14fdin01"
WORKFLOW_ID = "102772a9-31fa-4129-b9f8-7638e2792f3b"
WORKFLOW_NAME = "CreateMysqlSingleHAInstance"
EXAMPLE_TASK = {
    "instance_id": INSTANCE_ID,
    "instance_name": "rds-mysql-2",
    "job_id": WORKFLOW_ID,
    "job_name": WORKFLOW_NAME,
}

# Credentials that the sandbox accepts.
SANDBOX_TOKEN = "sandbox-token"
SANDBOX_AK, SANDBOX_SK = "SANDBOXACCESSKEY", "sandbox-secret-key"
SANDBOX_SECURITY_TOKEN = "sandbox-security-token"

START_SECONDS = 15
STOP_SECONDS = 30

# CI stops a hanging check with SIGTERM. Raising an exception leaves every `with` block, which stops the processes it started.
signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated by SIGTERM"))


class Program:
    """One run of a program: a context manager that stops the process at its end."""

    def __init__(self, command, environment=None):
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RDS_TASK_FACADE_", "HUAWEICLOUD_", "OTEL_")) and name != "RUST_LOG"
        }
        self.output = []
        self._more = threading.Condition()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**inherited, **(environment or {})},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            with self._more:
                self.output.append(line.rstrip("\n"))
                self._more.notify_all()

    def wait_for(self, what, found, seconds=START_SECONDS):
        """Passes the output so far to `found` until it returns something else than None, and returns that."""
        deadline = time.monotonic() + seconds
        with self._more:
            while True:
                value = found(self.output)
                if value is not None:
                    return value
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"no {what}; exit code {self._process.poll()}:\n" + "\n".join(self.output))
                self._more.wait(0.05)

    def stop(self):
        """Sends SIGTERM and returns the exit code."""
        self._process.terminate()
        return self._process.wait(STOP_SECONDS)

    def wait(self, seconds):
        """Waits for the end of the process and of its output. Returns the exit code."""
        code = self._process.wait(seconds)
        self.join()
        return code

    def join(self):
        """Waits until the output of a stopped process is read to its end."""
        self._reader.join(STOP_SECONDS)

    def kill(self):
        """Sends SIGKILL and waits for the end."""
        self._process.kill()
        self._process.wait()

    def exit_code(self):
        """The exit code, or None while the process runs."""
        return self._process.poll()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.kill()


class Process(Program):
    """One run of the facade's program, by the command `under` if any, such as valgrind."""

    def __init__(self, *arguments, environment=None, under=()):
        super().__init__([*under, PROGRAM, *arguments], environment)


class Facade(Process):
    """`serve` on free ports. `address` and `metrics` are host:port."""

    def __init__(self, *arguments, environment=None, port=0, under=()):
        super().__init__(
            "serve",
            f"--listen=127.0.0.1:{port}",
            "--metrics-listen=127.0.0.1:0",
            "--log-format=json",
            *arguments,
            environment=environment,
            under=under,
        )
        try:
            started = self.wait_for("log line with the addresses", _started)
            self.address, self.metrics = started[LISTEN_FIELD], started[METRICS_FIELD]
        except BaseException:
            self.__exit__()
            raise

    def call(self, *arguments, environment=None):
        """Runs `call` against this instance. Returns the exit code, the reply or None, and standard error."""
        return call(f"http://{self.address}", *arguments, environment=environment)

    def wait_until_serving(self):
        """Waits until health is SERVING: the facade then has its first credential."""
        deadline = time.monotonic() + START_SECONDS
        command = [PROGRAM, "health", "--target", f"http://{self.address}"]
        while subprocess.run(command, capture_output=True, timeout=10).returncode != 0:
            if time.monotonic() > deadline:
                raise AssertionError("not SERVING:\n" + "\n".join(self.output))
            time.sleep(0.1)


def _started(output):
    for line in output:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        fields = {**record, **record.get("fields", {})}
        if LISTEN_FIELD in fields:
            return fields
    return None


class Sandbox(Process):
    """`sandbox` on a free port. `url` is its base URL."""

    def __init__(self, port=None):
        port = port or free_port()
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        super().__init__("sandbox", f"--listen=127.0.0.1:{port}")

        def connected(_):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return True
            except OSError:
                return None

        try:
            self.wait_for("sandbox", connected)
        except BaseException:
            self.__exit__()
            raise


def call(target, *arguments, environment=None):
    result = subprocess.run(
        [PROGRAM, "call", "--target", target, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **(environment or {})},
    )
    reply = json.loads(result.stdout) if result.returncode == 0 else None
    return result.returncode, reply, result.stderr


def make_certificate(folder, name, names="IP:127.0.0.1,DNS:localhost"):
    """Creates a self-signed certificate for these names. Returns its path and the path of its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        + ["-subj", f"/CN={name}", "-addext", f"subjectAltName={names}"]
        + ["-addext", "basicConstraints=critical,CA:FALSE"]
        + ["-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    return str(certificate), str(key)


def free_port():
    """A port that was free a moment ago, below those that the system gives to clients and listeners, so that none of them takes it."""
    while True:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", random.randrange(15_000, 30_000)))
            return listener.getsockname()[1]


def tool(name):
    """Path of a binary that CI installs."""
    path = os.environ.get("CI_TOOLS", "") + os.pathsep + os.environ.get("PATH", "")
    found = shutil.which(name, path=path.lstrip(os.pathsep))
    if found is None:
        raise SystemExit(f"{name} is not installed; bash .ci/run tools installs it")
    return found


class Checks:
    """Prints and counts checks. `finish` exits with 1 if one has failed or none was made."""

    def __init__(self):
        self.passed = self.failed = 0

    def that(self, name, holds, seen=""):
        if holds:
            self.passed += 1
            print(f"ok    {name}")
        else:
            self.failed += 1
            print(f"FAIL  {name}\n      {seen!s}".rstrip())

    def equal(self, name, seen, expected):
        self.that(name, seen == expected, f"seen     {seen!r}\n      expected {expected!r}")

    def finish(self):
        print(f"{self.passed} passed, {self.failed} failed")
        sys.exit(1 if self.failed or not self.passed else 0)
