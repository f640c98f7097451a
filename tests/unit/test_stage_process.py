"""The process of a stage and what becomes of it: whatever happens to it, the boot goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from immucore import cmdline, observe, report, stage_boot, stages
from immucore.boot import Boot
from immucore.devices import Wanted
from immucore.layouts import cos


@pytest.fixture
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Boot:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    monkeypatch.setattr(report, "DIRECTORY", str(tmp_path / "immucore"))
    return Boot()


def run(boot: Boot, key: str = "active 1") -> list[str]:
    state = Wanted(spec="LABEL=COS_STATE", timeout_sec=1)
    asked = stage_boot.Asked(stage="initramfs", directories=(), words=(), state=state, key=key)
    stage_boot.run(boot, asked)
    return report.degraded(boot.record)


def doing(monkeypatch: pytest.MonkeyPatch, do: Callable[[stage_boot._Teller], None]) -> None:
    monkeypatch.setattr(stage_boot, "_do", lambda teller, *_: do(teller))


def test_a_process_that_dies_in_the_middle_of_a_message(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(teller: stage_boot._Teller) -> None:
        os.write(teller._descriptor, b'["done", "/oem/x.ya')
        os.kill(os.getpid(), signal.SIGKILL)

    doing(monkeypatch, die)
    assert run(boot) == ["stage initramfs: it ended with status -9"]


@pytest.mark.parametrize("line", [b"[]\n", b"nonsense\n", b'["failed"]\n', b"\xff\n"])
def test_a_message_that_is_none(boot: Boot, monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    def send(teller: stage_boot._Teller) -> None:
        os.write(teller._descriptor, line)
        time.sleep(60)

    doing(monkeypatch, send)
    before = time.monotonic()
    (failure,) = run(boot)
    assert failure.startswith("stage initramfs: cannot do stage initramfs: ")
    assert time.monotonic() - before < 30


@pytest.mark.parametrize("call", ["fork", "pipe"])
def test_no_process_can_be_made(boot: Boot, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail() -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, call, fail)
    assert run(boot) == ["stage initramfs: cannot do stage initramfs: it: Resource temporarily unavailable"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_stage_that_takes_too_long(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    doing(monkeypatch, lambda _: time.sleep(60))
    monkeypatch.setattr(stage_boot, "STAGE_SEC", 0.3)
    before = time.monotonic()
    assert run(boot) == ["stage initramfs: it has taken longer than 0.3 s, and was ended"]
    assert time.monotonic() - before < 30


def test_the_process_never_runs_the_handlers_of_the_agent(
    boot: Boot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    agent = os.getpid()

    def handler(_number: int, _frame: object) -> None:
        (tmp_path / f"handled-{os.getpid() == agent}").touch()

    fork = os.fork

    def fork_and_terminate() -> int:
        child = fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return child

    doing(monkeypatch, lambda _: None)
    monkeypatch.setattr(os, "fork", fork_and_terminate)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        assert run(boot) == ["stage initramfs: it ended with status 1"]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not [*tmp_path.glob("handled-*")]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_what_a_stage_starts_has_no_signal_blocked(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    doing(monkeypatch, lambda teller: teller.warning(str(signal.pthread_sigmask(signal.SIG_BLOCK, []))))
    assert run(boot) == []
    assert "set()" in "".join(boot.log.lines)


def test_a_second_run_does_no_stage_again(
    boot: Boot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def do(teller: stage_boot._Teller) -> None:
        with (tmp_path / "ran").open("a") as file:
            file.write("x")
        teller.send("failed", "/oem/x.yaml", "initramfs", "a step", "it failed")
        teller.send("done", "/oem/x.yaml", "initramfs", "another")

    doing(monkeypatch, do)
    failure = ["/oem/x.yaml: 'a step' of stage initramfs: it failed"]
    assert run(boot) == failure
    again = Boot()
    again.layouts = {"/run/cos/cos-layout.env": "changed"}
    assert run(again) == failure  # the boot is as degraded as it was
    assert again.layouts == {}
    assert (tmp_path / "ran").read_text() == "x"
    assert run(Boot(), "passive 1") == failure
    assert (tmp_path / "ran").read_text() == "xx"
    Path(report.stage_marker("initramfs")).write_text('{"key": 3')
    assert run(Boot(), "passive 1") == failure
    assert (tmp_path / "ran").read_text() == "xxx"


def test_a_full_run_is_no_failed_boot(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device", "/run/cos")

    monkeypatch.setattr(observe, "stage_files", lambda *_: ["/oem/x.yaml"])
    monkeypatch.setattr(boot.kernel, "write_file", full)
    boot._stage("rootfs", cos, cmdline.parse(b"root=LABEL=COS_ACTIVE cos-img/filename=/cOS/active.img"))
    assert report.degraded(boot.record) == [
        "stage rootfs: cannot do stage rootfs: /run/cos: No space left on device"
    ]


def test_a_file_that_nobody_can_read_as_it_was_thought_costs_itself(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps_of(documents: list[str], _stage: str) -> list[stages.Step]:
        if documents == ["bad"]:
            raise OverflowError("too much")
        return []

    monkeypatch.setattr(stage_boot, "_os_release", dict)
    monkeypatch.setattr(stage_boot, "_enter_new_root", lambda _: None)
    monkeypatch.setattr(stage_boot, "_listed", lambda *_: ["/oem/bad.yaml", "/oem/good.yaml"])
    monkeypatch.setattr(
        stage_boot, "_documents", lambda _root, path, _read: [path[5:].removesuffix(".yaml")]
    )
    monkeypatch.setattr(stages, "steps_of", steps_of)
    assert run(boot) == ["/oem/bad.yaml: this is a bug in immucore: OverflowError: too much"]


def test_what_cannot_be_taken_back_is_logged(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(boot.kernel, "remove_file", full)
    monkeypatch.setattr(boot.kernel, "write_file", full)
    boot.early = ["/run/cos/active_mode"]
    boot.layouts = {"/run/cos/a.env": "", "/run/cos/b.env": "A=1"}
    log = boot.log
    boot.take_back()
    assert "".join(log.lines).count("No space left on device") >= 3
    assert (boot.early, boot.layouts) == ([], {})
