"""`immucore state` on what a boot has mounted: what was changed, how it differs, and the way back."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from native import ACTIVE, PASSIVE, ROOT, SOURCE, Machine, described

BIND, OVERLAY = (
    f'PERSISTENT_STATE_PATHS="/var /home"\nPERSISTENT_STATE_BIND={bind}\n' for bind in ("true", "false")
)
KEPT = "/sysroot/usr/local/.state"
State = Callable[..., subprocess.CompletedProcess[str]]


def layout(machine: Machine, text: str, name: str = "active.img") -> None:
    with machine.image(name=name) as root:
        (root / "etc/cos/cos-layout.env").write_text(text)
        (root / "var/log/text").write_text("hello\n")
        (root / "var/log/audit").mkdir(0o700)  # otherwise each boot adds it


@pytest.fixture
def state(machine: Machine, source: Sequence[str]) -> State:
    """Run the command in the machine."""

    def run(*words: str | bytes, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command: list[str | bytes] = [*machine.inside(*source[:-1], "state"), *words]
        done = subprocess.run(
            command,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        )
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture(params=[BIND, OVERLAY], ids=["bind", "overlay"])
def booted(request: pytest.FixtureRequest, machine: Machine, source: Sequence[str]) -> Machine:
    """Give a machine that has booted, and in which nobody has done anything."""
    layout(machine, request.param)
    boot = machine.boot(ACTIVE, source)
    assert boot.status == 0, boot.stderr
    return machine


def live(machine: Machine, path: str = "") -> Path:
    return machine.path(f"/sysroot/var{path}")


def change(machine: Machine) -> None:
    """Do to /var what people do."""
    live(machine, "/log/text").write_text("hello\nworld\n")
    live(machine, "/tool").unlink()
    live(machine, "/mine").write_text("mine")
    live(machine, "/own").mkdir()
    live(machine, "/own/deep").write_text("mine")
    live(machine, "/log").chmod(0o700)
    live(machine, "/sparse").touch()


CHANGED = [
    "changed /var/log/",
    "changed /var/log/text",
    "added /var/mine",
    "added /var/own/",
    "deleted /var/tool",
]


def listed(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines(), key=lambda line: line.split(" ", 1)[1])


def stages(machine: Machine) -> list[str]:
    """List what a reset has left behind."""
    places = [machine.path(KEPT), live(machine)]
    return [name for place in places for name in os.listdir(place) if "reset" in name]


def test_nothing_was_changed(booted: Machine, state: State) -> None:
    assert listed(state("/var")) == []
    assert listed(state("--root", "/sysroot", "/var/")) == []
    found = json.loads(state("--json").stdout)
    assert found["schema"] == 1
    assert [each["path"] for each in found["paths"]] == ["/home", "/var"]
    for each in found["paths"]:
        assert (each["changed"], each["added"], each["deleted"], each["conflicts"]) == (0, 0, 0, [])
        assert each["error"] is None
    done = state("reset", "/var", "--yes")
    assert (done.returncode, done.stdout) == (0, "/var is as the image has it\n")


def test_what_was_changed(booted: Machine, state: State) -> None:
    change(booted)
    assert listed(state("/var")) == sorted(CHANGED, key=lambda line: line.split(" ", 1)[1])
    overview = state()
    assert overview.returncode == 0
    assert "2 changed, 2 added, 1 deleted" in overview.stdout
    assert "0 changed, 0 added, 0 deleted" in overview.stdout
    found = json.loads(state("show", "/var", "--json").stdout)["paths"][0]
    assert (found["changed"], found["added"], found["deleted"]) == (2, 2, 1)
    assert {"what": "added", "path": "/var/own", "kind": "directory"} in found["files"]


def test_the_way_back_of_all(booted: Machine, state: State) -> None:
    with booted.image() as image:
        before = described(image / "var")
    change(booted)
    todo = state("reset", "/var")
    assert todo.returncode == 2
    assert "bring back /var/tool\n" in todo.stdout
    assert "hint: to do it: --yes" in todo.stderr
    assert live(booted, "/mine").exists()

    done = state("reset", "/var", "--yes")

    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "brought back /var/tool",
        "removed /var/mine",
        "removed /var/own/",
        "replaced /var/log/",
        "replaced /var/log/text",
    ]
    assert listed(state("/var")) == []
    assert stages(booted) == []
    after = described(live(booted))
    for found in (before, after):
        for name in (".", "log", "log/text", "sparse"):  # their times
            found.pop(name)
    assert after == before
    assert live(booted, "/log/text").read_text() == "hello\n"
    assert stat.S_IMODE(live(booted, "/log").stat().st_mode) == 0o1770


def test_the_way_back_of_single_files(booted: Machine, state: State) -> None:
    change(booted)
    done = state("reset", "/var", "log/text", "/var/tool", "own")
    assert done.returncode == 0, done.stderr
    assert listed(state("/var")) == ["changed /var/log/", "added /var/mine"]
    assert live(booted, "/mine").read_text() == "mine"
    assert state("reset", "/var", "mine").stdout == "removed /var/mine\n"
    assert state("reset", "/var", "log").stdout == "replaced /var/log/\n"
    assert listed(state("/var")) == []


def test_a_file_of_another_kind(booted: Machine, state: State) -> None:
    """A directory where the image has a file, a symlink where it has a directory, a deleted directory."""
    live(booted, "/tool").unlink()
    live(booted, "/tool").mkdir()
    live(booted, "/tool/in").write_text("x")
    live(booted, "/log/fifo").unlink()
    live(booted, "/log/fifo").symlink_to("/etc/passwd")
    live(booted, "/log/link").unlink()
    live(booted, "/log/link").symlink_to("again")
    assert listed(state("/var")) == [
        "changed /var/log/fifo",
        "changed /var/log/link",
        "changed /var/tool/",
    ]
    assert "type: file in the image, directory here" in state("diff", "/var/tool").stdout
    assert "target: messages in the image, again here" in state("diff", "/var/log/link").stdout
    assert state("reset", "/var", "tool", "log").returncode == 0
    assert stat.S_ISFIFO(live(booted, "/log/fifo").lstat().st_mode)
    assert live(booted, "/tool").read_bytes() == b"\x7fELF"
    assert listed(state("/var")) == []

    booted.run("rm", "-r", "/sysroot/var/log")
    assert listed(state("/var")) == ["deleted /var/log/"]
    refused = state("reset", "/var", "log/text")
    assert refused.returncode == 4
    assert "hint: reset the directory that holds it" in refused.stderr
    assert state("reset", "/var", "log").stdout == "brought back /var/log/\n"
    assert live(booted, "/log/again").samefile(live(booted, "/log/messages"))
    assert listed(state("/var")) == []

    booted.run("rm", "-r", "/sysroot/var/log")
    live(booted, "/log").write_text("a file now")
    assert listed(state("/var")) == ["changed /var/log"]
    assert state("reset", "/var", "log").stdout == "replaced /var/log\n"
    assert listed(state("/var")) == []
    assert stages(booted) == []


def test_a_directory_that_was_made_anew(booted: Machine, state: State) -> None:
    """In an overlay it is opaque: what the image has in it does not shine through."""
    booted.run("rm", "-r", "/sysroot/var/log")
    live(booted, "/log").mkdir()
    live(booted, "/log/messages").write_text("hello\n")
    found = listed(state("/var"))
    assert "deleted /var/log/again" in found
    assert "deleted /var/log/null" in found
    assert not any("messages" in line for line in found)
    assert state("reset", "/var", "log").returncode == 0
    assert listed(state("/var")) == []


def test_differences(booted: Machine, state: State) -> None:
    change(booted)
    live(booted, "/log/text").write_text("hello\nwor\x1bld")
    done = state("diff", "/var/log/text")
    assert done.stdout.splitlines() == [
        "--- /var/log/text (image)",
        "+++ /var/log/text",
        "@@ -1 +1,2 @@",
        " hello",
        "+wor\\u001bld",
        "\\ No newline at end of file",
    ]
    assert state("diff", "/var/tool").stdout == "only the image has /var/tool (file): it was deleted here\n"
    assert state("diff", "/var/mine").stdout == "only this machine has /var/mine (file): it was added\n"
    assert "/var/log: mode: 1770 in the image, 0700 here" in state("diff", "/var/log").stdout
    assert state("diff", "/var/log/again").stdout == "/var/log/again is as the image has it\n"
    assert state("reset", "/var", "tool").returncode == 0
    tool = live(booted, "/tool")
    tool.write_bytes(b"\0\xff")
    os.chown(tool, 5, 6)
    os.setxattr(tool, "user.kept", b"other")
    said = state("diff", "/var/tool").stdout
    assert "the content differs, and is binary: 4 bytes in the image, 2 bytes here" in said
    assert "owner: 0:0 in the image, 5:6 here" in said
    assert "attribute user.kept: '\\x00binary\\xff' in the image, 'other' here" in said
    assert "attribute security.capability: " in said
    assert "here\n" in said
    live(booted, "/own/more").mkdir()
    assert state("diff", "/var/log/null").stdout == "/var/log/null is as the image has it\n"
    assert "deleted /var/log/null\n" not in state("diff", "/var/log").stdout
    live(booted, "/log/null").unlink()
    assert "deleted /var/log/null\n" in state("diff", "/var/log").stdout
    assert state("diff", "/home").stdout == "/home is as the image has it\n"
    live(booted, "/sparse").write_text("x" * 300_000)
    assert "too large to be compared by lines" in state("diff", "/var/sparse").stdout


REFUSED: list[tuple[tuple[str, ...], int, str]] = [
    (("/etc",), 2, "'/etc' is no persistent path of this boot"),
    (("reset", "/var/log", "x"), 2, "'/var/log' is no persistent path"),
    (("diff", "/etc/os-release"), 2, "is in no persistent path"),
    (("diff", "log/text"), 2, "is in no persistent path"),
    (("diff", "/var/../etc/os-release"), 2, "no '..'"),
    (("diff", "/var/nothing"), 2, "cannot find '/var/nothing', neither in the image nor here"),
    (("reset", "/var", "../etc/os-release"), 2, "no '..'"),
    (("reset", "/var", "log/../../x"), 2, "no '..'"),
    (("reset", "/var", "/home/x"), 2, "'/home/x' is not in '/var'"),
    (("reset", "/var", "nothing"), 2, "neither in the image nor here"),
    (("reset", "/var", "away/os-release"), 2, "a symlink is on the way"),
    (("diff", "/var/away/os-release"), 2, "a symlink is on the way"),
    (("--root", "/", "/var"), 4, "this boot has mounted another"),
    (("--root", "/nowhere", "/var"), 4, "No such file"),
    (("reset",), 2, "PATH"),
    (("diff",), 2, "FILE"),
    (("diff", "x", "y"), 2, "unrecognized arguments"),
]


def test_what_is_refused(machine: Machine, source: Sequence[str], state: State) -> None:
    layout(machine, BIND)
    machine.boot(ACTIVE, source)
    live(machine, "/away").symlink_to("/etc")
    for words, status, told in REFUSED:
        done = state(*words)
        assert (done.returncode, done.stdout) == (status, ""), done
        assert told in done.stderr


def test_symlinks_lead_nowhere(booted: Machine, state: State) -> None:
    """A directory that somebody has made a symlink is replaced, and what it leads to is not touched."""
    outside = booted.path("/sysroot/usr/local/outside")
    outside.mkdir()
    (outside / "messages").write_text("outside")
    booted.run("rm", "-r", "/sysroot/var/log")
    live(booted, "/log").symlink_to("/sysroot/usr/local/outside")
    refused = state("reset", "/var", "log/text")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert state("reset", "/var", "log").stdout == "replaced /var/log\n"
    assert os.listdir(outside) == ["messages"]
    assert (outside / "messages").read_text() == "outside"
    live(booted, "/mine").symlink_to("/sysroot/usr/local/outside")
    assert state("reset", "/var", "mine").returncode == 0
    assert os.listdir(outside) == ["messages"]
    assert listed(state("/var")) == []


def test_odd_names(booted: Machine, state: State) -> None:
    names = [b"new\nline", b"not\xffutf", b"esc\x1b[31m", "ümlaut".encode(), b"-dash"]
    for name in names:
        (booted.path("/sysroot/var") / os.fsdecode(name)).write_text("mine")
    assert sorted(state("/var").stdout.splitlines()) == sorted(
        [
            "added /var/-dash",
            "added /var/esc\\u001b[31m",
            "added /var/new\\u000aline",
            "added /var/not\\udcffutf",
            "added /var/ümlaut",
        ]
    )
    found = json.loads(state("/var", "--json").stdout)["paths"][0]["files"]
    assert {os.fsencode(each["path"]) for each in found} == {b"/var/" + name for name in names}
    done = state("reset", "/var", *names[:-1], "/var/-dash")
    assert done.returncode == 0, done.stderr
    assert "removed /var/not\\udcffutf\n" in done.stdout
    assert listed(state("/var")) == []


def test_conflicts_and_another_image(
    switch_on: Callable[[], Machine], source: Sequence[str], tmp_path: Path
) -> None:
    machine = switch_on()
    for slot in ("active", "passive"):
        layout(machine, BIND, f"{slot}.img")
    with machine.image(name="passive.img") as root:
        (root / "var/tool").write_text("passive\n")
    machine.boot(ACTIVE, source)
    live(machine, "/tool").write_text("mine\n")
    machine = switch_on()
    assert machine.boot(PASSIVE, source).result["conflicts"] == ["/var/tool"]

    def state(*words: str) -> str:
        return machine.run(*source[:-1], "state", *words)

    assert "    in conflict: /var/tool\n" in state()
    assert state("/var") == "conflict /var/tool\nchanged /var/tool\n"
    assert "-passive\n+mine\n" in state("diff", "/var/tool")
    assert state("reset", "/var", "tool") == "replaced /var/tool\n"
    assert live(machine, "/tool").read_text() == "passive\n"
    assert state("/var") == ""
    assert "conflict" not in state()


def test_adopted(machine: Machine, source: Sequence[str], state: State) -> None:
    layout(machine, BIND)
    with machine.image() as root:
        (root / "var/spool").mkdir()
    with machine.partition("persistent") as persistent:
        kept = persistent / ".state/var.bind"
        kept.mkdir(parents=True)
        (kept / "own").write_text("mine")
        (kept / "tool").write_text("old")
    machine.boot(ACTIVE, source)
    assert "was there before its first manifest (adopted): 2 missing" in state().stdout
    assert "missing /var/spool/\n" in state("/var").stdout
    assert "missing /var/sparse\n" in state("/var").stdout
    assert "added /var/own\n" in state("/var").stdout
    assert state("reset", "/var", "sparse").stdout == "brought back /var/sparse\n"
    assert live(machine, "/sparse").stat().st_size == 3 << 20


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"[" * 100_000 + b"\n",
        b'{"image": "x"}\n["directory", 493, 0, 0, ""]\n""\n["../../etc", "file", 0, 0, 0, ""]\n',
        b'{"image": "x"}\n["directory", 493, 0, 0, ""]\n""\nnull\n'
        b'["conflict", "../../etc/shadow", null, null]\n{"inode": 1, "adopted": false}\n',
    ],
    ids=["none", "empty", "deep", "names", "conflict"],
)
def test_a_manifest_that_is_none(
    machine: Machine, source: Sequence[str], state: State, content: bytes | None
) -> None:
    layout(machine, BIND)
    machine.boot(ACTIVE, source)
    place = machine.path(f"{KEPT}/var.manifest")
    place.unlink()
    if content is not None:
        place.write_bytes(content)
    done = state()
    assert done.returncode == 4
    assert "/home: bind, kept in /usr/local/.state/home.bind" in done.stdout
    assert "0 changed" in done.stdout
    assert "'/usr/local/.state/var.manifest' is no manifest: " in done.stdout
    assert state("/var").returncode == 4
    assert state("/var", "--json").returncode == 4
    live(machine, "/tool").unlink()
    assert state("reset", "/var", "tool").stdout == "brought back /var/tool\n", "the image says what it has"


def test_immutable_files(booted: Machine, state: State) -> None:
    live(booted, "/mine").mkdir()
    live(booted, "/mine/in").write_text("x")
    live(booted, "/tool").write_text("mine")
    for path in ("mine/in", "mine", "tool"):
        booted.run("chattr", "+i", f"/sysroot/var/{path}")
    done = state("reset", "/var", "--yes")
    assert done.returncode == 0, done.stderr
    assert listed(state("/var")) == []


def test_what_was_cut_off_is_cleared(booted: Machine, state: State) -> None:
    place = live(booted, "/.immucore.reset")
    if booted.path(f"{KEPT}/var.bind").exists():
        place = booted.path(f"{KEPT}/var.reset")
    place.mkdir(mode=0o700)
    (place / "new").mkdir()
    (place / "new/x").write_text("half")
    live(booted, "/tool").unlink()
    assert state("reset", "/var", "tool").returncode == 0
    assert stages(booted) == []

    place.mkdir(mode=0o700)
    held = os.open(place, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    live(booted, "/tool").unlink()
    refused = state("reset", "/var", "tool")
    assert refused.returncode == 4
    assert "another reset is at work" in refused.stderr
    os.close(held)
    assert state("reset", "/var", "tool").returncode == 0

    place.mkdir(mode=0o755)
    os.chown(place, 1000, 1000)
    live(booted, "/tool").unlink()
    refused = state("reset", "/var", "tool")
    assert refused.returncode == 4
    assert "it is somebody else's" in refused.stderr


def test_not_root(booted: Machine) -> None:
    # Imported as root: nobody may not be allowed to read where the tests are.
    program = "import os, sys, immucore.cli, immucore.state; os.setresuid(*[65534] * 3); "
    program += "sys.argv = ['immucore', 'state']; sys.exit(immucore.cli.main(sys.argv[1:]))"
    words = booted.inside(SOURCE[0], "-c", program)
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 4
    assert "that is for root alone" in done.stderr


def test_what_is_not_mounted_any_more(booted: Machine, state: State) -> None:
    booted.run("umount", "/sysroot/var")
    done = state("/var")
    assert done.returncode == 4
    assert "mounted there by now" in done.stderr
    assert state().returncode == 4


def test_a_machine_without_a_record(machine: Machine, state: State) -> None:
    done = state()
    assert done.returncode == 4
    assert "cannot read '/run/immucore/steps.json'" in done.stderr


# The system calls of a reset that change a file system: what is between two of them is one state.
CHANGING = (
    *("mkdir", "mkdirat", "mknod", "mknodat", "link", "symlink", "ftruncate", "sendfile", "lchown", "chmod"),
    *("setxattr", "utimensat", "fsync", "syncfs", "rename", "renameat", "renameat2"),
    *("unlink", "unlinkat", "rmdir"),
)


@pytest.mark.parametrize(("text", "was"), [(BIND, "a file"), (BIND, "a directory"), (OVERLAY, "a file")])
def test_a_reset_that_is_cut_off_anywhere(
    machine: Machine, state: State, source: Sequence[str], text: str, was: str
) -> None:
    """Killed at each change of the file system: what is there is the old version or the image's, whole."""
    layout(machine, text)
    machine.boot(ACTIVE, source)
    tool = live(machine, "/tool")
    image = described(live(machine))["tool"]
    reset = (sys.executable, "-m", "immucore", "state", "reset", "/var", "tool")

    def change() -> None:
        machine.run("rm", "-rf", "/sysroot/var/tool")
        if was == "a directory":
            tool.mkdir()
            (tool / "in").write_text("mine")
        else:
            tool.write_text("mine")

    def version() -> str:
        if tool.is_dir():
            return "a directory" if (tool / "in").read_text() == "mine" else "half"
        if tool.read_bytes() == b"mine":
            return "a file"
        return "the image's" if described(live(machine))["tool"] == image else "half"

    change()
    trace = ("strace", "--output=/machine/trace", f"--trace={','.join(f'?{each}' for each in CHANGING)}")
    machine.run(*trace, *reset)
    calls = [line.partition("(")[0] for line in machine.path("/machine/trace").read_text().splitlines()]
    seen = set()
    for call in {*CHANGING} & {*calls}:
        for when in range(1, calls.count(call) + 1):
            change()
            inject = f"--inject={call}:signal=SIGKILL:when={when}"
            killed = subprocess.run(
                machine.inside("strace", "--output=/dev/null", f"--trace={call}", inject, *reset),
                capture_output=True,
                check=False,
            )
            assert killed.returncode in (0, 137, -9), killed
            seen.add(version())
            if killed.returncode == 0:
                break  # Python had written its own cache the first time
            assert state("reset", "/var", "tool").returncode == 0
            assert version() == "the image's"
            assert stages(machine) == []
    assert seen == {was, "the image's"}
    assert listed(state("/var")) == []


def test_a_full_disk(booted: Machine, state: State) -> None:
    live(booted, "/sparse").unlink()
    live(booted, "/log/text").write_text("mine")
    volume = booted.path("/sysroot/usr/local")
    with suppress(OSError), (volume / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with suppress(OSError), (volume / "rest").open("wb", buffering=0) as file:
        while True:
            file.write(b"x")
    done = state("reset", "/var", "--yes")
    assert done.returncode == 4
    assert "No space left on device; it stays as it was" in done.stderr
    assert "hint: free space on the file system" in done.stderr
    assert live(booted, "/log/text").read_text() == "mine"
    (volume / "filler").unlink()
    assert state("reset", "/var", "--yes").returncode == 0
    assert listed(state("/var")) == []
    assert stages(booted) == []


@pytest.mark.parametrize("text", [BIND, OVERLAY])
def test_a_path_in_another(machine: Machine, source: Sequence[str], state: State, text: str) -> None:
    layout(machine, text.replace("/var", "/var /var/log"))
    machine.boot(ACTIVE, source)
    live(machine, "/log/text").write_text("mine")
    live(machine, "/mine").write_text("mine")
    assert listed(state("/var")) == ["added /var/mine"]
    assert listed(state("/var/log")) == ["changed /var/log/text"]
    assert "-hello\n+mine\n" in state("diff", "/var/log/text").stdout
    assert state("reset", "/var", "--yes").returncode == 0
    assert live(machine, "/log/text").read_text() == "mine"
    assert state("reset", "/var/log", "--yes").stdout == "replaced /var/log/text\n"
    assert listed(state("/var/log")) == []


def test_the_frozen_program(booted: Machine, frozen: Sequence[str]) -> None:
    (booted.path("/sysroot/var") / os.fsdecode(b"\xff\xc3\xbc")).write_text("mine")
    live(booted, "/log/text").write_text("f\u00fcr\n")
    for locale in ("C", "C.UTF-8", "POSIX"):
        for words in (["/var"], ["diff", "/var/log/text"], []):
            done = subprocess.run(
                booted.inside(frozen[0], "state", *words),
                capture_output=True,
                check=False,
                env={"PATH": os.environ["PATH"], "LC_ALL": locale},
            )
            assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run(
        booted.inside(frozen[0], "state", "reset", "/var", os.fsdecode(b"\xff\xc3\xbc")), check=False
    )
    assert done.returncode == 0
    assert not live(booted, "/" + os.fsdecode(b"\xff\xc3\xbc")).exists()


def test_a_confirmation_on_a_terminal(booted: Machine, source: Sequence[str]) -> None:
    for typed, gone in ((b"no\n", False), (b"yes\n", True)):
        live(booted, "/mine").write_text("mine")
        ours, theirs = os.openpty()
        process = subprocess.Popen(
            booted.inside(*source[:-1], "state", "reset", "/var"), stdin=theirs, stdout=subprocess.PIPE
        )
        os.write(ours, typed)
        said, _ = process.communicate(timeout=30)
        os.close(ours)
        os.close(theirs)
        assert process.returncode == 0
        assert said.startswith(b"remove /var/mine\nAll of this is done to /var")
        assert live(booted, "/mine").exists() != gone


def test_an_overlay_that_cannot_be_kept(switch_on: Callable[[], Machine], source: Sequence[str]) -> None:
    """On a full disk what was kept is a lower layer, and what changes is in memory."""
    machine = switch_on()
    layout(machine, OVERLAY)
    machine.boot(ACTIVE, source)
    live(machine, "/tool").unlink()
    live(machine, "/mine").write_text("mine")
    machine = switch_on()
    with machine.partition("persistent") as persistent, suppress(OSError):
        for number in range(100_000):
            (persistent / f"{number}").touch()
    machine.start(ACTIVE, source).communicate(timeout=30)
    assert '"makeshift"' in machine.path("/run/immucore/steps.json").read_text()
    live(machine, "/log/text").write_text("mine")
    state = (*source[:-1], "state")
    found = json.loads(machine.run(*state, "--json"))["paths"][1]
    assert "No space left on device" in found["note"]
    assert (found["changed"], found["added"], found["deleted"]) == (1, 1, 1)
    assert (
        machine.run(*state, "reset", "/var", "log", "mine") == "replaced /var/log/text\nremoved /var/mine\n"
    )
    assert machine.run(*state, "/var") == "deleted /var/tool\n"


SWAP = r"""
echo $$ >/machine/swapping
ln -s /sysroot/usr/local/outside link
while :; do
    mv --no-target-directory dir aside && mv --no-target-directory link dir
    mv --no-target-directory dir link && mv --no-target-directory aside dir
done
"""


def test_somebody_swaps_a_directory_for_a_symlink(
    machine: Machine, source: Sequence[str], state: State
) -> None:
    """Whoever owns a directory does that at any moment, and never makes root write anywhere else."""
    layout(machine, BIND)
    with machine.image() as root:
        (root / "home/dir/deep").mkdir(parents=True)
        for number in range(200):
            (root / f"home/dir/{number}").write_text("image")
            (root / f"home/dir/deep/{number}").write_text("image")
    machine.boot(ACTIVE, source)
    outside = machine.path("/sysroot/usr/local/outside")
    (outside / "deep").mkdir(parents=True)
    for number in range(0, 200, 2):
        (outside / f"deep/{number}").write_text("outside")
    before = described(outside)
    home = machine.path("/sysroot/home")
    for each in (*home.glob("dir/*7"), *home.glob("dir/deep/*3")):
        each.write_text("mine")
    swapping = subprocess.Popen(
        machine.inside("sh", "-c", f"cd /sysroot/home; {SWAP}"), stderr=subprocess.DEVNULL
    )
    try:
        statuses = [state("reset", "/home", "dir").returncode for _ in range(8)]
    finally:
        machine.run("kill", "-KILL", machine.path("/machine/swapping").read_text().strip())
        swapping.wait()
    assert {*statuses} <= {0, 2, 4}
    assert described(outside) == before
