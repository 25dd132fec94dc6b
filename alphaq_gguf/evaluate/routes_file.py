"""Which experts every token was sent to, kept in a file that layers or windows fill in any order.

A NumPy file of one record per window, with a field of int16 [n_ctx, top_k] for each layer that has experts, called by
the layer's number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import AlphaQError


class RoutesFile:
    """The experts that tokens were sent to in `layers`; AlphaQError for a file that does not hold them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._records = np.lib.format.open_memmap(path, "r")
            self.layers = tuple(int(name) for name in self._records.dtype.names or ())
        except (OSError, ValueError) as error:
            raise AlphaQError(f"{path}: cannot be read: {error}", "delete it, and it is made again") from None
        if not self.layers:
            raise AlphaQError(f"{path}: holds no layers", "delete it, and it is made again")

    def read(self, i: int) -> dict[int, np.ndarray]:
        """Of window `i`, by layer, the experts of each token in no order: int16 [n_ctx, top_k]."""
        return {bid: np.array(self._records[str(bid)][i]) for bid in self.layers}


class RoutesWriter:
    """A file for `n_windows` windows of `n_ctx` tokens, each sent to `n_used[bid]` experts in layer bid.

    What is in such a file already stays, so that an interrupted run can go on.
    """

    def __init__(self, path: Path, n_windows: int, n_ctx: int, n_used: Mapping[int, int]) -> None:
        record = np.dtype([(str(bid), np.int16, (n_ctx, k)) for bid, k in sorted(n_used.items())])
        if path.is_file():
            self._records = np.lib.format.open_memmap(path, "r+")
        else:
            self._records = np.lib.format.open_memmap(path, "w+", record, (n_windows,))

    @property
    def layers(self) -> dict[int, np.ndarray]:
        """The whole file by layer, to be filled: int16 [n_windows, n_ctx, top_k]."""
        return {int(name): self._records[name] for name in self._records.dtype.names or ()}

    def put(self, i: int, experts: Mapping[int, np.ndarray]) -> None:
        """Set window `i`: experts [n_ctx, top_k] by layer."""
        for bid, chosen in experts.items():
            self._records[str(bid)][i] = chosen

    def flush(self) -> None:
        """Bring what is set to the disk."""
        self._records.flush()
