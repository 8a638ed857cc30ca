"""Checks the rules and the dashboard of deploy/monitoring and the queries of docs/runbook.md: with promtool, and each name in them against
a live /metrics.

With --write, only writes the copies in deploy/kubernetes/components/monitoring, because kustomize reads no file outside of a component.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from facade import ROOT, Checks, Facade, tool
from metrics import scrape, scrape_classic

FOLDER = ROOT / "deploy/monitoring"
COMPONENT = ROOT / "deploy/kubernetes/components/monitoring"
# Labels that Prometheus and its operator add to every series.
SCRAPE_LABELS = {"job", "instance", "namespace"}
FUNCTIONS = {"sum", "min", "max", "count", "topk", "bottomk", "absent", "rate", "increase", "changes", "histogram_quantile", "time"}
WORDS = {"by", "without", "on", "group_left", "and", "or", "unless"}
INSTANCE = {"namespace": "rds-task-facade", "job": "rds-task-facade", "instance": "a"}
# Of Prometheus, kube-state-metrics, the kubelet, Istio and Linkerd.
FOREIGN = {
    "up": {},
    "kube_deployment_status_replicas_ready": {"deployment": {"rds-task-facade"}},
    "container_cpu_cfs_throttled_periods_total": {"container": {"facade"}, "pod": set()},
    "istio_requests_total": {"destination_workload": {"rds-task-facade"}, "source_workload": set(), "source_workload_namespace": set()},
    "request_total": {"direction": {"inbound"}, "target_port": {"50051"}, "client_id": set()},
}
# Of the quota store, for a program without the flag --quota-store.
STORE_OUTCOMES = {"outcome": {"ok", "timeout", "error", "skipped", "rejected"}, "operation": set()}
STORE = {
    "quota_store_up": {},
    "quota_store_replicas": {},
    "quota_store_requests_total": STORE_OUTCOMES,
    "quota_store_request_duration_seconds_bucket": {"le": set()},
}


def copies():
    """The generated files of the component and their content."""
    note = "# Copied from deploy/monitoring/rules.yaml by tests/tools/monitoring.py --write.\n"
    rules = re.sub(r"\A(#.*\n)+", "", (FOLDER / "rules.yaml").read_text())
    head = "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: rds-task-facade\nspec:\n"
    yield COMPONENT / "rules.yaml", note + head + re.sub(r"^(?=.)", "  ", rules, flags=re.M)
    yield COMPONENT / "dashboard.json", (FOLDER / "dashboard.json").read_text()


def queries():
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            query = re.sub(r"\$(namespace|job|instance)", ".*", target["expr"].replace("$__rate_interval", "5m"))
            yield f"dashboard: {panel['title']}", query
    for group in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
    for block in re.findall(r"^```promql\n(.*?)^```$", (ROOT / "docs/runbook.md").read_text(), re.M | re.S):
        for query in block.splitlines():
            yield f"runbook: {query}", query


def recorded():
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def names_and_matchers(query):
    matchers = re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', query)
    modifier = r"\b(?:by|without|on|group_left)\s*\(([^)]*)\)"
    grouping = re.findall(modifier, query)
    labels = {label.strip() for group in grouping for label in group.split(",")}
    bare = re.sub(modifier + r"|\{[^}]*\}|\[[^\]]*\]", " ", query)
    names = set(re.findall(r"[a-zA-Z_:][\w:]*", bare)) - FUNCTIONS - WORDS
    return names, matchers, labels


def check_dashboard(checks):
    """The layout: rows with headings, stats with thresholds on top, variables in every query, no panel over another."""
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    panels = dashboard["panels"]
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    checks.equal("variables", names, ["datasource", "namespace", "job", "instance"])
    rows = [index for index, panel in enumerate(panels) if panel["type"] == "row"]
    stats = panels[1 : rows[1]]
    checks.that("the first row has stats", rows[0] == 0 and len(stats) >= 6 and {p["type"] for p in stats} <= {"stat", "gauge"})
    checks.that("each stat has thresholds", all(p["fieldConfig"]["defaults"]["thresholds"]["steps"] for p in stats))
    checks.equal("ids of panels", len({panel["id"] for panel in panels}), len(panels))
    cells = [
        (column, line)
        for place in (panel["gridPos"] for panel in panels)
        for column in range(place["x"], place["x"] + place["w"])
        for line in range(place["y"], place["y"] + place["h"])
    ]
    checks.that("no panel covers another or leaves the grid", len(cells) == len(set(cells)) and max(cells)[0] < 24)
    for panel in panels:
        for target in panel.get("targets", []):
            selectors = re.findall(r"\w+\{([^}]*)\}", target["expr"])
            chosen = [s for s in selectors if "$instance" in s and "$job" in s and "$namespace" in s]
            foreign = sum("deployment=" in s for s in selectors)
            checks.that(f"dashboard: {panel['title']}: each series is chosen by the variables", selectors and len(chosen) + foreign == len(selectors))


def check_alerts(checks):
    """Each alert has a severity and URLs, and tests in which it fires and does not fire."""
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    tests = yaml.safe_load((FOLDER / "rules.test.yaml").read_text())["tests"]
    runs = [set(re.findall(r"RdsTaskFacade\w+", str(case["exp_samples"]))) for test in tests for case in test["promql_expr_test"]]
    for alert in (rule for group in groups for rule in group["rules"] if "alert" in rule):
        name, notes = alert["alert"], alert["annotations"]
        checks.that(f"{name}: severity", alert["labels"]["severity"] in ("page", "ticket"))
        checks.that(f"{name}: runbook", notes["runbook_url"].endswith(f"/docs/runbook.md#{name.lower()}"), notes)
        checks.that(f"{name}: dashboard", notes["dashboard_url"].endswith("/d/rds-task-facade"), notes)
        checks.that(f"{name}: a test in which it fires", any(name in run for run in runs))
        # The test of values just below the thresholds has a series for each alert.
        checks.that(f"{name}: a test in which it does not fire", any(name not in run for run in runs))


def check_panels(checks, promtool, families):
    """Each query of the dashboard has a result for an instance whose counters all grow."""
    series = [
        {"series": "{}{{{}}}".format(sample.name, ",".join(f'{k}="{v}"' for k, v in {**sample.labels, **INSTANCE}.items())), "values": "1+1x30"}
        for family in families.values()
        for sample in family.samples
    ]
    provided = {sample.name for family in families.values() for sample in family.samples}
    for name in (STORE | FOREIGN).keys() - provided:
        labels = (STORE | FOREIGN)[name]
        chosen = {label: sorted(values)[0] if values else "1" for label, values in labels.items()} | INSTANCE
        series.append({"series": "{}{{{}}}".format(name, ",".join(f'{k}="{v}"' for k, v in chosen.items())), "values": "1+1x30"})
    cases = [
        {"expr": f"(count({query}) > bool 0) or vector(0)", "eval_time": "20m", "exp_samples": [{"labels": "{}", "value": 1}]}
        for title, query in queries()
        if title.startswith("dashboard: ")
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "panels.yaml"
        tests = [{"interval": "1m", "input_series": series, "promql_expr_test": cases}]
        path.write_text(json.dumps({"evaluation_interval": "1m", "tests": tests}))
        done = subprocess.run([promtool, "test", "rules", path], capture_output=True, text=True)
    checks.that("each query of the dashboard has a result", done.returncode == 0, done.stderr + done.stdout)


def main():
    checks = Checks()
    if sys.argv[1:] == ["--write"]:
        for path, content in copies():
            path.write_text(content)
        return
    for path, content in copies():
        checks.that(f"{path.relative_to(ROOT)} is up to date", path.exists() and path.read_text() == content, "run tests/tools/monitoring.py --write")
    check_dashboard(checks)
    check_alerts(checks)
    promtool = tool("promtool")
    run = lambda *arguments: subprocess.run([promtool, *arguments], capture_output=True, text=True, cwd=FOLDER)
    done = run("check", "rules", "--lint=all", "--lint-fatal", "rules.yaml")
    checks.that("promtool check rules", done.returncode == 0, done.stdout + done.stderr)
    done = run("test", "rules", "rules.test.yaml")
    checks.that("promtool test rules", done.returncode == 0, done.stdout + done.stderr)
    with tempfile.TemporaryDirectory() as folder:
        rules = [{"record": f"panel:query_{number}", "expr": query} for number, (_, query) in enumerate(queries())]
        path = Path(folder) / "dashboard.yaml"
        path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
        done = run("check", "rules", str(path))
        checks.that("promtool accepts each query of the dashboard and the runbook", done.returncode == 0, done.stdout + done.stderr)

    with Facade("--sandbox") as facade:
        families = scrape(facade.metrics)
        classic, _ = scrape_classic(facade.metrics)
    check_panels(checks, promtool, families)
    done = subprocess.run([promtool, "check", "metrics"], input=classic, capture_output=True, text=True)
    checks.that("promtool check metrics", done.returncode == 0, done.stdout + done.stderr)
    live = {}
    for family in families.values():
        for sample in family.samples:
            values = live.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                values.setdefault(label, set()).add(value)
    provided = set(live)
    live = FOREIGN | STORE | live
    own = recorded()
    used = set()
    for title, query in queries():
        names, matchers, labels = names_and_matchers(query)
        if not title.startswith("runbook: "):
            used |= names
        unknown = names - set(live) - own
        checks.that(f"{title}: names", names and not unknown, unknown)
        known = {}
        for name in names & set(live):
            for label, values in live[name].items():
                known.setdefault(label, set()).update(values)
        if names & own:
            continue
        wrong = (labels | {label for label, _, _ in matchers}) - set(known) - SCRAPE_LABELS
        checks.that(f"{title}: labels", not wrong, wrong)
        for label, operator, text in matchers:
            if label in SCRAPE_LABELS:
                continue
            values = text.split("|") if operator == "=~" else [text]
            checks.that(f"{title}: {label}", set(values) <= known.get(label, set()), set(values) - known.get(label, set()))
    # Each metric must have a use. The parts of histograms are exempt.
    bases = {name for name in provided if not name.endswith(("_sum", "_count", "_bucket"))}
    checks.equal("metrics that neither a panel nor a rule uses", bases - used, set())
    checks.finish()


if __name__ == "__main__":
    main()
