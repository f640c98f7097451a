"""The semaphore of the reboot lock, as a value: who gets a slot, who gives it back, what is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore.system import reboot_lock
from immucore.system.reboot_lock import Holder, Semaphore
from immucore.system.settings import SettingsError

MACHINES = [f"{name}-id" for name in ("red", "green", "blue")]
BOOTS = st.sampled_from(["first", "second"])
HOLDERS = st.builds(
    lambda machine, boot: Holder(machine=machine, boot=boot), st.sampled_from(MACHINES), BOOTS
)


def holder(machine: str, boot: str = "first") -> Holder:
    return Holder(machine=machine, boot=boot)


def of(*holders: Holder, slots: int = 1) -> Semaphore:
    return Semaphore(max=slots, holders=holders)


@pytest.mark.parametrize(
    ("before", "me", "after"),
    [
        (of(), holder("red"), of(holder("red"))),
        (of(holder("red")), holder("red"), of(holder("red"))),
        (of(holder("red")), holder("blue"), of(holder("red"))),
        (of(holder("red"), slots=2), holder("blue"), of(holder("red"), holder("blue"), slots=2)),
        (of(slots=0), holder("red"), of(slots=0)),
        (of(holder("red"), slots=0), holder("red"), of(holder("red"), slots=0)),
        # not given back after an earlier boot: the slot is still this machine's, of this boot from now on
        (of(holder("red")), holder("red", "second"), of(holder("red", "second"))),
        (of(holder("red"), slots=0), holder("red", "second"), of(holder("red", "second"), slots=0)),
    ],
)
def test_who_gets_a_slot(before: Semaphore, me: Holder, after: Semaphore) -> None:
    assert before.taken(me) == after
    assert after.holds(me) == (me in after.holders)


def test_who_has_a_slot_is_told_the_time_of_the_first_try() -> None:
    first = Holder(machine="red", boot="first", since="then")
    assert of(first).taken(Holder(machine="red", boot="first", since="now")).holders == (first,)


@pytest.mark.parametrize(
    ("which", "kept"),
    [
        ({}, []),
        ({"of_boot": "first"}, []),
        ({"of_boot": "second"}, ["red"]),
        ({"not_of_boot": "first"}, ["red"]),
        ({"not_of_boot": "second"}, []),
    ],
)
def test_which_slot_is_given_back(which: dict[str, str], kept: list[str]) -> None:
    left = of(holder("red"), holder("blue"), slots=2).without("red", **which)
    assert [each.machine for each in left.holders] == [*kept, "blue"]
    assert left.max == 2


@given(
    st.integers(0, 3),
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), HOLDERS),
            st.tuples(st.just("give"), HOLDERS),
            st.tuples(st.just("resize"), st.integers(0, 3)),
        ),
        max_size=20,
    ),
)
def test_never_more_than_slots_whatever_happens(slots: int, events: list[tuple[str, object]]) -> None:
    now = Semaphore(max=slots)
    for what, about in events:
        before = now
        if what == "resize":
            assert isinstance(about, int)
            now = now.replace(max=about)
            continue
        assert isinstance(about, Holder)
        now = now.taken(about) if what == "take" else now.without(about.machine)
        machines = [each.machine for each in now.holders]
        assert len(set(machines)) == len(machines)
        if len(machines) > len(before.holders):
            assert len(machines) <= now.max
        if what == "take":
            assert set(before.holders) - set(now.holders) <= {
                each for each in before.holders if each.machine == about.machine
            }
            assert now.taken(about) == now  # once more changes nothing
        assert reboot_lock.read(reboot_lock.written(now)) == now


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["machine", "boot", "x"]), inner)
    ),
)


@given(
    st.text() | st.builds(lambda slots, all: json.dumps({"max": slots, "holders": all}), ANYTHING, ANYTHING)
)
def test_what_anybody_wrote_is_read_or_refused(text: str) -> None:
    try:
        found = reboot_lock.read(text)
    except ValueError:
        return
    assert reboot_lock.read(reboot_lock.written(found)) == found


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "'max' is no number of slots"),
        ("{}", "'max' is no number of slots"),
        ({"max": True, "holders": []}, "'max' is no number of slots"),
        ({"max": -1, "holders": []}, "'max' is no number of slots"),
        ({"max": 1.5, "holders": []}, "'max' is no number of slots"),
        ({"max": 10**9, "holders": []}, "'max' is no number of slots"),
        ({"max": 1, "holders": {}}, "'holders' is no list"),
        ({"max": 1}, "'holders' is no list"),
        ({"max": 1, "holders": ["red"]}, "one of 'holders' is no machine"),
        ({"max": 1, "holders": [{}]}, "one of 'holders' is no machine"),
        ({"max": 1, "holders": [{"machine": ""}]}, "one of 'holders' is no machine"),
        ({"max": 1, "holders": [{"machine": 1}]}, "one of 'holders' is no machine"),
        ({"max": 1, "holders": [{"machine": "red", "host": "\033[2J"}]}, "one of 'holders' is no machine"),
        ({"max": 1, "holders": [{"machine": "red", "since": None}]}, "one of 'holders' is no machine"),
    ],
)
def test_what_is_no_semaphore(found: object, reason: str) -> None:
    with pytest.raises(ValueError, match="^" + reason + "$"):
        reboot_lock.read(found if isinstance(found, str) else json.dumps(found))


def test_what_a_later_version_adds_does_not_hurt() -> None:
    found = {"max": 2, "holders": [{"machine": "red", "image": "x"}], "paused": False}
    assert reboot_lock.read(json.dumps(found)) == of(Holder(machine="red"), slots=2)


def test_a_holder_for_people() -> None:
    assert str(Holder(machine="red-id", host="red", since="then")) == "red since then"
    assert str(Holder(machine="red-id")) == "red-id since some time"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has none"),
        (b"\n", "it has none"),
        (b"uninitialized\n", "it has none"),
        (b"\xff", "it is no text"),
        (b"01\x0123", "it is no text"),
        (None, "No such file or directory"),
    ],
)
def test_a_machine_without_an_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, reason: str
) -> None:
    file = tmp_path / "machine-id"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(reboot_lock, "MACHINE_ID", str(file))
    with pytest.raises(SettingsError) as caught:
        reboot_lock.this_machine()
    assert caught.value.message == f"cannot read who this machine is in '{file}': {reason}"
    assert caught.value.hint == "systemd-machine-id-setup"


def test_who_this_machine_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "machine-id"
    file.write_text("0123\n")
    monkeypatch.setattr(reboot_lock, "MACHINE_ID", str(file))
    me = reboot_lock.this_machine()
    assert me.machine == "0123"
    assert len(me.boot) == 36
    assert me.since.endswith(" UTC")
    assert reboot_lock.this_machine().boot == me.boot


@pytest.mark.parametrize(("name", "host"), [("red", "red"), ("r\033ed", ""), ("r\udcffed", "")])
def test_a_name_that_others_can_read(monkeypatch: pytest.MonkeyPatch, name: str, host: str) -> None:
    monkeypatch.setattr(reboot_lock.platform, "node", lambda: name)
    monkeypatch.setattr(reboot_lock, "MACHINE_ID", reboot_lock.BOOT_ID)
    me = reboot_lock.this_machine()
    assert me.host == host
    assert reboot_lock.read(reboot_lock.written(of(me))) == of(me)
