"""What this machine is told about upgrades and reboots: /etc/immucore/upgrade.yaml."""

from __future__ import annotations

from typing import Any

from immucore.errors import ImmucoreError

PATH = "/etc/immucore/upgrade.yaml"


class SettingsError(ImmucoreError):
    """Whoever wrote the settings, or typed the option that stands for one, can put it right."""

    exit_status = 2


def read() -> dict[str, Any]:
    """Read the settings; a file that is not there has none. Raises SettingsError."""
    import yaml

    try:
        with open(PATH, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError(f"cannot read '{PATH}': {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no such day
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = f"{getattr(error, 'problem', None) or 'it is no YAML'}{where}"
        raise SettingsError(f"cannot read '{PATH}': {reason}", hint="correct it") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise SettingsError(f"cannot read '{PATH}': it is no mapping", hint="write lines like `reboot: now`")
    return settings
