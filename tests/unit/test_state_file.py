"""state.yaml: what is written is read, and whatever may be there is no reason to fail."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from immucore.system import state_file
from immucore.system.state_file import Entry, State

ENTRY = Entry(
    image_id="0123456789abcdef_01234567",
    source="oci:host/x:1",
    digest="sha256:1",
    label="COS_ACTIVE",
    fs="ext4",
    date="2026-03-01T12:00:00+00:00",
    action="upgrade",
)


def test_there_and_back(tmp_path: Path) -> None:
    state = State()
    state.record("active", ENTRY)
    state.record("passive", None)
    state.failed = ["a", "b", "a"]
    state_file.write(str(tmp_path), state)
    assert os.listdir(tmp_path) == ["state.yaml"]
    found = state_file.read(str(tmp_path))
    assert found.entry("active") == ENTRY
    assert found.entry("passive") is None
    assert found.entry_of(ENTRY.image_id) == found.of_digest("sha256:1") == ENTRY
    assert found.entry_of(None) is found.entry_of("other") is found.of_digest("") is None
    assert found.failed == ("a", "b")
    document = yaml.safe_load((tmp_path / "state.yaml").read_text())
    assert document["state"]["active"]["source"] == "oci:host/x:1"
    assert document["date"]


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / "state.yaml").write_text("oem: {label: X}\nstate: {label: Y, passive: {label: Z}}\n")
    state = state_file.read(str(tmp_path))
    state.record("active", ENTRY)
    state.record("passive", state.entry("passive"))
    state_file.write(str(tmp_path), state)
    document = yaml.safe_load((tmp_path / "state.yaml").read_text())
    assert document["oem"] == {"label": "X"}
    assert document["state"]["label"] == "Y"
    assert document["state"]["passive"] == {"label": "Z"}


def test_only_the_last_failures_are_kept() -> None:
    state = State()
    state.failed = map(str, range(100))
    assert state.failed[0] == "36"
    assert len(state.failed) == 64


@given(st.binary() | st.text().map(str.encode))
def test_whatever_is_there(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.mktemp("state")
    (directory / "state.yaml").write_bytes(content)
    look_at(state_file.read(str(directory)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(("state", "active", "failed", "x")), inner)
    ),
)


@given(JSON)
def test_whatever_it_says(document: object) -> None:
    look_at(State(document))


def look_at(state: State) -> None:
    for slot in state_file.PARTITIONS:
        state.record(slot, state.entry(slot))
    state.failed = [*state.failed, "x"]
    assert state.failed[-1] == "x"
    assert state.entry_of("x") is None or state.entry_of("x").image_id == "x"  # type: ignore[union-attr]
    assert yaml.safe_load(state.text())["failed"]


@pytest.mark.parametrize(
    "value", ['!!int ""', "!!bool x", "!!timestamp x", "!!float x", "0x" + "f" * 5000, "9" * 5000]
)
@pytest.mark.parametrize("name", ["date", "failed", "state"])
def test_a_value_that_is_not_what_it_says(tmp_path: Path, name: str, value: str) -> None:
    (tmp_path / "state.yaml").write_text(f"{name}: {value}\n")
    look_at(state_file.read(str(tmp_path)))
    (tmp_path / "state.yaml").write_text(f"state: {{active: {{image_id: {value}}}}}\n")
    look_at(state_file.read(str(tmp_path)))


def test_what_nests_too_deep_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "state.yaml").write_text("[" * 100_000)
    assert state_file.read(str(tmp_path)).failed == ()


def test_a_disk_that_is_full_leaves_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.yaml").write_text("failed: [a]\n")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        state_file.write(str(tmp_path), State())
    assert os.listdir(tmp_path) == ["state.yaml"]
    assert state_file.read(str(tmp_path)).failed == ("a",)
