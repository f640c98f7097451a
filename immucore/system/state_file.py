"""state.yaml, in the root of COS_STATE and COS_RECOVERY: where each image has come from, and which failed.

    date: 2026-03-01T12:00:00+00:00
    state:
      active: {source: 'oci:…', digest: 'sha256:…', image_id: …, label: COS_ACTIVE, fs: ext4, date: …,
        action: upgrade}
      passive: …
    recovery:
      recovery: …
    failed: [6f1c0a2b9d3e4f50]

As cos-toolkit and Elemental have it, with more in it; what else is in there stays. An entry whose `image_id`
is not that of the image file is of another one that was there before.
"""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from immucore import files
from immucore.values import Record

if TYPE_CHECKING:
    from collections.abc import Iterable

NAME = "state.yaml"
PARTITIONS = {"active": "state", "passive": "state", "recovery": "recovery"}
_NEW = f".{NAME}.new"
_MAX_BYTES = 1 << 20
_MAX_FAILED = 64  # the oldest go


class Entry(Record):
    """Where an image has come from."""

    image_id: str
    source: str = ""
    digest: str = ""  # of a registry the manifest's, else content.digest()
    label: str = ""
    fs: str = ""
    date: str = ""
    action: str = ""  # install, upgrade, reset, rollback


def now() -> str:
    """Give the time as state.yaml has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class State:
    """What a state.yaml says; whatever it may hold, reading it fails in nothing."""

    def __init__(self, document: object = None) -> None:
        self._document: dict[str, Any] = dict(document) if isinstance(document, dict) else {}

    def entry(self, slot: str) -> Entry | None:
        """Give the entry of a slot: active, passive or recovery."""
        found = self._part(PARTITIONS[slot]).get(slot)
        if not isinstance(found, dict):
            return None
        return Entry(**{"image_id": "", **{name: str(found.get(name) or "") for name in Entry._fields}})

    def entry_of(self, image_id: str | None) -> Entry | None:
        """Give the entry of an image, in whatever slot that was."""
        entries = [self.entry(slot) for slot in PARTITIONS] if image_id else []
        return next((entry for entry in entries if entry and entry.image_id == image_id), None)

    def of_digest(self, digest: str) -> Entry | None:
        """Give the entry of an image that was made of a source with this digest."""
        entries = [self.entry(slot) for slot in PARTITIONS] if digest else []
        return next((entry for entry in entries if entry and entry.digest == digest), None)

    def record(self, slot: str, entry: Entry | None) -> None:
        """Set the entry of a slot; None: nothing is known of what it holds."""
        partition = PARTITIONS[slot]
        part = {name: value for name, value in self._part(partition).items() if name != slot}
        if entry:
            part[slot] = {name: value for name, value in entry.items() if value}
        self._document[partition] = part

    @property
    def failed(self) -> tuple[str, ...]:
        """The digests of what was judged bad, as content.digest() gives them."""
        found = self._document.get("failed")
        return tuple(map(str, found)) if isinstance(found, list) else ()

    @failed.setter
    def failed(self, digests: Iterable[str]) -> None:
        self._document["failed"] = list(dict.fromkeys(digests))[-_MAX_FAILED:]

    def text(self) -> str:
        """Give it as YAML, with the time."""
        import yaml

        text: str = yaml.safe_dump({**self._document, "date": now()}, sort_keys=False, width=100)
        return text

    def _part(self, name: str) -> dict[str, Any]:
        found = self._document.get(name)
        return found if isinstance(found, dict) else {}


def read(directory: str) -> State:
    """Read the state.yaml of a partition that is mounted there; what is none says nothing."""
    try:
        with open(os.path.join(directory, NAME), "rb") as file:
            from immucore.system import plain_yaml  # not at every boot: the health service reads none

            return State(plain_yaml.load(file.read(_MAX_BYTES)))
    except (OSError, ValueError):
        return State()


def write(directory: str, state: State) -> None:
    """Put a state.yaml in the place of the one that is there; after a power cut it is one or the other.

    Raises OSError.
    """
    new, content = os.path.join(directory, _NEW), state.text().encode()
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        try:
            while content:
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(new, os.path.join(directory, NAME))
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise
    files.fsync(directory)
