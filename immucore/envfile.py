"""The syntax of systemd's EnvironmentFile= (systemd.exec(5); systemd: src/basic/env-file.c)."""

from __future__ import annotations

from immucore.errors import LayoutError

BLANKS = " \t\r"


def parse(text: str, name: str) -> dict[str, str]:
    """Read the assignments of a file; of several for one variable the last counts.

    `name` is what messages call the file. Raises LayoutError with the number of the line. Where systemd
    skips a line that is no assignment, this does not: a mistyped layout must not lose somebody's volumes in
    silence.
    """
    if "\0" in text:  # systemd too refuses the whole file; what a power cut leaves of one is often zeros
        raise LayoutError(
            f"cannot read line {_number(text, text.index(chr(0)))} of {name}: it has a zero byte",
            hint=f"the file is damaged: write {name} anew",
        )
    values: dict[str, str] = {}
    position = 0
    while position < len(text):
        start, end = position, text.find("\n", position)
        end = len(text) if end < 0 else end
        line = text[start:end].strip(BLANKS)
        if not line or line[0] in "#;":
            position = end + 1
            continue
        equals = text.find("=", start, end)
        key = text[start:equals].strip(BLANKS).removeprefix("export ") if equals >= 0 else ""
        if not _is_name(key):
            shown = line if len(line) <= 60 else line[:57] + "..."
            raise LayoutError(
                f"cannot read line {_number(text, start)} of {name}: '{shown}' is not an assignment",
                hint=f"write NAME=value, or put a # before it, in {name}",
            )
        values[key], position = _value(text, equals + 1, name)
    return values


def _number(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _is_name(key: str) -> bool:
    return key.isascii() and key.replace("_", "a").isalnum() and not key[:1].isdigit()


def _value(text: str, position: int, name: str) -> tuple[str, int]:
    """Read the value at `position`; return it and the position after its line."""
    value: list[str] = []  # its characters: to add to a string again and again would copy it each time
    bare = 0  # where the blanks at the end of an unquoted part begin to count: what was quoted keeps its own
    unquoted = False  # within an unquoted part quotes are ordinary characters
    while position < len(text) and text[position] != "\n":
        character = text[position]
        position += 1
        if character == "\\":
            if text[position : position + 1] != "\n":
                value.append(text[position : position + 1])
            bare = len(value)
            position, unquoted = position + 1, True
        elif character in "'\"" and not unquoted:
            position = _quoted(text, position, value, name)
            bare = len(value)
        elif character not in BLANKS or unquoted:
            value.append(character)
            unquoted = True
    return "".join(value[:bare]) + "".join(value[bare:]).rstrip(BLANKS), position + 1


def _quoted(text: str, position: int, value: list[str], name: str) -> int:
    """Add what stands in quotes to `value`; return the position after the closing one."""
    start, quote = position, text[position - 1]
    while position < len(text):
        character = text[position]
        position += 1
        if character == quote:
            return position
        if character == "\\" and quote == '"' and position < len(text):
            following = text[position]
            position += 1
            value.append(
                following if following in '"\\`$' else "" if following == "\n" else "\\" + following
            )
        else:
            value.append(character)
    raise LayoutError(
        f"cannot read line {_number(text, start)} of {name}: the quote {quote} is never closed",
        hint=f"close it in {name}",
    )
