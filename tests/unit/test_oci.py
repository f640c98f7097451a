"""What a registry says of the size of an image: it can be anything."""

from __future__ import annotations

import pytest

from immucore.system import oci


@pytest.mark.parametrize(
    ("manifest", "size_bytes"),
    [
        ('{"layers": [{"size": 5}, {"size": 7}]}', 12),
        ('warning: of skopeo\n{"layers": [{"size": 5}]}', 5),
        ('{"layers": [{"size": 5}, {"size": -1000}]}', 5),
        ('{"layers": [{"size": 1e999}]}', 0),
        ('{"layers": [{"size": NaN}]}', 0),
        ('{"layers": [{"size": %s}]}' % ("9" * 5000), 0),
        ('{"layers": ' + "[" * 100_000, 0),
        ('{"layers": [{"size": []}]}', 0),
        ('{"layers": [{}]}', 0),
        ('{"layers": 7}', 0),
        ('{"manifests": []}', 0),
        ("", 0),
    ],
)
def test_the_size_of_layers(manifest: str, size_bytes: int) -> None:
    assert oci.layer_bytes(manifest) == size_bytes
