"""What was typed and what upgrade.yaml says, put together."""

from __future__ import annotations

import argparse

import pytest

from immucore.errors import CmdlineError
from immucore.system.image_commands import check, wished


def test_an_empty_source_is_none() -> None:
    typed = argparse.Namespace(source="", recovery=False, force=False)
    with pytest.raises(CmdlineError, match="cannot upgrade: there is no source"):
        wished(typed, {"source": "dir:/configured"})


@pytest.mark.parametrize("key", ["fileystem", "tls_verify", 7])
def test_a_setting_that_nobody_knows(key: str) -> None:
    with pytest.raises(CmdlineError, match=f"'{key}' is not known"):
        check({"source": "dir:/x", key: "y"})
    check({"source": "dir:/x", "reboot": "off", "window": "x", "etcd": {}})
