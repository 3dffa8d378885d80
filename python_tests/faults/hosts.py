"""Hosts on one machine: network namespaces with names and addresses of their own, and a switch.

Each host is a network namespace. A pair of virtual interfaces joins it to a bridge, which lies in a
namespace too: a cable to a switch. A program of a host sees the host's name, the addresses of all
hosts, and no other network. `cut` pulls the cable, `kill` stops all programs of a host at once.

    with Hosts(2) as hosts:
        first = hosts.start(0, ["hostname"])
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

_PREFIX = "hos-test"


def refusal() -> str:
    """Why this machine makes no hosts; empty if it does."""
    try:
        with Hosts(1) as hosts:
            told = hosts.start(0, ["hostname"]).communicate(timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        return f"no network namespaces here: {output.strip()}"
    return "" if told[0].strip() == "host0" else f"no host of its own name here: {told}"


class Hosts:
    """A number of hosts named host0, host1, ... with the addresses 10.77.0.1, 10.77.0.2, ...

    Args:
        count: of them.

    Attributes:
        names: of the hosts, in order.
    """

    def __init__(self, count: int) -> None:
        self.names = [f"host{i}" for i in range(count)]
        self._base = f"{_PREFIX}-{os.getpid()}"
        self._switch = f"{self._base}-switch"
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Hosts:
        _remove_leftovers()
        self._folder = tempfile.TemporaryDirectory()
        table = Path(self._folder.name, "hosts")
        lines = [f"10.77.0.{i + 1} {name}" for i, name in enumerate(self.names)]
        table.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            for i in range(len(self.names)):
                self._connect(i)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _connect(self, i: int) -> None:
        space, port = self._space(i), f"port{i}"
        _ip("netns", "add", space)
        ends = ("peer", "name", "eth0", "netns", space)
        _ip("-n", self._switch, "link", "add", port, "type", "veth", *ends)
        _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", space, "address", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", space, "link", "set", device, "up")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for i in range(len(self.names)):
            self.kill(i)
        for each in self._started:
            each.communicate()
        for space in [*map(self._space, range(len(self.names))), self._switch]:
            _ip("netns", "delete", space, check=False)
        self._folder.cleanup()

    def start(
        self, i: int, command: list[str], env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Starts a program on host i; its output is one pipe of text."""
        told = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        table = str(Path(self._folder.name, "hosts"))
        place = ["ip", "netns", "exec", self._space(i), "unshare", "--uts", "--mount"]
        started = subprocess.Popen(
            [*place, "sh", "-c", told, self.names[i], table, *command],
            env=env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._started.append(started)
        return started

    def cut(self, i: int) -> None:
        """Pulls the cable of host i: what is sent is lost, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"port{i}", "down")

    def join(self, i: int) -> None:
        """Puts the cable back."""
        _ip("-n", self._switch, "link", "set", f"port{i}", "up")

    def kill(self, i: int) -> None:
        """Kills all programs of host i."""
        for _ in range(100):
            found = _ip("netns", "pids", self._space(i), check=False).split()
            if not found:
                return
            for each in map(int, found):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
            time.sleep(0.02)

    def _space(self, i: int) -> str:
        return f"{self._base}-{i}"


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=check)
    return done.stdout


def _remove_leftovers() -> None:
    """Removes the namespaces of tests that were killed before they could."""
    for line in _ip("netns", "list", check=False).splitlines():
        space = line.split()[0]
        if space.startswith(_PREFIX + "-") and not Path("/proc", space.split("-")[2]).exists():
            _ip("netns", "delete", space, check=False)
