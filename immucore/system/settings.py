"""What this machine is told: /etc/immucore/upgrade.yaml about upgrades and reboots, and other such files."""

from __future__ import annotations

from typing import Any

from immucore.errors import ImmucoreError

PATH = "/etc/immucore/upgrade.yaml"


class SettingsError(ImmucoreError):
    """Whoever wrote the settings, or typed the option that stands for one, can put it right."""

    exit_status = 2


def read(path: str = "") -> dict[str, Any]:
    """Read the settings of a file, PATH by default; one that is not there has none. Raises SettingsError."""
    from immucore.system import plain_yaml

    path = path or PATH
    try:
        with open(path, "rb") as file:
            settings = plain_yaml.load(file.read())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError(f"cannot read '{path}': {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"cannot read '{path}': {error}", hint="correct it") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise SettingsError(f"cannot read '{path}': it is no mapping", hint="write lines like `name: value`")
    return settings
