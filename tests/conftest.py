"""What all tests share: how hypothesis runs, and the option with which `make golden` rewrites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import settings

if TYPE_CHECKING:
    import pytest

# The same examples in every run, so that nothing waits for what random ones find in something else: those
# are for `make fuzz`.
settings.register_profile("immucore", max_examples=150, deadline=None, database=None, derandomize=True)
settings.register_profile("random", max_examples=150, deadline=None, database=None)
settings.load_profile("immucore")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="rewrite tests/golden; review the diff")
