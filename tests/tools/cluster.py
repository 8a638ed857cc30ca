"""Decides what a cluster would do with rendered resources: who may reach which port of the facade's pods, and where the pods may
connect to.

NetworkPolicies are evaluated as Kubernetes defines them. Resources without a namespace belong to that of the installation. The rules
for authorization are those of Istio and Linkerd for the fields that deploy/kubernetes uses; any other field is an error.
"""

import ipaddress
from dataclasses import dataclass, field

NAMESPACE = "rds-task-facade"
NAME_LABEL = "kubernetes.io/metadata.name"


@dataclass
class Party:
    """A peer of the facade's pods: a pod if it has a namespace, else only an address."""

    name: str
    namespace: str | None = None
    labels: dict = field(default_factory=dict)
    address: str = "192.0.2.7"


def facade_pods(resources):
    """The pods of the Deployment, with their ports by name."""
    (deployment,) = (r for r in resources if r["kind"] == "Deployment")
    template = deployment["spec"]["template"]
    ports = {port["name"]: port["containerPort"] for c in template["spec"]["containers"] for port in c["ports"]}
    return Party("facade", NAMESPACE, template["metadata"]["labels"]), ports


def selects(selector, labels):
    """Whether a label selector matches. An empty selector matches everything."""
    assert not selector.keys() - {"matchLabels", "matchExpressions"}, selector
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", expression
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def _is_peer(peer, party):
    assert not peer.keys() - {"ipBlock", "namespaceSelector", "podSelector"}, peer
    if "ipBlock" in peer:
        address = ipaddress.ip_address(party.address)
        block = peer["ipBlock"]
        return address in ipaddress.ip_network(block["cidr"]) and not any(
            address in ipaddress.ip_network(cidr) for cidr in block.get("except", [])
        )
    if party.namespace is None:
        return False
    if "namespaceSelector" in peer:
        is_namespace = selects(peer["namespaceSelector"], {NAME_LABEL: party.namespace})
    else:
        is_namespace = party.namespace == NAMESPACE
    return is_namespace and selects(peer.get("podSelector", {}), party.labels)


def _is_port(rule, port, protocol, names):
    return names.get(rule["port"], rule["port"]) == port and rule.get("protocol", "TCP") == protocol


def _permits(resources, direction, peers, party, port, protocol, names):
    pods, _ = facade_pods(resources)
    policies = [
        r["spec"]
        for r in resources
        if r["kind"] == "NetworkPolicy" and selects(r["spec"]["podSelector"], pods.labels) and direction in r["spec"]["policyTypes"]
    ]
    return not policies or any(
        (peers not in rule or any(_is_peer(peer, party) for peer in rule[peers]))
        and ("ports" not in rule or any(_is_port(allowed, port, protocol, names) for allowed in rule["ports"]))
        for policy in policies
        for rule in policy.get(direction.lower(), [])
    )


def admits(resources, party, port):
    """Whether the NetworkPolicies let the party reach the TCP port of the facade's pods."""
    _, names = facade_pods(resources)
    return _permits(resources, "Ingress", "from", party, port, "TCP", names)


def connects(resources, party, port, protocol="TCP"):
    """Whether the NetworkPolicies let the facade's pods connect to the port of the party."""
    return _permits(resources, "Egress", "to", party, port, protocol, {})


def authorizes(resources, identity, port):
    """Whether the authorization policies of the mesh accept a request. `identity` is (namespace, service account), or None for a peer
    without an identity in the mesh."""
    istio = [r["spec"] for r in resources if r["apiVersion"].startswith("security.istio.io/") and r["kind"] == "AuthorizationPolicy"]
    linkerd = [r["spec"] for r in resources if r["apiVersion"].startswith("policy.linkerd.io/") and r["kind"] == "Server"]
    return (not istio or any(_istio_allows(policy, identity, port) for policy in istio)) and all(
        _linkerd_allows(resources, server, identity) for server in linkerd if facade_pods(resources)[1][server["port"]] == port
    )


def _istio_allows(policy, identity, port):
    assert policy["action"] == "ALLOW" and policy.keys() <= {"action", "rules", "selector"}, policy
    pattern = "cluster.local/ns/{}/sa/{}".format(*identity) if identity else None
    for rule in policy["rules"]:
        assert rule.keys() <= {"from", "to"}, rule
        principals = [p for source in rule.get("from", []) for p in source["source"]["principals"]]
        ports = [p for target in rule.get("to", []) for p in target["operation"]["ports"]]
        is_source = "from" not in rule or (pattern is not None and ("*" in principals or pattern in principals))
        if is_source and str(port) in ports:
            return True
    return False


def _linkerd_allows(resources, server, identity):
    if server["accessPolicy"] == "all-authenticated":
        return identity is not None
    assert server["accessPolicy"] == "deny", server
    for policy in (r["spec"] for r in resources if r["kind"] == "AuthorizationPolicy"):
        assert policy["targetRef"]["kind"] == "Server", policy
        for reference in policy["requiredAuthenticationRefs"]:
            (authentication,) = (
                r["spec"] for r in resources if r["kind"] == reference["kind"] and r["metadata"]["name"] == reference["name"]
            )
            accounts = [(ref["namespace"], ref["name"]) for ref in authentication.get("identityRefs", [])]
            if identity and ("*" in authentication.get("identities", []) or identity in accounts):
                return True
    return False
