"""Running other programs."""

from __future__ import annotations

import pytest

from immucore import process


def test_output_and_status() -> None:
    finished = process.run(["sh", "-c", "echo one; echo two >&2; exit 1"])

    assert (finished.status, finished.output) == (1, "one\ntwo\n")


def test_only_the_fixed_environment_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/bundle")

    finished = process.run(["env"], environment={"EXTRA": "1"})

    assert sorted(finished.output.split()) == sorted(
        [*(f"{key}={value}" for key, value in process.ENVIRONMENT.items()), "EXTRA=1"]
    )


def test_signal() -> None:
    assert process.run(["sh", "-c", "kill -9 $$"]).status == 137


def test_too_long() -> None:
    finished = process.run(["sleep", "60"], timeout_sec=0.1)

    assert (finished.status, finished.output) == (process.TIMED_OUT, "sleep took longer than 0.1 s")


def test_standard_input_is_empty() -> None:
    assert process.run(["cat"]).output == ""


def test_find() -> None:
    assert process.find("sh") in ("/usr/bin/sh", "/bin/sh")
    assert process.find("no-such-program") is None
