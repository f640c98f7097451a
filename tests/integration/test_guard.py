"""The guard of the switch root, run by each shell it may meet, in a mount namespace with its own /run."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

GUARD = Path(__file__).parents[2] / "dracut-module/50immucore/immucore-guard"
Guard = Callable[..., tuple[int, str]]
GOOD = '{"schema":1,"outcome":"ok","mode":"active"}\n'
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNTS = "@ /run/a\\040b\n@ /run/immucore\n"  # @: the device that is mounted there
DEVICES = """NR == FNR { device[$5] = $3; next } $1 == "@" { $1 = device[$2] } { print }"""


@pytest.fixture(params=["dash", "bash"])
def guard(request: pytest.FixtureRequest, tmp_path: Path) -> Guard:
    """Run the guard over these two files (None: absent); return its exit status and what it said."""

    def run(result: str | None, mounts: str | None, over: str = "") -> tuple[int, str]:
        source = tmp_path / "immucore"
        source.mkdir()
        for name, text in (("result.json", result), ("mounts", mounts)):
            if text is not None:
                (source / name).write_text(text)
        script = (
            "set -e; mount -t tmpfs none /run; "
            'mkdir /run/immucore "/run/a b"; mount -t tmpfs none "/run/a b"; '
            'mount --bind "$1" /run/immucore; [ ! -e "$1/mounts" ] || '
            '{ awk "$4" /proc/self/mountinfo "$1/mounts" > "$1/new"; mv "$1/new" "$1/mounts"; }; '
            '[ -z "$5" ] || mount -t tmpfs none "$5"; exec "$2" "$3"'
        )
        words = [str(source), request.param, str(GUARD), DEVICES, over]
        done = subprocess.run(
            [*NAMESPACE, "sh", "-c", script, "sh", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == ""
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize("result", [GOOD, GOOD.strip(), GOOD.replace("ok", "degraded")])
def test_lets_a_good_boot_pass(guard: Guard, result: str) -> None:
    assert guard(result, MOUNTS) == (0, "")


def test_stops_without_a_result(guard: Guard) -> None:
    status, said = guard(None, MOUNTS)
    assert status == 1
    reason = "there is no /run/immucore/result.json: immucore did not run to its end"
    hint = "type journalctl -u immucore.service"
    assert said == f"<2>immucore-guard: {reason}; the root is not switched\n<2>  hint: {hint}\n"


@pytest.mark.parametrize(
    "result",
    [
        '{"schema":1,"outcome":"failed","why":"\\"outcome\\":\\"ok\\""}',
        '{"schema":1,"why":{"outcome":"ok"}}',
        "{}",
        "x",
    ],
)
def test_stops_unless_the_outcome_is_good(guard: Guard, result: str) -> None:
    status, said = guard(result, MOUNTS)
    assert status == 1
    assert "/run/immucore/result.json does not say that the boot went well; the root is not" in said


def test_stops_on_an_empty_result(guard: Guard) -> None:
    assert guard("", MOUNTS)[0] == 1


@pytest.mark.parametrize("lost", ["/run/a", "/run/gone", "/run/immucore/", "/run/*", "/run/a b"])
def test_stops_when_a_mount_is_gone(guard: Guard, lost: str) -> None:
    status, said = guard(GOOD, f"{MOUNTS}7:0 {lost}\n")
    assert status == 1
    assert f": {lost}, which immucore mounted, is no longer mounted; the root is not switched\n" in said


def test_stops_when_something_is_mounted_over_it(guard: Guard) -> None:
    status, said = guard(GOOD, MOUNTS, over="/run/a b")
    assert status == 1
    assert ": something else is mounted over /run/a\\040b; the root is not switched\n" in said


@pytest.mark.parametrize("mounts", [None, ""])
def test_stops_when_no_mount_is_named(guard: Guard, mounts: str | None) -> None:
    status, said = guard(GOOD, mounts)
    assert status == 1
    assert "/run/immucore/mounts names no mount at all; the root is not switched\n" in said
