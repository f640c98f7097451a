"""Frozen records with keyword-only fields.

What `dataclasses` would give, without its 30 ms at every boot.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from typing import Any, dataclass_transform
else:

    def dataclass_transform(**_: object) -> object:
        """Do at run time what typing's does: nothing."""
        return lambda cls: cls


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Record:
    """A value.

    Annotated names are its fields, class attributes their defaults; compared and shown by its fields.
    """

    _fields: tuple[str, ...] = ()
    _required: frozenset[str] = frozenset()  # those without a default
    _allowed: frozenset[str] = frozenset()

    def __init_subclass__(cls) -> None:
        """Collect the fields of the class, its parents' first."""
        own = cls.__dict__.get("__annotations__", {})
        added = tuple([name for name in own if name not in cls._fields])
        cls._fields += added
        cls._required = cls._required.union(added).difference(cls.__dict__)
        cls._allowed = frozenset(cls._fields)

    def __init__(self, **values: Any) -> None:
        if not self._required <= values.keys() <= self._allowed:  # a boot makes some hundred records
            if lacking := [name for name in self._fields if name in self._required - values.keys()]:
                raise TypeError(f"{type(self).__name__} needs {lacking[0]}=")
            raise TypeError(
                f"{type(self).__name__} has no {', '.join(sorted(values.keys() - self._allowed))}"
            )
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: a record is a value."""
        raise AttributeError(f"{type(self).__name__}.{name} cannot be assigned: records are frozen")

    def __delattr__(self, name: str) -> None:
        """Refuse likewise."""
        raise AttributeError(f"{type(self).__name__}.{name} cannot be deleted: records are frozen")

    def items(self) -> list[tuple[str, Any]]:
        """List the fields as (name, value), in the order of the class."""
        return [(name, getattr(self, name)) for name in self._fields]

    def replace(self, **changes: Any) -> Any:
        """Return a copy with some fields changed."""
        return type(self)(**{**dict(self.items()), **changes})

    def __eq__(self, other: object) -> bool:
        """Compare by class and fields."""
        return type(self) is type(other) and isinstance(other, Record) and self.items() == other.items()

    def __hash__(self) -> int:
        """Hash by the fields, so that records can be members of sets."""
        return hash((type(self), *(value for _, value in self.items())))

    def __repr__(self) -> str:
        """Show the class and its fields."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.items())})"
