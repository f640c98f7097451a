"""What was mounted → fstab(5), as the booted system has to see it (contract §4.3)."""

from __future__ import annotations

from immucore.plan import REQUIRED, SYSROOT, Bind, Loop, Mount, Operation, Overlay, as_booted, is_below

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from immucore.observe import MountPoint

HEADER = "# Written by immucore at every boot, from what it mounted.\n"
UTAB = "/run/mount/utab"
OUTLIVES = "x-initrd.mount"  # systemd.mount(5): stays mounted until everything else has ended
MARK = "# The image's own lines:\n"
_ESCAPES = {ord(character): f"\\{ord(character):03o}" for character in " \t\n\\"}


def render(operations: Iterable[Operation], image_fstab: str) -> str:
    """Render the mounts among `operations` in their order, then the image's lines for other mount points.

    The root has no line: it is mounted, its loop device is named anew at every boot, and a line naming the
    file would order the root after the partition that holds it, which is ordered after the root. What is
    mounted once more over an earlier mount point replaces its line.
    """
    done = [operation for operation in operations if isinstance(operation, Mount | Bind | Overlay)]
    lines = {operation.target: _line(operation, done) for operation in done}
    ours = {as_booted(target) for target in lines}
    theirs = [line for line in lines_of(image_fstab) if not _mounts(line, ours) and not _of_root(line)]
    root = "".join(
        f"# / is {escape(as_booted(operation.source))}, mounted {','.join(operation.options)}"
        " by the initramfs.\n"
        for operation in operations
        if isinstance(operation, Loop)
    )
    ours_text, theirs_text = ("".join(f"{line}\n" for line in part) for part in (lines.values(), theirs))
    return HEADER + root + ours_text + MARK + theirs_text


def of_image(text: str) -> str:
    """Return the lines of an fstab that are the image's, also of one that render() made before."""
    return text.partition(MARK)[2] if text.startswith(HEADER) else text


def _mounts(line: str, targets: set[str]) -> bool:
    where = mount_point(line)
    return where is not None and (where.rstrip("/") or "/") in targets


def lines_of(text: str) -> list[str]:
    """Split a table of the kernel's or of libmount's.

    At newlines only: str.splitlines() would split at ten other characters, which a name may have.
    """
    return text.removesuffix("\n").split("\n") if text else []


def mount_point(line: str) -> str | None:
    """Read the second field of a line of fstab as getmntent(3) does; None for a comment."""
    fields = [field for field in line.replace("\t", " ").split(" ") if field]
    return unescape(fields[1]) if len(fields) > 1 and not fields[0].startswith("#") else None


def _of_root(line: str) -> bool:
    return _mounts(line, {"/"}) or line.startswith("# UNCONFIGURED FSTAB")


def _line(operation: Mount | Bind | Overlay, done: list[Mount | Bind | Overlay]) -> str:
    target = as_booted(operation.target)
    if isinstance(operation, Bind):
        source, fstype, options = as_booted(operation.source), "none", ["bind"]
    elif isinstance(operation, Overlay):
        backing = as_booted(operation.backing)
        source, fstype = "overlay", "overlay"
        options = [f"{key}={path}" for key, path in overlay_paths(target, backing)]
        options += ["index=off", "metacopy=off"]
    else:
        source, fstype = operation.fstab_name or operation.source, operation.fstype
        options = [*operation.options] or ["defaults"]
    if operation.criticality != REQUIRED and "nofail" not in options:
        options.append("nofail")
    if is_below(operation.target, SYSROOT) and _outlives_shutdown(operation, done):
        options.append(OUTLIVES)  # below /run it would be taken for something to mount below /sysroot/run
    return " ".join([*map(escape, (source, target, fstype, ",".join(dict.fromkeys(options)))), "0", "0"])


def overlay_paths(target: str, backing: str) -> tuple[tuple[str, str], ...]:
    """Give the directories of an overlay as its mount options name them, escaped for the kernel's parser."""
    return tuple(
        (key, path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,"))
        for key, path in (
            ("lowerdir", target),
            ("upperdir", f"{backing}/upper"),
            ("workdir", f"{backing}/work"),
        )
    )


def _outlives_shutdown(operation: Mount | Bind | Overlay, done: list[Mount | Bind | Overlay]) -> bool:
    """Tell what systemd must not unmount while services end: overlays, binds and what they stand on.

    Something may be open in them to the end: the hwdb of udev in /etc, what a container that outlives its
    service has below /var. A volume with nothing of ours on it is unmounted as on any machine.
    """
    if isinstance(operation, Bind | Overlay):
        return True
    return any(
        is_below(path, operation.target)
        for other in done
        if not isinstance(other, Mount)
        for path in (other.target, other.source if isinstance(other, Bind) else other.backing)
    )


def utab(
    operations: Iterable[Operation],
    table: Iterable[MountPoint],
    place: Callable[[str], str],
    before: str,
) -> str:
    """Render /run/mount/utab, where mount(8) notes the options that the kernel does not know.

    systemd takes x-initrd.mount from there: of what is mounted it asks the kernel and libmount, not fstab.
    `place` says where an operation on a target has mounted, `before` is what the file says already.
    """
    done = [operation for operation in operations if isinstance(operation, Mount | Bind | Overlay)]
    found = {mount.target: mount for mount in table}
    lines = before.splitlines(keepends=True)
    for operation in done:
        target = place(operation.target)
        if target in found and _outlives_shutdown(operation, done):
            mount = found[target]
            fields = {"SRC": mount.source, "TARGET": as_booted(target), "ROOT": mount.root, "OPTS": OUTLIVES}
            line = " ".join(f"{key}={escape(value)}" for key, value in fields.items()) + "\n"
            if line not in lines:
                lines.append(line)
    return "".join(lines)


def escape(text: str) -> str:
    """Write a field of fstab as getmntent(3) reads it."""
    return text.translate(_ESCAPES)


def unescape(text: str) -> str:
    """Read a field of fstab or mountinfo: octal escapes (getmntent(3); the kernel's mangle_path())."""
    head, *parts = text.split("\\")
    for part in parts:
        code = part[:3]
        octal = len(code) == 3 and code[0] in "0123" and all(digit in "01234567" for digit in code)
        head += chr(int(code, 8)) + part[3:] if octal else "\\" + part
    return head
