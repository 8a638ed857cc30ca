"""Checks the facade behind the proxies of a service mesh, under constant load, through restarts, crashes and an outage.

    load -> Envoy of the caller -> mutual TLS -> Envoy of each pod -> two instances -> sandbox

The caller's proxy balances per call, checks gRPC health, and retries only calls that reached no pod. Each scenario counts the
calls that did not end with OK, and measures the time until calls succeed again.
"""

import contextlib
import socket
import ssl
import tempfile
import time
import urllib.request
from collections import Counter

from facade import Checks, Sandbox, free_port
from mesh.certificates import Identities
from mesh.envoy import Envoy, client_side
from mesh.load import DEADLINE_SECONDS, Load
from mesh.pod import CALLER, SERVER, Pod, healthy, wait_for_health

RESTARTS = 6
CRASHES = 3
SETTLE_SECONDS = 1.5
OUTAGE_SECONDS = 5
RECOVERY_SECONDS = 2
# The facade's circuit breaker allows a probe every 1.5 s; the rest is for the proxies and for a busy machine.
OUTAGE_RECOVERY_SECONDS = 2.5


class Mesh:
    def __init__(self, checks, load, client, pods, identities, upstream_port):
        self.checks, self.load, self.client, self.pods = checks, load, client, pods
        self.identities, self.upstream_port = identities, upstream_port

    def settle(self):
        wait_for_health(self.client, len(self.pods))
        time.sleep(SETTLE_SECONDS)

    def none_failed(self, title, begun):
        calls = self.load.between(begun, time.monotonic())
        failed = [call for call in calls if call.failed]
        self.checks.that(f"{title}: {len(calls)} calls, {len(failed)} failed", calls and not failed, failed[:3])

    def undisturbed(self):
        begun = time.monotonic()
        time.sleep(2)
        self.none_failed("no disturbance", begun)
        requests = [pod.proxy.stat("http.inbound.downstream_rq_total") for pod in self.pods]
        self.checks.that(f"both pods get calls: {requests}", min(requests) > 0.5 * max(requests))

    def rolling_restarts(self):
        begun = time.monotonic()
        slowest = 0
        for number in range(RESTARTS):
            pod = self.pods[number % len(self.pods)]
            code, took = pod.stop()
            slowest = max(slowest, took)
            if code != 0:
                self.checks.that(f"{pod.name} exits with 0", False, code)
            pod.start()
            self.settle()
        self.none_failed(f"{RESTARTS} rolling restarts, the slowest drain {slowest:.1f} s", begun)

    def rotation(self):
        begun = time.monotonic()
        proxies = [self.client, *(pod.proxy for pod in self.pods)]
        before = [proxy.certificate_serial() for proxy in proxies]
        handshakes = self.client.stat("cluster.facade.ssl.handshake")
        self.identities.rotate(1)
        for proxy, old in zip(proxies, before):
            proxy.wait_until("the new certificate", lambda: proxy.certificate_serial() != old)
        swapped = self.client.stat("cluster.facade.ssl.handshake")
        # The caller's proxy closes each connection after 3 s.
        time.sleep(5)
        after = self.client.stat("cluster.facade.ssl.handshake")
        self.checks.that(f"the new certificates are in use: {after - swapped} handshakes", handshakes <= swapped < after)
        self.checks.equal("no handshake failed", self.client.stat("cluster.facade.ssl.connection_error"), 0)
        self.none_failed("certificates and root rotated", begun)

    def crash(self, title, kill, restart, only_in_flight):
        """Kills pods under load, `CRASHES` times. Calls in flight there may fail; later ones must succeed again soon."""
        killed = failed_in_flight = failed_later = 0
        slowest, messages = 0.0, Counter()
        for number in range(CRASHES):
            pod = self.pods[number % len(self.pods)]
            in_flight = pod.proxy.stat("cluster.instance.upstream_rq_active")
            begun = time.monotonic()
            kill(pod)
            at = time.monotonic()
            time.sleep(RECOVERY_SECONDS + 0.5)
            failed = [call for call in self.load.between(begun, time.monotonic()) if call.failed]
            killed += in_flight
            failed_in_flight += sum(call.begun <= at for call in failed)
            later = [call for call in failed if call.begun > at]
            failed_later += len(later)
            messages.update(call.message for call in later)
            slowest = max([slowest, *(call.ended - at for call in failed)])
            restart(pod)
            ready = pod.start_seconds
            self.checks.that(f"{title}: the instance serves again after {ready:.1f} s", ready < RECOVERY_SECONDS)
            self.settle()
        self.checks.that(
            f"{title}, {CRASHES} times: {failed_in_flight} of about {killed} calls in flight and {failed_later} later calls "
            f"failed, the last one {slowest * 1000:.0f} ms after the crash",
            slowest < RECOVERY_SECONDS and (not only_in_flight or failed_later == 0),
            messages.most_common(4),
        )

    def outage(self, sandbox):
        detected = self.client.stat("cluster.facade.outlier_detection.ejections_detected_consecutive_gateway_failure")
        ejected = self.client.stat("cluster.facade.outlier_detection.ejections_enforced_total")
        down = time.monotonic()
        sandbox.kill()
        time.sleep(OUTAGE_SECONDS)
        back = time.monotonic()
        with Sandbox(self.upstream_port):
            time.sleep(OUTAGE_RECOVERY_SECONDS + 1)
            now = time.monotonic()
            during = [call for call in self.load.between(down, back) if call.begun > down + 0.5]
            failed = [call for call in self.load.between(down, now) if call.failed]
            codes = Counter(call.code.name for call in failed)
            recovered = max(call.ended for call in failed) - back
            longest = max(call.ended - call.begun for call in failed)
            lost = sum(call.failed for call in during)
            self.checks.equal("outage of upstream: each failed call is UNAVAILABLE", set(codes), {"UNAVAILABLE"})
            self.checks.that(
                f"outage of upstream, {OUTAGE_SECONDS} s: {lost} of {len(during)} calls failed, the slowest after "
                f"{longest:.1f} s; the last one failed {recovered:.1f} s after upstream was back",
                recovered < OUTAGE_RECOVERY_SECONDS and longest < DEADLINE_SECONDS,
            )
            noticed = self.client.stat(
                "cluster.facade.outlier_detection.ejections_detected_consecutive_gateway_failure"
            )
            now_ejected = self.client.stat("cluster.facade.outlier_detection.ejections_enforced_total")
            self.checks.that(
                f"outage of upstream: no pod was ejected; gateway errors would have ejected pods {noticed - detected} times",
                now_ejected == ejected and noticed > detected,
                (ejected, now_ejected, detected, noticed),
            )
            self.checks.equal("outage of upstream: health stays SERVING", healthy(self.client), len(self.pods))

    def sizes(self):
        for pod in self.pods:
            metrics = metrics_of(pod.instance)
            memory = metrics["process_resident_memory_bytes"] / 2**20
            calls = sum(value for name, value in metrics.items() if is_call(name))
            cpu = metrics["process_cpu_seconds_total"] / calls * 1000
            print(f"      {pod.name}: {memory:.1f} MiB resident, {cpu:.2f} ms of CPU per call, {calls:.0f} calls")


def is_call(name):
    return name.startswith("grpc_server_handled_total{") and "GetTaskDetail" in name


def metrics_of(instance):
    with urllib.request.urlopen(f"http://{instance.metrics}/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#") and " # " not in line)
    return {name: float(value) for name, _, value in samples}


def check_strict(checks, pod):
    """The proxy rejects plain text, and TLS without a client certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
    for name, wrap in (("plain text", lambda s: s), ("no client certificate", lambda s: context.wrap_socket(s))):
        answer = b"closed"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", pod.port), timeout=5) as plain:
            answer = b""
            with wrap(plain) as connection:
                connection.sendall(preface)
                answer = connection.recv(100)
        # An HTTP/2 server would send SETTINGS; a TLS alert begins with 0x15.
        checks.that(f"mutual TLS is strict: {name} is rejected", answer in (b"", b"closed") or answer[0] == 0x15, answer)


def main():
    checks = Checks()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        identities = Identities(folder, [CALLER, SERVER])
        sandbox = stack.enter_context(Sandbox())
        pods = [Pod(f"pod-{number}", folder, identities, sandbox.url) for number in (1, 2)]
        for pod in pods:
            stack.callback(pod.close)
            pod.start()
        port = free_port()
        resources = client_side(port, [pod.port for pod in pods], identities.path(CALLER), SERVER)
        client = stack.enter_context(Envoy(folder, "caller", resources))
        check_strict(checks, pods[0])
        wait_for_health(client, len(pods))
        with Load(port) as load:
            mesh = Mesh(checks, load, client, pods, identities, sandbox.port)
            mesh.settle()
            mesh.undisturbed()
            mesh.rolling_restarts()
            mesh.rotation()
            mesh.settle()
            mesh.crash("kill -9 of a pod", Pod.kill, Pod.start, True)
            mesh.crash("kill -9 of an instance behind its proxy", lambda pod: pod.instance.kill(), Pod.start_instance, False)
            mesh.outage(sandbox)
            mesh.sizes()
        calls = load.all()
        seconds = max(call.ended for call in calls) - min(call.begun for call in calls)
        print(f"      {len(calls)} calls in {seconds:.0f} s")
    checks.finish()


if __name__ == "__main__":
    main()
