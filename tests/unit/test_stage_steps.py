"""Doing steps without a machine: conditions, files, what is told of what fails."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from immucore import documents, observe, stage_accounts, stage_steps, stages
from immucore.documents import DocumentError
from immucore.stage_accounts import add_authorized_keys, ensure_entities, owner_ids
from immucore.stage_steps import Steps
from immucore.stage_tools import StepError, command, together, write, write_environment


class Told:
    """Remembers what is told."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.warnings: list[str] = []
        self.ignored: list[str] = []

    def debug(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        self.warnings.append(message)

    def ignored_of(self, _step: stages.Step, message: str) -> None:
        self.ignored.append(message)

    def failed(self, _step: stages.Step, message: str) -> None:
        self.failures.append(message)


def done(keys: str) -> tuple[bool, Told]:
    (step,) = stages.steps_of(documents.read(f"stages: {{x: [{{{keys}}}]}}", "f"), "x")
    told = Told()
    release = {"ID": "debian", "PRETTY_NAME": "Debian GNU/Linux 12 (bookworm)", "VERSION_ID": "12"}
    return Steps(told, release, offline=True, find=lambda _: None).do(step), told


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("only_os: 'Ubuntu.*|Debian.*|Fedora.*|CentOS.*|Red\\sHat.*|Rocky.*|AlmaLinux.*'", True),
        ("only_os: 'Debian GNU/Linux 12.*'", True),
        ("only_os: 'Fedora.*|openSUSE.*|SLES.*|Alpine.*'", False),
        ("only_os: 'debian|ubuntu'", True),
        ("only_os: 'fedora'", False),
        ("only_os_version: '^1[23]$'", True),
        ("only_os_version: '^2'", False),
        (f"only_arch: '{os.uname().machine}'", True),
        ("only_arch: 'vax'", False),
        (f"node: '^{os.uname().nodename}$'", True),
        ("if_files: {all: [/etc/passwd], none: [/not/there]}", True),
        ("if_files: {any: [/not/there, /etc/passwd]}", True),
        ("if_files: {any: [/not/there]}", False),
        ("if: '[ -d / ]'", True),
        ("if: '[ -f / ]'", False),
        ("only_os: fedora, if: 'exit 0'", False),
    ],
)
def test_conditions(tmp_path: Path, condition: str, holds: bool) -> None:
    did, told = done(f"{condition}, files: [{{path: {tmp_path}/x}}]")
    assert (did, (tmp_path / "x").exists(), told.failures) == (holds, holds, [])


def test_templates_are_named_wherever_they_stay(tmp_path: Path) -> None:
    _, told = done(
        f"if: '[ \"{{{{ .A }}}}\" ]', commands: ['echo \"{{{{ .X }}}}\" >{tmp_path}/x'], "
        f"files: [{{path: {tmp_path}/y, content: 'a {{{{ .Y }}}}'}}, {{path: {tmp_path}/z, content: x}}], "
        f"environment_file: {tmp_path}/e, environment: {{A: '{{{{ .Z }}}}', B: x}}"
    )
    assert told.failures == []
    says = "is left as it is: this agent fills in no templates"
    command = 15 + len("if: '[ \"{{ .A }}\" ]', commands: [")
    assert told.warnings == [
        f"f:1:14: {{{{…}}}} in if {says}",
        f"f:1:14: {{{{…}}}} in files: {tmp_path}/y {says}",
        f"f:1:14: {{{{…}}}} in environment: A {says}",
        f"f:1:{command}: {{{{…}}}} {says}",
    ]
    assert (tmp_path / "x").read_text() == "{{ .X }}\n"
    assert (tmp_path / "y").read_text() == "a {{ .Y }}"


def test_what_is_for_a_file_is_not_for_the_steps_own_commands(tmp_path: Path) -> None:
    asked = f"environment_file: {tmp_path}/e, environment: {{LD_PRELOAD: /x, PATH: /nowhere}}"
    did, told = done(f"if: '[ -z \"$LD_PRELOAD\" ]', commands: ['cat /dev/null >{tmp_path}/x'], {asked}")
    assert (did, told.failures, told.ignored) == (True, [], [])
    assert (tmp_path / "x").exists()
    assert "LD_PRELOAD" in (tmp_path / "e").read_text()


def test_what_a_command_ends_with_is_its_own_matter(tmp_path: Path) -> None:
    _, told = done("commands: ['exit 3', 'exit 0'], systemctl: {start: [x]}")
    assert told.failures == []
    assert told.ignored == [
        "f:1:26: the command ended with status 3",
        "systemctl: cannot start x: the new root does not run yet; enable it",
    ]


def test_a_command_that_takes_too_long_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_steps, "COMMAND_SEC", 0.2)
    _, told = done("commands: ['sleep 60']")
    assert told.failures == ["f:1:26: the command ended with status 124, it took longer than 0.2 s"]


def test_one_that_fails_in_a_way_nobody_thought_of_costs_itself_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(stage_accounts, "add_groups", fail)
    (step,) = stages.steps_of(
        documents.read("stages: {x: [{groups: [a], files: [{path: /dev/null}]}]}", "f"), "x"
    )
    told = Told()
    Steps(told, {}, offline=True, find=lambda _: None).do(step)
    assert told.failures == ["groups: this is a bug in immucore: RecursionError: too deep"]


@pytest.mark.parametrize(
    ("keys", "failure"),
    [
        ("hostname: 'a b'", "hostname: 'a b' is no name of a host"),
        ("hostname: 'x-{{ .Other }}'", "hostname: 'x-{{ .Other }}' is no name of a host"),
        ("sysctl: {'../x': 1}", "sysctl: '../x' is no name of a setting"),
        ("environment: {'A B': 1}", "environment: 'A B' is no name of a variable"),
        ("authorized_keys: {nobody_here: [k]}", "authorized_keys: there is no user nobody_here"),
        ("files: [{path: /x, owner_string: nobody_here}]", "files: there is no user nobody_here"),
        ("layout: {device: {path: /dev/null}, expand_partition: {}}", "layout: /dev/null is no partition"),
    ],
)
def test_what_cannot_be_done_is_told(keys: str, failure: str) -> None:
    assert done(keys)[1].failures == [failure]


def test_writing_follows_a_symlink_and_keeps_mode_and_owner(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o751)
    (tmp_path / "link").symlink_to("file")
    write(f"{tmp_path}/link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o751
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_what_is_no_file_is_written_to_as_it_is(tmp_path: Path) -> None:
    write("/dev/null", b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="Is a directory"):
        write(str(tmp_path), b"x")


def test_the_environment_file_keeps_the_other_variables(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    path.write_text("A=1\nB='two words'\n")
    write_environment(str(path), {"A": 'say "hi" $x', "C": "line\nline"})
    assert path.read_text() == 'A="say \\"hi\\" \\$x"\nB="two words"\nC="line\nline"\n'


def test_entities(tmp_path: Path) -> None:
    path = tmp_path / "shadow"
    path.write_text("root:x:1\nother:*:2\n")
    ensure_entities(
        ((str(path), "kind: shadow\nusername: root\npassword: '*'\nlast_changed: 7\nexpire: ~"),)
    )
    assert path.read_text() == "root:*:7::::::\nother:*:2\n"
    for text in (
        "kind: shadow",
        "kind: x\nname: y",
        "[]",
        "kind: group\ngroup_name: 'a:b'",
        "kind: user\nx: y",
    ):
        with pytest.raises((DocumentError, StepError)):
            ensure_entities(((str(path), text),))
    assert path.read_text() == "root:*:7::::::\nother:*:2\n"


def test_owners() -> None:
    assert owner_ids("root:root") == (0, 0)
    assert owner_ids("12:") == (12, -1)
    assert owner_ids(":root") == (-1, 0)
    with pytest.raises(StepError, match="there is no group nobody_here"):
        owner_ids("root:nobody_here")


def test_all_are_tried_and_told_together() -> None:
    tried = []

    def one(number: int) -> None:
        tried.append(number)
        if number:
            raise StepError(f"not {number}")

    with pytest.raises(StepError, match="not 1; not 2"):
        together(one, [1, 0, 2])
    assert tried == [1, 0, 2]


def test_programs() -> None:
    assert command("cat", typed="x") == "x"
    with pytest.raises(StepError, match=r"cat ended with status 1: .*cat: /not/there: No such file"):
        command("cat", "/not/there")
    with pytest.raises(StepError, match="there is no such-program here"):
        command("such-program")


USER = 4321


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give somebody a home with .ssh in it."""
    (tmp_path / "passwd").write_text(f"some:x:{USER}:{USER}::{tmp_path}/home:/bin/sh\n")
    (tmp_path / "home/.ssh").mkdir(parents=True)
    (tmp_path / "secret").write_text("root:secret\n")
    for path in (tmp_path / "home", tmp_path / "home/.ssh"):
        os.chown(path, USER, USER)
    monkeypatch.setattr(stage_accounts, "PASSWD", f"{tmp_path}/passwd")
    return tmp_path / "home"


def add_key() -> None:
    add_authorized_keys({"some": ("ssh-rsa one",)})


def test_a_key_is_added_to_those_that_are_there(home: Path) -> None:
    keys = home / ".ssh/authorized_keys"
    keys.write_text("ssh-rsa zero")
    keys.chmod(0o644)
    os.chown(keys, USER, USER)
    add_key()
    add_key()
    assert keys.read_text() == "ssh-rsa zero\nssh-rsa one\n"
    assert (stat.S_IMODE(keys.stat().st_mode), keys.stat().st_uid) == (0o644, USER)
    assert [path.name for path in keys.parent.iterdir()] == ["authorized_keys"]


def test_a_home_that_is_not_there_is_made(home: Path) -> None:
    (home / ".ssh").rmdir()
    home.rmdir()
    add_key()
    ssh, keys = home / ".ssh", home / ".ssh/authorized_keys"
    assert (stat.S_IMODE(ssh.stat().st_mode), ssh.stat().st_uid) == (0o700, USER)
    assert (stat.S_IMODE(keys.stat().st_mode), keys.stat().st_uid) == (0o600, USER)


def test_a_home_may_be_below_a_symlink_of_root_and_of_nobody_else(home: Path) -> None:
    home.rename(home.parent / "moved")
    home.symlink_to("moved")
    add_key()
    assert (home / ".ssh/authorized_keys").read_text() == "ssh-rsa one\n"
    os.chown(home, USER, USER, follow_symlinks=False)
    with pytest.raises(StepError, match="home is a symlink that is not root's"):
        add_authorized_keys({"some": ("ssh-rsa two",)})


def _symlinked_file(home: Path) -> None:
    (home / ".ssh/authorized_keys").symlink_to(home.parent / "secret")


def _symlinked_directory(home: Path) -> None:
    (home / ".ssh").rmdir()
    (home.parent / "etc").mkdir()
    (home / ".ssh").symlink_to(home.parent / "etc")


def _hard_link(home: Path) -> None:
    (home / ".ssh/authorized_keys").hardlink_to(home.parent / "secret")


def _fifo(home: Path) -> None:
    os.mkfifo(home / ".ssh/authorized_keys")


def _large(home: Path) -> None:
    with (home / ".ssh/authorized_keys").open("wb") as file:
        file.truncate(observe.MAX_FILE_BYTES + 1)


@pytest.mark.parametrize("prepare", [_symlinked_file, _symlinked_directory, _hard_link, _fifo, _large])
def test_the_owner_of_a_home_gets_nothing_of_roots(home: Path, prepare: Callable[[Path], None]) -> None:
    prepare(home)
    secret = home.parent / "secret"
    before = secret.stat().st_uid, secret.read_text()
    size = (home / ".ssh/authorized_keys").stat().st_size if prepare is _large else 0
    with pytest.raises(StepError, match="ssh"):
        add_key()
    assert (secret.stat().st_uid, secret.read_text()) == before
    if prepare is _symlinked_directory:
        assert [*(home.parent / "etc").iterdir()] == []
        assert (home.parent / "etc").stat().st_uid == 0
    if prepare is _large:
        assert (home / ".ssh/authorized_keys").stat().st_size == size


def test_what_is_in_the_way_of_the_new_file_is_not_written_to(home: Path) -> None:
    (home / ".ssh/.authorized_keys.new").symlink_to(home.parent / "secret")
    add_key()
    assert (home.parent / "secret").read_text() == "root:secret\n"
    assert (home / ".ssh/authorized_keys").read_text() == "ssh-rsa one\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda path: ensure_entities(((path, "kind: shadow\nusername: x"),)),
        lambda path: write_environment(path, {"A": "1"}),
    ],
)
def test_a_large_file_is_never_cut(tmp_path: Path, change: Callable[[str], None]) -> None:
    path = tmp_path / "file"
    path.write_text("A=1\n" * (observe.MAX_FILE_BYTES // 4 + 1))
    size = path.stat().st_size
    with pytest.raises((StepError, OSError)) as caught:
        change(str(path))
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert path.stat().st_size == size
