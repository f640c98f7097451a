"""The keys of a step of a cloud-init file, as values: yip's schema. Pure.

What cannot be read says where it stands.
"""

from __future__ import annotations

import binascii
import re
import zlib

from immucore.documents import MAPPING, SCALAR, SEQUENCE, DocumentError, Node, forbidden
from immucore.values import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    Reader = Callable[[Node, list[str]], Any]  # takes down the keys within that nobody knows

MAX_CONTENT_BYTES = 64 << 20  # of a file, unpacked: its memory is the initramfs'
CONDITIONS = ("if", "only_os", "only_os_version", "only_arch", "only_service_manager", "node", "if_files")
ENCODINGS = {"": "", "b64": "b64", "base64": "b64", "gz": "gz", "gzip": "gz"}
ENCODINGS |= {
    f"{one}+{other}": "gz+b64"
    for pair in (("gz", "gzip"), ("b64", "base64"))
    for one in pair
    for other in ("gz", "gzip", "b64", "base64")
    if other not in pair
}


class File(Record):
    """A file to write, or a directory to make (`content` None)."""

    path: str
    content: bytes | None
    mode: int
    owner: str = ""  # user:group, by names or numbers; either may be empty


class User(Record):
    """An account, as useradd(8) makes it."""

    name: str
    password: str = ""  # as it stands in shadow(5), or what is to be typed
    keys: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # of useradd
    lock: bool = False


class Override(Record):
    """A drop-in of a unit."""

    service: str
    name: str
    content: str


class Systemctl(Record):
    """What is done with units."""

    verbs: tuple[tuple[str, tuple[str, ...]], ...]  # enable, disable, mask, start and their units
    overrides: tuple[Override, ...]


def _wrong(node: Node, why: str) -> DocumentError:
    return DocumentError(f"{node.place}: {why}", hint=f"correct {node.place.name}")


def mapping(node: Node) -> dict[str, Node]:
    """Return what a mapping maps. Raises DocumentError for another node."""
    if node.keys is None:
        raise _wrong(node, f"it has to be {MAPPING}, and is {node.kind}")
    return node.keys


def sequence(node: Node) -> list[Node]:
    """Return what a list lists, likewise."""
    if node.items is None:
        raise _wrong(node, f"it has to be {SEQUENCE}, and is {node.kind}")
    return node.items


def text_of(node: Node) -> str:
    """Return a text, likewise; one without a value is empty."""
    if node.text is None:
        raise _wrong(node, f"it has to be {SCALAR}, and is {node.kind}")
    if why := forbidden(node.text):
        raise _wrong(node, why)
    return "" if node.is_nothing else node.text


def _texts(node: Node) -> tuple[str, ...]:
    return tuple(text_of(each) for each in sequence(node) if not each.is_nothing)


def _commands(node: Node) -> tuple[tuple[str, str], ...]:
    """Read (place, command) pairs: a command may hold a secret, so messages have its place."""
    return tuple((str(each.place), text_of(each)) for each in sequence(node) if not each.is_nothing)


def _map(node: Node) -> dict[str, str]:
    return {key: text_of(value) for key, value in mapping(node).items()}


def _switch(node: Node) -> bool:
    text = text_of(node).lower()
    if text not in ("true", "false", "yes", "no", "on", "off", ""):
        raise _wrong(node, "it is true or false")
    return text in ("true", "yes", "on")


def _number(node: Node) -> int:
    """Read a number as Go's YAML does: 0644 and 0o644 are octal."""
    text = text_of(node)
    match = re.fullmatch(r"0o?([0-7]{1,8})|(0|[1-9][0-9]{0,8})", text)
    if match is None:
        raise _wrong(node, f"'{text[:60]}' is no number")
    return int(match[1], 8) if match[1] else int(match[2])


def _pattern(node: Node) -> str:
    text = text_of(node)
    try:
        re.compile(text[:1000])
    except (re.error, RecursionError, OverflowError) as error:
        raise _wrong(node, f"it is no regular expression: {error}") from None
    return text[:1000]


def _path(node: Node) -> str:
    text = text_of(node)
    if not text.startswith("/") or text.endswith("/.."):
        raise _wrong(node, f"'{text[:200]}' is no absolute path")
    return text


def _given(node: Node) -> dict[str, Node]:
    """Leave the keys out that have no value."""
    return {key: value for key, value in mapping(node).items() if not value.is_nothing}


def _wanted(keys: dict[str, Node], key: str, node: Node) -> Node:
    if key not in keys or keys[key].is_nothing:
        raise _wrong(node, f"there is no {key}: in it")
    return keys[key]


def _only(keys: dict[str, Node], known: Iterable[str], unknown: list[str]) -> None:
    """Note keys that this agent does nothing with: a mistyped one is no reason to lose what it stands in."""
    unknown += [f"{value.place}: {key}" for key, value in keys.items() if key not in known]


def _plain(read: Callable[[Node], Any]) -> Reader:
    """Make a reader of what has no keys of its own."""
    return lambda node, _: read(node)


def _files(node: Node, unknown: list[str]) -> tuple[File, ...]:
    return tuple(_file(each, unknown, with_content=True) for each in sequence(node))


def _directories(node: Node, unknown: list[str]) -> tuple[File, ...]:
    return tuple(_file(each, unknown, with_content=False) for each in sequence(node))


def _file(node: Node, unknown: list[str], *, with_content: bool) -> File:
    keys = _given(node)
    known = ("path", "permissions", "owner", "group", "owner_string")
    _only(keys, (*known, "content", "encoding") if with_content else known, unknown)
    content = None
    if with_content:
        text = text_of(keys["content"]) if "content" in keys else ""
        encoding = text_of(keys["encoding"]) if "encoding" in keys else ""
        content = _decoded(text, encoding, keys.get("encoding", node), keys.get("content", node))
    user, group = (str(_number(keys[key])) if key in keys else "" for key in ("owner", "group"))
    owner = text_of(keys["owner_string"]) if "owner_string" in keys else ""
    default = 0o644 if with_content else 0o755
    mode = _number(keys["permissions"]) if "permissions" in keys else 0
    return File(
        path=_path(_wanted(keys, "path", node)),
        content=content,
        mode=(mode or default) & 0o7777,
        owner=owner or (f"{user}:{group}" if user or group else ""),
    )


def _decoded(text: str, encoding: str, where: Node, node: Node) -> bytes:
    kind = ENCODINGS.get(encoding.lower())
    data = text.encode("utf-8", "surrogateescape")
    if kind is None:
        raise _wrong(where, f"there is no encoding '{encoding[:60]}': b64, gz or gz+b64")
    try:
        if kind in ("b64", "gz+b64"):
            data = binascii.a2b_base64(data)
        if kind in ("gz", "gz+b64"):
            unpacking = zlib.decompressobj(31)  # gzip's header
            if kind == "gz":
                data = text.encode("latin-1")
            data = unpacking.decompress(data, MAX_CONTENT_BYTES)
            if unpacking.unconsumed_tail:
                raise _wrong(node, f"it unpacks to more than {MAX_CONTENT_BYTES >> 20} MiB")
            if not unpacking.eof:
                raise _wrong(node, f"it cannot be unpacked ({encoding}): its end is missing")
    except (binascii.Error, zlib.error, UnicodeEncodeError) as error:
        raise _wrong(node, f"it cannot be unpacked ({encoding}): {error}") from None
    return data


def _users(node: Node, unknown: list[str]) -> tuple[User, ...]:
    return tuple(_user(name, each, unknown) for name, each in mapping(node).items())


# key → option of useradd(8), with a value
_OPTIONS = {"gecos": "--comment", "homedir": "--home-dir", "primary_group": "--gid", "shell": "--shell"}
_OPTIONS |= {"uid": "--uid"}
_FLAGS = {"no_create_home": "--no-create-home", "no_user_group": "--no-user-group", "system": "--system"}
_FLAGS |= {"no_log_init": "--no-log-init"}
_ACCOUNT = ("name", "passwd", "lock_passwd", "groups", "ssh_authorized_keys", *_OPTIONS, *_FLAGS)


def _user(name: str, node: Node, unknown: list[str]) -> User:
    keys = {} if node.is_nothing else _given(node)
    _only(keys, _ACCOUNT, unknown)
    name = text_of(keys["name"]) if "name" in keys else name
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?", name):
        raise _wrong(node, f"'{name[:60]}' is no name of a user")
    options = [f"{option}={text_of(keys[key])}" for key, option in _OPTIONS.items() if key in keys]
    options += [option for key, option in _FLAGS.items() if key in keys and _switch(keys[key])]
    return User(
        name=name,
        password=text_of(keys["passwd"]) if "passwd" in keys else "",
        keys=_texts(keys["ssh_authorized_keys"]) if "ssh_authorized_keys" in keys else (),
        groups=_texts(keys["groups"]) if "groups" in keys else (),
        options=tuple(options),
        lock="lock_passwd" in keys and _switch(keys["lock_passwd"]),
    )


def _authorized_keys(node: Node) -> dict[str, tuple[str, ...]]:
    return {name: _texts(each) for name, each in mapping(node).items()}


def _groups(node: Node) -> dict[str, tuple[str, ...]]:
    """Read groups and their members: a list of names, or of mappings of a name to users (cloud-init's)."""
    found: dict[str, tuple[str, ...]] = {}
    for each in [node] if node.keys is not None else sequence(node):
        if each.keys is None:
            found.setdefault(text_of(each), ())
            continue
        for name, members in each.keys.items():
            listed = (
                [members] if members.text is not None and not members.is_nothing else members.items or []
            )
            found[name] = found.get(name, ()) + tuple(text_of(member) for member in listed)
    return found


def _entities(node: Node, unknown: list[str]) -> tuple[tuple[str, str], ...]:
    """Read (path, entity) pairs; the entity is a YAML text of its own."""
    found = []
    for each in sequence(node):
        keys = mapping(each)
        _only(keys, ("path", "entity"), unknown)
        found.append((_path(keys["path"]) if "path" in keys else "", text_of(_wanted(keys, "entity", each))))
    return tuple(found)


_VERBS = ("enable", "disable", "mask", "start")


def _systemctl(node: Node, unknown: list[str]) -> Systemctl:
    keys = _given(node)
    _only(keys, (*_VERBS, "overrides"), unknown)
    verbs = tuple((verb, _texts(keys[verb])) for verb in _VERBS if verb in keys)
    for verb, units in verbs:
        for unit in units:
            if unit.startswith("-"):
                raise _wrong(keys[verb], f"'{unit[:60]}' is no unit")
    overrides = []
    for each in sequence(keys["overrides"]) if "overrides" in keys else ():
        within = mapping(each)
        _only(within, ("service", "name", "content"), unknown)
        name = text_of(within["name"]) if "name" in within else "override-yip.conf"
        service = text_of(_wanted(within, "service", each))
        if "/" in service + name:
            raise _wrong(each, "a service and a name of a drop-in have no /")
        content = text_of(_wanted(within, "content", each))
        overrides.append(
            Override(
                service=service if "." in service else f"{service}.service",
                name=name if name.endswith(".conf") else f"{name}.conf",
                content=content,
            )
        )
    return Systemctl(verbs=verbs, overrides=tuple(overrides))


def _dns(node: Node, unknown: list[str]) -> dict[str, tuple[str, ...]]:
    keys = _given(node)
    known = ("nameservers", "search", "options", "path")
    _only(keys, known, unknown)
    given = {key: keys[key] for key in known if key in keys}
    return {key: (_path(each),) if key == "path" else _texts(each) for key, each in given.items()}


def _layout(node: Node, unknown: list[str]) -> tuple[str, str, int]:
    """Read (label of a partition, or path of a device, what to make of its size in MiB; 0: all there is)."""
    keys = mapping(node)
    _only(keys, ("device", "expand_partition"), unknown)  # add_partitions is for an installer
    device = _map(_wanted(keys, "device", node))
    if len(found := [device[key] for key in ("label", "path") if device.get(key)]) != 1:
        raise _wrong(keys["device"], "it needs a label: or a path:")
    expand = mapping(_wanted(keys, "expand_partition", node))
    size_mib = _number(expand["size"]) if "size" in expand else 0
    return ("label" if device.get("label") else "path"), found[0], size_mib


def _if_files(node: Node) -> dict[str, tuple[str, ...]]:
    keys = mapping(node)
    for key, value in keys.items():
        if key not in ("any", "all", "none"):
            raise _wrong(value, f"there is no such key as {key}:")
    return {key: _texts(each) for key, each in keys.items()}


IF: dict[str, Callable[[Node], Any]] = dict.fromkeys(CONDITIONS, _pattern)
IF |= {"if": text_of, "if_files": _if_files}
# In yip's order, which is that in which a step does them.
READERS: dict[str, Reader] = {
    "dns": _dns,
    "groups": _plain(_groups),
    "ensure_entities": _entities,
    "directories": _directories,
    "files": _files,
    "commands": _plain(_commands),
    "hostname": _plain(text_of),
    "sysctl": _plain(_map),
    "users": _users,
    "authorized_keys": _plain(_authorized_keys),
    "modules": _plain(_texts),
    "timesyncd": _plain(_map),
    "systemctl": _systemctl,
    "environment": _plain(_map),
    "environment_file": _plain(_path),
    "systemd_firstboot": _plain(_map),
    "layout": _layout,
}
