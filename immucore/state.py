"""What people have made of the persistent paths: `immucore state` (contract §4.2)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from immucore import report
from immucore.errors import ImmucoreError, MountError
from immucore.plan import as_booted
from immucore.state_changes import KINDS, MISSING, changes, conflicts
from immucore.state_paths import Kept, begin, find, opened, say, shown

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


def show(arguments: argparse.Namespace) -> int:
    """List the persistent paths, or what is not as the image gave it in one of them."""
    root, paths = begin(arguments)
    if arguments.path:
        paths = [find(paths, arguments.path)]
        if not arguments.json:
            return _list(paths[0], root)
    found = []
    for kept in paths:
        found.append(_facts(kept, root, listed=bool(arguments.path)))
        for line in () if arguments.json else _lines(found[-1]):
            say(line)
    if arguments.json:
        print(json.dumps({"schema": report.SCHEMA, "paths": found}, indent=2))
    elif not paths:
        say("nothing is kept in this boot: no persistent path is mounted")
    return MountError.exit_status if any(facts["error"] for facts in found) else 0


def _list(kept: Kept, root: str) -> int:
    with opened(kept, root) as trees:
        for each in conflicts(trees):
            say(f"conflict {kept.shown(each.path)}")
        for change in changes(trees):
            say(f"{change.what} {kept.shown(change.path, change.kind)}")
    return 0


def _facts(kept: Kept, root: str, *, listed: bool) -> dict[str, Any]:
    """Find out about one persistent path; where that is not possible there is an `error`, and no counts."""
    facts: dict[str, Any] = {
        "path": kept.path,
        "mode": "overlay" if kept.overlay else "bind",
        "kept_in": as_booted(kept.place),
        "image": None,
        "adopted": False,
        "note": kept.note,
        "error": None,
    }
    counts: dict[str, Any] = dict.fromkeys(KINDS, 0)
    files = []
    try:
        with opened(kept, root) as trees:
            if not kept.overlay:
                with trees.manifest() as reader:
                    facts["image"], facts["adopted"] = reader.image, reader.memory().adopted
            facts["conflicts"] = [kept.name(each.path) for each in conflicts(trees)]
            for change in changes(trees):
                counts[change.what] += 1
                if listed:
                    files.append({"what": change.what, "path": kept.name(change.path), "kind": change.kind})
    except ImmucoreError as error:
        return facts | {"error": error.message}
    return facts | counts | ({"files": files} if listed else {})


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    """Say what became of one persistent path."""
    yield f"{shown(facts['path'])}: {facts['mode']}, kept in {shown(facts['kept_in'])}"
    if facts["note"]:
        yield f"    in this boot: {shown(facts['note'])}"
    if facts["error"]:
        yield f"    {facts['error']}"
        return
    known = {None: "what the booted image has", "": "an image that is not known"}
    yield f"    follows {known.get(facts['image']) or 'image ' + shown(facts['image'])}"
    yield "    " + ", ".join(f"{facts[what]} {what}" for what in KINDS[:3])
    if facts["adopted"]:
        yield f"    was there before its first manifest (adopted): {facts[MISSING]} missing"
    for path in facts["conflicts"]:
        yield f"    in conflict: {shown(path)}"
