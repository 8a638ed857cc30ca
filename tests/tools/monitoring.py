"""Checks the rules and the dashboard of deploy/monitoring: with promtool, and each name in them against a live /metrics."""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import yaml
from facade import ROOT, Checks, Facade, tool
from metrics import scrape, scrape_classic

FOLDER = ROOT / "deploy/monitoring"
# Labels that Prometheus adds to every series.
SCRAPE_LABELS = {"job", "instance"}
FUNCTIONS = {"sum", "max", "count", "rate", "increase", "histogram_quantile", "time"}
WORDS = {"by", "without", "and", "or", "unless"}


def queries():
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "5m").replace("$job", ".+")
            yield f"dashboard: {panel['title']}", query
    for group in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]


def recorded():
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def names_and_matchers(query):
    matchers = re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', query)
    grouping = re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", query)
    labels = {label.strip() for group in grouping for label in group.split(",")}
    bare = re.sub(r"\b(?:by|without)\s*\([^)]*\)|\{[^}]*\}|\[[^\]]*\]", " ", query)
    names = set(re.findall(r"[a-zA-Z_:][\w:]*", bare)) - FUNCTIONS - WORDS
    return names, matchers, labels


def main():
    checks = Checks()
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
        checks.that("promtool accepts each query of the dashboard", done.returncode == 0, done.stdout + done.stderr)

    with Facade("--sandbox") as facade:
        families = scrape(facade.metrics)
        classic, _ = scrape_classic(facade.metrics)
    done = subprocess.run([promtool, "check", "metrics"], input=classic, capture_output=True, text=True)
    checks.that("promtool check metrics", done.returncode == 0, done.stdout + done.stderr)
    live = {}
    for family in families.values():
        for sample in family.samples:
            values = live.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                values.setdefault(label, set()).add(value)
    own = recorded()
    used = set()
    for title, query in queries():
        names, matchers, labels = names_and_matchers(query)
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
            checks.that(f"{title}: {label}", set(values) <= known[label], set(values) - known.get(label, set()))
    # Each metric must have a use. The parts of histograms are exempt.
    bases = {name for name in live if not name.endswith(("_sum", "_count", "_bucket"))}
    checks.equal("metrics that neither a panel nor a rule uses", bases - used, set())
    checks.finish()


if __name__ == "__main__":
    main()
