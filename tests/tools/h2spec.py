"""Runs the sections generic, http2 and hpack of h2spec against the gRPC port.

h2spec-exceptions.tsv lists the cases that may fail, with reasons. Any other failed case fails the check, and so does a listed
case that h2spec no longer has.
"""

import subprocess
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

from facade import Checks, Facade, tool

SECTIONS = ("generic", "http2", "hpack")
EXCEPTIONS = Path(__file__).with_name("h2spec-exceptions.tsv")
SECONDS = 300


def main():
    checks = Checks()
    with Facade("--sandbox", "--max-connection-age=0s") as facade, tempfile.TemporaryDirectory() as folder:
        run_against(checks, facade.address, Path(folder) / "report.xml")
        code, _, error = facade.call()
        checks.that("the server still replies afterwards", code == 0, error)
    checks.finish()


def run_against(checks, address, report):
    host, _, port = address.rpartition(":")
    command = [tool("h2spec"), *SECTIONS, "--host", host, "--port", port, "--timeout", "2", "--junit-report", report]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
    checks.that("h2spec wrote its report", report.exists(), run)
    if not report.exists():
        return
    allowed, met = exceptions(), set()
    cases = list(xml.parse(report).getroot().iter("testcase"))
    for case in cases:
        section, title = case.get("package"), case.get("classname")
        seen = case.find("error") if case.find("error") is not None else case.find("failure")
        known = next((key for key in allowed if section == key[0] and title.startswith(key[1])), None)
        if seen is None:
            outcome = "skipped by h2spec" if case.find("skipped") is not None else "passed"
            if known is not None:
                print(f"note  {section} {title}: {outcome}, although it is listed as an exception")
            checks.that(f"{section} {title}: {outcome}", True)
        elif known is not None:
            checks.that(f"{section} {title}: may fail, {allowed[known]}", True)
        else:
            checks.that(f"{section} {title}", False, " ".join((seen.text or "").split()))
        if known is not None:
            met.add(known)
    for key in allowed.keys() - met:
        checks.that(f"exception {key[0]} {key[1]} names a case of h2spec", False)
    checks.that("h2spec ran at least 140 cases", len(cases) >= 140, len(cases))


def exceptions():
    lines = EXCEPTIONS.read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {(section, title): reason for section, title, reason in rows}


if __name__ == "__main__":
    main()
