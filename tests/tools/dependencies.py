"""Checks what the program was built with: the list of dependencies that it contains, and its allocator.

cargo-auditable embeds the list, where image scanners look for it: JSON compressed with zlib, in the ELF section .dep-v0. The
list must contain every package that is built, in its locked version, and none that only tests use. It also contains packages
that are not built: optional ones behind features that only a dependency could enable, such as ring.
"""

import json
import os
import re
import struct
import subprocess
import tomllib
import zlib
from pathlib import Path

from facade import PROGRAM, ROOT, Checks

SECTION = b".dep-v0"


def section(path):
    """The content of .dep-v0 in a 64-bit little-endian ELF file, or None."""
    elf = Path(path).read_bytes()
    if elf[:6] != b"\x7fELF\x02\x01":
        raise SystemExit(f"{path}: not a 64-bit little-endian ELF file")
    headers, size, count, names = struct.unpack_from("<Q10xHHH", elf, 0x28)
    sections = [struct.unpack_from("<I20xQQ", elf, headers + size * index) for index in range(count)]
    for name, offset, length in sections:
        begin = sections[names][1] + name
        if elf[begin : elf.index(b"\0", begin)] == SECTION:
            return elf[offset : offset + length]
    return None


def tree(*edges):
    """Name and version of each package that cargo builds along these edges, with the features of the Dockerfile."""
    command = ["cargo", "tree", "--locked", "--features=jemalloc", "--prefix=none", "--no-dedupe", "--format={p}"]
    command.append(f"--edges={','.join(edges)}")
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    return {tuple(re.match(r"(\S+) v(\S+)", line).groups()) for line in output.splitlines()}


def main():
    checks = Checks()
    found = section(PROGRAM)
    checks.that("the program contains a list of dependencies", found is not None)
    packages = json.loads(zlib.decompress(found or zlib.compress(b'{"packages": []}')))["packages"]
    listed = {(package["name"], package["version"]) for package in packages}
    shipped = {(package["name"], package["version"]) for package in packages if package.get("kind", "runtime") == "runtime"}
    locked = {(package["name"], package["version"]) for package in tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]}

    roots = [(package["name"], package["version"]) for package in packages if package.get("root")]
    version = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout.split()
    checks.equal("the root of the list is this program", roots, [tuple(version)])
    checks.equal("each listed package is in Cargo.lock", sorted(listed - locked), [])
    built, linked = tree("normal", "build"), tree("normal", "no-proc-macro")
    checks.equal(f"the {len(listed)} listed packages include the {len(built)} that cargo builds", sorted(built - listed), [])
    checks.equal(f"the {len(shipped)} packages listed as runtime include the {len(linked)} that are linked", sorted(linked - shipped), [])
    sources = {package["source"] for package in packages if not package.get("root")}
    checks.equal("each package comes from crates.io", sources, {"crates.io"})
    checks.equal("no package of the tests is listed", sorted(name for name, _ in listed if name in {"proptest", "rcgen"}), [])
    check_allocator(checks)
    checks.finish()


def check_allocator(checks):
    # jemalloc reads this variable at the first allocation and reports options that it does not have.
    environment = {**os.environ, "_RJEM_MALLOC_CONF": "no_such_option:1"}
    run = subprocess.run([PROGRAM, "--version"], env=environment, capture_output=True, text=True, timeout=30)
    checks.equal("the program ignores an unknown option of jemalloc", run.returncode, 0)
    checks.that("the program allocates with jemalloc", run.stderr.startswith("<jemalloc>: "), run.stderr)


if __name__ == "__main__":
    main()
