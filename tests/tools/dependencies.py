"""The program names in itself what it was built from, where image scanners look: the section .dep-v0, zlib around JSON, of
cargo-auditable. Nothing that was built in is missing there, all of it is locked, and nothing of the tests is in it. It names
some packages beyond that: optional ones, of features that only a dependency of ours could switch on, such as ring.
"""

import json
import re
import struct
import subprocess
import tomllib
import zlib
from pathlib import Path

from facade import PROGRAM, ROOT, Checks

SECTION = b".dep-v0"


def section(path):
    """The content of the section, out of a 64-bit little-endian ELF file."""
    elf = Path(path).read_bytes()
    if elf[:6] != b"\x7fELF\x02\x01":
        raise SystemExit(f"{path} is no 64-bit little-endian ELF file")
    headers, size, count, names = struct.unpack_from("<Q10xHHH", elf, 0x28)
    places = [struct.unpack_from("<I20xQQ", elf, headers + size * index) for index in range(count)]
    for name, offset, length in places:
        begin = places[names][1] + name
        if elf[begin : elf.index(b"\0", begin)] == SECTION:
            return elf[offset : offset + length]
    return None


def tree(*edges):
    """Name and version of all that cargo builds along these edges."""
    command = ["cargo", "tree", "--locked", "--prefix=none", "--no-dedupe", "--format={p}", f"--edges={','.join(edges)}"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    return {tuple(re.match(r"(\S+) v(\S+)", line).groups()) for line in output.splitlines()}


def main():
    checks = Checks()
    found = section(PROGRAM)
    checks.that("the program has the section", found is not None)
    packages = json.loads(zlib.decompress(found or zlib.compress(b'{"packages": []}')))["packages"]
    listed = {(package["name"], package["version"]) for package in packages}
    shipped = {(package["name"], package["version"]) for package in packages if package.get("kind", "runtime") == "runtime"}
    locked = {(package["name"], package["version"]) for package in tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]}

    roots = [(package["name"], package["version"]) for package in packages if package.get("root")]
    version = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout.split()
    checks.equal("the list's root is this program", roots, [tuple(version)])
    checks.equal("all of it is locked", sorted(listed - locked), [])
    built, linked = tree("normal", "build"), tree("normal", "no-proc-macro")
    checks.equal(f"{len(listed)} packages, all of the {len(built)} that cargo builds among them", sorted(built - listed), [])
    checks.equal(f"{len(shipped)} as shipped, all of the {len(linked)} that are linked among them", sorted(linked - shipped), [])
    sources = {package["source"] for package in packages if not package.get("root")}
    checks.equal("all of it comes from the registry", sources, {"crates.io"})
    checks.equal("nothing of the tests", sorted(name for name, _ in listed if name in {"proptest", "rcgen"}), [])
    checks.finish()


if __name__ == "__main__":
    main()
