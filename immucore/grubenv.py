"""GRUB's environment block (grub-editenv(1), grub-core/lib/envblk.c): 1024 bytes of name=value lines."""

from __future__ import annotations

SIGNATURE = b"# GRUB Environment Block\n"
SIZE_BYTES = 1024  # GRUB writes into the blocks that are there, and never changes the size


def parse(block: bytes) -> dict[str, str]:
    """Read the variables of a block; what is none has none.

    A backslash protects the byte after it in a value; in a name GRUB knows no such thing, and writes none.
    """
    if not block.startswith(SIGNATURE):
        return {}
    values: dict[str, str] = {}
    line, escaped = b"", False
    for byte in block[len(SIGNATURE) : SIZE_BYTES]:
        one = bytes((byte,))
        if escaped or one not in (b"\\", b"\n"):
            line, escaped = line + one, False
        elif one == b"\\":
            escaped = True
        else:
            name, separator, value = line.partition(b"=")
            if separator and not (name.startswith(b"#") or b"\\" in name or b"\n" in name):
                values[name.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
            line = b""
    return values


def render(values: dict[str, str]) -> bytes:
    """Write a block. Raises ValueError when the variables do not fit into it."""
    block = SIGNATURE
    for name, value in values.items():
        escaped = value.replace("\\", "\\\\").replace("\n", "\\\n")
        block += f"{name}={escaped}\n".encode("utf-8", "surrogateescape")
    if len(block) > SIZE_BYTES:
        raise ValueError(f"{len(block) - SIZE_BYTES} bytes too many for the environment block of GRUB")
    return block.ljust(SIZE_BYTES, b"#")
