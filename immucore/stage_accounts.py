"""Users, groups and their keys, as the steps of a stage ask for them: with the tools of the system at /."""

from __future__ import annotations

import os
import re
import stat
from contextlib import ExitStack, suppress

from immucore import observe, syscalls
from immucore.documents import NOTHING, DocumentError, read
from immucore.stage_tools import StepError, command, together, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from immucore.stage_keys import User

PASSWD, GROUP = "/etc/passwd", "/etc/group"
KEYS = "authorized_keys"
AT_FDCWD = -100
# kind of an entity → its file, and its fields in the order of a line (github.com/mudler/entities)
ENTITIES = {
    "user": (PASSWD, ("username", "password", "uid", "gid", "info", "homedir", "shell")),
    "group": (GROUP, ("group_name", "password", "gid", "users")),
    "shadow": (
        "/etc/shadow",
        (
            *("username", "password", "last_changed", "minimum_changed", "maximum_changed", "warn"),
            *("inactive", "expire", "reserved"),
        ),
    ),
    "gshadow": ("/etc/gshadow", ("name", "password", "administrators", "members")),
}


def table(path: str) -> dict[str, list[str]]:
    """Read a file of colon-separated fields by the first of them."""
    lines = [line.split(":") for line in observe.whole(path).split("\n") if ":" in line]
    return {fields[0]: fields for fields in lines}


def owner_ids(owner: str) -> tuple[int, int]:
    """Give the numbers of user:group; -1 for what is not said. Raises StepError for who is not there."""
    user, _, group = owner.partition(":")
    return _id(user, PASSWD, "user"), _id(group, GROUP, "group")


def _id(name: str, path: str, what: str) -> int:
    if not name:
        return -1
    if name.isascii() and name.isdecimal():
        return int(name)
    fields = table(path).get(name, [])
    if len(fields) < 3 or not fields[2].isdecimal():
        raise StepError(f"there is no {what} {name}")
    return int(fields[2])


def add_groups(groups: Mapping[str, tuple[str, ...]]) -> None:
    """Make groups that are not there, and put their members in."""

    def one(item: tuple[str, tuple[str, ...]]) -> None:
        name, members = item
        if name not in table(GROUP):
            command("groupadd", "--", name)
        for member in members:
            command("usermod", "--append", "--groups", name, "--", member)

    together(one, groups.items())


def add_users(users: tuple[User, ...]) -> None:
    """Make users that are not there; password, groups and keys of those that are, are set all the same."""
    together(_add_user, users)


def _add_user(user: User) -> None:
    groups = table(GROUP)
    for group in user.groups:
        if group not in groups:
            command("groupadd", "--", group)
    if user.name not in table(PASSWD):
        home = () if {"--no-create-home", "--system"} & {*user.options} else ("--create-home",)
        same = ("--gid", user.name) if user.name in groups else ()  # or useradd refuses
        given = any(option.startswith(("--gid", "--no-user-group")) for option in user.options)
        command("useradd", *home, *(() if given else same), *user.options, "--", user.name)
    if user.groups:
        command("usermod", "--append", "--groups", ",".join(user.groups), "--", user.name)
    if user.password:
        if ":" in user.password or "\n" in user.password:
            raise StepError(f"the password of {user.name} has a colon or a line end")
        # On its standard input: everybody can read the arguments of a program.
        hashed = ("--encrypted",) if re.match(r"[$*!]", user.password) else ()
        command("chpasswd", *hashed, typed=f"{user.name}:{user.password}\n")
    if user.lock:
        command("usermod", "--lock", "--", user.name)
    if user.keys:
        add_authorized_keys({user.name: user.keys})


def add_authorized_keys(keys: Mapping[str, tuple[str, ...]]) -> None:
    """Let who has these keys log in as these users."""

    def one(item: tuple[str, tuple[str, ...]]) -> None:
        name, listed = item
        fields = table(PASSWD).get(name, [])
        if len(fields) < 6:
            raise StepError(f"there is no user {name}")
        _add_keys(fields[5], (int(fields[2]), int(fields[3])), [each for each in listed if _is_key(each)])
        if elsewhere := [each for each in listed if not _is_key(each)]:
            raise StepError(
                f"the keys of {', '.join(elsewhere)} are not fetched: there is no network in an initramfs"
            )

    together(one, keys.items())


def _add_keys(home: str, owner: tuple[int, int], keys: list[str]) -> None:
    """Put keys into a user's file. Whatever the user has made of the own home: nothing there is followed."""
    real = _without_symlinks(home)
    os.makedirs(real, exist_ok=True)
    with ExitStack() as opened:

        def hold(directory: int, name: str, flags: int) -> int:
            descriptor = syscalls.openat2(directory, name, flags, syscalls.RESOLVE_NO_SYMLINKS)
            opened.callback(os.close, descriptor)
            return descriptor

        try:
            top = hold(AT_FDCWD, real, os.O_PATH | os.O_DIRECTORY)
            try:
                ssh = hold(top, ".ssh", os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                os.mkdir(".ssh", 0o700, dir_fd=top)
                ssh = hold(top, ".ssh", os.O_RDONLY | os.O_DIRECTORY)
                os.fchown(ssh, *owner)
            mode, there = 0o600, b""
            try:
                file = hold(ssh, KEYS, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except FileNotFoundError:
                pass
            else:
                status = os.fstat(file)
                if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                    raise StepError(f"{home}/.ssh/{KEYS} is no file, or one with another name")
                # A file of root's that the user has put there stays root's.
                mode, owner = stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid)
                there = observe.whole_of(file)
            lines = [line for line in there.decode("utf-8", "surrogateescape").split("\n") if line]
            new = [key.strip() for key in keys if key.strip() not in lines]
            if new:
                content = "".join(f"{line}\n" for line in [*lines, *new])
                _replace(ssh, content.encode("utf-8", "surrogateescape"), mode, owner)
        except OSError as error:
            raise StepError(f"{home}/.ssh/{KEYS}: {error.strerror}") from None


def _replace(ssh: int, content: bytes, mode: int, owner: tuple[int, int]) -> None:
    """Write the file of the keys beside it, and give it its name."""
    new = f".{KEYS}.new"
    with suppress(FileNotFoundError):
        os.unlink(new, dir_fd=ssh)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(new, flags, 0o600, dir_fd=ssh), "wb") as file:
        file.write(content)
        os.fchown(file.fileno(), *owner)
        os.fchmod(file.fileno(), mode)
    os.rename(new, KEYS, src_dir_fd=ssh, dst_dir_fd=ssh)


def _without_symlinks(home: str, left: int = observe.MAX_LINKS) -> str:
    """Take the symlinks out of the path of a home, such as /home itself in some images: only root's."""
    real = "/"
    for number, name in enumerate(parts := home.split("/")):
        below = os.path.join(real, name)
        if name == ".." or not left:
            raise StepError(f"{home} is no path of a home")
        if os.path.islink(below):
            if os.lstat(below).st_uid:
                raise StepError(f"{below} is a symlink that is not root's")
            target = os.path.normpath(os.path.join(real, os.readlink(below)))
            return _without_symlinks("/".join([target, *parts[number + 1 :]]), left - 1)
        real = below if name not in ("", ".") else real
    return real


def _is_key(text: str) -> bool:
    return not text.startswith(("github:", "gitlab:", "http://", "https://"))


def ensure_entities(entities: tuple[tuple[str, str], ...]) -> None:
    """Put lines into passwd(5), shadow(5), group(5) and gshadow(5), in the place of those that are there."""
    together(_ensure, entities)


def _ensure(item: tuple[str, str]) -> None:
    path, text = item
    documents = read(text, "the entity")
    keys = documents[0].keys if documents else None
    if not keys or any(each.text is None for each in keys.values()):
        raise DocumentError("an entity is a mapping of texts")
    values = {key: each.text or "" for key, each in keys.items()}
    kind = values.pop("kind", "")
    if kind not in ENTITIES:
        raise DocumentError(f"there is no entity of kind '{kind[:60]}': {', '.join(ENTITIES)}")
    default, fields = ENTITIES[kind]
    if unknown := values.keys() - {*fields}:
        raise DocumentError(f"a {kind} has no {', '.join(sorted(unknown))[:200]}")
    line = [("" if values.get(field, "") in NOTHING[1:] else values.get(field, "")) for field in fields]
    if not line[0] or any(":" in field or "\n" in field for field in line):
        raise DocumentError(f"a {kind} needs a {fields[0]}, and no field has a colon or a line end")
    path = path or default
    there = observe.whole(path)
    lines = [each for each in there.split("\n") if each]
    whole = ":".join(line)
    at = next((number for number, each in enumerate(lines) if each.split(":")[0] == line[0]), len(lines))
    if kind == "user" and at < len(lines) and not line[2]:
        raise DocumentError(f"the user {line[0]} needs a uid")
    lines[at : at + 1] = [whole]
    content = "".join(f"{each}\n" for each in lines).encode("utf-8", "surrogateescape")
    write(path, content, -1 if there else 0o600 if "shadow" in path else 0o644)
