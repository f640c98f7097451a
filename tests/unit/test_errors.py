"""The classes of errors: who can put it right decides the exit status (contract §9)."""

from __future__ import annotations

import pytest

from immucore import errors


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("ImmucoreError", 70),
        ("CmdlineError", 2),
        ("LayoutError", 2),
        ("DeviceError", 3),
        ("MountError", 4),
        ("AmbiguousError", 3),
        ("KernelMismatchError", 4),
        ("MakeshiftError", 4),
        ("Interrupted", 4),
    ],
)
def test_the_class_decides_the_exit_status(name: str, status: int) -> None:
    error = getattr(errors, name)("cannot do it", hint="do that")
    assert isinstance(error, errors.ImmucoreError)
    assert (error.exit_status, error.message, error.hint) == (status, "cannot do it", "do that")
    assert str(error) == "cannot do it"


def test_every_class_is_in_the_table() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    assert len(classes) == 9


def test_the_hint_may_be_left_out() -> None:
    assert errors.MountError("x").hint == ""
