"""Checks that the documents agree with the code: quoted regions, reasons and their codes, the version of Rust. Checks that they use
the terms of the glossary.

A quotation is a fenced block after a line `<!-- FILE#REGION -->`. In FILE, the region is between a line that ends with
`[REGION]` and one that ends with `[/REGION]`.
"""

import re
import textwrap
from pathlib import Path

from facade import ROOT, Checks

QUOTATION = re.compile(r"^<!-- (\S+)#(\S+) -->\n```\w*\n(.*?)^```$", re.M | re.S)
FENCE = re.compile(r"^```\w+$", re.M)
# Code blocks, code spans, and the table of docs/sandbox.md that the sandbox defines.
CODE = re.compile(r"<!-- scenarios -->.*?<!-- /scenarios -->|^```.*?^```$|`[^`]*`", re.M | re.S)
REASON = re.compile(r"`([A-Z][A-Z_]+)`")


def main():
    checks = Checks()
    for page in ("docs/proxies.md", "docs/clients.md"):
        text = (ROOT / page).read_text()
        quotations = QUOTATION.findall(text)
        for path, name, quoted in quotations:
            checks.equal(f"{page} quotes {path}#{name}", quoted, region(path, name))
        checks.equal(f"every block of {page} is a quotation", len(FENCE.findall(text)), len(quotations))

    reasons = set(re.findall(r'=> "([A-Z_]+)"', (ROOT / "src/reason.rs").read_text()))
    checks.that("src/reason.rs has reasons", len(reasons) > 30, reasons)
    in_clients = table(text, "Reasons")
    in_readme = table((ROOT / "README.md").read_text(), "Errors")
    checks.equal("docs/clients.md has every reason and no other", sorted(reasons ^ set(in_clients)), [])
    checks.equal("README.md has every reason and no other", sorted(reasons ^ set(in_readme)), [])
    checks.equal("both put each reason under the same code", sorted(set(in_clients.items()) ^ set(in_readme.items())), [])

    version = re.search(r'^rust-version = "(.*)"$', (ROOT / "Cargo.toml").read_text(), re.M).group(1)
    for path, text in {
        "README.md": f"Needs Rust {version} or newer",
        "CONTRIBUTING.md": f"needs Rust {version} or newer",
        "Dockerfile": f"FROM rust:{version}-",
        "examples/clients/rust/Cargo.toml": f'rust-version = "{version}"',
        "docs/clients.md": f"| Rust | Rust {version},",
    }.items():
        checks.that(f"{path} names Rust {version}", text in (ROOT / path).read_text())

    glossary = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Glossary\n")[2]
    words = re.findall(r'"([^"|]+)"(?=[^|]*\|$)', glossary, re.M)
    checks.that("the glossary has words to avoid", len(words) > 10, words)
    avoided = re.compile(rf"\b(?:{'|'.join(words)})s?\b", re.I)
    for path in ["README.md", "SECURITY.md", "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("proto/**/*.proto")]:
        prose = CODE.sub("", (ROOT / path).read_text())
        checks.equal(f"{Path(path).name} uses the terms of the glossary", avoided.findall(prose), [])
    checks.finish()


def region(path, name):
    """The lines between the marks, without their common indentation."""
    lines = (ROOT / path).read_text().splitlines(keepends=True)
    begin, end = (next(i for i, line in enumerate(lines) if line.rstrip().endswith(f"[{mark}{name}]")) for mark in ("", "/"))
    return textwrap.dedent("".join(lines[begin + 1 : end])).strip("\n") + "\n"


def table(text, title):
    """Maps each reason to its code, from the table below a heading. An empty first cell repeats the code above it."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.M | re.S).group(1)
    codes, code = {}, None
    for row in section.splitlines():
        cells = row.split("|")
        if len(cells) < 4 or set(row) <= set("|- ") or row.startswith("| code "):
            continue
        code = cells[1].strip() or code
        for reason in REASON.findall(cells[2]):
            codes[reason] = code
    return codes


if __name__ == "__main__":
    main()
