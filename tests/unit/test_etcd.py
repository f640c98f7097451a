"""The setting `etcd`, and what answers in etcd's place; etcd itself is in tests/integration."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore.system import etcd
from immucore.system.etcd import Access, Client, EtcdError
from immucore.system.settings import SettingsError

HERE = ["http://127.0.0.1:2379"]
Serve = Callable[[int, bytes], str]


def test_all_that_can_be_set() -> None:
    urls = ["https://a", "https://b:1/"]
    found = etcd.access({"endpoints": urls, "user": "u", "password-file": "/p", "group": "g"})
    assert found.endpoints == ("https://a", "https://b:1/")
    assert (found.user, found.password_file, found.group) == ("u", "/p", "g")
    assert etcd.access({"endpoints": HERE}).group == "default"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (None, "it is not there"),
        ("x", "it is no mapping"),
        ({}, "it is no mapping"),
        ({"endpoint": HERE}, "there is no 'endpoint'"),
        ({"endpoints": HERE, 1: 2}, "there is no '1'"),
        ({"group": "x"}, "'endpoints' has to be a list of URLs"),
        ({"endpoints": HERE[0]}, "'endpoints' has to be a list of URLs"),
        ({"endpoints": []}, "'endpoints' has to be a list of URLs"),
        ({"endpoints": [*HERE, "10.0.0.1:2379"]}, "the endpoint '10.0.0.1:2379' is no URL of a server"),
        ({"endpoints": [1]}, "the endpoint '1' is no URL of a server"),
        ({"endpoints": ["http://"]}, "the endpoint 'http://' is no URL of a server"),
        ({"endpoints": ["http://a:b"]}, "the endpoint 'http://a:b' is no URL of a server"),
        ({"endpoints": ["http://a:0"]}, "the endpoint 'http://a:0' is no URL of a server"),
        ({"endpoints": ["http://a:99999"]}, "the endpoint 'http://a:99999' is no URL of a server"),
        ({"endpoints": ["http://a/v3"]}, "the endpoint 'http://a/v3' is no URL of a server"),
        ({"endpoints": ["http://me:pw@a"]}, "the endpoint 'http://me:pw@a' is no URL of a server"),
        ({"endpoints": ["unix:///run/x"]}, "the endpoint 'unix:///run/x' is no URL of a server"),
        ({"endpoints": HERE, "group": 1}, "'group' has to be a text"),
        ({"endpoints": HERE, "password-file": ""}, "'password-file' has to be a text"),
        ({"endpoints": HERE, "cert": "/c"}, "'cert' and 'key' go together"),
        ({"endpoints": HERE, "key": "/k"}, "'cert' and 'key' go together"),
        ({"endpoints": HERE, "user": "u"}, "'user' and 'password-file' go together"),
        ({"endpoints": HERE, "password-file": "/p"}, "'user' and 'password-file' go together"),
        (
            {"endpoints": ["https://a"], "ca": "/nowhere/ca"},
            "cannot read '/nowhere/ca': No such file or directory",
        ),
        (
            {"endpoints": ["https://a"], "cert": "/nowhere/c", "key": "/nowhere/k"},
            "cannot read '/nowhere/c' with '/nowhere/k': No such file or directory",
        ),
        (
            {"endpoints": ["https://a"], "ca": __file__},
            f"cannot read '{__file__}': no certificate or crl found",
        ),
    ],
)
def test_what_cannot_be_used(settings: object, reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        etcd.access(settings)
    assert caught.value.message == f"cannot use 'etcd' of '/etc/immucore/upgrade.yaml': {reason}"
    assert caught.value.hint


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start something that answers every request with this."""
    servers = []

    def start(status: int, content: bytes) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answered(revision: object, value: object = "eA==") -> bytes:
    return json.dumps({"kvs": [{"mod_revision": revision, "value": value}]}).encode()


def test_an_answer(serve: Serve) -> None:
    assert Client(Access(endpoints=(serve(200, answered("7")),))).get("k") == ("x", 7)
    assert Client(Access(endpoints=(serve(200, b"{}"),))).get("k") == (None, 0)
    assert Client(Access(endpoints=(serve(200, b'{"succeeded": true}'),))).swap("k", "v", 0) is True
    assert Client(Access(endpoints=(serve(200, b'{"succeeded": "x"}'),))).swap("k", "v", 0) is False


@pytest.mark.parametrize(
    ("status", "content", "reason"),
    [
        (200, b"<html>\nhello", "<html> (HTTP 200)"),
        (200, b"[]", "[] (HTTP 200)"),
        (200, b"\xff\n", "\ufffd (HTTP 200)"),
        (503, b"", "it is no etcd (HTTP 503)"),
        (503, b"x" * 1000, f"{'x' * 200} (HTTP 503)"),
        (200, b"[" * 200_000, f"{'[' * 200} (HTTP 200)"),
        (401, b'{"message": "etcdserver: no"}', "etcdserver: no (HTTP 401)"),
        (400, b'{"message": 1}', "1 (HTTP 400)"),
        (302, b"elsewhere", "elsewhere (HTTP 302)"),
    ],
)
def test_what_is_no_answer(serve: Serve, status: int, content: bytes, reason: str) -> None:
    endpoint = serve(status, content)
    with pytest.raises(EtcdError) as caught:
        Client(Access(endpoints=(endpoint,))).get("k")
    assert caught.value.message == f"cannot use etcd at {endpoint}: {reason}"
    assert caught.value.hint == "look at 'etcd' in /etc/immucore/upgrade.yaml, and at the servers"


@pytest.mark.parametrize(
    "content",
    [
        b'{"kvs": []}',
        b'{"kvs": 1}',
        b'{"kvs": [1]}',
        b'{"kvs": [{}]}',
        answered("x"),
        answered(None),
        answered("7", "*"),
        answered("7", 1),
        answered("7", "/w=="),
    ],
)
def test_an_answer_that_is_not_etcds(serve: Serve, content: bytes) -> None:
    with pytest.raises(EtcdError) as caught:
        Client(Access(endpoints=(serve(200, content),))).get("k")
    assert caught.value.message == "cannot read 'k' in etcd: the answer is none of etcd's"


def test_the_first_endpoint_that_answers(serve: Serve) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        good = serve(200, answered("7"))
        client = Client(Access(endpoints=(gone, serve(503, b"no leader"), good)))
        assert client.get("k") == ("x", 7)
        assert client._endpoints[0] == good
        with pytest.raises(EtcdError) as caught:
            Client(Access(endpoints=(gone, gone))).get("k")
    assert (
        caught.value.message == f"cannot use etcd at {gone}: Connection refused; {gone}: Connection refused"
    )


def test_a_server_that_hangs_up_and_one_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd, "TIMEOUT_SEC", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        client = Client(Access(endpoints=(endpoint,)))
        with pytest.raises(EtcdError, match="timed out"):
            client.get("k")

        def hang_up() -> None:
            for _ in range(2):  # the one before has given up
                connection = server.accept()[0]
                while b'"key"' not in connection.recv(4096):
                    pass
                connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(EtcdError, match="closed connection without response"):
            client.get("k")
        thread.join()


def test_a_name_that_no_server_can_have() -> None:
    with pytest.raises(EtcdError, match=r"^cannot use etcd at http://a\.\.b: "):
        Client(etcd.access({"endpoints": ["http://a..b"]})).get("k")


@pytest.mark.parametrize("endpoint", ["http://10.0.0.1:2379", "http://localhost.example", "http://[::2]"])
def test_a_password_goes_over_no_network_in_clear(endpoint: str) -> None:
    who = {"user": "u", "password-file": "/p"}
    with pytest.raises(SettingsError) as caught:
        etcd.access({"endpoints": ["https://a", endpoint], **who})
    reason = f"the password of 'user' would go to '{endpoint}' in clear"
    assert caught.value.message == f"cannot use 'etcd' of '/etc/immucore/upgrade.yaml': {reason}"
    assert caught.value.hint == "use https:// for all endpoints"
    for here in ("http://127.0.0.2:1", "http://[::1]:1", "http://localhost:1"):
        assert etcd.access({"endpoints": [here], **who}).endpoints == (here,)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_password_that_others_can_read(serve: Serve, tmp_path: Path, mode: int) -> None:
    path = tmp_path / "password"
    path.write_text("pw")
    path.chmod(mode)
    who = {"user": "u", "password-file": str(path)}
    with pytest.raises(SettingsError) as caught:
        Client(etcd.access({"endpoints": [serve(200, b"{}")], **who})).get("k")
    reason = f"others than its owner can use '{path}'"
    assert caught.value.message == f"cannot use 'etcd' of '/etc/immucore/upgrade.yaml': {reason}"
    assert caught.value.hint == f"chmod 600 {path}"


def test_a_token_that_is_none(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("pw")
    (tmp_path / "password").chmod(0o600)
    who = {"user": "u", "password-file": str(tmp_path / "password")}
    for answer, reason in ((b'{"token": "a\\nb"}', "Invalid header value"), (b"{}", None)):
        client = Client(etcd.access({"endpoints": [serve(200, answer)], **who}))
        if reason:
            with pytest.raises(EtcdError, match=reason):
                client.get("k")
        else:
            assert client.get("k") == (None, 0)


def test_https_where_there_is_none(serve: Serve) -> None:
    endpoint = serve(200, b"{}").replace("http:", "https:")
    with pytest.raises(EtcdError, match=r"/v3|wrong version number|record layer failure"):
        Client(Access(endpoints=(endpoint,))).get("k")


@given(st.integers(100, 599), st.binary(max_size=50))
def test_any_answer_is_one_or_refused(status: int, content: bytes) -> None:
    try:
        answer = etcd._answer(status, content)
    except etcd._Refused:
        return
    assert status == 200
    assert isinstance(answer, dict)
