"""The fuzz targets over their seed corpus and over random bytes, so that they cannot rot."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fuzz_targets import TARGETS

from immucore import cmdline, envfile, fstab, observe
from immucore.layouts.cos.names import directory_names

if TYPE_CHECKING:
    from collections.abc import Callable

CORPUS = Path(__file__).with_name("corpus")
SEEDS = sorted(CORPUS.glob("*/*"))


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"{seed.parent.name}-{seed.name}")
def test_the_seed_corpus(seed: Path) -> None:
    TARGETS[seed.parent.name](seed.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_bytes_made_of_the_seeds_and_at_random(name: str) -> None:
    """Cut, joined, and with bytes changed, as a fuzzer begins; the same ones at every run."""
    chance = random.Random(name)  # noqa: S311
    seeds = [seed.read_bytes() for seed in SEEDS if seed.parent.name == name]
    for _ in range(300):
        one, other = chance.choice(seeds), chance.choice(seeds)
        data = bytearray(one[: chance.randrange(len(one) + 1)] + other[chance.randrange(len(other) + 1) :])
        for _ in range(chance.randrange(6)):
            position = chance.randrange(len(data) + 1)
            data[position : position + chance.randrange(2)] = chance.choice(STRANGE)
        TARGETS[name](bytes(data))


STRANGE = (
    *(b"\0", b"\n", b"\r", b"\t", b" ", b"\\", b"\\x", b"\\040", b'"', b"'", b"=", b":", b"/", b"/..", b","),
    *(b"\x0b", b"\x1b[2J", b"\x85", b"\xc2\x85", b"\xe2\x80\xa8", b"\xff", b"\xc3\xa4", b"A" * 300, b"#"),
)

MIB = 1 << 20
LONG = {
    "a value without quotes": lambda n: envfile.parse("A=" + "a" * n, "x"),
    "quotes side by side": lambda n: envfile.parse("A=" + "'a'" * (n // 3), "x"),
    "a backslash before each": lambda n: envfile.parse("A=" + "\\a" * (n // 2), "x"),
    "one word": lambda n: cmdline.parse(b"rd.cos.x=" + b"a" * n),
    "nothing but quotes": lambda n: cmdline.parse(b'"' * n),
    "an encoded label": lambda n: observe.decode("\\x20" * (n // 4)),
    "an escaped mount point": lambda n: fstab.unescape("\\040" * (n // 4)),
    "short lines of an fstab": lambda n: fstab.render([], "a\n" * (n // 2)),
    "paths": lambda n: directory_names(f"/{i}" for i in range(n // 16)),
}


def cost(read: Callable[[int], object], size: int) -> float:
    started = time.process_time()
    read(size)
    return time.process_time() - started


@pytest.mark.parametrize("name", LONG)
def test_a_text_eight_times_as_long_takes_eight_times_as_long(name: str) -> None:
    """A reader that adds to a text in a loop would take 64 times: for a mebibyte, minutes."""
    small = min(cost(LONG[name], MIB // 8) for _ in range(3))
    assert cost(LONG[name], MIB) < 24 * small
