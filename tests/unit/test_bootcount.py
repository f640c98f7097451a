"""Boot counting: every transition, and every choice."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore import bootcount
from immucore.bootcount import BAD, GOOD, TRYING, Count

ID = "0123456789abcdef_01234567"
OTHER = "fedcba9876543210_89abcdef"

NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
IDS = st.from_regex(r"[0-9a-f]{16}_[0-9a-f]{8}", fullmatch=True)
COUNTS = st.builds(Count, image_id=IDS, left=st.integers(0, 3), good=st.booleans())


def count(left: int, good: bool = False) -> Count:
    return Count(image_id=ID, left=left, good=good)


@pytest.mark.parametrize(
    ("left", "good", "state"),
    [
        (3, False, TRYING),
        (2, False, TRYING),
        (1, False, TRYING),
        (0, False, BAD),
        (3, True, GOOD),
        (2, True, GOOD),
        (1, True, GOOD),
        (0, True, BAD),
    ],
)
def test_a_state(left: int, good: bool, state: str) -> None:
    assert count(left, good).state == state


@pytest.mark.parametrize("good", [False, True])
@pytest.mark.parametrize(("left", "then"), [(3, 2), (2, 1), (1, 0), (0, 0)])
def test_a_boot_takes_a_try_and_nothing_else(left: int, then: int, good: bool) -> None:
    assert bootcount.started(count(left, good)) == count(then, good)


@pytest.mark.parametrize("good", [False, True])
@pytest.mark.parametrize("left", [0, 1, 2, 3])
def test_a_verdict_makes_good_or_bad_whatever_was_before(left: int, good: bool) -> None:
    assert bootcount.verdict(count(left, good)) == count(3, True)
    assert bootcount.condemned(count(left, good)) == count(0, False)


def test_a_new_image_has_all_its_tries_and_is_not_good() -> None:
    assert bootcount.armed(ID) == count(3)
    assert bootcount.armed(ID).state == TRYING


STATES = {"missing": None, "bad": 0, "last": 1, "full": 3}
# saved, active, passive → what is booted
CHOICES = {
    ("", "full", "full"): "active",
    ("", "full", "bad"): "active",
    ("", "full", "missing"): "active",
    ("", "last", "full"): "active",
    ("", "last", "bad"): "active",
    ("", "bad", "full"): "passive",
    ("", "bad", "last"): "passive",
    ("", "missing", "full"): "passive",
    ("", "missing", "last"): "passive",
    ("", "bad", "bad"): "recovery",
    ("", "bad", "missing"): "recovery",
    ("", "missing", "bad"): "recovery",
    ("", "missing", "missing"): "recovery",
    ("passive", "full", "full"): "passive",
    ("passive", "full", "last"): "passive",
    ("passive", "full", "bad"): "active",
    ("passive", "full", "missing"): "active",
    ("passive", "bad", "bad"): "recovery",
    ("passive", "missing", "missing"): "recovery",
    ("recovery", "full", "full"): "recovery",
    ("recovery", "missing", "bad"): "recovery",
}


@pytest.mark.parametrize(("saved", "active", "passive"), CHOICES)
def test_a_choice(saved: str, active: str, passive: str) -> None:
    slots = [
        None if (left := STATES[name]) is None else Count(image_id=image_id, left=left)
        for name, image_id in ((active, ID), (passive, OTHER))
    ]
    assert bootcount.order(saved, *slots)[0] == CHOICES[saved, active, passive]


def test_what_remains_when_recovery_cannot_be_loaded_goes_by_turns() -> None:
    assert bootcount.order("", count(3), count(3)) == ("active", "passive", "recovery")
    assert bootcount.order("", None, count(3)) == ("passive", "recovery", "active")
    assert bootcount.order("", count(0), count(0)) == ("recovery", "active", "passive")
    assert bootcount.order("", count(0), count(0), "active") == ("recovery", "passive", "active")
    assert bootcount.order("", count(0), count(0), "passive") == ("recovery", "active", "passive")
    assert bootcount.order("recovery", count(3), count(0)) == ("recovery", "active", "passive")


def test_a_boot_takes_the_first_slot_that_can_be_loaded() -> None:
    assert bootcount.boot({"x": "y"}, ID, OTHER) == ("active", {"x": "y", f"tries_{ID}": "2"})
    both = {f"tries_{ID}": "2", f"tries_{OTHER}": "2"}
    assert bootcount.boot({}, ID, OTHER, ["active"]) == ("passive", both)
    assert bootcount.boot({}, ID, OTHER, ["active", "passive"]) == ("recovery", both)
    assert bootcount.boot({}, None, None) == ("recovery", {})
    assert bootcount.boot({}, None, None, ["recovery"]) == (None, {})


def test_a_boot_without_recovery_goes_by_turns_when_all_tries_are_gone() -> None:
    values, booted = {f"tries_{ID}": "0", f"tries_{OTHER}": "0"}, []
    for _ in range(4):
        slot, values = bootcount.boot(values, ID, OTHER, ["recovery"])
        booted.append(slot)
    assert booted == ["active", "passive", "active", "passive"]


@pytest.mark.parametrize(
    ("said", "slot"), [("cos", "active"), ("passive", "passive"), ("recovery", "recovery")]
)
def test_a_boot_that_is_chosen_once_is_not_counted(said: str, slot: str) -> None:
    values = {f"tries_{ID}": "0", "next_entry": said, "saved_entry": "recovery"}
    assert bootcount.boot(values, ID, OTHER) == (slot, {f"tries_{ID}": "0", "saved_entry": "recovery"})


def test_what_cannot_be_booted_once_is_left_for_this_boot() -> None:
    values = {"next_entry": "passive"}
    assert bootcount.boot(values, ID, OTHER, ["passive"]) == ("active", {f"tries_{ID}": "2"})
    assert bootcount.boot(values, None, OTHER, ["passive"]) == ("recovery", {})


@pytest.mark.parametrize(
    ("said", "meant"),
    [("cos", "active"), ("fallback", "passive"), ("active", "active"), ("nonsense", ""), ("0", "")],
)
def test_the_names_that_peers_have_mean_the_same(said: str, meant: str) -> None:
    for active, passive in itertools.product((None, count(0), count(3)), repeat=2):
        assert bootcount.order(said, active, passive) == bootcount.order(meant, active, passive)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, count(3)),
        ({f"tries_{ID}": "3"}, count(3)),
        ({f"tries_{ID}": "1", f"good_{ID}": "1"}, count(1, True)),
        ({f"tries_{ID}": "0"}, count(0)),
        ({f"tries_{OTHER}": "0", f"good_{OTHER}": "1"}, count(3)),
        ({f"tries_{ID}": ""}, count(3)),
        ({f"tries_{ID}": "4"}, count(3)),
        ({f"tries_{ID}": "-1"}, count(3)),
        ({f"tries_{ID}": "02"}, count(3)),
        ({f"tries_{ID}": "\u0662"}, count(3)),
        ({f"good_{ID}": "yes"}, count(3)),
    ],
)
def test_what_a_block_says_is_read(values: dict[str, str], expected: Count) -> None:
    assert bootcount.read(values, ID) == expected


@given(st.dictionaries(NAMES, st.text(max_size=5)), COUNTS)
def test_what_is_written_is_read_and_nothing_else_is_changed(values: dict[str, str], one: Count) -> None:
    after = bootcount.written(values, one)
    assert bootcount.read(after, one.image_id) == one
    assert {name: after[name] for name in values} == values
    assert bootcount.forgotten(after, []) == bootcount.forgotten(values, [])


@given(
    st.dictionaries(NAMES.filter(lambda name: name[:6] != "tries_" and name[:5] != "good_"), NAMES), COUNTS
)
def test_only_the_counts_of_other_images_are_forgotten(values: dict[str, str], one: Count) -> None:
    after = bootcount.written(values, one)
    assert bootcount.forgotten(after, [one.image_id]) == after
    assert bootcount.forgotten(after, ["another"]) == values
