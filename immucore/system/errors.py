"""What can go wrong with images and partitions, beside immucore/errors.py."""

from __future__ import annotations

from immucore.errors import ImmucoreError


class ImageError(ImmucoreError):
    """An image cannot be fetched, made, checked or put in its place; what was there stays."""

    exit_status = 4
