"""Records: what dataclasses would give."""

from __future__ import annotations

import pytest

from immucore.values import Record


class Point(Record):
    """A place."""

    x: int
    y: int = 2


class Named(Point):
    """A place with a name."""

    name: str


def test_fields_are_the_annotations_the_parents_first() -> None:
    assert Named(x=1, name="a").items() == [("x", 1), ("y", 2), ("name", "a")]


def test_shown_by_its_fields() -> None:
    assert repr(Named(x=1, name="a")) == "Named(x=1, y=2, name='a')"


def test_compared_by_class_and_fields() -> None:
    assert Point(x=1) == Point(x=1, y=2)
    assert Point(x=1) != Point(x=2)
    assert Point(x=1) != (1, 2)
    assert Point(x=1) != Named(x=1, name="a")
    assert len({Point(x=1), Point(x=1, y=2), Point(x=2)}) == 2


def test_replace_gives_a_copy() -> None:
    one = Point(x=1)
    assert one.replace(y=5) == Point(x=1, y=5)
    assert one == Point(x=1)


def test_fields_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        Point(1, 2)  # type: ignore[misc]


def test_a_missing_field_is_named() -> None:
    with pytest.raises(TypeError, match="Named needs name="):
        Named(x=1)  # type: ignore[call-arg]


@pytest.mark.parametrize("wrong", [{"x": 1, "z": 3}, {"x": 1, "y": 2, "z": 3}])
def test_a_field_too_many_is_named(wrong: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="Point has no z"):
        Point(**wrong)


def test_frozen() -> None:
    one = Point(x=1)
    with pytest.raises(AttributeError, match=r"Point\.x cannot be assigned"):
        one.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match=r"Point\.x cannot be deleted"):
        del one.x
    assert one.x == 1
