"""A real registry on loopback: Debian's docker-registry, plain or with TLS and a password."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

import native

USER, PASSWORD = "somebody", "secret-password"


class Registry:
    """A registry that runs until the end of a `with`, and what is in it."""

    def __init__(self, folder: Path, *, tls: bool = False) -> None:
        self.folder, self.tls = folder, tls
        folder.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        config = f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {folder}/store\n"
        config += f"http:\n  addr: {self.address}\n"
        self.certificates, self.authfile = folder / "certificates", folder / "auth.json"
        self.certificates.mkdir()
        if tls:
            key, certificate = folder / "key.pem", self.certificates / "registry.crt"
            native.command(
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
                *("-subj", "/CN=registry", "-addext", "subjectAltName=IP:127.0.0.1"),
                *("-keyout", key, "-out", certificate),
            )
            passwords = native.command("htpasswd", "-Bbn", USER, PASSWORD)
            (folder / "passwords").write_text(passwords)
            config += f"  tls:\n    certificate: {certificate}\n    key: {key}\n"
            config += f"auth:\n  htpasswd:\n    realm: test\n    path: {folder}/passwords\n"
            secret = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            self.authfile.write_text(json.dumps({"auths": {self.address: {"auth": secret}}}))
        (folder / "config.yml").write_text(config)

    def __enter__(self) -> Registry:
        self._log = (self.folder / "log").open("wb")
        self._process = subprocess.Popen(
            ["docker-registry", "serve", self.folder / "config.yml"], stdout=self._log, stderr=self._log
        )
        host, _, port = self.address.partition(":")
        for _attempt in range(1000):
            try:
                socket.create_connection((host, int(port))).close()
            except OSError:
                time.sleep(0.01)
            else:
                return self
        raise RuntimeError((self.folder / "log").read_text())

    def __exit__(self, _1: type[BaseException] | None, _2: object, _3: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def push(self, name: str, *trees: Path, without: str = "") -> str:
        """Push an image `path:tag` with a layer for each tree, and one that takes a path away.

        Gives the digest of its manifest.
        """
        layout = self.folder / "layout"
        shutil.rmtree(layout, ignore_errors=True)
        native.command("umoci", "init", "--layout", layout)
        native.command("umoci", "new", "--image", f"{layout}:x")
        for tree in trees:
            native.command("umoci", "insert", "--image", f"{layout}:x", tree, "/")
        if without:
            native.command("umoci", "insert", "--image", f"{layout}:x", "--whiteout", without)
        access = ["--dest-tls-verify=false", *(["--authfile", str(self.authfile)] if self.tls else [])]
        target = f"docker://{self.address}/{name}"
        native.command("skopeo", "--insecure-policy", "copy", *access, f"oci:{layout}:x", target)
        repository, _, tag = name.partition(":")
        link = f"repositories/{repository}/_manifests/tags/{tag}/current/link"
        return (self.folder / "store/docker/registry/v2" / link).read_text()

    def blob(self, digest: str) -> Path:
        """Give the file that the registry has of a manifest or a layer."""
        return self.folder / f"store/docker/registry/v2/blobs/sha256/{digest[7:9]}/{digest[7:]}/data"

    def layers(self, digest: str) -> list[str]:
        """Give the digests of the layers of an image."""
        return [each["digest"] for each in json.loads(self.blob(digest).read_text())["layers"]]
