"""How the directory is called in which a path's changes are kept (contract §4)."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Iterable

_SAFE = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:_."


def directory_names(paths: Iterable[str]) -> dict[str, str]:
    """Name each path's directory.

    The field's `/` → `-`, or systemd-escape's name where two paths would share it.

    An escaped name that differs from the field's holds a backslash, which no listed path may: so none meets
    another.
    """
    plain = {path: path.strip("/").replace("/", "-") for path in paths}
    first: dict[str, str] = {}
    shared = {name for path, name in plain.items() if first.setdefault(name, path) != path}
    return {path: _escaped(path) if name in shared else name for path, name in plain.items()}


def _escaped(path: str) -> str:
    r"""Escape a path as systemd-escape --path does (systemd.unit(5)): `/var/lib-foo` is var-lib\x2dfoo."""
    escaped = ""
    for index, byte in enumerate(path.strip("/").encode("utf-8", "surrogateescape")):
        character = chr(byte)
        if character == "/":
            escaped += "-"
        elif character in _SAFE and (character != "." or index):
            escaped += character
        else:
            escaped += f"\\x{byte:02x}"
    return escaped
