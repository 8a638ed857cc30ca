"""Checks that the documents agree with the code: quoted regions, reasons, the version of Rust. Checks their links, the marks of their
commands, and that they use the terms of the glossary.

A mark is a line `<!-- MARK -->` before a fenced block. Every block of shell commands has one:

    FILE#REGION             quotes the lines of FILE between one that ends with [REGION] and one that ends with [/REGION]
    run                     tests/tools/commands.py runs it; `run, exit code N` expects that exit code
    output                  the lines that the block before it prints, in this order; … stands for any text
    start: PORT             commands.py starts it and waits until it listens on PORT of 127.0.0.1
    start: PORT, then: X    the same, and runs the command X
    not run: REASON

A block with a program of NEEDS_MORE needs no mark.
"""

import re
import textwrap

from facade import REASONS, ROOT, Checks

PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "release/README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^(?:<!-- (.*) -->\n)?```(\w*)\n((?:.*\n)*?)```$", re.M)
QUOTATION = re.compile(r"(\S+)#(\S+)")
MARK = re.compile(r"run(, exit code \d+)?|output|start: \d+(, then: .+)?|not run: .+|\S+#\S+")
# Pages for other languages and programs: every block is part of a file that CI builds or runs.
QUOTATIONS_ONLY = ("docs/clients.md", "docs/proxies.md", "docs/stubs.md", "docs/web.md")
# They need a cluster, a registry or a cloud account.
NEEDS_MORE = re.compile(r"\b(kubectl|docker|helm|istioctl|linkerd|kustomize|cosign)\b")
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
# Code blocks, code spans, and the table of docs/sandbox.md, which quotes the replies of the vendor.
CODE = re.compile(r"<!-- scenarios -->.*?<!-- /scenarios -->|^```.*?^```$|`[^`]*`", re.M | re.S)
REASON = re.compile(r"`([A-Z][A-Z_]+)`")
LONGEST_README = 150


def main():
    checks = Checks()
    texts = {page: (ROOT / page).read_text() for page in PAGES}
    for page, text in texts.items():
        check_blocks(checks, page, text)
        dead = [link for link in LINK.findall(CODE.sub("", text)) if not leads_somewhere(page, link)]
        checks.equal(f"{page}: every link leads to a file and a heading", dead, [])
    lines = texts["README.md"].count("\n")
    checks.that(f"README.md has {lines} lines, at most {LONGEST_README}", lines <= LONGEST_README)

    checks.that("src/reason.rs has reasons", len(REASONS) > 30, REASONS)
    checks.equal("docs/errors.md has every reason and no other", sorted(set(REASONS) ^ reasons_of(texts["docs/errors.md"])), [])

    version = re.search(r'^rust-version = "(.*)"$', (ROOT / "Cargo.toml").read_text(), re.M).group(1)
    for path, text in {
        "README.md": f"Needs Rust {version} or newer",
        "CONTRIBUTING.md": f"Needs Rust {version} or newer",
        "rust-toolchain.toml": f'channel = "{version}.',
        "Dockerfile": f"FROM rust:{version}-",
        "examples/clients/rust/Cargo.toml": f'rust-version = "{version}"',
        "docs/clients.md": f"| Rust {version}, a C compiler |",
    }.items():
        checks.that(f"{path} names Rust {version}", text in (ROOT / path).read_text())

    glossary = texts["CONTRIBUTING.md"].partition("\n## Glossary\n")[2]
    words = re.findall(r'"([^"|]+)"(?=[^|]*\|$)', glossary, re.M)
    checks.that("the glossary has words to avoid", len(words) > 10, words)
    avoided = re.compile(rf"\b(?:{'|'.join(words)})s?\b", re.I)
    for path in [*set(PAGES) - {"CONTRIBUTING.md"}, *ROOT.glob("proto/**/*.proto")]:
        prose = CODE.sub("", (ROOT / path).read_text())
        checks.equal(f"{path} uses the terms of the glossary", avoided.findall(prose), [])
    checks.finish()


def check_blocks(checks, page, text):
    unmarked = []
    for mark, language, block in BLOCK.findall(text):
        if quotation := QUOTATION.fullmatch(mark):
            checks.equal(f"{page} quotes {mark}", block, region(*quotation.groups()))
        elif page in QUOTATIONS_ONLY or mark and not MARK.fullmatch(mark) or language == "sh" and not mark and not NEEDS_MORE.search(block):
            unmarked.append((mark, block.splitlines()[0]))
    checks.equal(f"{page}: every block of commands has a mark", unmarked, [])


def leads_somewhere(page, link):
    """Whether a link from a page, relative and perhaps with an anchor, leads to a file and a heading. Other sites are not checked."""
    if "://" in link:
        return True
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    if not target.exists():
        return False
    return not anchor or anchor in {anchor_of(title) for title in re.findall(r"^#+ (.*)$", target.read_text(), re.M)}


def anchor_of(title):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def region(path, name):
    """The lines between the marks, without their common indentation."""
    lines = (ROOT / path).read_text().splitlines(keepends=True)
    begin, end = (next(i for i, line in enumerate(lines) if line.rstrip().endswith(f"[{mark}{name}]")) for mark in ("", "/"))
    return textwrap.dedent("".join(lines[begin + 1 : end])).strip("\n") + "\n"


def reasons_of(text):
    """The reasons in the second column of the table below the heading "Reasons"."""
    section = re.search(r"^## Reasons\n(.*?)(?=^## |\Z)", text, re.M | re.S).group(1)
    rows = [row.split("|") for row in section.splitlines() if row.startswith("| ")]
    return {reason for row in rows for reason in REASON.findall(row[2])}


if __name__ == "__main__":
    main()
