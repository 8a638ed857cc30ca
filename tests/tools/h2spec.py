"""Runs the sections generic, http2 and hpack of h2spec against the gRPC port.

h2spec-exceptions.tsv lists the cases that may fail, with reasons. Any other failed case fails the check, and so does a listed
case that h2spec no longer has.

h2spec writes the frames of a case one by one, and the server may rightly reply to the first before it has the next. A case that fails
therefore has two more attempts; a violation of the protocol fails all three.
"""

import subprocess
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

from facade import Checks, Facade, tool

SECTIONS = ("generic", "http2", "hpack")
EXCEPTIONS = Path(__file__).with_name("h2spec-exceptions.tsv")
SECONDS = 300
ATTEMPTS = 3


def main():
    checks = Checks()
    with Facade("--sandbox", "--max-connection-age=0s") as facade, tempfile.TemporaryDirectory() as folder:
        run_against(checks, facade.address, Path(folder) / "report.xml")
        code, _, error = facade.call()
        checks.that("the server still replies afterwards", code == 0, error)
    checks.finish()


def run_against(checks, address, report):
    results = {}
    for _ in range(ATTEMPTS):
        for name, seen in run_cases(address, report).items():
            # The first success counts, else the last failure.
            results[name] = results.get(name, seen) and seen
        if not any(results.values()):
            break
    allowed, met = exceptions(), set()
    for (section, title), seen in results.items():
        known = next((key for key in allowed if section == key[0] and title.startswith(key[1])), None)
        if known is not None:
            met.add(known)
            checks.that(f"{section} {title}: may fail, {allowed[known]}", True)
        else:
            checks.that(f"{section} {title}", not seen, seen)
    for key in allowed.keys() - met:
        checks.that(f"exception {key[0]} {key[1]} names a case of h2spec", False)
    checks.that("h2spec ran at least 140 cases", len(results) >= 140, len(results))


def run_cases(address, report):
    """Runs h2spec once. Maps each case, a section and a title, to what h2spec has seen instead of the right reply, None if nothing."""
    host, _, port = address.rpartition(":")
    command = [tool("h2spec"), *SECTIONS, "--host", host, "--port", port, "--timeout", "2", "--junit-report", report]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
    if not report.exists():
        raise SystemExit(f"h2spec wrote no report: {run}")
    results = {}
    for case in xml.parse(report).getroot().iter("testcase"):
        seen = case.find("error") if case.find("error") is not None else case.find("failure")
        text = None if seen is None else " ".join((seen.text or "").split()) or "a failure without text"
        results[case.get("package"), case.get("classname")] = text
    report.unlink()
    return results


def exceptions():
    lines = EXCEPTIONS.read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {(section, title): reason for section, title, reason in rows}


if __name__ == "__main__":
    main()
