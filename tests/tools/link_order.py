"""Writes link-order.ld: the functions that a call passes through, for the linker to put side by side.

Not a check. Run it when the path of a call has changed, or a library of it, with a program that has its symbols:

    CARGO_PROFILE_RELEASE_STRIP=none cargo build --release --locked --target-dir target/symbols
    FACADE=target/symbols/release/rds-task-facade PYTHONPATH=tests/tools python3 tests/tools/link_order.py

A function is on the path when one of the kinds of call that instructions.py counts, or the first of them with TLS to
upstream, calls it nearly as often as there are calls.
"""

import asyncio
import collections
import contextlib
import re
import ssl
import subprocess
import tempfile
import threading
from pathlib import Path

from clients import make_certificate
from facade import PROGRAM, ROOT, Sandbox, free_port
from instructions import CASES, FEW, MANY, count, load

# Symbols hold hashes and versions, which change. What has the same name without them comes along, unless it is this much,
# in bytes, and twice what is wanted: instances of generic functions for other types.
MAX_BESIDE = 2048

HEAD = """/* The functions of a call's path, side by side in the program: 290 KiB of code that a call runs through, in functions that
   are strewn over 7 MiB otherwise. Written by tests/tools/link_order.py, never by hand; what it no longer names lies
   elsewhere, and works. docs/performance.md, "Design decisions that were measured", says what it saves. */
SECTIONS
{
  .text.call_path : {
"""
TAIL = """  }
}
INSERT BEFORE .text;
"""


def main():
    path = set()
    with Sandbox() as sandbox, tempfile.TemporaryDirectory() as folder:
        plain = [f"--endpoint={sandbox.url}"]
        encrypted = tls_front(sandbox.port, Path(folder))
        kinds = [(plain, *case) for case in CASES] + [(encrypted, "TLS", *CASES[0][1:])]
        for endpoint, name, options, environment, instance, workflow, outcome, _ in kinds:
            few, many = (
                calls_of_functions([*endpoint, *options], environment, instance, workflow, outcome, calls)
                for calls in (FEW, MANY)
            )
            found = {function for function in many if many[function] - few[function] >= 0.9 * (MANY - FEW)}
            print(f"{name}: {len(found)} functions")
            path |= found
    wanted, beside = collections.Counter(), collections.Counter()
    for symbol, size in symbols():
        (wanted if symbol in path else beside)[without_versions(symbol)] += size
    names = [name for name in wanted if beside[name] <= max(MAX_BESIDE, 2 * wanted[name])]
    lines = [f"    *(.text.{name})\n" for name in names]
    (ROOT / "link-order.ld").write_text(HEAD + "".join(lines) + TAIL)
    print(f"{len(names)} names, {sum(wanted[name] for name in names)} bytes of code on the path, "
          f"{sum(beside[name] for name in names)} beside it")


def tls_front(port, folder):
    """Starts a server that takes TLS off for the one on `port`. Returns the options that lead the facade there."""
    front = free_port()
    certificate, key = make_certificate(folder, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def carry(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader, writer):
        behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, behind_writer), carry(behind_reader, writer))

    async def serve():
        server = await asyncio.start_server(connected, "127.0.0.1", front, ssl=context)
        await server.serve_forever()

    threading.Thread(target=asyncio.run, args=(serve(),), daemon=True).start()
    return [f"--endpoint=https://127.0.0.1:{front}", f"--upstream-ca={certificate}"]


def calls_of_functions(options, environment, instance, workflow, outcome, calls):
    """How often each function was called, by its symbol, in a run of the facade with this many calls."""
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        report = ["--demangle=no", f"--callgrind-out-file={profile}"]
        count(options, environment, load(instance, workflow, calls), outcome, calls, report)
        return read(profile.read_text())


def read(profile):
    """Sums the calls in callgrind's format: a name is told once, with the number that stands for it later."""
    names, called, calls = {}, None, collections.Counter()
    for line in profile.splitlines():
        if function := re.match(r"c?fn=\((\d+)\)(?: (\S+))?", line):
            number, name = function.groups()
            if name:
                # A recursion's levels are told apart.
                names[number] = re.sub(r"'\d+$", "", name)
            called = number
        elif line.startswith("calls="):
            calls[names[called]] += int(line.removeprefix("calls=").split()[0])
    return calls


def symbols():
    """Symbol and size of each function of the program, in its order: what calls each other is near each other already."""
    command = ["nm", "--defined-only", "--print-size", "--numeric-sort", PROGRAM]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        fields = line.split()
        if len(fields) == 4 and fields[2] in "tTwW":
            yield fields[3], int(fields[1], 16)


def without_versions(symbol):
    symbol = re.sub(r"17h[0-9a-f]{16}E", "17h*E", symbol)
    # The hash of a crate in the newer mangling, the compiler's own counter, and the version in AWS-LC's names.
    symbol = re.sub(r"Cs[0-9A-Za-z]+_", "Cs*_", symbol)
    symbol = re.sub(r"\.\d+$", ".*", symbol)
    return re.sub(r"aws_lc_\d+_\d+_\d+_", "aws_lc_*_", symbol)


if __name__ == "__main__":
    main()
