"""Which of two images an upgrade keeps, for every combination of what they were judged and which runs."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path

import pytest

from immucore import bootcount
from immucore.bootcount import ACTIVE, BAD, GOOD, PASSIVE, RECOVERY, TRYING
from immucore.system import boot_state
from immucore.system.environment import Environment
from immucore.system.slots import Slot, after_fallback, carry, forget, judged_bad, kept, moving, next_boot

RANK = (BAD, TRYING, GOOD)


def slot(name: str, state: str, *, running: bool = False, whole: bool = True) -> Slot:
    return Slot(name=name, whole=whole, image_id=f"{name}_1", state=state, running=running)


@pytest.mark.parametrize(
    ("active", "passive", "running", "keeps"),
    [
        (GOOD, GOOD, ACTIVE, ACTIVE),  # the ordinary upgrade: what was active becomes passive
        (GOOD, TRYING, ACTIVE, ACTIVE),
        (GOOD, BAD, ACTIVE, ACTIVE),
        (BAD, GOOD, PASSIVE, PASSIVE),  # after a fallback: what the machine fell back to stays
        (TRYING, GOOD, PASSIVE, PASSIVE),  # active was not loaded at all
        (TRYING, GOOD, ACTIVE, PASSIVE),  # active has not proved itself yet
        (TRYING, TRYING, ACTIVE, ACTIVE),  # a machine that was just installed
        (TRYING, BAD, ACTIVE, ACTIVE),
        (GOOD, GOOD, PASSIVE, PASSIVE),  # somebody has chosen passive
        (GOOD, GOOD, "", PASSIVE),  # from recovery only active changes
        (BAD, GOOD, "", PASSIVE),
        (GOOD, BAD, "", ACTIVE),  # but not for a passive that does not boot
        (BAD, BAD, "", PASSIVE),
        (BAD, BAD, ACTIVE, ACTIVE),
    ],
)
def test_what_is_kept(active: str, passive: str, running: str, keeps: str) -> None:
    one = slot(ACTIVE, active, running=running == ACTIVE)
    other = slot(PASSIVE, passive, running=running == PASSIVE)
    assert kept(one, other) == keeps


def test_the_better_one_is_never_given_up() -> None:
    for states in itertools.product(RANK, RANK):
        for running in itertools.product((False, True), (False, True)):
            for whole in itertools.product((False, True), (False, True)):
                found = {
                    name: slot(name, state, running=runs, whole=there)
                    for name, state, runs, there in zip(
                        (ACTIVE, PASSIVE), states, running, whole, strict=True
                    )
                }
                keeps = found[kept(found[ACTIVE], found[PASSIVE])]
                (gone,) = [each for each in found.values() if each is not keeps]
                assert (keeps.whole, RANK.index(keeps.state)) >= (gone.whole, RANK.index(gone.state))


@pytest.mark.parametrize("wanted", [ACTIVE, PASSIVE])
def test_what_could_not_be_booted_is_not_kept_whatever_its_count_says(wanted: str) -> None:
    other = {ACTIVE: PASSIVE, PASSIVE: ACTIVE}[wanted]
    found = {wanted: slot(wanted, GOOD), other: slot(other, TRYING, running=True)}
    assert kept(found[ACTIVE], found[PASSIVE]) == wanted
    line = f"root=LABEL=COS_STATE cos-img/filename=/cOS/{other}.img upgrade_failure={wanted}".encode()
    left = after_fallback(found, boot_state.of(line, {}, other, None))
    assert kept(left[ACTIVE], left[PASSIVE]) == other
    assert after_fallback(found, boot_state.of(b"", {}, other, None)) == found
    recovery = boot_state.of(b"", {"mode_asked": "recovery"}, other, None)
    assert after_fallback(found, recovery) == found


def test_by_the_slot_only_until_images_are_moved(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "grubenv")
    environment.write({"tries_active_1": "2", "good_active_1": "1"})
    found = {name: slot(name, GOOD, running=name == PASSIVE) for name in (ACTIVE, PASSIVE)}
    boot = boot_state.of(b"root=LABEL=COS_STATE upgrade_failure=active", {}, PASSIVE, None)
    with moving(environment, after_fallback(found, boot).values(), str(tmp_path / "moved")):
        assert environment.read() == {"tries_active_1": "0"}
    assert (tmp_path / "moved").exists()
    assert after_fallback(found, boot.replace(moved=True)) == found


@pytest.mark.parametrize(
    ("active", "passive"),
    [
        (Slot(name=ACTIVE), slot(PASSIVE, GOOD)),
        (Slot(name=ACTIVE, whole=True, problem="cannot read"), slot(PASSIVE, GOOD)),
        (Slot(name=ACTIVE, whole=True, image_id="passive_1"), slot(PASSIVE, GOOD)),
    ],
    ids=["none", "unreadable", "the same"],
)
def test_no_other_image_is_judged_with_what_could_not_be_booted(
    tmp_path: Path, active: Slot, passive: Slot
) -> None:
    environment = Environment(tmp_path / "grubenv")
    environment.write(values := {"tries_passive_1": "3", "good_passive_1": "1"})
    boot = boot_state.of(b"root=LABEL=COS_STATE upgrade_failure=active", {}, PASSIVE, None)
    found = after_fallback({ACTIVE: active, PASSIVE: passive}, boot)
    with moving(environment, found.values(), str(tmp_path / "moved")):
        assert environment.read() == values


@pytest.mark.parametrize("earlier", [False, True])
def test_what_was_not_moved_is_not_judged(tmp_path: Path, earlier: bool) -> None:
    environment, mark = Environment(tmp_path / "grubenv"), tmp_path / "moved"
    environment.write(values := {"tries_active_1": "2", "good_active_1": "1"})
    if earlier:
        mark.touch()
    boot = boot_state.of(b"root=LABEL=COS_STATE upgrade_failure=active", {}, PASSIVE, None)
    found = after_fallback({name: slot(name, GOOD) for name in (ACTIVE, PASSIVE)}, boot)
    with pytest.raises(OSError, match="I/O"), moving(environment, found.values(), str(mark)):
        raise OSError(errno.EIO, "I/O error")
    assert environment.read() == values
    assert mark.exists() is earlier


def test_both_could_not_be_booted() -> None:
    """The boot loader passed over one, and the agent over the other."""
    result = {"mode_asked": "passive", "failures": [{"mode": "passive", "message": "it is damaged"}]}
    boot = boot_state.of(b"root=LABEL=COS_STATE upgrade_failure=active", result, "recovery", None)
    found = after_fallback({name: slot(name, GOOD) for name in (ACTIVE, PASSIVE)}, boot)
    assert {each.state for each in found.values()} == {BAD}
    assert all(each.given_up for each in found.values())


@pytest.mark.parametrize(
    ("values", "entry", "told"),
    [
        ({}, ACTIVE, "active"),
        ({"tries_a_1": "0"}, PASSIVE, "passive"),
        ({"tries_a_1": "0", "tries_passive": "0"}, RECOVERY, "recovery"),
        ({"next_entry": "cos"}, ACTIVE, "active"),
        ({"next_entry": "memtest"}, "memtest", "memtest, once (immucore boot next auto takes that back)"),
    ],
)
def test_what_the_next_boot_boots(values: dict[str, str], entry: str, told: str) -> None:
    active, passive = Slot(name=PASSIVE, whole=True, image_id="a_1"), Slot(name=ACTIVE, whole=True)
    assert next_boot(values, active, passive) == (entry, f"the next boot boots {told}")


def test_what_was_judged_bad() -> None:
    values = {"tries_aa_1": "0", "tries_bb_1": "2", "tries_cc_1": "x", "good_dd_1": "1", "saved_entry": "0"}
    assert judged_bad(values) == {"aa"}


def test_nothing_is_forgotten_while_an_image_cannot_be_read(tmp_path: Path) -> None:
    """Nobody knows which one it is: it may be any of those that are counted."""
    environment = Environment(tmp_path / "grubenv")
    environment.update(lambda _: {"tries_a_1": "0", "saved_entry": "passive"})
    unreadable = Slot(name=ACTIVE, whole=True, state=BAD, problem="cannot read")
    forget(environment, [unreadable, slot(PASSIVE, GOOD)])
    assert environment.read() == {"tries_a_1": "0"}
    forget(environment, [slot(PASSIVE, GOOD)])
    assert environment.read() == {}


def test_a_power_cut_in_a_rollback_gives_no_good_image_the_count_of_a_bad_one(tmp_path: Path) -> None:
    """Images without an identity are counted by their slot, and the two are exchanged in between."""
    environment = Environment(tmp_path / "grubenv")
    environment.write({"tries_active": "0", "tries_passive": "3", "good_passive": "1"})
    found = {name: Slot(name=name, whole=True) for name in (ACTIVE, PASSIVE)}
    moves, known = ((found[ACTIVE], PASSIVE), (found[PASSIVE], ACTIVE)), environment.read()

    carry(environment, moves, known, either=True)
    between = [bootcount.read(environment.read(), name).state for name in (ACTIVE, PASSIVE)]
    carry(environment, moves, known)
    after = [bootcount.read(environment.read(), name).state for name in (ACTIVE, PASSIVE)]

    assert between == [GOOD, GOOD]
    assert after == [GOOD, BAD]
