"""Checks the clients of examples/clients against the sandbox: a reply, error details, a retry, a deadline, TLS, a token.

examples/clients/build builds them first. The facade makes one attempt per call, so that only the client's own retry can
recover from the 503 of the instance `flaky-1`. The server's UNAVAILABLE counter shows whether the client received that error.
"""

import json
import os
import re
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from facade import EXAMPLE_TASK, ROOT, SANDBOX_TOKEN, Checks, Facade, Sandbox

FOLDER = ROOT / "examples/clients"
RUST_TARGET = Path(os.environ.get("CARGO_TARGET_DIR", FOLDER / "rust/target"))
CLIENTS = {
    "go": [FOLDER / "go/client"],
    "python": [FOLDER / "python/.venv/bin/python", FOLDER / "python/client.py"],
    "node": ["node", FOLDER / "node/client.js"],
    "java": ["java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-jar", FOLDER / "java/target/client.jar"],
    "rust": [RUST_TARGET / "debug/rds-task-facade-client"],
}


def main():
    checks = Checks()
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = make_certificate(Path(folder), "server")
        other_certificate, _ = make_certificate(Path(folder), "other")
        with (
            Facade("--sandbox", "--max-attempts=1") as plain,
            Facade("--sandbox", f"--tls-cert={certificate}", f"--tls-key={key}") as encrypted,
            Sandbox() as sandbox,
            Facade(f"--endpoint={sandbox.url}", "--credentials=caller") as callers,
        ):
            plain.wait_until_serving()
            for language, command in CLIENTS.items():
                begun = time.monotonic()
                check(checks, language, Client(command, plain.address), plain)
                check_tls(checks, language, Client(command, encrypted.address), certificate, other_certificate)
                check_token(checks, language, Client(command, callers.address))
                print(f"      {language}: {time.monotonic() - begun:.1f} s")
    checks.finish()


def check(checks, language, client, facade):
    result = client()
    checks.equal(f"{language} exits 0 with the example task", result.returncode, 0)
    checks.that(f"{language} prints the example task", prints(result, EXAMPLE_TASK), result)

    failed = client("--instance-id", "task-not-found")
    checks.equal(f"{language} exits 1 for a task that does not exist", failed.returncode, 1)
    for part in (r"^not_?found: The task does not exist", r"^reason: TASK_NOT_FOUND$", r"^request id: \w+$"):
        checks.that(f"{language} prints {part}", re.search(part, failed.stderr, re.I | re.M), failed)

    unavailable_before = unavailable_replies(facade)
    recovered = client("--instance-id", "flaky-1", "--workflow-id", f"{language}-recovers")
    checks.that(f"{language} recovers from one UNAVAILABLE", prints(recovered, {"job_id": f"{language}-recovers"}), recovered)
    received = unavailable_replies(facade) - unavailable_before
    checks.equal(f"{language} received that UNAVAILABLE once", received, 1)

    lost = client("--instance-id", "flaky-2", "--workflow-id", f"{language}-gives-up")
    checks.that(f"{language} makes no third attempt", re.search(r"^unavailable: ", lost.stderr, re.I | re.M), lost)
    checks.that(f"{language} prints UPSTREAM_UNAVAILABLE", "reason: UPSTREAM_UNAVAILABLE" in lost.stderr, lost)
    later = client("--instance-id", "flaky-2", "--workflow-id", f"{language}-gives-up")
    checks.that(f"{language} gets the task later", prints(later, {"job_id": f"{language}-gives-up"}), later)

    begun = time.monotonic()
    late = client("--instance-id", "slow-30000", "--timeout", "1")
    checks.that(f"{language} prints DEADLINE_EXCEEDED", re.search(r"^deadline_?exceeded: ", late.stderr, re.I | re.M), late)
    checks.that(f"{language} returns soon after its deadline", time.monotonic() - begun < 20, late)


def check_tls(checks, language, client, certificate, other_certificate):
    result = client("--ca", certificate)
    checks.that(f"{language} gets the example task over TLS", prints(result, EXAMPLE_TASK), result)
    rejected = client("--ca", other_certificate, "--timeout", "5")
    checks.equal(f"{language} rejects an untrusted certificate", rejected.returncode, 1)


def check_token(checks, language, client):
    result = client("--token", SANDBOX_TOKEN)
    checks.that(f"{language} sends its token", prints(result, EXAMPLE_TASK), result)
    rejected = client()
    checks.that(f"{language} prints CREDENTIAL_MISSING", "reason: CREDENTIAL_MISSING" in rejected.stderr, rejected)
    throttled = client("--instance-id", "throttled-retry-after", "--token", SANDBOX_TOKEN)
    checks.that(
        f"{language} prints the retry delay", re.search(r"^retry after: [12](\.\d+)? s$", throttled.stderr, re.M), throttled
    )
    # The next client must get the whole delay, and not the rest of this one.
    time.sleep(2.1)


class Client:
    """One client program and its target. Calling it runs the program once."""

    def __init__(self, command, address):
        self.command = [*command, "--target", address]

    def __call__(self, *arguments):
        # A cold start of the JVM takes seconds on a busy machine.
        options = arguments if "--timeout" in arguments else (*arguments, "--timeout", "30")
        return subprocess.run(
            [*self.command, *options], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90
        )


def prints(result, fields):
    """Whether the output contains each field, as JSON or as the language prints a message.

    Go's protojson prints one or two spaces after a colon, depending on a hash of the binary.
    """
    return result.returncode == 0 and all(
        re.search(rf'"?{name}"?: {{1,2}}{re.escape(json.dumps(value))}', result.stdout) for name, value in fields.items()
    )


def unavailable_replies(facade):
    with urllib.request.urlopen(f"http://{facade.metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if line.startswith("grpc_server_handled_total{") and 'grpc_code="Unavailable"' in line
    )


def make_certificate(folder, name):
    """Creates a self-signed certificate for 127.0.0.1. Returns its path and the path of its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        + ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
        + ["-addext", "basicConstraints=critical,CA:FALSE"]
        + ["-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    return str(certificate), str(key)


if __name__ == "__main__":
    main()
