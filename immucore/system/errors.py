"""What can go wrong with images and partitions, beside immucore/errors.py."""

from __future__ import annotations

from immucore.errors import ImmucoreError


class ImageError(ImmucoreError):
    """An image cannot be fetched, made, checked or put in its place; what was there stays."""

    exit_status = 4


class UnreadableError(ImageError):
    """A file system is there, and cannot be read: what it holds nobody can boot."""


def told(error: OSError) -> str:
    """Say what the kernel has refused, and of which file if that is known."""
    return f"'{error.filename}': {error.strerror}" if error.filename else str(error.strerror)
