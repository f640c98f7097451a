"""YAML text → nodes that know where they stand. Nothing is ever constructed from what a file says.

Of PyYAML only what makes events of a text is imported. Scalars stay text: what a `0644` means is for the one
who asks for it. Imported only by a boot that has stage files.
"""

from __future__ import annotations

from yaml.error import MarkedYAMLError
from yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    Event,
    MappingStartEvent,
    ScalarEvent,
    SequenceStartEvent,
)
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.scanner import Scanner

from immucore.errors import ImmucoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

MAX_DEPTH = 40
MAX_NODES = 100_000  # aliases counted as often as they are used: ten lines of them can mean a billion nodes
SCALAR, SEQUENCE, MAPPING = "a text", "a list", "a mapping"
TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map"))
NOTHING = ("", "~", "null", "Null", "NULL")
MERGE = "<<"


class DocumentError(ImmucoreError):
    """Whoever wrote the file can put it right."""

    exit_status = 2


class Place:
    """Where something stands: in a file with line and column, or on the kernel command line."""

    __slots__ = ("column", "line", "name")

    def __init__(self, name: str, line: int = 0, column: int = 0) -> None:
        self.name = name
        self.line = line
        self.column = column

    def __str__(self) -> str:
        return f"{self.name}:{self.line}:{self.column}" if self.line else self.name


class Node:
    """A part of a document: a text, a list of nodes, or a mapping of texts to nodes."""

    __slots__ = ("items", "keys", "place", "plain", "size", "text")

    def __init__(
        self,
        place: Place,
        *,
        text: str | None = None,
        plain: bool = False,
        items: list[Node] | None = None,
        keys: dict[str, Node] | None = None,
    ) -> None:
        self.place = place
        self.text = text
        self.plain = plain  # a text without quotes, which may mean nothing or a number
        self.items = items
        self.keys = keys
        within: Iterable[Node] = items if items is not None else keys.values() if keys is not None else ()
        self.size: int = 1 + sum([each.size for each in within])

    @property
    def kind(self) -> str:
        """What it is, in the words of a message."""
        return SCALAR if self.text is not None else SEQUENCE if self.items is not None else MAPPING

    @property
    def is_nothing(self) -> bool:
        """Whether it stands for no value at all (null, ~)."""
        return self.plain and self.text in NOTHING


class _Events(Reader, Scanner, Parser):  # type: ignore[misc]  # PyYAML has no types
    """The events of a text, without what PyYAML would make of them."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)


def read(text: str, name: str) -> list[Node]:
    """Read the documents of a file; empty ones are left out.

    Raises DocumentError with file, line and column.
    """
    try:
        events: Any = _Events(text)
        return _documents(events, name)
    except ReaderError as error:
        before = text[: error.position]
        place = Place(name, before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1)
        raise _unreadable(place, f"the character #x{ord(text[error.position]):04x} is not allowed") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(name, mark.line + 1, mark.column + 1) if mark else Place(name)
        raise _unreadable(place, error.problem or "it is no YAML") from None
    except DocumentError:
        raise
    except Exception as error:  # noqa: BLE001  PyYAML does not say what it raises: "\UFFFFFFFF" overflows
        raise _unreadable(Place(name), f"it is no YAML ({type(error).__name__})") from None


def forbidden(text: str) -> str:
    """Say what a text has that no file, no name and no program can be given; empty where it has nothing."""
    bad = next((each for each in text if each == "\0" or "\ud800" <= each <= "\udfff"), "")
    return f"the character #x{ord(bad):04x} is not allowed" if bad else ""


def _unreadable(place: Place, why: str) -> DocumentError:
    return DocumentError(
        f"cannot read {place}: {why}", hint=f"correct {place.name}; until then nothing in it is done"
    )


def _documents(events: Any, name: str) -> list[Node]:
    documents = []
    while (event := events.get_event()) is not None:
        if isinstance(event, ScalarEvent | AliasEvent | SequenceStartEvent | MappingStartEvent):
            node = _Composer(events, name).node(event, 0)
            if not node.is_nothing:
                documents.append(node)
    return documents


class _Composer:
    """Nodes from the events of one document."""

    def __init__(self, events: Any, name: str) -> None:
        self._events = events
        self._name = name
        self._anchors: dict[str, Node] = {}

    def node(self, event: Event, depth: int) -> Node:
        """Take the node that begins with `event`."""
        place = self._place(event)
        if depth > MAX_DEPTH:
            raise _unreadable(place, f"it is deeper than {MAX_DEPTH} lists and mappings")
        if isinstance(event, AliasEvent):
            if event.anchor not in self._anchors:
                raise _unreadable(place, f"there is no anchor &{event.anchor} before it")
            return self._anchors[event.anchor]
        if event.tag not in (None, "!", *TAGS):
            raise _unreadable(place, f"the tag {_cut(event.tag)} means nothing here")
        if isinstance(event, ScalarEvent):
            node = Node(place, text=event.value, plain=event.style is None)
        elif isinstance(event, SequenceStartEvent):
            node = self._sequence(place, depth)
        else:
            node = self._mapping(place, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _sequence(self, place: Place, depth: int) -> Node:
        items: list[Node] = []
        size = 0
        while not isinstance(event := self._events.get_event(), CollectionEndEvent):
            items.append(self.node(event, depth + 1))
            size += items[-1].size
            self._check(size, event)
        return Node(place, items=items)

    def _mapping(self, place: Place, depth: int) -> Node:
        keys: dict[str, Node] = {}
        merged: list[Node] = []
        size = 0
        while not isinstance(event := self._events.get_event(), CollectionEndEvent):
            key = self.node(event, depth + 1)
            value = self.node(self._events.get_event(), depth + 1)
            size += value.size
            self._check(size, event)
            if key.text is None:
                raise _unreadable(key.place, f"{key.kind} cannot be a key")
            if why := forbidden(key.text):
                raise _unreadable(key.place, why)
            if key.text == MERGE and key.plain:
                merged += value.items if value.items is not None else [value]
            elif key.text in keys:
                raise _unreadable(key.place, f"'{_cut(key.text)}' is there twice")
            else:
                keys[key.text] = value
        for each in merged:
            if each.keys is None:
                raise _unreadable(each.place, f"{MERGE} takes mappings, and this is {each.kind}")
            keys = {**each.keys, **keys}
        return Node(place, keys=keys)

    def _check(self, size: int, event: Event) -> None:
        if size > MAX_NODES:
            raise _unreadable(self._place(event), f"it has more than {MAX_NODES} parts, aliases counted")

    def _place(self, event: Event) -> Place:
        return Place(self._name, event.start_mark.line + 1, event.start_mark.column + 1)


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
