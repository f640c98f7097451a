"""The log: kept whole, told as asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from immucore.log import Log

if TYPE_CHECKING:
    import pytest


def write_all(log: Log) -> None:
    log.debug("d")
    log.info("i\nj")
    log.warning("w\udcff")
    log.error("e")


def test_a_name_on_a_disk_does_not_command_a_terminal() -> None:
    log = Log(journal=False)
    log.debug("LABEL=\x1b[2J\x9b\u2028\u202eä\nnext")
    assert [line.partition("] ")[2] for line in log.lines] == [
        "<7> LABEL=\\u001b[2J\\u009b\\u2028\\u202eä",
        "<7> next",
    ]


def test_the_journal_gets_a_line_with_its_level_each(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log(journal=True)
    write_all(log)
    assert capfd.readouterr().err == "<6>i\n<6>j\n<4>w\\udcff\n<3>e\n"
    assert [line.partition("] ")[2] for line in log.lines] == [
        "<7> d",
        "<6> i",
        "<6> j",
        "<4> w\\udcff",
        "<3> e",
    ]


def test_debug_is_told_when_wanted(capfd: pytest.CaptureFixture[str]) -> None:
    log = Log(journal=True)
    log.debug_wanted = True
    write_all(log)
    assert capfd.readouterr().err.startswith("<7>d\n<6>i\n")


def test_times_are_monotonic_seconds() -> None:
    log = Log(journal=True)
    log.debug("a")
    log.debug("b")
    first, second = (float(line[1:].partition("]")[0]) for line in log.lines)
    assert 0 < first <= second
