"""The layouts. This alone knows their names; each is a module with the functions that boot.py calls."""

from __future__ import annotations

from immucore.layouts import cos

TYPE_CHECKING = False  # importing typing would cost a boot 9 ms
if TYPE_CHECKING:
    from types import ModuleType

    from immucore.cmdline import Cmdline


def select(cmdline: Cmdline) -> ModuleType:
    """Return the layout that the command line asks for; the cOS layout is the only one so far."""
    return cos
