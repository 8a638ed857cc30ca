"""Runs release/build and checks its files: archives, checksums, lists of dependencies, the image's manifest list; and runs the program
for arm64 in qemu.

The image's base comes from a registry, which is not available everywhere; images of the same name with nothing in them replace it.
Requires root. CI builds with Debian's cross compiler.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import tomllib
from pathlib import Path

from facade import EXAMPLE_TASK, PROJECT_ID, ROOT, WORKFLOW_ID, Checks, Program, free_port

FILES = ROOT / "target/release-files"
VERSION = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
ARCHITECTURES = {"x86_64": ("amd64", []), "aarch64": ("arm64", ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"])}
BASE = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.M)[-1]
NEWEST_GLIBC = (2, 34)
# For a program that an emulator runs on a busy machine.
PATIENCE_SECONDS = 120


def main():
    checks = Checks()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        storage = folder / "storage.conf"
        storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/store"\nrunroot = "{folder}/run"\n')
        environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(storage), "BUILDAH_ISOLATION": "chroot"}

        def buildah(*arguments):
            return subprocess.run(
                ["buildah", *arguments], env=environment, check=True, capture_output=True, text=True, timeout=300
            ).stdout.strip()

        bases = []
        for platform, _ in ARCHITECTURES.values():
            container = buildah("from", "--arch", platform, "scratch")
            bases.append(f"localhost/base-{platform}")
            buildah("commit", "--quiet", "--rm", container, bases[-1])
        buildah("manifest", "create", BASE, *(f"containers-storage:{base}" for base in bases))
        subprocess.run(["bash", ROOT / "release/build"], env=environment, check=True, timeout=3600)
        check_files(checks)
        check_image(checks, buildah, folder)
        for arch, (_, emulator) in ARCHITECTURES.items():
            check_program(checks, arch, extract(arch, folder), emulator)
        check_pages(checks, extract("aarch64", folder), ARCHITECTURES["aarch64"][1])
    checks.finish()


def base_name(arch):
    return f"rds-task-facade-{VERSION}-{arch}-linux"


def check_files(checks):
    sums = dict(reversed(line.split("  ")) for line in (FILES / "SHA256SUMS").read_text().splitlines())
    expected = {base_name(arch) + suffix for arch in ARCHITECTURES for suffix in (".tar.gz", ".cdx.json")}
    checks.equal("the files of the release", set(os.listdir(FILES)), {*expected, "SHA256SUMS"})
    seen = {name: hashlib.sha256((FILES / name).read_bytes()).hexdigest() for name in expected}
    checks.equal("SHA256SUMS has the files' checksums", sums, seen)
    locked = {(p["name"], p["version"]) for p in tomllib.loads((ROOT / "Cargo.lock").read_text())["package"]}
    for arch in ARCHITECTURES:
        with tarfile.open(FILES / f"{base_name(arch)}.tar.gz") as archive:
            members = {member.name.partition("/")[2]: member for member in archive}
        checks.equal(f"{arch}: the archive", set(members), {"", "rds-task-facade", "LICENSE", "README.md", "CHANGELOG.md"})
        checks.equal(f"{arch}: the program is executable", members["rds-task-facade"].mode & 0o111, 0o111)
        bill = json.loads((FILES / f"{base_name(arch)}.cdx.json").read_text())
        listed = {(c["name"], c["version"]) for c in bill["components"]}
        checks.equal(f"{arch}: the format of the list of dependencies", bill["bomFormat"], "CycloneDX")
        checks.that(f"{arch}: it lists {len(listed)} packages of Cargo.lock", len(listed) > 100 and listed <= locked, listed - locked)
        checks.that(f"{arch}: rustls is among them", "rustls" in dict(listed))


def check_image(checks, buildah, folder):
    image = f"localhost/rds-task-facade:{VERSION}"
    listed = json.loads(buildah("manifest", "inspect", image))["manifests"]
    platforms = {entry["platform"]["architecture"]: entry["digest"] for entry in listed}
    checks.equal("the image's architectures", set(platforms), {platform for platform, _ in ARCHITECTURES.values()})
    for arch, (platform, _) in ARCHITECTURES.items():
        container = buildah("from", "--pull-never", "--arch", platform, image)
        program = Path(buildah("mount", container)) / "rds-task-facade"
        same = program.read_bytes() == extract(arch, folder).read_bytes()
        checks.that(f"{arch}: the image has the program of the archive", same)
        buildah("rm", container)


def extract(arch, folder):
    """The program of an archive, on disk."""
    program = folder / f"rds-task-facade-{arch}"
    if not program.exists():
        with tarfile.open(FILES / f"{base_name(arch)}.tar.gz") as archive, program.open("wb") as file:
            shutil.copyfileobj(archive.extractfile(f"{base_name(arch)}/rds-task-facade"), file)
        program.chmod(0o755)
    return program


def check_program(checks, arch, program, emulator):
    symbols = subprocess.run(["readelf", "--dyn-syms", "--wide", program], capture_output=True, text=True, check=True).stdout
    versions = {tuple(map(int, version.split("."))) for version in re.findall(r"@GLIBC_([\d.]+)", symbols)}
    checks.that(f"{arch}: needs no glibc after {NEWEST_GLIBC}", max(versions)[:2] <= NEWEST_GLIBC, max(versions))
    command = [*emulator, str(program)]
    address = f"127.0.0.1:{free_port()}"
    target = ["--target", f"http://{address}"]

    def run(*arguments):
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=PATIENCE_SECONDS)

    with Program([*command, "serve", "--sandbox", f"--listen={address}", "--metrics-listen=off"]) as server:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (health := run("health", *target)).returncode and time.monotonic() < deadline:
            time.sleep(0.1)
        checks.equal(f"{arch}: health", (health.returncode, server.exit_code()), (0, None))
        called = run("call", *target)
        checks.equal(f"{arch}: call", json.loads(called.stdout or "{}"), EXAMPLE_TASK)
        ids = ["--project-id", PROJECT_ID, "--instance-id", "lifecycle-3", "--workflow-id", WORKFLOW_ID]
        watched = run("watch", *target, *ids)
        checks.equal(f"{arch}: watch of a task that succeeds", watched.returncode, 0)
        failed = run("call", *target, "--project-id", PROJECT_ID, "--instance-id", "task-not-found", "--workflow-id", WORKFLOW_ID)
        checks.that(f"{arch}: call of an unknown task", failed.returncode == 1 and "TASK_NOT_FOUND" in failed.stderr, failed)
        checks.equal(f"{arch}: SIGTERM drains", server.stop(), 0)


def check_pages(checks, program, emulator):
    """jemalloc ends a program whose pages are larger than it was built for."""
    for size in (4, 16, 64):
        command = [*emulator, "-p", str(size * 1024), program, "--version"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
        checks.equal(f"aarch64: starts with pages of {size} KiB", (run.returncode, run.stderr), (0, ""))


if __name__ == "__main__":
    main()
