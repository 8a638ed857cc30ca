"""Renders deploy/kubernetes with kustomize and checks the resources: the base, each component alone on it, each pair that may be used
together, the full set for each mesh, and the overlays. The table of components in docs/operations.md defines what goes together.

kubernetes-validate checks Kubernetes' own resources strictly, against the oldest and the newest supported version. The
minimal schemas in crds/ check custom resources; they contain only the fields that are used here. Then come the rules that no
schema expresses: names that must match, times that must add up, and, by cluster.py, who can reach whom.
"""

import copy
import csv
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml

from cluster import NAMESPACE, Party, admits, authorizes, connects, facade_pods, selects
from facade import PROGRAM, ROOT, SERVICE, Checks, tool

KUBERNETES = ROOT / "deploy/kubernetes"
CRDS = Path(__file__).parent / "crds"
VERSIONS = ["1.29.0", "1.37.0"]
MESHES = {"istio", "ambient", "linkerd"}
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
# Envoy's outlier detection counts UNAVAILABLE as a 503 and DEADLINE_EXCEEDED as a 504.
EJECTING = ("consecutive5xxErrors", "consecutiveGatewayErrors")
# The remote folders that an overlay refers to.
REMOTE = re.compile(r"https://\S+//deploy/kubernetes/([\w/-]+)\?ref=v\S+")

CALLER = Party("a caller of another namespace", "team-a", {"app": "worker", "rds-task-facade/caller": "true"})
STRANGER = Party("a pod without the label", "team-a", {"app": "worker"})
NEIGHBOUR = Party("a pod of the same namespace without the label", NAMESPACE, {"app": "other"})
PROMETHEUS = Party("Prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"})
GATEWAY = Party("the Gateway", "gateway", {"app": "gateway"})
AMBIENT_PROBE = Party("a probe in ambient mode", address="169.254.7.127")


def components_table():
    """Each component with the components that it needs and those that exclude it."""
    text = (ROOT / "docs/operations.md").read_text()
    rows = re.search(r"^\| component \| purpose \| needs \| not with \|\n\|[- |]+\n((?:\|.*\n)+)", text, re.M)[1]
    table = {}
    for row in rows.splitlines():
        name, _, needs, excluded = (cell.strip() for cell in row.strip("|").split("|"))
        table[name.strip("`")] = (re.findall(r"`([\w-]+)`", needs), set(re.findall(r"`([\w-]+)`", excluded)))
    return table


def combinations(table):
    """Lists of components, each after those that it needs."""

    def closed(names):
        ordered = []
        for name in names:
            for needed in [*table[name][0], name]:
                if needed not in ordered:
                    ordered.append(needed)
        return ordered

    def allowed(names):
        return not any(b in table[a][1] or a in table[b][1] for a, b in itertools.combinations(names, 2))

    yield []
    found = {()}
    full = []
    for mesh in [*sorted(MESHES), None]:
        chosen = [mesh] if mesh else []
        for name in table:
            if name not in chosen and (mesh or name not in MESHES) and allowed(closed([*chosen, name])):
                chosen = closed([*chosen, name])
        full.append(chosen)
    pairs = [list(pair) for pair in itertools.permutations(table, 2)]
    for names in [[name] for name in table] + pairs + full:
        names = closed(names)
        if allowed(names) and tuple(names) not in found:
            found.add(tuple(names))
            yield names


def build(folder):
    result = subprocess.run([tool("kustomize"), "build", folder], capture_output=True, text=True, timeout=60)
    if result.returncode:
        raise AssertionError(result.stderr)
    return list(yaml.safe_load_all(result.stdout))


def render(components, settings=(), namespace=NAMESPACE, is_plain=False):
    """The resources of an overlay with these components, settings and namespace; or, if `is_plain`, of base and components alone."""
    with tempfile.TemporaryDirectory(dir=KUBERNETES, prefix=".render-") as folder:
        content = {"resources": ["../base"], "components": [f"../components/{name}" for name in components]}
        if not is_plain:
            generator = {"name": "rds-task-facade", "behavior": "merge", "literals": list(settings)}
            content |= {"namespace": namespace, "transformers": ["../derived"], "configMapGenerator": [generator]}
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(content))
        return build(folder)


def render_overlay(overlay):
    """The resources of an overlay, with the folders of this repository in place of the remote ones."""
    with tempfile.TemporaryDirectory(dir=KUBERNETES, prefix=".render-") as folder:
        shutil.copytree(overlay, folder, dirs_exist_ok=True)
        path = Path(folder) / "kustomization.yaml"
        text, count = REMOTE.subn(r"../\1", path.read_text())
        path.write_text(text)
        return build(folder), count


@functools.cache
def validator(name):
    return jsonschema.Draft202012Validator(json.loads((CRDS / name).read_text()))


def schema_of(resource):
    """The file in crds/ for a custom resource. Two groups have an AuthorizationPolicy."""
    name = f"{resource['kind'].lower()}.json"
    return f"linkerd-{name}" if resource["kind"] == "AuthorizationPolicy" and "linkerd" in resource["apiVersion"] else name


def problems(resource):
    """The violations of its schema in one resource."""
    if (CRDS / schema_of(resource)).exists():
        return [f"{error.json_path}: {error.message}" for error in validator(schema_of(resource)).iter_errors(resource)]
    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(resource, version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            found.append(f"{version}: {error}")
    return found


def seconds(text):
    return sum(int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|s|m|h)", text))


def one(resources, kind, name="rds-task-facade"):
    found = [r for r in resources if r["kind"] == kind and r["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def settings_of(resources):
    container = one(resources, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return one(resources, "ConfigMap", container["envFrom"][0]["configMapRef"]["name"])["data"]


def check_rules(that, resources, components):
    pod = one(resources, "Deployment")["spec"]["template"]
    spec, labels = pod["spec"], pod["metadata"]["labels"]
    container = spec["containers"][0]
    settings = settings_of(resources)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}

    drain = seconds(settings["RDS_TASK_FACADE_DRAIN_DELAY"])
    grace = seconds(settings["RDS_TASK_FACADE_SHUTDOWN_GRACE"])
    whole = spec["terminationGracePeriodSeconds"]
    that("drain delay and shutdown grace fit into the pod's grace period", drain + grace < whole, (drain, grace, whole))
    readiness = container["readinessProbe"]
    noticed = readiness["periodSeconds"] * readiness.get("failureThreshold", 3)
    that("the kubelet notices a failed readiness probe within the drain delay", noticed <= drain, (noticed, drain))
    that(
        "the container ports are those that the settings listen on",
        settings["RDS_TASK_FACADE_LISTEN"].endswith(f":{ports['grpc']}")
        and settings["RDS_TASK_FACADE_METRICS_LISTEN"].endswith(f":{ports['metrics']}"),
        (settings, ports),
    )
    plain = not {"tls", "linkerd"} & set(components)
    that(
        "the readiness probe uses a port that the kubelet can reach",
        readiness.get("grpc", {}).get("port") == ports["grpc"]
        if plain
        else readiness.get("httpGet") == {"path": "/readyz", "port": "metrics"} and "grpc" not in readiness,
        readiness,
    )
    that("the liveness probe checks the process, not its health", container["livenessProbe"]["httpGet"]["path"] == "/livez")
    that("no API server token is mounted", spec["automountServiceAccountToken"] is False)
    that("Services set no environment variables", spec["enableServiceLinks"] is False)
    restricted = container["securityContext"]
    that(
        "the restricted pod security standard holds",
        spec["securityContext"]["runAsNonRoot"] is True
        and spec["securityContext"]["runAsUser"] >= 1000
        and spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        and restricted["allowPrivilegeEscalation"] is False
        and restricted["readOnlyRootFilesystem"] is True
        and restricted["capabilities"] == {"drop": ["ALL"]},
        (spec["securityContext"], restricted),
    )
    resources_of_container = container["resources"]
    limited = set(resources_of_container["requests"]) & set(resources_of_container["limits"])
    that("requests and limits are set", {"cpu", "memory"} <= limited, resources_of_container)
    spread = spec["topologySpreadConstraints"]
    that("pods spread over zones and nodes", len(spread) == 2 and all(is_part(c["labelSelector"]["matchLabels"], labels) for c in spread))
    for volume in container["volumeMounts"]:
        that(f"{volume['name']} is mounted as a folder, so that updates arrive", "subPath" not in volume)
    mounted = {volume["mountPath"] for volume in container["volumeMounts"]}
    files = [value for value in settings.values() if value.startswith("/")]
    that("each file named by a setting is in a mounted folder", all(os.path.dirname(file) in mounted for file in files), (files, mounted))

    deployment = one(resources, "Deployment")["spec"]
    scaled = "autoscaler" in components
    that("two replicas are set, unless an autoscaler sets them", deployment.get("replicas") == (None if scaled else 2))
    if scaled:
        scaler = one(resources, "HorizontalPodAutoscaler")["spec"]
        that("the autoscaler scales this Deployment, to at least two pods", scaler["scaleTargetRef"]["name"] == "rds-task-facade" and scaler["minReplicas"] >= 2)

    for service in (r for r in resources if r["kind"] == "Service"):
        port = service["spec"]["ports"][0]
        protocol = "https" if "tls" in components else "kubernetes.io/h2c"
        that(f"Service {service['metadata']['name']} declares its protocol", (port["name"], port["appProtocol"]) == ("grpc", protocol), port)
        that(f"Service {service['metadata']['name']} leads to the gRPC port", ports.get(port["targetPort"]) == port["port"] == ports["grpc"], port)
        that(f"Service {service['metadata']['name']} has addresses of both families", service["spec"].get("ipFamilyPolicy") == "PreferDualStack")

    for resource in resources:
        selector = selector_of(resource)
        if selector is not None:
            name = f"{resource['kind']} {resource['metadata']['name']}"
            that(f"{name} selects the pods", selects(selector, labels), selector)
            that(f"{name} selects no other pods", not selects(selector, {"app.kubernetes.io/name": "other"}), selector)
    kinds = {r["kind"] for r in resources if selector_of(r) is not None}
    that("Deployment, Service, policy and disruption budget have selectors", {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"} <= kinds, kinds)

    if "istio" in components:
        watch, route = one(resources, "VirtualService")["spec"]["http"]
        limit = seconds(settings.get("RDS_TASK_FACADE_TIMEOUT", default_timeout()))
        retried = set(route["retries"]["retryOn"].split(","))
        that("the mesh retries only calls that reached no pod", retried <= {"connect-failure", "refused-stream"}, retried)
        that("the timeout of the mesh is longer than the facade's", seconds(route["timeout"]) > limit, (route["timeout"], limit))
        that("the first route is that of watches", watch["match"] == [{"uri": {"exact": f"/{SERVICE}/WatchTaskDetail"}}], watch)
        that("the mesh neither limits nor retries watches", (watch["timeout"], watch["retries"]) == ("0s", {"attempts": 0}), watch)
        policy = one(resources, "PeerAuthentication")["spec"]
        that("mutual TLS is strict on the gRPC port", policy["mtls"]["mode"] == "STRICT" and str(ports["grpc"]) not in policy["portLevelMtls"])
        # With consistent hashing, there is no outlier detection at all.
        traffic = one(resources, "DestinationRule")["spec"]["trafficPolicy"]
        outliers, hashed = traffic.get("outlierDetection"), "consistentHash" in traffic["loadBalancer"]
        that(
            "an outage of RDS ejects no pod",
            not outliers
            if hashed
            else outliers["splitExternalLocalOriginErrors"] is True and not any(outliers[name] for name in EJECTING),
            outliers,
        )
        entries = [r["spec"] for r in resources if r["kind"] == "ServiceEntry"]
        that("ServiceEntries change the routing of no other namespace", all(entry.get("exportTo") == ["."] for entry in entries))
        services = {r["metadata"]["name"] for r in resources if r["kind"] == "Service"}
        targets = {one(resources, "DestinationRule")["spec"]["host"], *one(resources, "VirtualService")["spec"]["hosts"]}
        targets |= {entry["destination"]["host"] for part in (watch, route) for entry in part["route"]}
        that("routes lead to the Service", targets <= services, targets)
        config = yaml.safe_load(pod["metadata"]["annotations"]["proxy.istio.io/config"])
        outlives = seconds(config["terminationDrainDuration"])
        that("the sidecar outlives the drain, within the pod's grace period", drain + grace < outlives < whole, outlives)
    if "linkerd" in components:
        server = one(resources, "Server")["spec"]
        that("only allowed peers reach the gRPC port", (server["port"], server["accessPolicy"]) == ("grpc", "deny"))
        check_watch_route(that, resources, "rds-task-facade-mesh")
    if "gateway-api" in components:
        check_watch_route(that, resources, "rds-task-facade")
    for route in (r for r in resources if r["kind"] == "GRPCRoute"):
        parents = [p for p in route["spec"]["parentRefs"] if p.get("kind") == "Service"]
        backends = [backend for rule in route["spec"]["rules"] for backend in rule["backendRefs"]]
        leads = {(reference["name"], reference["port"]) for reference in parents + backends}
        that(f"{route['metadata']['name']} leads to the Service", leads == {("rds-task-facade", ports["grpc"])}, leads)
    if "monitoring" in components:
        (endpoint,) = one(resources, "PodMonitor")["spec"]["podMetricsEndpoints"]
        that("Prometheus scrapes the metrics port", (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics"))
        job = labels.get(one(resources, "PodMonitor")["spec"].get("jobLabel"))
        that("the job is that of the rules", job == "rds-task-facade", job)
    check_network(that, resources, components)
    check_authorization(that, resources, components, ports)
    check_settings(that, settings)


def selector_of(resource):
    """The selector by which a resource chooses pods, if it has one, in the form of a Deployment's."""
    spec = resource.get("spec", {})
    if resource["kind"] == "Service":
        return {"matchLabels": spec["selector"]}
    return spec.get("podSelector", spec.get("selector"))


def check_network(that, resources, components):
    """Evaluates the NetworkPolicies."""
    ports = facade_pods(resources)[1]
    grpc, metrics = ports["grpc"], ports["metrics"]
    # Linkerd's proxy and ztunnel receive calls on ports of their own; Istio's sidecar is invisible to policies.
    calls = {grpc} | ({4143} if "linkerd" in components else set()) | ({15008} if "ambient" in components else set())
    scrapes = {metrics}
    if "istio" in components:
        scrapes |= {15020, 15090}
    if "linkerd" in components:
        scrapes |= {4191, 4143}
    if "ambient" in components:
        scrapes |= {15008}
    expected = {
        CALLER.name: (CALLER, calls),
        STRANGER.name: (STRANGER, set()),
        NEIGHBOUR.name: (NEIGHBOUR, set()),
        "another pod of the facade": (Party("", NAMESPACE, facade_pods(resources)[0].labels), set()),
        PROMETHEUS.name: (PROMETHEUS, scrapes if "monitoring" in components else set()),
        GATEWAY.name: (GATEWAY, calls if "gateway-api" in components else set()),
        AMBIENT_PROBE.name: (AMBIENT_PROBE, {grpc, metrics} if "ambient" in components else set()),
    }
    # Ports that belong to a mesh which the components do not include have no listener.
    unused = {4143, 4191, 15008, 15020, 15090} - calls - scrapes
    for name, (party, reached) in expected.items():
        admitted = {port for port in {22, 8080, grpc, metrics, 4143, 4191, 15008, 15020, 15090} - unused if admits(resources, party, port)}
        that(f"the policies admit {name} to {sorted(reached) or 'no port'}", admitted == reached, sorted(admitted))

    def connects_to(namespace=None, address="192.0.2.7", **labels):
        party = Party("", namespace, labels, address)
        return lambda port, protocol="TCP": connects(resources, party, port, protocol)

    servers = {"kube-system": 53, "openshift-dns": 5353}
    named = all(connects_to(space)(port, protocol) for space, port in servers.items() for protocol in ("UDP", "TCP"))
    that("the policies allow name servers in the cluster and on the node", named and connects_to(address="169.254.20.10")(53, "UDP"))
    that("the policies allow RDS by IPv4 and IPv6", connects_to(address="203.0.113.9")(443) and connects_to(address="2001:db8::9")(443))
    metadata = connects_to(address="169.254.169.254")
    that("the policies allow the metadata service on its port only", metadata(80) and not metadata(443))
    that("the policies allow no other port", not connects_to(address="203.0.113.9")(80) and not connects_to("team-a")(5432))
    if "istio" in components:
        that("the policies allow istiod", connects_to("istio-system")(15012))
    if "linkerd" in components:
        that("the policies allow Linkerd's control plane", all(map(connects_to("linkerd"), (8080, 8086, 8090))))


def check_authorization(that, resources, components, ports):
    """Evaluates the authorization policies of the mesh: first with every workload as a caller, then with the list of the example."""
    if not MESHES & set(components):
        return
    worker, other = ("team-a", "worker"), ("team-b", "other")
    listed = with_callers(resources, worker)
    grpc, metrics = ports["grpc"], ports["metrics"]
    that("the mesh accepts calls of each workload by default", authorizes(resources, worker, grpc) and authorizes(resources, other, grpc))
    that("a list of callers admits those", authorizes(listed, worker, grpc) and not authorizes(listed, other, grpc))
    that("the mesh rejects calls without an identity", not authorizes(resources, None, grpc) and not authorizes(listed, None, grpc))
    that("the mesh accepts a Prometheus without an identity", authorizes(listed, None, metrics) and authorizes(resources, None, metrics))


def with_callers(resources, account):
    """The resources of a mesh with a list of one service account."""
    resources = copy.deepcopy(resources)
    for resource in resources:
        if resource["kind"] == "MeshTLSAuthentication":
            resource["spec"] = {"identityRefs": [{"kind": "ServiceAccount", "namespace": account[0], "name": account[1]}]}
        elif resource["kind"] == "AuthorizationPolicy" and "rules" in resource["spec"]:
            resource["spec"]["rules"][0]["from"][0]["source"]["principals"] = ["cluster.local/ns/{}/sa/{}".format(*account)]
    return resources


def check_regions(checks):
    """The mesh allows the hosts of every region, and the program accepts the region."""
    for row in csv.DictReader((ROOT / "src/regions.tsv").open(), delimiter="\t"):
        resources = render(["istio"], [f"RDS_TASK_FACADE_REGION={row['region_id']}"])
        hosts = {host for r in resources if r["kind"] == "ServiceEntry" for host in r["spec"]["hosts"]}
        needed = {row["rds_endpoint"], row["iam_endpoint"]}
        foreign = {host for host in hosts - {"iam.myhuaweicloud.com"} if row["region_id"] not in host.split(".")}
        checks.that(f"region {row['region_id']}: the mesh allows its endpoints and those of no other", needed <= hosts and not foreign, hosts)


def check_names(checks):
    """The certificate has every name of both Services, in any namespace."""
    certificate = one(render(["tls", "headless"], namespace="databases"), "Certificate")
    suffixes = ["", ".databases", ".databases.svc", ".databases.svc.cluster.local"]
    names = {service + suffix for service in ("rds-task-facade", "rds-task-facade-pods") for suffix in suffixes}
    checks.equal("names in the certificate", set(certificate["spec"]["dnsNames"]), names)


def check_watch_route(that, resources, name):
    """The route of watches has the same parents as the general one, a more specific match, and no timeout."""
    general, watch = (one(resources, "GRPCRoute", route) for route in (name, f"{name}-watch"))
    methods = [match["method"] for match in watch["spec"]["rules"][0]["matches"]]
    that(f"{name}-watch selects watches", methods == [{"service": SERVICE, "method": "WatchTaskDetail"}], methods)
    that(f"{name}-watch has no timeout", "annotations" not in watch["metadata"], watch["metadata"])
    for field in ("parentRefs", "hostnames"):
        that(f"{name}-watch has the {field} of {name}", watch["spec"].get(field) == general["spec"].get(field), watch["spec"])


def check_settings(that, settings):
    """Runs the program with the settings, except those that name files, which do not exist here. The quota store needs its key."""
    environment = {name: value for name, value in settings.items() if not value.startswith("/")}
    with tempfile.NamedTemporaryFile() as key:
        key.write(os.urandom(32))
        key.flush()
        if "RDS_TASK_FACADE_QUOTA_STORE" in settings:
            environment["RDS_TASK_FACADE_QUOTA_STORE_KEY_FILE"] = key.name
        result = subprocess.run(
            [PROGRAM, "serve", "--print-config"], capture_output=True, text=True, timeout=30, env=environment
        )
    that("the program accepts the settings", result.returncode == 0, result.stderr)


def default_timeout():
    help_text = subprocess.run([PROGRAM, "serve", "--help"], capture_output=True, text=True, timeout=30, check=True).stdout
    return re.search(r"--timeout <DURATION>.*?\[default: (\w+)\]", help_text, re.DOTALL)[1]


def check_runbook(checks):
    """Each alert of deploy/monitoring has a section of its own in docs/runbook.md, and no section lacks its alert."""
    rules = ROOT / "deploy/monitoring/rules.yaml"
    alerts = set(re.findall(r"- alert: (\w+)", rules.read_text()))
    headings = re.findall(r"^## (RdsTaskFacade.*)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    checks.equal("alerts in the runbook", sorted(headings), sorted(alerts))


def unordered(value):
    """The value with sorted lists: components append volumes and resources in their own order."""
    if isinstance(value, dict):
        return {key: unordered(item) for key, item in value.items()}
    return sorted(map(unordered, value), key=json.dumps) if isinstance(value, list) else value


def is_part(selector, labels):
    return bool(selector) and selector.items() <= labels.items()


def check_faults(checks):
    """Puts back faults that these manifests once had; the evaluation must notice each of them."""

    def noticed(name, components, change):
        resources = copy.deepcopy(render(components))
        change(resources)
        found = []
        check_rules(lambda rule, holds, *_: None if holds else found.append(rule), resources, components)
        checks.that(f"noticed: {name}", found)

    def label_peers(resources):
        for peer in one(resources, "NetworkPolicy")["spec"]["ingress"][0]["from"]:
            peer["podSelector"]["matchLabels"]["app.kubernetes.io/name"] = "rds-task-facade"

    def drop_ports(policy, dropped):
        def drop(resources):
            for rule in one(resources, "NetworkPolicy", policy)["spec"]["ingress"]:
                rule["ports"] = [port for port in rule["ports"] if port["port"] not in dropped]

        return drop

    def export_everywhere(resources):
        del one(resources, "ServiceEntry", "rds-task-facade-rds")["spec"]["exportTo"]

    def misspell(resources):
        one(resources, "Service")["spec"]["selector"]["app.kubernetes.io/name"] = "rds-facade"

    noticed("a peer selector with the label of the facade", [], label_peers)
    noticed("a closed port of Linkerd's proxy", ["linkerd"], drop_ports("rds-task-facade-linkerd", [4143]))
    noticed("closed metrics of the sidecar", ["istio", "monitoring"], drop_ports("rds-task-facade-metrics", [15020]))
    noticed("a ServiceEntry for all namespaces", ["istio"], export_everywhere)
    noticed("a Service that selects no pods", [], misspell)
    broken = one(render([]), "Deployment")
    broken["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    checks.that("noticed: a misspelt field", problems(broken))


def main():
    checks = Checks()
    table = components_table()
    checks.equal("components in the table of docs/operations.md", set(table), {path.name for path in (KUBERNETES / "components").iterdir()})
    rendered = {}
    for components in combinations(table):
        title = "+".join(["base", *components])
        resources = render(components)
        # A pair in the other order.
        earlier = rendered.setdefault(frozenset(components), resources)
        if earlier is not resources:
            checks.equal(f"{title}: the order of the components does not matter", unordered(resources), unordered(earlier))
            continue
        for resource in resources:
            name = f"{title}: {resource['kind']} {resource['metadata']['name']} fits its schema"
            found = problems(resource)
            checks.that(name, not found, found)
        check_rules(lambda name, holds, seen="": checks.that(f"{title}: {name}", holds, seen), resources, components)
    for name, (needed, _) in table.items():
        plain = render([*needed, name], is_plain=True)
        check_rules(lambda rule, holds, seen="": checks.that(f"base and {name} without overlay: {rule}", holds, seen), plain, [*needed, name])
    check_regions(checks)
    check_names(checks)

    for overlay in sorted((KUBERNETES / "overlays").iterdir()):
        resources, remote = render_overlay(overlay)
        found = [problem for resource in resources for problem in problems(resource)]
        checks.that(f"overlay {overlay.name} fits the schemas", not found, found)
        checks.that(f"overlay {overlay.name} works where it is copied", remote >= 2 and ".." not in (overlay / "kustomization.yaml").read_text(), remote)
        spaces = {r["metadata"]["name"] if r["kind"] == "Namespace" else r["metadata"].get("namespace") for r in resources}
        checks.that(f"overlay {overlay.name} has one namespace, and creates it", len(spaces) == 1 and one(resources, "Namespace", *spaces), spaces)
        port = facade_pods(resources)[1]["grpc"]
        listed = authorizes(resources, ("team-a", "worker"), port) and not authorizes(resources, ("team-b", "other"), port)
        checks.that(f"overlay {overlay.name} admits the callers of its list only", listed)
    for path in sorted([*(KUBERNETES / "secrets").iterdir(), *KUBERNETES.glob("components/*/*.example.yaml")]):
        found = [problem for resource in yaml.safe_load_all(path.read_text()) for problem in problems(resource)]
        checks.that(f"{path.name} fits its schema", not found, found)

    check_runbook(checks)
    check_faults(checks)
    checks.finish()


if __name__ == "__main__":
    main()
