"""Checks the clients of examples/clients against the sandbox: a reply, error details, a retry, a deadline, TLS with and without a
certificate of the client, a token, watches, the help text.

examples/clients/build builds them first. The facade makes one attempt per call, so that only the client's own retry can
recover from the 503 of the instance `flaky-1`. The server's UNAVAILABLE counter shows whether the client received that error.

The watched tasks change when the check sets the sandbox's clock: by themselves, they would take a day.
"""

import contextlib
import itertools
import json
import os
import re
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from facade import EXAMPLE_TASK, PROJECT_ID, ROOT, SANDBOX_TOKEN, Checks, Facade, Program, Sandbox, free_port, make_certificate
from metrics import scrape

FOLDER = ROOT / "examples/clients"
RUST_TARGET = Path(os.environ.get("CARGO_TARGET_DIR", FOLDER / "rust/target"))
CLIENTS = {
    "go": [FOLDER / "go/client"],
    "python": [FOLDER / "python/.venv/bin/python", FOLDER / "python/client.py"],
    "node": ["node", FOLDER / "node/client.js"],
    "java": ["java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-jar", FOLDER / "java/target/client.jar"],
    "rust": [RUST_TARGET / "debug/rds-task-facade-client"],
}

# For ten clients that start at once on a busy machine.
PATIENCE_SECONDS = 60

# A course of the sandbox: pending, then running, then over.
COURSE_SECONDS = 100_000
LIFECYCLE, FAILS = f"lifecycle-{COURSE_SECONDS}", f"fails-{COURSE_SECONDS}"
# In the middle of a percent, so that the time of the checks makes no difference.
HALFWAY_SECONDS = 45_500
PENDING, RUNNING = "TASK_STATE_PENDING 0%", "TASK_STATE_RUNNING 45%"
SUCCEEDED, FAILED = "TASK_STATE_SUCCEEDED", "TASK_STATE_FAILED"


def main():
    checks = Checks()
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = make_certificate(Path(folder), "server")
        other = make_certificate(Path(folder), "other")
        identity = make_certificate(Path(folder), "client")
        tls = [f"--tls-cert={certificate}", f"--tls-key={key}"]
        with (
            Facade("--sandbox", "--max-attempts=1") as plain,
            Facade("--sandbox", *tls) as encrypted,
            Facade("--sandbox", *tls, f"--tls-client-ca={identity[0]}") as mutual,
            Sandbox() as sandbox,
            Facade(f"--endpoint={sandbox.url}", "--credentials=caller") as callers,
        ):
            plain.wait_until_serving()
            for language, command in CLIENTS.items():
                begun = time.monotonic()
                check(checks, language, Client(command, plain.address), plain)
                check_tls(checks, language, Client(command, encrypted.address), certificate, other[0])
                check_mutual_tls(checks, language, Client(command, mutual.address), certificate, identity, other)
                check_token(checks, language, Client(command, callers.address))
                check_options(checks, language, Client(command, plain.address))
                print(f"      {language}: {time.monotonic() - begun:.1f} s")
    begun = time.monotonic()
    check_watches(checks)
    print(f"      watches: {time.monotonic() - begun:.1f} s")
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


def check_mutual_tls(checks, language, client, ca, identity, other_identity):
    def call(certificate, key):
        return client("--ca", ca, "--cert", certificate, "--key", key, "--timeout", "5")

    result = call(*identity)
    checks.that(f"{language} gets the example task with its certificate", prints(result, EXAMPLE_TASK), result)
    rejections = {"another certificate": call(*other_identity), "no certificate": client("--ca", ca, "--timeout", "5")}
    for title, rejected in rejections.items():
        checks.equal(f"{language} exits 1 with {title}", rejected.returncode, 1)


def check_options(checks, language, client):
    names = ["target", "ca", "cert", "key", "token", "project-id", "instance-id", "workflow-id", "timeout"]
    shown = client("--help")
    missing = [name for name in names if f"-{name} " not in shown.stdout + shown.stderr]
    checks.equal(f"{language} --help exits 0 and has every option", (shown.returncode, missing), (0, []))
    invalid = {"an unknown option": ["--nope", "1"], "a certificate without its key": ["--cert", "client.pem"]}
    for title, arguments in invalid.items():
        rejected = client(*arguments)
        checks.equal(f"{language} exits 2 for {title}", rejected.returncode, 2)
        checks.that(f"{language} prints no stack trace for {title}", "    at " not in rejected.stderr, rejected)


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


def check_watches(checks):
    """The clients of all languages watch the same tasks at the same time."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        sandbox = stack.enter_context(Sandbox())

        def serve():
            # A grace period of 2 s spreads the ends of the watches over 1 s.
            flags = ["--credentials=caller", "--watch-interval=100ms", "--watch-rate=off", "--shutdown-grace=2s"]
            return stack.enter_context(Facade(f"--endpoint={sandbox.url}", *flags, port=port))

        def watch(name, instance_id, token=SANDBOX_TOKEN, timeout=300):
            ids = ["--instance-id", instance_id, "--workflow-id", name]
            options = ["--target", f"127.0.0.1:{port}", *ids, "--token", token, "--timeout", str(timeout)]
            programs = {language: Program([*command, "watch", *options]) for language, command in CLIENTS.items()}
            for program in programs.values():
                stack.enter_context(program)
            return programs

        def wait_for(state, programs):
            for language, program in programs.items():
                program.wait_for(f"{state} from {language}", lambda output: state in output or None, PATIENCE_SECONDS)

        facade = serve()
        throttled = watch("throttled", "throttled", token=issue_token(sandbox), timeout=60)
        endless = watch("endless", "no-status", timeout=3)
        for language, client in endless.items():
            checks.equal(f"{language} exits 4 when the time of its watch is over", client.wait(PATIENCE_SECONDS), 4)
        for language, client in throttled.items():
            # The delay is longer than the time that is left.
            checks.equal(f"{language} exits 4 after a RetryInfo of minutes", client.wait(PATIENCE_SECONDS), 4)
            seen = "\n".join(client.output)
            checks.that(f"{language} does not call before the delay is over", seen.count("reason: THROTTLED") == 1, seen)

        for code, instance_id in (("INTERNAL", "html-200"), ("RESOURCE_EXHAUSTED", "instance-quota")):
            for language, client in watch("permanent", instance_id).items():
                checks.equal(f"{language} exits 1 on {code} of {instance_id}", client.wait(PATIENCE_SECONDS), 1)

        failing = watch("failing", FAILS)
        expiring = watch("expiring", LIFECYCLE, token=issue_token(sandbox))
        wait_for(PENDING, failing)
        wait_for(PENDING, expiring)
        set_clock(sandbox, COURSE_SECONDS)
        for language, client in failing.items():
            checks.equal(f"{language} exits 3 after a failed task", client.wait(PATIENCE_SECONDS), 3)
            checks.equal(f"{language} prints the states of a failed task", states(client), [PENDING, FAILED])
        for language, client in expiring.items():
            checks.equal(f"{language} exits 1 when its token has expired", client.wait(PATIENCE_SECONDS), 1)
            seen = "\n".join(client.output)
            checks.that(f"{language} prints UNAUTHENTICATED", re.search(r"^unauthenticated: ", seen, re.I | re.M), seen)
            checks.that(f"{language} prints CREDENTIAL_REJECTED", seen.count("reason: CREDENTIAL_REJECTED") == 1, seen)

        set_clock(sandbox, 0)
        resuming = watch("resuming", LIFECYCLE)
        wait_for(PENDING, resuming)
        facade.stop()
        facade = serve()
        first = wait_for_messages(facade, len(CLIENTS))
        checks.equal("a restart without a change: the first messages", first, {"heartbeat": len(CLIENTS), "state": 0})
        set_clock(sandbox, HALFWAY_SECONDS)
        wait_for(RUNNING, resuming)
        # A killed facade sends no status: the code comes from the client's library.
        facade.kill()
        set_clock(sandbox, COURSE_SECONDS)
        serve()
        for language, client in resuming.items():
            checks.equal(f"{language} exits 0 after a restart, a crash and a task that succeeded", client.wait(PATIENCE_SECONDS), 0)
            # Times change without the percentage, so a running task has several states of one text.
            seen = states(client)
            texts = [text for text, _ in itertools.groupby(seen)]
            checks.equal(f"{language} prints each state", texts, [PENDING, RUNNING, SUCCEEDED])
            once = (seen.count(PENDING), seen.count(SUCCEEDED))
            checks.equal(f"{language} prints the first and the last state once", once, (1, 1))


def states(client):
    return [line for line in client.output if line.startswith("TASK_STATE_")]


def wait_for_messages(facade, count):
    """Waits until the facade has sent this number of messages to watches. Returns the number of each kind."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        samples = scrape(facade.metrics)["rds_watch_messages"].samples
        sent = {sample.labels["kind"]: int(sample.value) for sample in samples}
        if sum(sent.values()) >= count:
            return sent
        if time.monotonic() > deadline:
            raise AssertionError(f"messages sent: {sent}, expected: {count}")
        time.sleep(0.05)


def set_clock(sandbox, seconds):
    """Sets the sandbox's clock ahead of the machine's."""
    post(f"{sandbox.url}/sandbox/clock?offset-seconds={seconds}")


def issue_token(sandbox):
    """Returns a token that expires 24 hours later."""
    user = {"name": "sandbox-user", "password": "sandbox-password", "domain": {"name": "sandbox-domain"}}
    identity = {"methods": ["password"], "password": {"user": user}}
    body = {"auth": {"identity": identity, "scope": {"project": {"id": PROJECT_ID}}}}
    return post(f"{sandbox.url}/v3/auth/tokens", json.dumps(body).encode())["x-subject-token"]


def post(url, body=b""):
    """Returns the headers of the response."""
    request = urllib.request.Request(url, data=body, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.headers


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
    """Whether the output is JSON with these fields."""
    return result.returncode == 0 and fields.items() <= json.loads(result.stdout).items()


def unavailable_replies(facade):
    samples = scrape(facade.metrics)["grpc_server_handled"].samples
    return sum(sample.value for sample in samples if sample.name.endswith("_total") and sample.labels["grpc_code"] == "Unavailable")


if __name__ == "__main__":
    main()
