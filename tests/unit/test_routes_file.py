"""The file of chosen experts holds what was put in, by layer or by window, over interruptions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.evaluate.routes_file import RoutesFile, RoutesWriter

# Layers with experts, and how many each token is sent to.
N_USED = {11: 3, 2: 1, 5: 2}
EXPERTS = {bid: np.random.default_rng(bid).integers(0, 500, (4, 16, k)) for bid, k in N_USED.items()}


def assert_holds_everything(path: Path) -> None:
    file = RoutesFile(path)
    assert file.layers == (2, 5, 11)
    for i in range(4):
        found = file.read(i)
        assert tuple(found) == (2, 5, 11)
        for bid, chosen in found.items():
            np.testing.assert_array_equal(chosen, EXPERTS[bid][i])


def test_filled_by_layer(tmp_path: Path) -> None:
    path = tmp_path / "routes.npy"
    for bid in (5, 2, 11):
        # Each one a run of its own.
        writer = RoutesWriter(path, 4, 16, N_USED)
        writer.layers[bid][:] = EXPERTS[bid]
        writer.flush()
    assert_holds_everything(path)


def test_filled_by_window(tmp_path: Path) -> None:
    path = tmp_path / "routes.npy"
    for windows in ((0, 1), (1, 2, 3)):
        writer = RoutesWriter(path, 4, 16, N_USED)
        for i in windows:
            writer.put(i, {bid: chosen[i] for bid, chosen in EXPERTS.items()})
        writer.flush()
    assert_holds_everything(path)


@pytest.mark.parametrize("content", [None, b"", b"no such thing", "array"])
def test_what_is_no_such_file_is_one_line(content: bytes | str | None, tmp_path: Path) -> None:
    path = tmp_path / "routes.npy"
    if content == "array":
        np.save(path, np.zeros((3, 4)))
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(AlphaQError, match=r"routes\.npy: (cannot be read|holds no layers)") as caught:
        RoutesFile(path)
    assert "\n" not in str(caught.value)
