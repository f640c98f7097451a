"""What is needed of etcd's v3 API, through its JSON gateway: a key, and to change it only as it was read.

https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/
"""

from __future__ import annotations

import base64
import http.client
import ipaddress
import json
import os
import ssl
from typing import Any
from urllib.parse import urlsplit

from immucore.errors import ImmucoreError
from immucore.system import settings
from immucore.system.settings import SettingsError
from immucore.values import Record

TIMEOUT_SEC = 10  # etcd itself gives up after 7
MAX_ANSWER_BYTES = 1 << 20
_KEYS = ("endpoints", "ca", "cert", "key", "user", "password-file", "group")
_EXAMPLE = "etcd: {endpoints: ['https://10.0.0.1:2379'], ca: /etc/immucore/etcd-ca.pem}"


class EtcdError(ImmucoreError):
    """etcd does not answer, or refuses: it may some time."""

    exit_status = 4


class Access(Record):
    """Where etcd is, and who this machine is there."""

    endpoints: tuple[str, ...]
    ca: str = ""  # empty: what the system trusts
    cert: str = ""
    key: str = ""
    user: str = ""
    password_file: str = ""
    group: str = "default"  # machines of one group share a lock


def access(setting: object) -> Access:
    """Read the setting `etcd`. Raises SettingsError."""
    if not isinstance(setting, dict) or not setting:
        raise _unusable("it is not there" if setting is None else "it is no mapping")
    if unknown := [str(key) for key in setting if key not in _KEYS]:
        raise _unusable(f"there is no '{unknown[0]}'", hint=f"it can have: {', '.join(_KEYS)}")
    endpoints = setting.get("endpoints")
    if not isinstance(endpoints, list) or not endpoints:
        raise _unusable("'endpoints' has to be a list of URLs")
    for endpoint in endpoints:
        _check_endpoint(endpoint)
    texts = {key.replace("-", "_"): value for key, value in setting.items() if key != "endpoints"}
    for key, value in texts.items():
        if not isinstance(value, str) or not value:
            raise _unusable(f"'{key.replace('_', '-')}' has to be a text", hint="put it in quotes")
    found = Access(endpoints=tuple(endpoints), **texts)
    if bool(found.cert) != bool(found.key):
        raise _unusable("'cert' and 'key' go together")
    if bool(found.user) != bool(found.password_file):
        raise _unusable("'user' and 'password-file' go together")
    if found.user and (exposed := [endpoint for endpoint in endpoints if not _is_private(endpoint)]):
        raise _unusable(
            f"the password of 'user' would go to '{exposed[0]}' in clear",
            hint="use https:// for all endpoints",
        )
    if any(urlsplit(endpoint).scheme == "https" for endpoint in endpoints):
        _context(found)
    return found


def _unusable(reason: str, hint: str = _EXAMPLE) -> SettingsError:
    return SettingsError(f"cannot use 'etcd' of '{settings.PATH}': {reason}", hint=hint)


def _check_endpoint(endpoint: object) -> None:
    try:
        url = urlsplit(endpoint if isinstance(endpoint, str) else "")
        good = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # a port that is no number
        good = False
    if not good or url.path not in ("", "/") or url.query or url.fragment or "@" in url.netloc:
        raise _unusable(f"the endpoint '{endpoint}' is no URL of a server")


def _is_private(endpoint: str) -> bool:
    """Tell whether nobody on a network can read what goes there."""
    url = urlsplit(endpoint)
    host = str(url.hostname)
    try:
        return url.scheme == "https" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _context(found: Access) -> ssl.SSLContext:
    """Read the certificates, anew for each connection: they may be renewed while a machine waits."""
    path = found.ca
    try:
        context = ssl.create_default_context(cafile=found.ca or None)
        if found.cert:
            path = f"{found.cert}' with '{found.key}"
            context.load_cert_chain(found.cert, found.key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        raise _unusable(
            f"cannot read '{path}': {_words(error)}", hint="it has to be in PEM format"
        ) from None
    return context


def _no_passphrase() -> str:
    """Answer for the user: without this OpenSSL asks on the terminal."""
    raise ValueError("it is encrypted")


def _words(error: Exception) -> str:
    """Say what was wrong; of an error in TLS the part that people understand."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return str(error.verify_message)
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class _Refused(Exception):
    """A server has answered, though not with what was asked for."""


class Client:
    """etcd, at the first of several endpoints that answers."""

    def __init__(self, found: Access) -> None:
        self._access = found
        self._endpoints = [*found.endpoints]  # the one that answered last comes first
        self._token = ""

    def get(self, key: str) -> tuple[str | None, int]:
        """Read a key, as a majority of the servers knows it; return its value, and which change has made it.

        None and 0 where there is none. Raises EtcdError.
        """
        answer = self._call("/v3/kv/range", {"key": _encoded(key)})
        try:
            if "kvs" not in answer:
                return None, 0
            found = answer["kvs"][0]
            value = base64.b64decode(found.get("value", ""), validate=True).decode()
            return value, int(found["mod_revision"])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise EtcdError(f"cannot read '{key}' in etcd: the answer is none of etcd's") from None

    def swap(self, key: str, value: str, revision: int) -> bool:
        """Write a key if nobody has changed it since that revision; False if somebody has. Raises EtcdError.

        After an error it may have been written, or still be.
        """
        unchanged = {"target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}
        answer = self._call(
            "/v3/kv/txn",
            {
                "compare": [{"key": _encoded(key), **unchanged}],
                "success": [{"request_put": {"key": _encoded(key), "value": _encoded(value)}}],
            },
        )
        return answer.get("succeeded") is True

    def _call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        reasons = []
        for endpoint in [*self._endpoints]:
            try:
                answer = self._ask(endpoint, path, body)
            except (
                OSError,
                ValueError,
                http.client.HTTPException,
                _Refused,
            ) as error:  # ValueError: no such name
                reasons.append(f"{endpoint}: {_words(error)}")
                continue
            self._endpoints.remove(endpoint)
            self._endpoints.insert(0, endpoint)
            return answer
        raise EtcdError(
            f"cannot use etcd at {'; '.join(reasons)}",
            hint=f"look at 'etcd' in {settings.PATH}, and at the servers",
        )

    def _ask(self, endpoint: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask one server, as the user if there is one.

        A token lasts some minutes, and until its server restarts. With one that is no longer good etcd
        answers in several ways, down to none at all, so that each failure is a reason for a new one.
        """
        if not self._access.user:
            return self._post(endpoint, path, body)
        if self._token:
            try:
                return self._post(endpoint, path, body)
            except (ConnectionError, http.client.HTTPException, _Refused):
                self._token = ""
        who = {"name": self._access.user, "password": _password(self._access.password_file)}
        self._token = str(self._post(endpoint, "/v3/auth/authenticate", who).get("token", ""))
        return self._post(endpoint, path, body)

    def _post(self, endpoint: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        url = urlsplit(endpoint)
        host, port = str(url.hostname), url.port or 2379
        connection = (
            http.client.HTTPSConnection(host, port, timeout=TIMEOUT_SEC, context=_context(self._access))
            if url.scheme == "https"
            else http.client.HTTPConnection(host, port, timeout=TIMEOUT_SEC)
        )
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = self._token
        try:
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            return _answer(response.status, response.read(MAX_ANSWER_BYTES))
        finally:
            connection.close()


def _password(path: str) -> str:
    """Read the file of a password, which is a secret. Raises SettingsError."""
    try:
        with open(path, encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise _unusable(f"others than its owner can use '{path}'", hint=f"chmod 600 {path}")
            return file.read().rstrip("\r\n")
    except (OSError, ValueError) as error:
        raise _unusable(f"cannot read '{path}': {_words(error)}", hint="") from None


def _answer(status: int, content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    if status == http.client.OK and isinstance(answer, dict):
        return answer
    said = answer.get("message") if isinstance(answer, dict) else content.decode("utf-8", "replace")
    first = next(iter(str(said).strip().splitlines()), "")
    raise _Refused(f"{first[:200] or 'it is no etcd'} (HTTP {status})")


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
