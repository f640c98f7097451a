"""A real etcd on this machine, plain or with TLS, client certificates and users; and its own client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SERVER = """\
[usage]
keyUsage = digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectAltName = IP:127.0.0.1
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Etcd:
    """A server that can be killed and started again, on the same port and with the same data."""

    def __init__(self, folder: Path, *, tls: bool = False) -> None:
        self.folder = folder
        self.certificates = Certificates(folder / "certificates") if tls else None
        self.endpoint = f"http{'s' if tls else ''}://127.0.0.1:{free_port()}"
        self.peer = f"http://127.0.0.1:{free_port()}"
        self.root = ""  # its name and password, where only users may ask
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["etcd", "--data-dir", self.folder / "data", "--listen-client-urls", self.endpoint]
        words += ["--advertise-client-urls", self.endpoint, "--listen-peer-urls", self.peer]
        words += ["--initial-advertise-peer-urls", self.peer, "--initial-cluster", f"default={self.peer}"]
        if self.certificates:
            words += ["--client-cert-auth", "--trusted-ca-file", self.certificates.ca]
            words += ["--cert-file", self.certificates.server[0], "--key-file", self.certificates.server[1]]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while self.run("get", "anything").returncode:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run etcdctl."""
        options = ["--endpoints", self.endpoint, "--command-timeout", "5s"]
        if self.certificates:
            cert, key = self.certificates.client
            options += ["--cacert", str(self.certificates.ca), "--cert", str(cert), "--key", str(key)]
        if self.root:
            options += ["--user", self.root]
        environment = {"PATH": os.environ["PATH"], "ETCDCTL_API": "3"}
        return subprocess.run(
            ["etcdctl", *options, *words], env=environment, capture_output=True, text=True, check=False
        )

    def ctl(self, *words: str) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def value(self, key: str) -> Any:
        text = self.ctl("get", "--print-value-only", key)
        return json.loads(text) if text else None

    def history(self, key: str) -> list[Any]:
        """Give all that a key has had since it was made."""
        found = json.loads(self.ctl("get", key, "--write-out=json"))["kvs"][0]
        command = [
            "etcdctl",
            "--endpoints",
            self.endpoint,
            "watch",
            f"--rev={found['create_revision']}",
            key,
        ]
        environment = {"PATH": os.environ["PATH"], "ETCDCTL_API": "3"}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as watch:
            assert watch.stdout
            late = threading.Timer(60, watch.kill)
            late.start()
            values = []
            while len(values) < found["version"]:
                words = [watch.stdout.readline().strip() for _ in range(3)]
                assert words[:2] == ["PUT", key]
                values.append(json.loads(words[2]))
            late.cancel()
            watch.kill()
        return values

    def only_users(self, users: Sequence[tuple[str, str, str]]) -> None:
        """From now on only these may ask: name, password, and the prefix of the keys that they may have."""
        for name, password, prefix in (("root", "root", ""), *users):
            self.ctl("user", "add", f"{name}:{password}")
            self.ctl("role", "add", name)
            if prefix:
                self.ctl("role", "grant-permission", name, "readwrite", "--prefix=true", prefix)
            self.ctl("user", "grant-role", name, name)
        self.ctl("auth", "enable")
        self.root = "root:root"


class Certificates:
    """An authority, and what it has signed: a server's, a client's without a name, and one with a name."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        (folder / "usage.cnf").write_text(SERVER)
        self.ca = self._new("ca", "-x509", "-subj", "/CN=authority", "-days", "2")[0]
        self.server = self._signed("server", "/CN=etcd")
        self.client = self._signed("client", "/O=fleet")
        self.named = self._signed("named", "/CN=somebody")

    def _new(self, name: str, *words: str) -> tuple[Path, Path]:
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        _openssl("req", "-newkey", "rsa:2048", "-nodes", *words, "-out", cert, "-keyout", key)
        return cert, key

    def _signed(self, name: str, subject: str) -> tuple[Path, Path]:
        request, key = self._new(name, "-subj", subject)
        cert = self.folder / f"{name}.crt"
        authority = ["-CA", self.ca, "-CAkey", self.folder / "ca.key", "-CAcreateserial", "-days", "2"]
        usage = ["-extfile", self.folder / "usage.cnf", "-extensions", "usage"]
        _openssl("x509", "-req", "-in", request, "-out", cert, *authority, *usage)
        return cert, key


def _openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


@contextmanager
def running(folder: Path, *, tls: bool = False) -> Iterator[Etcd]:
    """Run a server; whatever happens it is gone at the end."""
    server = Etcd(folder, tls=tls)
    try:
        server.start()
        yield server
    finally:
        with suppress(ProcessLookupError):
            server.kill()
