"""Checks consistent hashing in a mesh: equal calls meet at one of three replicas, which coalesces and caches for the whole fleet.

    calls -> Envoys of two callers, ring hash -> mutual TLS -> Envoy of each pod -> instance -> an upstream that counts

The header that is hashed is the one of deploy/kubernetes/components/istio-hash and istio-hash-own. A cache that outlives the check
makes the numbers of upstream requests exact, however slow the machine is.
"""

import contextlib
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import yaml

from facade import INSTANCE_ID, ROOT, SANDBOX_TOKEN, Checks, free_port
from mesh.certificates import Identities
from mesh.envoy import HTTP_OPTIONS, Envoy, client_side
from mesh.pod import CALLER, SERVER, Pod, wait_for_health
from mesh.upstream import Tasks, Upstream
from rpc import WATCH_METHOD, call, request

# As callers address the Service.
AUTHORITY = "rds-task-facade:50051"
REPLICAS = 3
TOKENS = [f"token-{number}" for number in range(36)]
TASKS = 2
# Of each token about each task.
CALLS = 4
WATCHERS = 4
TOLERANCE = 0.1
# Istio's default.
RING = {"lb_policy": "RING_HASH", "ring_hash_lb_config": {"minimum_ring_size": 1024}}


def hashed_header(component):
    rule = yaml.safe_load((ROOT / f"deploy/kubernetes/components/{component}/destination-rule.yaml").read_text())
    policy = rule["spec"]["trafficPolicy"]
    assert policy["outlierDetection"] is None, policy
    return policy["loadBalancer"]["consistentHash"]["httpHeaderName"]


def hashing(port, pods, identities, header):
    """The caller's side with a ring instead of round robin, and without outlier detection. The ring changes only when a pod is gone:
    connections last, and a slow machine does not make a pod unhealthy."""
    resources = client_side(port, [pod.port for pod in pods], identities.path(CALLER), SERVER)
    (cluster,) = resources["clusters"]
    cluster.update(RING)
    del cluster["outlier_detection"]
    del cluster["typed_extension_protocol_options"][HTTP_OPTIONS]["common_http_protocol_options"]
    cluster["health_checks"][0]["timeout"] = "20s"
    manager = resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    for route in manager["route_config"]["virtual_hosts"][0]["routes"]:
        route["route"]["hash_policy"] = [{"header": {"header_name": header}}]
    return resources


class Fleet:
    """Three pods, each with an upstream that only its instance uses, and callers' proxies."""

    def __init__(self, stack, checks, folder, identities, name, credentials):
        self.checks, self._stack, self._folder, self._identities, self._name = checks, stack, folder, identities, name
        tasks = Tasks()
        self.upstreams = [stack.enter_context(Upstream(tasks)) for _ in range(REPLICAS)]
        self.pods = [
            Pod(f"{name}-{number}", folder, identities, upstream.url, "--cache-ttl=10m", credentials=credentials)
            for number, upstream in enumerate(self.upstreams)
        ]
        for pod in self.pods:
            stack.callback(pod.close)
            pod.start()

    def caller(self, name, resources_of, pods):
        """A caller's proxy in front of these pods: the proxy and a channel to it."""
        port = free_port()
        proxy = self._stack.enter_context(Envoy(self._folder, f"{self._name}-{name}", resources_of(port, pods, self._identities)))
        wait_for_health(proxy, len(pods))
        options = [("grpc.enable_retries", 0), ("grpc.default_authority", AUTHORITY)]
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options)
        self._stack.callback(channel.close)
        return proxy, channel

    def hashing_callers(self, header):
        """Two callers' proxies that hash this header: the proxies and the channels."""

        def ring(port, pods, identities):
            return hashing(port, pods, identities, header)

        return zip(*(self.caller(f"caller-{number}", ring, self.pods) for number in range(2)))

    def load(self, name, channels, tokens=TOKENS):
        """Makes all calls, a few at a time. Returns the upstream requests of each replica by token, and the codes."""
        before = [Counter(upstream.lookups) for upstream in self.upstreams]
        lookups = [(token, f"{name}-{task}") for token in tokens for task in range(TASKS)]

        def one(number):
            token, workflow_id = lookups[number % len(lookups)]
            metadata = [("x-auth-token", token)] if token else []
            return call(channels[number % len(channels)], request(INSTANCE_ID, workflow_id), metadata=metadata)[0]

        with ThreadPoolExecutor(16) as workers:
            codes = Counter(workers.map(one, range(CALLS * len(lookups) + 1)))
        made = [upstream.lookups - seen for upstream, seen in zip(self.upstreams, before)]
        return [tokens_of(counter) for counter in made], codes


def tokens_of(lookups):
    by_token = Counter()
    for (token, _), count in lookups.items():
        by_token[token] += count
    return by_token


def replicas_of(requests):
    """The replicas that made requests with each token."""
    return {token: {n for n, made in enumerate(requests) if made[token]} for made in requests for token in made}


def total(requests):
    return sum(made.total() for made in requests)


def wait_for_pods(proxies, count):
    for proxy in proxies:
        wait_for_health(proxy, count)


def round_robin(port, pods, identities):
    return client_side(port, [pod.port for pod in pods], identities.path(CALLER), SERVER)


def by_token(fleet):
    header = hashed_header("istio-hash")
    checks, pods = fleet.checks, fleet.pods
    proxies, channels = fleet.hashing_callers(header)
    _, alone = fleet.caller("alone", round_robin, pods[:1])
    _, spread = fleet.caller("spread", round_robin, pods)
    expected = {"OK": CALLS * len(TOKENS) * TASKS + 1}

    single, codes = fleet.load("one", [alone])
    checks.equal("one replica: codes", codes, expected)
    everywhere, _ = fleet.load("everywhere", [spread])
    hashed, codes = fleet.load("hashed", channels)
    checks.equal("ring hash on the token: codes", codes, expected)
    checks.that(
        f"{expected['OK']} calls cause {total(single)} upstream requests of one replica, {total(hashed)} of {REPLICAS} behind ring hash "
        f"on {header}, {total(everywhere)} behind round robin",
        abs(total(hashed) - total(single)) <= TOLERANCE * total(single) and total(everywhere) > 1.5 * total(single),
    )
    homes = replicas_of(hashed)
    checks.that("each token is used by one replica", all(len(home) == 1 for home in homes.values()), homes)
    checks.that("the tokens are spread over the replicas", len(set.union(*homes.values())) > 1, homes)

    watched_by_one_replica(fleet, channels)

    (gone,) = homes[TOKENS[0]]
    moved = {token for token, home in homes.items() if home == {gone}}
    pods[gone].kill()
    wait_for_pods(proxies, len(pods) - 1)
    changed, codes = fleet.load("changed", channels)
    checks.equal(f"the replica of {len(moved)} of {len(TOKENS)} tokens is lost: codes", codes, expected)
    after = replicas_of(changed)
    others = set(homes) - moved
    stay = sum(after[token] == homes[token] for token in others)
    # Envoy's ring has a minimum size, so that a remaining replica gets more points, and with them some tokens of the other one.
    checks.that(f"{stay} of {len(others)} other tokens stay where they are", stay > len(others) / 2)
    checks.that("each token is used by one replica again", all(len(home) == 1 and gone not in home for home in after.values()), after)
    checks.equal("upstream requests of two replicas", total(changed), total(hashed))
    pods[gone].start()
    wait_for_pods(proxies, len(pods))
    back = replicas_of(fleet.load("back", channels)[0])
    checks.equal("all return when the replica is back at its address", back, homes)


def watched_by_one_replica(fleet, channels):
    """Watches of one task, through both callers' proxies."""
    token, metadata = TOKENS[0], [("x-auth-token", TOKENS[0])]
    streams = []
    for number in range(WATCHERS):
        method = channels[number % len(channels)].unary_stream(WATCH_METHOD)
        streams.append(method(request(INSTANCE_ID, "watched"), timeout=30, metadata=metadata))
    for stream in streams:
        next(iter(stream))
    polled = [upstream.lookups[token, "watched"] for upstream in fleet.upstreams]
    for stream in streams:
        stream.cancel()
    fleet.checks.that(f"{WATCHERS} watches of one task are polled by one replica: {polled}", sum(made > 0 for made in polled) == 1)


def by_authority(fleet):
    header = hashed_header("istio-hash-own")
    checks, pods = fleet.checks, fleet.pods
    proxies, channels = fleet.hashing_callers(header)
    expected = {"OK": CALLS * TASKS + 1}
    requests, codes = fleet.load("own", channels, [None])
    checks.equal("ring hash on the authority: codes", codes, expected)
    homes = replicas_of(requests)[SANDBOX_TOKEN]
    checks.that(f"one replica serves all calls, with {total(requests)} upstream requests", len(homes) == 1 and total(requests) == TASKS, homes)
    (gone,) = homes
    pods[gone].kill()
    wait_for_pods(proxies, len(pods) - 1)
    requests, codes = fleet.load("changed", channels, [None])
    checks.equal("the replica is lost: codes", codes, expected)
    homes = replicas_of(requests)[SANDBOX_TOKEN]
    checks.that("another one takes over all calls", len(homes) == 1 and gone not in homes and total(requests) == TASKS, (gone, requests))


def main():
    checks = Checks()
    with tempfile.TemporaryDirectory() as folder:
        identities = Identities(folder, [CALLER, SERVER])
        with contextlib.ExitStack() as stack:
            by_token(Fleet(stack, checks, folder, identities, "caller", "caller"))
        with contextlib.ExitStack() as stack:
            by_authority(Fleet(stack, checks, folder, identities, "own", "token"))
    checks.finish()


if __name__ == "__main__":
    main()
