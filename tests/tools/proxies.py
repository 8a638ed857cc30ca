"""Checks the configurations of examples/proxies with HAProxy and nginx: two instances behind mutual TLS.

The proxy passes each code, detail and trailer unchanged, and the longest token. A watch is silent but for its heartbeats, which keep it
below the proxy's limits: the check lowers them from 60 s to 30 s. An instance restarts while calls and a watch go on.
"""

import concurrent.futures
import contextlib
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
from facade import ROOT, SANDBOX_TOKEN, Checks, Facade, Program, free_port, make_certificate
from rpc import call, request, watch

NAME = "rds-task-facade"
FAILURES = ("task-not-found", "throttled-retry-after", "policy-denial", "status-503", "no/such/id")
DETAILS = "grpc-status-details-bin"
REASON = re.compile(rb"\b[A-Z]+_[A-Z_]+\b")
# Metadata whose value differs between two calls.
VARYING = {DETAILS, "x-upstream-request-id", "grpc-retry-pushback-ms", "date"}
TOKEN_BYTES = 31 * 1024
LIMIT_SECONDS, WATCH_SECONDS = 30, 35
# A check of HAProxy every 2 s takes an instance out after three failures.
DRAIN = "--drain-delay=8s"


def main():
    checks = Checks()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        identities = {who: make_certificate(folder, who, f"DNS:{NAME}") for who in ("facade", "proxy", "client", "other")}
        certificate, key = identities["facade"]
        flags = ["--sandbox", "--credentials=caller", "--max-attempts=1", DRAIN]
        flags += [f"--tls-cert={certificate}", f"--tls-key={key}", f"--tls-client-ca={identities['proxy'][0]}"]
        facades = [stack.enter_context(Facade(*flags)) for _ in range(2)]
        direct_port = int(facades[1].address.rpartition(":")[2])
        direct = stack.enter_context(open_channel(direct_port, identities["proxy"], certificate))
        runs, proxies = [], []
        for start in (haproxy, nginx):
            port = free_port()
            proxy = stack.enter_context(start(folder, port, facades, identities))
            channel = stack.enter_context(open_channel(port, identities["client"], identities["proxy"][0]))
            grpc.channel_ready_future(channel).result(30)
            check(checks, start.__name__, channel, direct, port, identities)
            runs.append((start.__name__, channel))
            proxies.append(proxy)
        check_watches(checks, runs, facades[0])
        # HAProxy prints the changes of an instance's health.
        seen = [line.partition(", reason")[0].partition("Server ")[2] for line in proxies[0].output if "Server " in line]
        checks.equal("haproxy: the instance that stopped is down, and no other was", seen, ["rds-task-facade/one is DOWN"])
    checks.finish()


def haproxy(folder, port, facades, identities):
    """Starts HAProxy with the example's configuration."""
    tls = folder / "haproxy"
    tls.mkdir()
    (tls / "proxy.pem").write_text("".join(Path(file).read_text() for file in identities["proxy"]))
    return Program(["haproxy", "-db", "-f", configure("haproxy.cfg", folder, port, facades, identities)])


def nginx(folder, port, facades, identities):
    """Starts nginx with the example's configuration."""
    tls = folder / "nginx"
    tls.mkdir()
    certificate, key = identities["proxy"]
    shutil.copy(certificate, tls / "proxy.pem")
    shutil.copy(key, tls / "proxy-key.pem")
    configuration = configure("nginx.conf", folder, port, facades, identities)
    options = f"daemon off; pid {folder}/nginx.pid; error_log stderr;"
    return Program(["nginx", "-p", str(folder), "-e", "stderr", "-c", configuration, "-g", options])


def configure(name, folder, port, facades, identities):
    """Writes the example's configuration with these ports and files and the lower limit on silence. Returns its path."""
    tls = Path(name).stem
    text = (ROOT / "examples/proxies" / name).read_text()
    text = text.replace("bind :50051", f"bind 127.0.0.1:{port}").replace("listen 50051", f"listen 127.0.0.1:{port}")
    for number, facade in enumerate(facades, 1):
        metrics = facade.metrics.rpartition(":")[2]
        text = text.replace(f"10.0.0.{number}:50051 check port 9464", f"{facade.address} check port {metrics}")
        text = text.replace(f"10.0.0.{number}:50051", facade.address)
    text = text.replace(f"/etc/{tls}/tls", str(folder / tls)).replace(" 60s", f" {LIMIT_SECONDS}s")
    shutil.copy(identities["client"][0], folder / tls / "clients-ca.pem")
    shutil.copy(identities["facade"][0], folder / tls / "facade-ca.pem")
    path = folder / name
    path.write_text(text)
    return str(path)


def open_channel(port, identity, ca):
    certificate, key = (Path(file).read_bytes() for file in identity)
    credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes(), key, certificate)
    options = [("grpc.ssl_target_name_override", NAME), ("grpc.enable_retries", 0)]
    return grpc.secure_channel(f"127.0.0.1:{port}", credentials, options)


def check(checks, proxy, channel, direct, port, identities):
    token = (("x-auth-token", SANDBOX_TOKEN),)
    checks.equal(f"{proxy}: a call", call(channel, metadata=token)[0], "OK")
    for instance_id in FAILURES:
        seen, expected = (call(c, request(instance_id), metadata=(*token, ("x-request-id", proxy))) for c in (channel, direct))
        checks.equal(f"{proxy}: code of {instance_id}", seen[0], expected[0])
        missing = expected[1].keys() - seen[1].keys()
        changed = {name for name, value in expected[1].items() if name not in VARYING and seen[1].get(name) != value}
        checks.equal(f"{proxy}: metadata of {instance_id}", (missing, changed), (set(), set()))
        checks.equal(f"{proxy}: reason of {instance_id}", REASON.findall(seen[1][DETAILS]), REASON.findall(expected[1][DETAILS]))
    long_token = call(channel, metadata=(("x-auth-token", "t" * TOKEN_BYTES),))
    arrived = b"CREDENTIAL_REJECTED" in long_token[1].get(DETAILS, b"")
    checks.that(f"{proxy}: a token of 31 KiB reaches the facade", arrived, long_token)
    with open_channel(port, identities["other"], identities["proxy"][0]) as stranger:
        checks.that(f"{proxy}: another certificate is rejected", call(stranger, timeout=5)[0] != "OK")


def check_watches(checks, runs, first):
    """A silent watch; then the first instance drains while calls go on."""
    token = (("x-auth-token", SANDBOX_TOKEN),)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        silent = [pool.submit(watch, channel, request("no-status"), WATCH_SECONDS, token) for _, channel in runs]
        for (proxy, _), future in zip(runs, silent):
            code, messages = future.result()
            checks.equal(f"{proxy}: a silent watch lasts until its deadline", code, "DEADLINE_EXCEEDED")
            checks.equal(f"{proxy}: messages of {WATCH_SECONDS} s", len(messages), 2)

        over = threading.Event()

        def keep_calling(channel):
            codes = Counter()
            while not over.is_set():
                codes[call(channel, metadata=token)[0]] += 1
                time.sleep(0.02)
            return codes

        calling = [pool.submit(keep_calling, channel) for _, channel in runs]
        first.stop()
        time.sleep(1)
        over.set()
        for (proxy, _), future in zip(runs, calling):
            codes = future.result()
            checks.that(f"{proxy}: {codes['OK']} calls while an instance stops", codes["OK"] > 50 and set(codes) == {"OK"}, codes)


if __name__ == "__main__":
    main()
