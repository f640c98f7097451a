"""The syntax of EnvironmentFile=, against systemd itself.

Systemd has one parser for these files (env-file.c); the generator for environment.d(5) runs it on any file.
"""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from immucore import envfile
from immucore.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Callable

GENERATOR = "/usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator"
NAMES = ("IMMUCORE_A", "IMMUCORE_B", "_C")


@pytest.fixture(scope="session")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Return systemd's parser as a function."""
    home = tmp_path_factory.mktemp("environment.d")
    (home / "environment.d").mkdir()

    def parse(text: str) -> dict[str, str]:
        (home / "environment.d/test.conf").write_text(text, newline="")
        environment = {"XDG_CONFIG_HOME": str(home), "HOME": str(home), "PATH": os.environ["PATH"]}
        said = subprocess.run(
            [GENERATOR], env=environment, capture_output=True, text=True, check=True
        ).stdout
        pairs = (word.partition("=") for word in _words(said))
        return {key: value for key, _, value in pairs if key in NAMES}

    return parse


def _words(text: str) -> list[str]:
    """Undo shell_maybe_quote(): double quotes, in which a newline is written as a backslash and an n."""
    words, word, quoted, characters = [], "", False, iter(text)
    for character in characters:
        if character == '"':
            quoted = not quoted
        elif character == "\\" and quoted:
            following = next(characters)
            word += {"n": "\n", "t": "\t", "r": "\r"}.get(following, following)
        elif character == "\n" and not quoted:
            words.append(word)
            word = ""
        else:
            word += character
    return words


TABLE = [
    ("", {}),
    ("IMMUCORE_A=b", {"IMMUCORE_A": "b"}),
    ("IMMUCORE_A=", {"IMMUCORE_A": ""}),
    ("IMMUCORE_A=b\n_C=d\n", {"IMMUCORE_A": "b", "_C": "d"}),
    ("IMMUCORE_A=b\nIMMUCORE_A=c\n", {"IMMUCORE_A": "c"}),
    ("  IMMUCORE_A = b c \t\n", {"IMMUCORE_A": "b c"}),
    ("# a\n; b\n\n  # c\nIMMUCORE_A=b # c\n", {"IMMUCORE_A": "b # c"}),
    ("IMMUCORE_A=b;c", {"IMMUCORE_A": "b;c"}),
    ("IMMUCORE_A=b=c", {"IMMUCORE_A": "b=c"}),
    ("IMMUCORE_A='b c'", {"IMMUCORE_A": "b c"}),
    ("IMMUCORE_A='b\nc'", {"IMMUCORE_A": "b\nc"}),
    ("IMMUCORE_A='b\\n'", {"IMMUCORE_A": "b\\n"}),
    ('IMMUCORE_A=" b "  \n', {"IMMUCORE_A": " b "}),
    ('IMMUCORE_A="b\\"c\\\\d\\$e\\`f"', {"IMMUCORE_A": 'b"c\\d$e`f'}),
    ('IMMUCORE_A="b\\nc"', {"IMMUCORE_A": "b\\nc"}),
    ('IMMUCORE_A="b\\\nc"', {"IMMUCORE_A": "bc"}),
    ('IMMUCORE_A="b\nc"', {"IMMUCORE_A": "b\nc"}),
    ("IMMUCORE_A='b'\"c\" d", {"IMMUCORE_A": "bcd"}),
    ("IMMUCORE_A=b'c'", {"IMMUCORE_A": "b'c'"}),
    ("IMMUCORE_A=b\\ c", {"IMMUCORE_A": "b c"}),
    ("IMMUCORE_A=b\\ \n", {"IMMUCORE_A": "b "}),
    ('IMMUCORE_A=\\"b', {"IMMUCORE_A": '"b'}),
    ("IMMUCORE_A=b\\\nc", {"IMMUCORE_A": "bc"}),
    ("IMMUCORE_A=b \\\n  c", {"IMMUCORE_A": "b   c"}),
    ("IMMUCORE_A=b \\\n\n", {"IMMUCORE_A": "b "}),
    ("IMMUCORE_A=b \\\n  \n", {"IMMUCORE_A": "b "}),
    ("IMMUCORE_A=b\\", {"IMMUCORE_A": "b"}),
    ("IMMUCORE_A=b\r\n_C=d\r\n", {"IMMUCORE_A": "b", "_C": "d"}),
    ("IMMUCORE_A=ä b", {"IMMUCORE_A": "ä b"}),
]


@pytest.mark.parametrize(("text", "expected"), TABLE)
def test_as_systemd_reads_it(
    systemd: Callable[[str], dict[str, str]], text: str, expected: dict[str, str]
) -> None:
    assert envfile.parse(text, "test") == expected
    if "$" not in text:  # environment.d, other than EnvironmentFile=, expands variables
        assert systemd(text) == {name: value for name, value in expected.items() if value}


PIECES = st.sampled_from(
    ["IMMUCORE_A=", "_C=", "\n", "\n", " ", "\t", "'", '"', "\\", "\\\n", "b", "é", "#", ";", "="]
)


@settings(max_examples=80)  # each runs a process
@given(text=st.lists(PIECES, max_size=12).map(lambda pieces: "IMMUCORE_B=" + "".join(pieces)))
def test_what_it_reads_is_what_systemd_reads(systemd: Callable[[str], dict[str, str]], text: str) -> None:
    # Until systemd 254 a comment too went on after a backslash at the end of its line.
    assume(not re.search(r"^\s*[#;].*\\$", text, re.MULTILINE))
    try:
        mine = envfile.parse(text, "test")
    except LayoutError:
        return  # stricter than systemd, which skips such a line with a warning
    theirs = systemd(text)
    # environment.d, other than EnvironmentFile=, drops what is empty, so that an earlier value shows.
    for name in [name for name in mine if name.startswith("IMMUCORE_")]:
        assert mine[name] == theirs.get(name, "") or (not mine[name] and text.count(f"{name}=") > 1)
    assert {*theirs} <= {*mine}


def test_export_is_accepted() -> None:
    """Kairos' own parser takes it, so that such files are in the field."""
    assert envfile.parse("export A=b\n", "test") == {"A": "b"}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            "A=b\nno assignment\n",
            "cannot read line 2 of /x: 'no assignment' is not an assignment",
            "write NAME=value, or put a # before it, in /x",
        ),
        (
            "\n\n1A=b",
            "cannot read line 3 of /x: '1A=b' is not an assignment",
            "write NAME=value, or put a # before it, in /x",
        ),
        ("=b", "cannot read line 1 of /x: '=b' is not an assignment", ""),
        ("A-B=c", "cannot read line 1 of /x: 'A-B=c' is not an assignment", ""),
        ("Ä=c", "cannot read line 1 of /x: 'Ä=c' is not an assignment", ""),
        ("x" * 70, f"cannot read line 1 of /x: '{'x' * 57}...' is not an assignment", ""),
        ("A='b\nc", "cannot read line 1 of /x: the quote ' is never closed", "close it in /x"),
        ("A='b\nc'\n\nB=\"d\n", 'cannot read line 4 of /x: the quote " is never closed', "close it in /x"),
        ('A="b\\', 'cannot read line 1 of /x: the quote " is never closed', "close it in /x"),
        ("A=b\nC=\0", "cannot read line 2 of /x: it has a zero byte", "damaged: write /x anew"),
    ],
)
def test_what_cannot_be_read_is_named_by_line(text: str, message: str, hint: str) -> None:
    with pytest.raises(LayoutError) as caught:
        envfile.parse(text, "/x")
    assert caught.value.message == message
    assert hint in caught.value.hint
    assert caught.value.exit_status == 2


@given(text=st.text(max_size=60) | st.text("AB=\n\"'\\ #;\r", max_size=40))
def test_only_ever_a_layout_error(text: str) -> None:
    try:
        values = envfile.parse(text, "test")
    except LayoutError:
        return
    assert all(name.isidentifier() and isinstance(value, str) for name, value in values.items())


@given(
    values=st.dictionaries(
        st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True),
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20),
        max_size=4,
    )
)
def test_what_a_shell_would_quote_comes_back(values: dict[str, str]) -> None:
    text = "".join(f"{name}='{value}'\n" for name, value in values.items() if "'" not in value)
    assert envfile.parse(text, "test") == {n: v for n, v in values.items() if "'" not in v}
