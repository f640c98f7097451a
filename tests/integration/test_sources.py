"""Where images come from: directories, archives, images, and a real registry, plain and with TLS."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import native
import psutil
import pytest
import upgrading
from registry import PASSWORD, Registry

from immucore.errors import CmdlineError
from immucore.system import content, oci, sources
from immucore.system.errors import ImageError
from immucore.system.sources import Options, parse

PLAIN = Options(tls_verify=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    native.require_root()
    return upgrading.make_tree(tmp_path_factory.mktemp("tree") / "tree", "one")


def same(source: sources.Source, tree: Path, target: Path, *, labels: bool = True) -> None:
    source.look()
    digest = source.unpack(str(target))
    if not labels:
        for path in target.rglob("*"):
            assert "security.selinux" not in os.listxattr(path, follow_symlinks=False)
            with contextlib.suppress(OSError):  # it has none
                label = os.getxattr(
                    tree / path.relative_to(target), "security.selinux", follow_symlinks=False
                )
                os.setxattr(path, "security.selinux", label, follow_symlinks=False)
    assert content.difference(str(tree), str(target)) == ""
    assert digest == content.digest(str(tree))
    assert os.listdir(target.parent).count(target.name) == 1
    assert [name for name in os.listdir(target.parent) if name.startswith(f"{target.name}.")] == []


def test_a_directory(tmp_path: Path, tree: Path) -> None:
    source = parse(f"dir:{tree}")
    same(source, tree, tmp_path / "copy")
    assert source.digest == content.digest(str(tree))
    assert (tmp_path / "copy/var/sparse").stat().st_blocks * 512 < 3 << 20
    copied = tmp_path / "copy/var/log/messages"
    assert copied.stat().st_mtime_ns == (tree / "var/log/messages").stat().st_mtime_ns


@native.isolated(user=False)
def test_what_is_mounted_in_a_directory_stays_outside(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "proc").mkdir(parents=True)
    native.command("mount", "-t", "tmpfs", "mounted", tree / "proc")
    (tree / "proc/secret").write_bytes(bytes(100_000))
    source = parse(f"dir:{tree}")
    source.look()
    assert source.needs_bytes < 100_000
    parse(f"dir:{tree}").unpack(str(tmp_path / "copy"))
    assert os.listdir(tmp_path / "copy/proc") == []


@pytest.mark.parametrize("how", ["", "--gzip", "--xz", "--zstd"])
def test_an_archive(tmp_path: Path, tree: Path, how: str) -> None:
    archive = tmp_path / "archive"
    native.command(
        *("tar", "--create", "--acls", "--xattrs", "--selinux", "--sparse", *([how] if how else [])),
        *("--file", archive, "--directory", tree, "."),
    )
    source = parse(f"tar:{archive}")
    same(source, tree, tmp_path / "copy")
    assert source.needs_bytes > 10_000


@pytest.mark.parametrize("fstype", ["ext4", "squashfs"])
def test_an_image(tmp_path: Path, fstype: str) -> None:
    tree = upgrading.make_tree(tmp_path / "tree", "one")
    if fstype == "squashfs":
        native.command("setfacl", "--recursive", "--remove-all", "--remove-default", tree)
    image = tmp_path / "image"
    upgrading.build(tree, image, "active", fstype)
    same(parse(f"file:{image}"), tree, tmp_path / "copy")


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(10_000))
    with pytest.raises(ImageError, match="it holds no file system that is known"):
        parse(f"file:{tmp_path}/image").look()
    for kind in ("file", "dir", "tar"):
        with pytest.raises(ImageError, match=r"cannot read '/not/there'.*No such file"):
            parse(f"{kind}:/not/there").look()


def archive_of(path: Path, *members: tuple[str, bytes, str]) -> Path:
    """Make an archive of (name, type, link target or content)."""
    with tarfile.open(path, "w") as archive:
        for name, kind, what in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if kind == tarfile.REGTYPE:
                member.size = len(what)
            else:
                member.linkname = what
            archive.addfile(member, io.BytesIO(what.encode()))
    return path


@pytest.mark.parametrize(
    "members",
    [
        [("../escaped", tarfile.REGTYPE, "x")],
        [("a/../../escaped", tarfile.REGTYPE, "x")],
        [("link", tarfile.SYMTYPE, ".."), ("link/escaped", tarfile.REGTYPE, "x")],
        [("link", tarfile.SYMTYPE, "{outside}"), ("link/escaped", tarfile.REGTYPE, "x")],
        [("{outside}/escaped", tarfile.REGTYPE, "x")],
        [("hard", tarfile.LNKTYPE, "{outside}/own"), ("hard", tarfile.REGTYPE, "x")],
        [("hard", tarfile.LNKTYPE, "../outside/own")],
    ],
)
def test_no_archive_writes_or_reads_outside_of_its_directory(
    tmp_path: Path, members: list[tuple[str, bytes, str]]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "own").write_text("own")
    filled = [(n.format(outside=outside), k, w.format(outside=outside)) for n, k, w in members]
    archive = archive_of(tmp_path / "archive", *filled)
    with contextlib.suppress(ImageError):  # some are left out, some stop it, as tar(1) has it
        parse(f"tar:{archive}").unpack(str(tmp_path / "copy"))
    assert not (tmp_path / "escaped").exists()
    assert os.listdir(outside) == ["own"]
    assert (outside / "own").read_text() == "own"
    assert (outside / "own").stat().st_nlink == 1


def test_an_archive_that_is_cut_short(tmp_path: Path, tree: Path) -> None:
    archive = tmp_path / "archive"
    native.command("tar", "--create", "--gzip", "--file", archive, "--directory", tree, ".")
    with archive.open("r+b") as file:
        file.truncate(archive.stat().st_size // 2)
    with pytest.raises(ImageError, match=r"cannot read '.*archive'.*[Uu]nexpected"):
        parse(f"tar:{archive}").look()


@native.isolated(user=False)
def test_a_full_disk(tmp_path: Path) -> None:
    tree = upgrading.make_tree(tmp_path / "tree", "one")
    (tree / "large").write_bytes(os.urandom(4 << 20))
    native.command("tar", "--create", "--file", tmp_path / "archive", "--directory", tree, ".")
    upgrading.build(tree, tmp_path / "image", "active")
    small = tmp_path / "small"
    small.mkdir()
    native.command("mount", "-t", "tmpfs", "-o", "size=3m", "small", small)
    for name in (f"dir:{tree}", f"tar:{tmp_path}/archive", f"file:{tmp_path}/image"):
        with pytest.raises(ImageError, match="No space left on device") as caught:
            parse(name).unpack(str(small / "copy"))
        assert "free space" in caught.value.hint
        native.command("rm", "-r", small / "copy")


@pytest.mark.parametrize(
    "text",
    [
        *("", "dir:", "dir:relative", "zip:/x", "/path", "oci:", "oci:nothing", "oci:host/Upper:x"),
        *(
            "oci:host/x:tag with blank",
            "oci:host/x@sha256:12",
            "oci:host/x --authfile=/etc/shadow",
            "oci:-x/y",
            *("dir:/a\0b", "file:/a\0b", "tar:/\0"),
        ),
    ],
)
def test_what_is_no_source(text: str) -> None:
    with pytest.raises(CmdlineError, match="cannot take '") as caught:
        parse(text)
    assert "oci:registry/image:tag" in caught.value.hint


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("plain") / "registry") as registry:
        yield registry


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("secured") / "registry", tls=True) as registry:
        yield registry


def test_an_image_of_a_registry(tmp_path: Path, tree: Path, plain: Registry) -> None:
    digest = plain.push("my/os:1", tree)
    source = parse(f"oci:{plain.address}/my/os:1", PLAIN)
    same(source, tree, tmp_path / "copy", labels=False)
    assert source.digest == digest
    layers = sum(plain.blob(layer).stat().st_size for layer in plain.layers(digest))
    assert source.needs_bytes == 2 * layers > 1000
    # What a name meant when it was looked at is what is fetched, though it means another image by now.
    source = parse(f"oci:{plain.address}/my/os:1", PLAIN)
    source.look()
    other = tmp_path / "other"
    other.mkdir()
    assert plain.push("my/os:1", tree, other) != digest
    source.unpack(str(tmp_path / "again"))
    assert source.digest == digest


@pytest.mark.parametrize("form", ["{0}/os/pinned@{1}", "{0}/os/pinned:1@{1}", "//{0}/os/pinned:1"])
def test_the_forms_of_a_name(tmp_path: Path, tree: Path, plain: Registry, form: str) -> None:
    digest = plain.push("os/pinned:1", tree)
    source = parse(f"oci:{form.format(plain.address, digest)}", PLAIN)
    same(source, tree, tmp_path / "copy", labels=False)
    assert source.digest == digest


def test_a_later_layer_takes_files_away(tmp_path: Path, plain: Registry) -> None:
    """Whiteouts are umoci's: what a layer has deleted is not in the image."""
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/kept").write_text("kept")
    (tree / "etc/gone").write_text("gone")
    plain.push("os/layers:1", tree, without="/etc/gone")
    parse(f"oci:{plain.address}/os/layers:1", PLAIN).unpack(str(tmp_path / "copy"))
    assert os.listdir(tmp_path / "copy/etc") == ["kept"]


@pytest.mark.parametrize("what", ["layer", "manifest", "config"])
def test_what_is_not_what_its_digest_says_is_refused(
    tmp_path: Path, tree: Path, plain: Registry, what: str
) -> None:
    digest = plain.push(f"os/{what}:1", tree)
    broken = plain.layers(digest)[0] if what == "layer" else digest
    path = plain.blob(broken)
    if what == "config":
        import json

        path = plain.blob(json.loads(path.read_text())["config"]["digest"])
    before = path.read_bytes()
    try:
        middle = len(before) // 2
        path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
        with pytest.raises(ImageError, match="cannot fetch 'oci:") as caught:
            parse(f"oci:{plain.address}/os/{what}@{digest}", PLAIN).unpack(str(tmp_path / "copy"))
    finally:
        path.write_bytes(before)
    assert "whether the registry answers" in caught.value.hint
    assert os.listdir(tmp_path) == []


def test_tls_and_a_password(tmp_path: Path, tree: Path, secured: Registry) -> None:
    digest = secured.push("my/os:1", tree)
    options = Options(authfile=str(secured.authfile), cert_dir=str(secured.certificates))
    name = f"oci:{secured.address}/my/os:1"
    source = parse(name, options)
    same(source, tree, tmp_path / "copy", labels=False)
    assert source.digest == digest
    for wrong, said in (
        (Options(cert_dir=str(secured.certificates)), "authentication required|unauthorized"),
        (Options(authfile=str(secured.authfile)), "certificate"),
    ):
        with pytest.raises(ImageError, match=said):
            parse(name, wrong).look()
    with pytest.raises(ImageError, match="cannot fetch"):
        parse(f"oci:{secured.address}/my/other:1", options).look()


def test_plain_http_has_to_be_asked_for(plain: Registry, tree: Path) -> None:
    plain.push("os/plain:1", tree)
    with pytest.raises(ImageError, match="HTTP response to HTTPS client"):
        parse(f"oci:{plain.address}/os/plain:1").look()


def test_no_password_is_on_a_command_line(tmp_path: Path, tree: Path, secured: Registry) -> None:
    secured.push("my/os:2", tree)
    options = Options(authfile=str(secured.authfile), cert_dir=str(secured.certificates))
    child = os.fork()
    if child == 0:
        try:
            parse(f"oci:{secured.address}/my/os:2", options).unpack(str(tmp_path / "copy"))
        finally:
            os._exit(0)
    seen: set[str] = set()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        try:
            below = psutil.Process(child).children(recursive=True)
            seen |= {" ".join([*each.cmdline(), *each.environ().values()]) for each in below}
        except psutil.Error:
            continue
        time.sleep(0.005)
    assert any("skopeo" in each for each in seen)
    assert not any(PASSWORD in each for each in seen)


def test_who_cannot_unpack_it_is_told_so(tmp_path: Path, plain: Registry) -> None:
    ran = subprocess.run(
        [
            *("fakeroot", "/usr/bin/python3.11", "-c"),
            "import sys; sys.path[:0] = [sys.argv[1]]\n"
            "from immucore.system.oci import Options, Registry\n"
            "Registry(sys.argv[2], Options()).unpack(sys.argv[3])",
            *(native.ROOT, f"{plain.address}/x:1", tmp_path / "copy"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "umoci unpacks images for root only" in ran.stderr


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from immucore import process

    monkeypatch.setitem(process.ENVIRONMENT, "PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError, match="there is no skopeo") as caught:
        parse("oci:host/x:1").look()
    assert caught.value.hint == "install skopeo"


def test_a_policy_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody says which signatures an image has to have, skopeo is not told to take any."""
    registry = oci.Registry("host/x:1", Options())
    monkeypatch.setattr(oci, "POLICY", str(tmp_path / "policy.json"))
    assert "--insecure-policy" in registry._skopeo("copy")
    (tmp_path / "policy.json").write_text("{}")
    assert "--insecure-policy" not in registry._skopeo("copy")
