"""Renders deploy/kubernetes with kustomize, in combinations of its components, and checks the resources.

kubernetes-validate checks Kubernetes' own resources strictly, against the oldest and the newest supported version. The
minimal schemas in crds/ check custom resources; they contain only the fields that are used here. Last come the rules that no
schema expresses: names that must match, and times that must add up.
"""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import jsonschema
import kubernetes_validate
import yaml

from facade import PROGRAM, ROOT, SERVICE, Checks, tool

KUBERNETES = ROOT / "deploy/kubernetes"
CRDS = Path(__file__).parent / "crds"
VERSIONS = ["1.29.0", "1.37.0"]
COMBINATIONS = [
    [],
    ["headless"],
    ["monitoring"],
    ["tls"],
    ["headless", "tls", "monitoring"],
    ["ambient"],
    ["ambient", "monitoring"],
    ["istio"],
    ["istio", "monitoring"],
    ["istio", "gateway-api", "monitoring"],
    ["quota-store"],
    ["istio", "monitoring", "quota-store"],
    ["linkerd", "monitoring", "quota-store"],
    ["ambient", "quota-store"],
    ["istio", "istio-hash"],
    ["istio", "istio-hash-own", "monitoring"],
    ["linkerd"],
    ["linkerd", "monitoring"],
    ["linkerd", "gateway-api", "monitoring"],
    ["gateway-api"],
    ["gateway-api", "headless", "monitoring"],
]
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
# Envoy's outlier detection counts UNAVAILABLE as a 503 and DEADLINE_EXCEEDED as a 504.
EJECTING = ("consecutive5xxErrors", "consecutiveGatewayErrors")


def render(folder):
    result = subprocess.run([tool("kustomize"), "build", folder], capture_output=True, text=True, timeout=60)
    if result.returncode:
        raise AssertionError(result.stderr)
    return list(yaml.safe_load_all(result.stdout))


def render_combination(components):
    with tempfile.TemporaryDirectory(dir=KUBERNETES, prefix=".render-") as folder:
        names = [f"../components/{name}" for name in components]
        content = {"resources": ["../base"], "components": names}
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(content))
        return render(folder)


def problems(resource):
    """The violations of its schema in one resource."""
    schema = CRDS / f"{resource['kind'].lower()}.json"
    if schema.exists():
        validator = jsonschema.Draft202012Validator(json.loads(schema.read_text()))
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(resource)]
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


def check_rules(checks, title, resources, components):
    pod = one(resources, "Deployment")["spec"]["template"]
    spec, labels = pod["spec"], pod["metadata"]["labels"]
    container = spec["containers"][0]
    settings = settings_of(resources)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}

    def that(name, holds, seen=""):
        checks.that(f"{title}: {name}", holds, seen)

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

    for service in (r for r in resources if r["kind"] == "Service"):
        port = service["spec"]["ports"][0]
        protocol = "https" if "tls" in components else "kubernetes.io/h2c"
        that(f"Service {service['metadata']['name']} declares its protocol", (port["name"], port["appProtocol"]) == ("grpc", protocol), port)
        that(f"Service {service['metadata']['name']} selects the pods", is_part(service["spec"]["selector"], labels))
    budget = one(resources, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    that("the disruption budget selects the pods", is_part(budget, labels))
    for policy in (r for r in resources if r["kind"] == "NetworkPolicy"):
        that(f"NetworkPolicy {policy['metadata']['name']} selects the pods", is_part(policy["spec"]["podSelector"]["matchLabels"], labels))
    scaler = one(resources, "HorizontalPodAutoscaler")["spec"]
    that("the autoscaler scales this Deployment, to at least two pods", scaler["scaleTargetRef"]["name"] == "rds-task-facade" and scaler["minReplicas"] >= 2)

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
        hosts = {host for r in resources if r["kind"] == "ServiceEntry" for host in r["spec"]["hosts"]}
        region = settings["RDS_TASK_FACADE_REGION"]
        that("the mesh allows the region's endpoints", hosts == {f"{name}.{region}.myhuaweicloud.com" for name in ("rds", "iam")}, hosts)
        config = yaml.safe_load(pod["metadata"]["annotations"]["proxy.istio.io/config"])
        outlives = seconds(config["terminationDrainDuration"])
        that("the sidecar outlives the drain, within the pod's grace period", drain + grace < outlives < whole, outlives)
    if "linkerd" in components:
        server = one(resources, "Server")["spec"]
        that("only authenticated peers reach the gRPC port", (server["port"], server["accessPolicy"]) == ("grpc", "all-authenticated"))
        check_watch_route(that, resources, "rds-task-facade-mesh")
    if "gateway-api" in components:
        check_watch_route(that, resources, "rds-task-facade")
    check_settings(that, settings)


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
    """Each alert of deploy/monitoring has a section in docs/operations.md, and each section has an alert."""
    rules = ROOT / "deploy/monitoring/rules.yaml"
    alerts = set(re.findall(r"- alert: (\w+)", rules.read_text()))
    headings = re.findall(r"^### (RdsTaskFacade.*)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    checks.equal("alerts in the runbook", {name for heading in headings for name in heading.split(", ")}, alerts)


def is_part(selector, labels):
    return bool(selector) and selector.items() <= labels.items()


def main():
    checks = Checks()
    used = set()
    for components in COMBINATIONS:
        title = "+".join(["base", *components])
        used.update(components)
        resources = render_combination(components)
        for resource in resources:
            name = f"{title}: {resource['kind']} {resource['metadata']['name']} fits its schema"
            found = problems(resource)
            checks.that(name, not found, found)
        check_rules(checks, title, resources, components)
    checks.equal("every component was rendered", used, {path.name for path in (KUBERNETES / "components").iterdir()})

    for overlay in sorted((KUBERNETES / "overlays").iterdir()):
        found = [problem for resource in render(overlay) for problem in problems(resource)]
        checks.that(f"overlay {overlay.name} fits the schemas", not found, found)
    for example in KUBERNETES.rglob("secret.example.yaml"):
        found = problems(yaml.safe_load(example.read_text()))
        checks.that(f"the example of a Secret in {example.parent.name} fits its schema", not found, found)

    check_runbook(checks)

    broken = one(render(KUBERNETES / "base"), "Deployment")
    broken["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    checks.that("a misspelt field violates its schema", problems(broken))
    checks.finish()


if __name__ == "__main__":
    main()
