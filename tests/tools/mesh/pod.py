"""An instance of the facade and the proxy in front of it."""

import time

from facade import SANDBOX_TOKEN, Facade, free_port

from .envoy import Envoy, server_side

CALLER, SERVER = "caller", "rds-task-facade"
DRAIN_DELAY_SECONDS = 1


class Pod:
    """The ports of both stay the same after a restart. `options` are those of `server_side`."""

    def __init__(self, name, folder, identities, upstream, *arguments, credentials="token", **options):
        self.name, self._credentials = name, credentials
        self.port, self.instance_port = free_port(), free_port()
        self._folder, self._upstream, self._arguments = folder, upstream, arguments
        self._resources = server_side(self.port, self.instance_port, identities.path(SERVER), CALLER, **options)

    def start(self):
        self.start_proxy()
        self.start_instance()

    def start_proxy(self):
        self.proxy = Envoy(self._folder, self.name, self._resources)

    def start_instance(self):
        begun = time.monotonic()
        self.instance = Facade(
            f"--endpoint={self._upstream}",
            f"--credentials={self._credentials}",
            f"--drain-delay={DRAIN_DELAY_SECONDS}s",
            *self._arguments,
            environment={"RDS_TASK_FACADE_TOKEN": SANDBOX_TOKEN},
            port=self.instance_port,
        )
        self.instance.wait_until_serving()
        self.start_seconds = time.monotonic() - begun

    def stop(self):
        """Stops the proxy last, as a native sidecar. Returns the instance's exit code and the seconds it took."""
        begun = time.monotonic()
        code = self.instance.stop()
        took = time.monotonic() - begun
        self.proxy.stop()
        return code, took

    def kill(self):
        """Kills both at once, as when a node dies."""
        for process in (self.proxy, self.instance):
            process.kill()

    def close(self):
        for name in ("instance", "proxy"):
            if hasattr(self, name):
                getattr(self, name).__exit__()


def wait_for_health(client, count):
    """Waits until the caller's proxy has this number of healthy pods."""
    client.wait_until(f"{count} healthy pods", lambda: healthy(client) == count)


def healthy(client):
    return client.stat("cluster.facade.membership_healthy")
