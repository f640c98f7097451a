"""Doing steps without a machine: conditions, files, what is told of what fails."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from immucore import documents, stages
from immucore.documents import DocumentError
from immucore.stage_accounts import ensure_entities, owner_ids
from immucore.stage_steps import Steps
from immucore.stage_tools import StepError, command, together, write, write_environment


class Told:
    """Remembers what is told."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.warnings: list[str] = []

    def debug(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        self.warnings.append(message)

    def failed(self, _step: stages.Step, message: str) -> None:
        self.failures.append(message)


def done(keys: str) -> tuple[bool, Told]:
    (step,) = stages.steps_of(documents.read(f"stages: {{x: [{{{keys}}}]}}", "f"), "x")
    told = Told()
    release = {"ID": "debian", "PRETTY_NAME": "Debian GNU/Linux 12 (bookworm)", "VERSION_ID": "12"}
    return Steps(told, release, offline=True).do(step), told


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


def test_a_template_is_named(tmp_path: Path) -> None:
    _, told = done(f"commands: ['echo \"{{{{ .X }}}}\" >{tmp_path}/x']")
    assert told.failures == []
    assert told.warnings == ["f:1:26: {{…}} is left as it is: this agent fills in no templates"]
    assert (tmp_path / "x").read_text() == "{{ .X }}\n"


@pytest.mark.parametrize(
    ("keys", "failure"),
    [
        ("hostname: 'a b'", "hostname: 'a b' is no name of a host"),
        ("hostname: 'x-{{ .Other }}'", "hostname: 'x-{{ .Other }}' is no name of a host"),
        ("sysctl: {'../x': 1}", "sysctl: '../x' is no name of a setting"),
        ("environment: {'A B': 1}", "environment: 'A B' is no name of a variable"),
        ("systemctl: {start: [x]}", "systemctl: cannot start x: the new root does not run yet; enable it"),
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
