"""GRUB's environment block."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from immucore import grubenv

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True)
VALUES = st.text(st.characters(blacklist_characters="\0", codec="utf-8"), max_size=20)


def test_a_block() -> None:
    block = grubenv.render({"saved_entry": "cos", "next_entry": "fallback"})
    assert len(block) == 1024
    assert block.startswith(b"# GRUB Environment Block\nsaved_entry=cos\nnext_entry=fallback\n###")
    assert grubenv.parse(block) == {"saved_entry": "cos", "next_entry": "fallback"}


@pytest.mark.parametrize(
    "block", [b"", b"# GRUB Environment Blocks\n", b"\0" * 1024, b"x=1\n" + b"#" * 1020]
)
def test_what_is_no_block_has_no_variables(block: bytes) -> None:
    assert grubenv.parse(block) == {}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes too many"):
        grubenv.render({"x": "y" * (1024 - 25 - 3 + 2)})


@given(st.dictionaries(NAMES, VALUES, max_size=5))
def test_what_is_written_is_read(values: dict[str, str]) -> None:
    assert grubenv.parse(grubenv.render(values)) == values


@given(st.binary(max_size=1100))
def test_anything_can_be_read(block: bytes) -> None:
    assert isinstance(grubenv.parse(grubenv.SIGNATURE + block), dict)
