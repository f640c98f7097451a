"""Images of a registry: fetched by skopeo, which checks every digest, and unpacked by umoci."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

from immucore import files
from immucore.errors import CmdlineError
from immucore.system.errors import ImageError
from immucore.system.programs import FAKEROOT, run, silent
from immucore.values import Record

if TYPE_CHECKING:
    from immucore.system.programs import Advance

POLICY = "/etc/containers/policy.json"  # containers-policy.json(5): which signatures an image has to have
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_DIGEST = r"sha256:[0-9a-f]{64}"
# registry/path, then a tag or a digest or both: distribution's reference grammar, with a registry always
_REFERENCE = re.compile(
    rf"(?P<name>[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+)"
    rf"(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}))?(@(?P<digest>{_DIGEST}))?"
)
_HINT = "name it as oci:registry/image:tag, or as oci:registry/image@sha256:…"
_REACH = (
    "see whether the registry answers, and for authfile, cert-dir and tls-verify: immucore upgrade --help"
)


class Options(Record):
    """How a registry is spoken to."""

    authfile: str = ""  # as `skopeo login` writes it: a password on a command line is everybody's to read
    cert_dir: str = ""  # *.crt for its certificate, *.cert and *.key for ours: containers-certs.d(5)
    tls_verify: bool = True  # else also plain HTTP, and any certificate


class Registry:
    """One image of a registry."""

    def __init__(self, reference: str, options: Options) -> None:
        found = _REFERENCE.fullmatch(reference.removeprefix("//"))
        if not found:
            raise CmdlineError(f"cannot take 'oci:{reference}' for an image in a registry", hint=_HINT)
        self._name = found["name"]
        self._digest = found["digest"] or ""
        self._tag = found["tag"] or "latest"
        self._options = options
        self._failure = f"cannot fetch 'oci:{reference}'"

    def resolve(self) -> str:
        """Give the digest of the manifest that is meant, and keep to it from now on. Raises ImageError."""
        if not self._digest:
            argv = [*self._skopeo("inspect"), *self._access(""), "--no-tags", "--format", "{{.Digest}}"]
            said = run(
                [*argv, f"docker://{self._name}:{self._tag}"],
                self._failure,
                hint=_REACH,
                environment=_proxies(),
            )
            found = re.findall(rf"^{_DIGEST}$", said, re.MULTILINE)
            if not found:
                raise ImageError(f"{self._failure}: skopeo gives no digest of it", hint=_REACH)
            self._digest = found[-1]
        return self._digest

    def size_bytes(self) -> int:
        """Tell how large it is as it is fetched, compressed; 0 for one for several architectures."""
        argv = [*self._skopeo("inspect"), *self._access(""), "--raw"]
        said = run([*argv, f"docker://{self._name}@{self.resolve()}"], self._failure, environment=_proxies())
        return layer_bytes(said)

    def unpack(self, directory: str, advance: Advance = silent) -> None:
        """Fetch it into a directory beside `directory`, and unpack it into that, which is made.

        Raises ImageError.
        """
        if os.geteuid() or FAKEROOT in os.environ:
            raise ImageError(f"{self._failure}: umoci unpacks images for root only", hint="run it as root")
        digest = self.resolve()
        layout = f"{directory}.layout"
        try:
            argv = [*self._skopeo("copy", layout), "--quiet", *self._access("src-")]
            argv += [f"docker://{self._name}@{digest}", f"oci:{layout}:image"]
            run(argv, self._failure, hint=_REACH, environment=_proxies(), advance=advance)
            fetched = files.size(layout).bytes
            argv = ["umoci", "raw", "unpack", "--image", f"{layout}:image", directory]
            run(argv, self._failure, advance=advance, total_bytes=fetched)
        finally:
            files.remove(layout)

    def _skopeo(self, command: str, work: str = "") -> list[str]:
        # Without a policy skopeo refuses everything; digests are checked all the same.
        argv = ["skopeo", *([] if os.path.exists(POLICY) else ["--insecure-policy"])]
        return [*argv, *(["--tmpdir", os.path.dirname(work)] if work else []), command]

    def _access(self, prefix: str) -> list[str]:
        options = self._options
        given = [f"--{prefix}tls-verify={'true' if options.tls_verify else 'false'}"]
        given += ["--authfile", options.authfile] if options.authfile else []
        return given + ([f"--{prefix}cert-dir", options.cert_dir] if options.cert_dir else [])


def layer_bytes(manifest: str) -> int:
    """Sum up the layers that a manifest lists; 0 for one that cannot be read, which is any registry's."""
    try:
        layers = json.loads(manifest[manifest.index("{") :])["layers"]
        return sum(max(0, int(layer["size"])) for layer in layers)
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return 0


def _proxies() -> dict[str, str]:
    return {name: os.environ[name] for name in _PROXIES if name in os.environ}
