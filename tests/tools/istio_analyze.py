"""Runs `istioctl analyze`, which validates resources as Istio's webhook does, on the rendered resources with Istio."""

import subprocess
import tempfile
from pathlib import Path

import yaml

from facade import Checks, tool
from kubernetes import combinations, components_table, one, render


def analyze(resources):
    """The exit code and the messages."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resources.yaml"
        path.write_text(yaml.safe_dump_all(resources))
        command = [tool("istioctl"), "analyze", "--use-kube=false", "--failure-threshold=Warning", path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr


def main():
    checks = Checks()
    seen = set()
    for components in combinations(components_table()):
        if {"istio", "ambient"} & set(components) and frozenset(components) not in seen:
            seen.add(frozenset(components))
            code, messages = analyze(render(components))
            checks.that(f"istioctl analyzes {'+'.join(components)}", code == 0, messages)
    broken = render(["istio"])
    one(broken, "VirtualService")["spec"]["http"][0]["timeout"] = "soon"
    code, messages = analyze(broken)
    checks.that("istioctl reports an invalid timeout", code != 0 and "soon" in messages, messages)
    checks.finish()


if __name__ == "__main__":
    main()
