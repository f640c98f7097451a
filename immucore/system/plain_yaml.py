"""YAML that anybody may have written: what it says, or one error with the reason why it says nothing."""

from __future__ import annotations

from typing import Any

import yaml

_INTEGER_BITS = 64


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """SafeLoader, with integers that can be printed and be made floats: Python's have no end."""

    def integer(self, node: yaml.ScalarNode) -> int:
        number: int = self.construct_yaml_int(node)
        if number.bit_length() > _INTEGER_BITS:
            raise yaml.constructor.ConstructorError(None, None, "a number is too large", node.start_mark)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)


def load(content: bytes) -> Any:
    """Read a document. Raises ValueError with the reason where it is none, and nothing else."""
    try:
        return yaml.load(content, _Loader)  # noqa: S506 - it is a SafeLoader
    # PyYAML lets out whatever the conversion of a value raises that is not what its tag says: `!!int ""`.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{getattr(error, 'problem', None) or 'it is no YAML'}{where}") from None
