"""What a cloud-init file asks for in a stage, as values: yip's schema (github.com/rancher/yip). Pure.

A file has stages, a stage has steps, a step has keys. What cannot be read says where it stands; it costs its
key, or the step where it is a condition, and never what stands beside it.
"""

from __future__ import annotations

import re

from immucore.documents import MAX_DEPTH, DocumentError, Node, Place, forbidden
from immucore.stage_keys import CONDITIONS, IF, READERS, mapping, sequence, text_of
from immucore.values import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

SUB_STAGES = ("{}.before", "{}", "{}.after")


class Step(Record):
    """A step of a stage: its conditions, what it does by key, and what of it cannot be done."""

    name: str
    place: Place
    stage: str
    conditions: dict[str, Any]
    keys: dict[str, Any]
    broken: bool  # a condition cannot be read: nobody knows whether it was to be done
    problems: tuple[str, ...]
    unknown: tuple[str, ...]  # keys that this agent does nothing with


def steps_of(documents: Iterable[Node], stage: str) -> list[Step]:
    """List the steps that documents have for a stage. Raises DocumentError."""
    steps = []
    for document in documents:
        stages = mapping(document).get("stages")
        wanted = mapping(stages).get(stage) if stages and not stages.is_nothing else None
        if wanted is None or wanted.is_nothing:
            continue
        for number, node in enumerate(sequence(wanted), 1):
            steps.append(_step(node, stage, number))
    return steps


def _step(node: Node, stage: str, number: int) -> Step:
    conditions: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    problems: list[str] = []
    unknown: list[str] = []
    name, broken = f"step {number}", False
    try:
        items = mapping(node)
    except DocumentError as error:
        items, broken = {}, True
        problems.append(error.message)
    for key, value in items.items():
        if value.is_nothing:
            continue
        try:
            if key == "name":
                name = text_of(value)
            elif key in CONDITIONS:
                conditions[key] = IF[key](value)
            elif key in READERS:
                keys[key] = READERS[key](value, unknown)
            else:
                unknown.append(f"{value.place}: {key}")
        except DocumentError as error:
            problems.append(error.message)
            broken |= key in CONDITIONS
    return Step(
        name=name,
        place=node.place,
        stage=stage,
        conditions=conditions,
        keys={key: keys[key] for key in READERS if key in keys},  # in the order in which they are done
        broken=broken,
        problems=tuple(problems),
        unknown=tuple(unknown),
    )


def from_words(words: Iterable[tuple[str, str]]) -> tuple[list[Node], list[str]]:
    """Make a document of `stages.rootfs[0].commands[0]=…` words, and name those that are none.

    A word that does not fit those before it is left out alone.
    """
    tree: dict[Any, Any] = {}
    problems = []
    for key, value in words:
        name = f"'{key}' on the kernel command line"
        path = _dotted(key)
        if not path or not _fits(tree, path):
            problems.append(f"cannot read {name}: write stages.<stage>[0].<key>=<value>, each once")
            continue
        here = tree
        for part in path[:-1]:
            here = here.setdefault(part, {})
        here[path[-1]] = Node(Place(name), text=value)
    return ([_node(tree, Place("the kernel command line"))] if tree else []), problems


def _fits(tree: dict[Any, Any], path: list[str | int]) -> bool:
    """Tell whether there is room for a text at a path: nothing on it is one, a list is no mapping."""
    here: Any = tree
    for part in path:
        if not isinstance(here, dict):
            return False
        if here and _named(here) != isinstance(part, str):
            return False
        if part not in here:
            return True
        here = here[part]
    return not isinstance(here, dict)


def _dotted(key: str) -> list[str | int]:
    """Split `stages.rootfs.before[0].files[0].path`: the stage goes up to the first bracket."""
    match = re.fullmatch(r'stages\.("?)([a-z][a-z-]*(?:\.before|\.after)?)\1\[(\d{1,3})\]((?:\..+)?)', key)
    if match is None or forbidden(key):
        return []
    path: list[str | int] = ["stages", match[2], int(match[3])]
    for part in re.finditer(r'\.(?:"([^"]+)"|([^.\[\]"]+))|\[(\d{1,3})\]|(.)', match[4]):
        if part[4]:
            return []
        path.append(int(part[3]) if part[3] else part[1] or part[2])
    return path if len(path) < MAX_DEPTH else []


def _node(tree: Any, place: Place) -> Node:
    if isinstance(tree, Node):
        return tree
    within = {key: _node(tree[key], place) for key in sorted(tree, key=str if _named(tree) else int)}
    if _named(tree):
        return Node(place, keys=within)
    return Node(place, items=[*within.values()])


def _named(tree: dict[Any, Any]) -> bool:
    return isinstance(next(iter(tree)), str)
