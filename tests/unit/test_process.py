"""Running other programs."""

from __future__ import annotations

import time
from pathlib import Path

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


def test_somebody_is_told_while_it_runs() -> None:
    told: list[float] = []
    script = "for i in 1 2 3 4 5; do echo $i; sleep 0.1; done"

    finished = process.run(["sh", "-c", script], meanwhile=told.append, every_sec=0.1, timeout_sec=60)

    assert (finished.status, finished.output) == (0, "1\n2\n3\n4\n5\n")
    assert len(told) >= 3
    assert told == sorted(told)


def test_standard_input_is_empty() -> None:
    assert process.run(["cat"]).output == ""


def test_find() -> None:
    assert process.find("sh") in ("/usr/bin/sh", "/bin/sh")
    assert process.find("no-such-program") is None


def wait_for(child: process.Child) -> process.Finished:
    while (finished := child.finished()) is None:
        time.sleep(0.01)
    return finished


def test_a_child_runs_beside() -> None:
    child = process.Child(["sh", "-c", "sleep 0.1; echo done; echo badly >&2; exit 3"])

    assert child.finished() is None
    assert wait_for(child) == process.Finished(status=3, output="done\nbadly\n")


def test_of_a_child_that_prints_much_the_end_is_kept() -> None:
    child = process.Child(["sh", "-c", "yes | head -n 100000; echo end; kill -9 $$"])

    finished = wait_for(child)

    assert finished.status == 137
    assert len(finished.output) == process.MAX_OUTPUT_BYTES
    assert finished.output.endswith("end\n")


@pytest.mark.parametrize("script", ["exec sleep 60", "trap '' TERM; while :; do sleep 0.1; done"])
def test_a_child_is_ended(script: str) -> None:
    started = time.monotonic()
    child = process.Child(["sh", "-c", script])
    time.sleep(0.1)

    child.end(timeout_sec=0.3)

    assert time.monotonic() - started < 10


def test_a_child_that_cannot_be_started() -> None:
    with pytest.raises(FileNotFoundError):
        process.Child(["/no-such-program"])


def test_what_a_command_leaves_in_the_background_is_not_waited_for() -> None:
    before = time.monotonic()
    finished = process.run_apart(("/bin/sh", "-c", "sleep 20 & echo said; exit 3"), timeout_sec=30)
    assert time.monotonic() - before < 15
    assert finished == process.Finished(status=3, output="said\n")


def test_a_command_that_takes_too_long_is_killed_with_all_it_has_started(tmp_path: Path) -> None:
    said: list[float] = []
    script = f"(sleep 2; touch {tmp_path}/alive) & echo begun; sleep 60"
    finished = process.run_apart(
        ("/bin/sh", "-c", script), timeout_sec=0.6, meanwhile=said.append, every_sec=0.2
    )
    assert finished.status == process.TIMED_OUT
    assert finished.output == "begun\n\nit took longer than 0.6 s"
    assert said
    time.sleep(2.2)
    assert not (tmp_path / "alive").exists()


def test_what_a_command_is_given() -> None:
    finished = process.run_apart(
        ("/bin/sh", "-c", 'cat; echo "$PATH $ADDED"'),
        timeout_sec=30,
        typed=b"in ",
        environment={"ADDED": "x"},
    )
    assert finished == process.Finished(status=0, output="in /usr/sbin:/usr/bin:/sbin:/bin x\n")


def test_what_a_command_prints_is_kept_to_its_end_and_no_longer(tmp_path: Path) -> None:
    script = f"yes & echo $! >{tmp_path}/pid; head -c 3000000 /dev/zero; sleep 0.1; exit 3"
    finished = process.run_apart(("/bin/sh", "-c", script), timeout_sec=30)
    assert (finished.status, len(finished.output)) == (3, process.MAX_OUTPUT_BYTES)
    deadline = time.monotonic() + 10
    pid = (tmp_path / "pid").read_text().strip()
    try:
        while (
            Path(f"/proc/{pid}/fd").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        ):
            assert time.monotonic() < deadline, "it writes on, into memory that nobody frees"
            time.sleep(0.05)
    finally:
        process.run(["kill", "-9", pid])


def test_a_command_that_never_stops_printing_has_its_deadline() -> None:
    said: list[float] = []
    before = time.monotonic()
    finished = process.run_apart(("yes",), timeout_sec=0.6, meanwhile=said.append, every_sec=0.2)
    assert finished.status == process.TIMED_OUT
    assert len(said) == 2
    assert time.monotonic() - before < 15


def test_a_command_that_closes_its_output_is_waited_for() -> None:
    before = time.process_time()
    finished = process.run_apart(("/bin/sh", "-c", "exec >&- 2>&-; sleep 1; exit 7"), timeout_sec=30)
    assert finished == process.Finished(status=7, output="")
    assert time.process_time() - before < 0.5
