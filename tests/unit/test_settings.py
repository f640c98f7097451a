"""Settings that somebody has written: they are read, or one error says why not."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from immucore.system import health_checks, settings
from immucore.system.health_checks import Settings
from immucore.system.settings import SettingsError

# What PyYAML answers with something that is no YAMLError: IndexError, KeyError, AttributeError, ValueError.
UNREADABLE = ('!!int ""', "!!bool x", "!!timestamp x", "!!float x", "2026-02-30", "9" * 5000)
# Integers that Python can neither make a float nor print.
TOO_LARGE = ("9" * 400, "0x" + "f" * 5000)


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "etc/immucore").mkdir(parents=True, exist_ok=True)
    (tmp_path / health_checks.SETTINGS).write_text(text)
    return str(tmp_path / health_checks.SETTINGS)


@pytest.mark.parametrize("value", UNREADABLE)
def test_a_value_that_is_not_what_it_says(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, f"deadline: {value}\n")
    with pytest.raises(SettingsError) as caught:
        settings.read(path)
    assert (caught.value.message, caught.value.hint) == (
        f"cannot read '{path}': it is no YAML",
        "correct it",
    )
    assert health_checks.configured(str(tmp_path)) == (Settings(), [caught.value.message])


@pytest.mark.parametrize("value", TOO_LARGE)
def test_a_number_that_is_too_large(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, f"check_timeout: 5\ndeadline: {value}\n")
    reason = f"cannot read '{path}': a number is too large, line 2"
    assert health_checks.configured(str(tmp_path)) == (Settings(), [reason])


@pytest.mark.parametrize("value", ["1e+99", ".inf", ".nan", "1000000001", "-1"])
def test_seconds_that_nobody_can_wait(tmp_path: Path, value: str) -> None:
    path = written(tmp_path, f"deadline: {value}\n")
    found, problems = health_checks.configured(str(tmp_path))
    assert found == Settings()
    assert len(problems) == 1
    assert problems[0].startswith(f"'deadline' in '{path}' has to be a number of seconds: ")


@given(st.binary() | st.text("!int bol:x\"'[]{}&*-0f\n.").map(str.encode))
@example(b"\xff")
@example(b"[" * 100_000)
def test_whatever_is_there(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = written(tmp_path_factory.mktemp("settings"), "")
    Path(path).write_bytes(content)
    with contextlib.suppress(SettingsError):
        assert isinstance(settings.read(path), dict)
