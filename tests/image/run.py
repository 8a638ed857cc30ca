"""Builds the Dockerfile with buildah and runs the image as Kubernetes would: unprivileged, read-only, no shell.

Images made of this machine's files, under the names of the registry's base images, replace those, which are not available
everywhere. In the fake compiler image, `cargo` copies the program that is already built (target/dist, or the variable FACADE).
With `--compile` the compiler image is a Debian with the Rust toolchain, and the Dockerfile compiles the program. The Dockerfile
is not changed in either case.

Usage: run.py [--compile]. Requires root and buildah; with --compile, debootstrap and a Debian mirror, too.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dependencies import section
from facade import EXAMPLE_TASK, PROGRAM, ROOT, Checks

COMPILER, BASE = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
USER = 65532
# The libraries that gcr.io/distroless/cc-debian12 contains and Rust programs may load.
LIBRARIES = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libstdc++.so.6"}
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# The image must stay below 40 MB, and the base takes about 24 MB.
ADDED_LIMIT_MB = 13.5
MB = 1_000_000


class Buildah:
    """buildah with a separate store."""

    def __init__(self, folder):
        registries = folder / "registries.conf"
        registries.write_text('unqualified-search-registries = ["docker.io"]\n')
        policy = folder / "policy.json"
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self._policy = str(policy)
        self._environment = {**os.environ, "CONTAINERS_REGISTRIES_CONF": str(registries)}
        self._store = ["--root", str(folder / "store"), "--runroot", str(folder / "run"), "--storage-driver", "vfs"]

    def __call__(self, *arguments):
        command = ["buildah", *self._store, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=self._environment)
        if result.returncode:
            raise AssertionError(f"{' '.join(command)}\n{result.stdout}\n{result.stderr}")
        return result.stdout.strip()

    def image_of(self, rootfs, name, *settings):
        container = self("from", "scratch")
        self("copy", "--quiet", container, str(rootfs), "/")
        if settings:
            self("config", *settings, container)
        self("commit", "--quiet", "--format", "docker", "--signature-policy", self._policy, container, name)
        self("rm", container)

    def build(self, name):
        options = ["--format", "docker", "--isolation", "chroot", "--pull-never", "--layers=false"]
        return self("build", *options, "--signature-policy", self._policy, "--tag", name, str(ROOT))

    @contextlib.contextmanager
    def files(self, image):
        """The image's files, mounted."""
        container = self("from", "--pull-never", "--signature-policy", self._policy, image)
        try:
            yield Path(self("mount", container))
        finally:
            self("rm", container)


def libraries_of(program):
    """The shared libraries that a program loads, and the loader."""
    output = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=30, check=True).stdout
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", output)]


def copy_with_libraries(rootfs, program, target=None):
    for source, place in [(Path(program), target or program), *((library, library) for library in libraries_of(program))]:
        destination = rootfs / str(place).lstrip("/")
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, destination)


def base_files(rootfs):
    """What the facade may rely on in distroless/cc: C runtime, CA certificates, two users."""
    for library in libraries_of(PROGRAM):
        destination = rootfs / str(library).lstrip("/")
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, destination)
    certificates = rootfs / str(CERTIFICATES).lstrip("/")
    certificates.parent.mkdir(parents=True)
    shutil.copy(CERTIFICATES, certificates)
    (rootfs / "etc/passwd").write_text(
        f"root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:{USER}:{USER}:nonroot:/home/nonroot:/sbin/nologin\n"
    )
    (rootfs / "etc/nsswitch.conf").write_text("hosts: files dns\n")
    (rootfs / "tmp").mkdir(mode=0o1777)


def compiler_files(rootfs):
    """A shell, and a fake cargo that copies the built program."""
    for program in ("sh", "mkdir", "touch", "rm", "cp", "test"):
        copy_with_libraries(rootfs, shutil.which(program), f"/bin/{program}")
    shutil.copy(PROGRAM, rootfs / "compiled")
    cargo = rootfs / "bin/cargo"
    cargo.write_text(
        "#!/bin/sh\nset -e\n"
        # `cargo install` does nothing.
        'test "$1" != install || exit 0\n'
        # A plain `cargo build` would not embed the list of dependencies.
        'test "$1 $2" = "auditable build"\n'
        # `set -e` ignores every command of an && list but the last, so each file has its own test.
        "for file in .cargo/config.toml Cargo.toml Cargo.lock build.rs src/main.rs src/lib.rs benches/hot_path.rs; do\n"
        '    test -f "$file" || { echo "$file is not there" >&2; exit 1; }\n'
        "done\n"
        "test -d proto && test -d third_party || exit 1\n"
        "mkdir -p target/dist && cp /compiled target/dist/rds-task-facade\n"
    )
    cargo.chmod(0o755)
    (rootfs / "tmp").mkdir(mode=0o1777)


def debian_compiler_files(rootfs):
    """Debian with a C compiler and `make`, as in the registry's image, and this machine's Rust."""
    packages = "ca-certificates,gcc,libc6-dev,make"
    command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(rootfs)]
    subprocess.run(command, check=True, timeout=1800, stdout=subprocess.DEVNULL)
    sysroot = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for part in ("bin", "lib"):
        shutil.copytree(Path(sysroot.strip()) / part, rootfs / "usr/local" / part, dirs_exist_ok=True, symlinks=True)
    # The CA certificates of this machine, for networks with their own CA.
    shutil.copy(CERTIFICATES, rootfs / str(CERTIFICATES).lstrip("/"))


class Container:
    """Runs the image's program unprivileged in a read-only root, with the image's variables only.

    The network namespace that `main` creates has only loopback."""

    def __init__(self, root, config):
        self.root, self.config = str(root), config
        self.environment = dict(item.split("=", 1) for item in config["Env"])

    def start(self, *command):
        def enter():
            os.chroot(self.root)
            os.chdir("/")
            os.setgroups([])
            os.setgid(USER)
            os.setuid(USER)

        return subprocess.Popen(
            command,
            preexec_fn=enter,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command):
        process = self.start(*command)
        output, errors = process.communicate(timeout=30)
        return process.returncode, output, errors


def check_config(checks, config):
    checks.equal("user", config["User"], f"{USER}:{USER}")
    checks.equal("entry point", config["Entrypoint"], ["/rds-task-facade"])
    checks.equal("command", config["Cmd"], ["serve"])
    checks.equal("ports", set(config["ExposedPorts"]), {"50051/tcp", "9464/tcp"})
    checks.equal("health check", config["Healthcheck"]["Test"], ["CMD", "/rds-task-facade", "health"])
    labels = {f"org.opencontainers.image.{name}" for name in ("title", "description", "licenses", "version")}
    checks.that("labels", labels <= set(config["Labels"]), config["Labels"])
    environment = dict(item.split("=", 1) for item in config["Env"])
    checks.equal("log format", environment["RDS_TASK_FACADE_LOG_FORMAT"], "json")


def check_files(checks, image, base):
    def listed(root):
        return {path.relative_to(root) for path in root.rglob("*") if not path.is_dir()}

    added = listed(image) - listed(base)
    checks.equal("the program is the only added file", added, {Path("rds-task-facade")})
    size = sum((image / path).stat().st_size for path in added)
    checks.that(f"size added to the base: {size / MB:.1f} MB, of {ADDED_LIMIT_MB}", size < ADDED_LIMIT_MB * MB)
    checks.that("the program contains a list of dependencies", section(image / "rds-task-facade"))
    output = subprocess.run(["readelf", "-d", image / "rds-task-facade"], capture_output=True, text=True, check=True).stdout
    needed = {name for name in re.findall(r"NEEDED.*\[(.*)\]", output) if not name.startswith("ld-linux")}
    checks.that(f"the base contains the libraries: {', '.join(sorted(needed))}", needed <= LIBRARIES, needed)
    output = subprocess.run(["readelf", "-V", image / "rds-task-facade"], capture_output=True, text=True, check=True).stdout
    newest = max(tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_(\d+\.\d+)", output))
    checks.that(f"Debian 12's glibc, 2.36, is new enough: the program needs {newest}", newest <= (2, 36))


def check_run(checks, container):
    server = container.start(*container.config["Entrypoint"], "serve", "--sandbox")
    try:
        health = container.config["Healthcheck"]["Test"][1:]
        begun = time.monotonic()
        while container.run(*health)[0] != 0 and time.monotonic() < begun + 15:
            time.sleep(0.1)
        took = time.monotonic() - begun
        checks.that(f"healthy after {took:.1f} s, by the image's own health check", container.run(*health)[0] == 0)
        status = Path(f"/proc/{server.pid}/status").read_text()
        checks.that(
            "runs unprivileged",
            re.search(r"^Uid:(\s+65532){4}$", status, re.MULTILINE) and re.search(r"^CapEff:\s+0+$", status, re.MULTILINE),
            status,
        )
        version = container.run("/rds-task-facade", "--version")[1].split()[-1]
        checks.equal("the version's label", container.config["Labels"]["org.opencontainers.image.version"], version)
        code, reply, errors = container.run("/rds-task-facade", "call")
        checks.that("answers a call", code == 0 and json.loads(reply) == EXAMPLE_TASK, (code, reply, errors))
        checks.that("the root is read-only", os.statvfs(container.root).f_flag & os.ST_RDONLY)
        server.send_signal(signal.SIGTERM)
        output, errors = server.communicate(timeout=30)
        checks.equal("exits with 0 after SIGTERM", server.returncode, 0)
        lines = (output + errors).splitlines()
        checks.that("every line of the log is JSON", lines and all(is_json(line) for line in lines), lines)
        checks.equal("no longer healthy", container.run(*health)[0], 1)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    with contextlib.ExitStack() as stack:
        shell = None
        with contextlib.suppress(OSError):
            shell = stack.enter_context(container.start("/bin/sh", "-c", "true"))
        checks.that("there is no shell", shell is None)


def is_json(line):
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def build_and_check(compile_for_real):
    checks = Checks()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        compiler, base = folder / "compiler", folder / "base"
        compiler.mkdir()
        base.mkdir()
        (debian_compiler_files if compile_for_real else compiler_files)(compiler)
        base_files(base)
        buildah = Buildah(folder)
        buildah.image_of(compiler, f"docker.io/library/{COMPILER}", "--env", "PATH=/usr/local/bin:/usr/bin:/bin")
        buildah.image_of(base, BASE)
        begun = time.monotonic()
        buildah.build("localhost/rds-task-facade:test")
        print(f"      built in {time.monotonic() - begun:.0f} s")
        config = json.loads(buildah("inspect", "--type", "image", "localhost/rds-task-facade:test"))["Docker"]["config"]
        check_config(checks, config)
        with buildah.files("localhost/rds-task-facade:test") as image:
            check_files(checks, image, base)
            run = ["mount", "--bind", str(image), str(image)]
            subprocess.run(run, check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(image)], check=True)
            try:
                check_run(checks, Container(image, config))
            finally:
                subprocess.run(["umount", str(image)], check=True)
    checks.finish()


def main():
    arguments = sys.argv[1:]
    if "--inside" not in arguments:
        # New namespaces for mounts and network, in which the image's ports are free.
        again = [sys.executable, __file__, *arguments, "--inside"]
        network = [] if "--compile" in arguments else ["--net"]
        raise SystemExit(subprocess.run(["unshare", "--mount", *network, *again]).returncode)
    if "--compile" not in arguments:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    build_and_check("--compile" in arguments)


if __name__ == "__main__":
    main()
