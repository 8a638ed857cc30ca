"""Runs the commands of README.md and docs/ as they are printed; documents.py describes their marks. `commands.py PAGE...` runs those of
some pages only.

A command that was started runs until another one takes its port, or until the end of its page.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

from documents import BLOCK, PAGES
from facade import ROOT, Checks, tool

# The first command of a fresh clone compiles the program.
START_SECONDS = 400
RUN_SECONDS = 400


def main():
    checks = Checks()
    with tempfile.TemporaryDirectory() as folder:
        # The documents call it without its version.
        os.symlink(tool("grpcurl-new"), f"{folder}/grpcurl")
        os.environ["PATH"] = folder + os.pathsep + os.environ["PATH"]
        for page in sys.argv[1:] or PAGES:
            run_page(checks, page)
    checks.finish()


def run_page(checks, page):
    started, output = {}, ""
    try:
        for mark, _, block in BLOCK.findall((ROOT / page).read_text()):
            name = f"{page}: {block.splitlines()[0]}"
            if start := re.fullmatch(r"start: (\d+)(?:, then: (.+))?", mark):
                port, then = int(start[1]), start[2]
                if port in started:
                    stop(started.pop(port))
                started[port] = start_block(block, port)
                checks.that(f"{name} listens on port {port}", listens(port, started[port]))
                if then:
                    code, output = run(then)
                    checks.that(f"{name}, then {then}", code == 0, output)
            elif run_mark := re.fullmatch(r"run(?:, exit code (\d+))?", mark):
                code, output = run(block)
                checks.that(f"{name} exits with {run_mark[1] or 0}", code == int(run_mark[1] or 0), f"{code}: {output}")
            elif mark == "output":
                checks.that(f"{page}: the printed output", contains(output, block), f"{output}\n      expected {block}")
    finally:
        for process in started.values():
            stop(process)


def start_block(block, port):
    if accepts(port):
        raise SystemExit(f"port {port} of 127.0.0.1 is in use: stop what listens there")
    # A session of its own, so that a signal reaches the shell and the program.
    return subprocess.Popen(
        ["bash", "-euc", block], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )


def stop(process):
    """Ends a started command as Ctrl-C does."""
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)


def run(command):
    """The exit code and the output of a command, errors included."""
    result = subprocess.run(
        ["bash", "-euc", command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_SECONDS,
    )
    return result.returncode, result.stdout


def listens(port, process):
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if accepts(port):
            return True
        time.sleep(0.1)
    return False


def accepts(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def contains(output, expected):
    """Whether the output has the expected lines in this order, perhaps with others between them."""
    lines = iter(output.splitlines())
    patterns = (".*".join(map(re.escape, line.split("…"))) for line in expected.splitlines())
    return all(any(re.fullmatch(pattern, line) for line in lines) for pattern in patterns)


if __name__ == "__main__":
    main()
