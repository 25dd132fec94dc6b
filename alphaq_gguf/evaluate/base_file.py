"""llama-perplexity's --kl-divergence-base files: a model's log-probabilities in 16 bits, and the tokens they are of.

"_logits_", then int32 n_ctx, n_vocab and number of windows, then all tokens as int32, then by window a compressed row
for each scored position (metrics.compress); little-endian. Where the model wants BOS, llama-perplexity puts it in the
place of each window's first token when it runs; in the file stands the text's own token.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import numpy as np

from ..errors import AlphaQError, OutputError
from ..writer import check_space, partial_path
from .metrics import row_words, scored

_MAGIC = b"_logits_"
_HEADER = np.dtype([("magic", "S8"), ("n_ctx", "<i4"), ("n_vocab", "<i4"), ("n_windows", "<i4")])


class BaseFile:
    """A base file, read one window at a time; `windows` int64 [n_windows, n_ctx] are its tokens as they stand there.

    AlphaQError for what is none, damaged, or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            header = np.fromfile(path, _HEADER, 1)
            if not header.size or header["magic"][0] != _MAGIC:
                raise AlphaQError(f"{path}: no base file: it does not begin with {_MAGIC.decode()}", _HINT)
            self.n_ctx, self.n_vocab, self.n_windows = header.tolist()[0][1:]
            self._shape = _window_shape(self.n_ctx, self.n_vocab)
            if self.n_windows < 1 or self.n_vocab < 1 or self._shape[0] < 1:
                found = f"{self.n_windows} windows of {self.n_ctx} tokens and a vocabulary of {self.n_vocab}"
                raise AlphaQError(f"{path}: damaged base file: its header says {found}", _HINT)
            n_tokens = self.n_windows * self.n_ctx
            self._rows_at = _HEADER.itemsize + 4 * n_tokens
            expected = self._rows_at + self.n_windows * _n_bytes(self._shape)
            if size != expected:
                problem = "base file cut short" if size < expected else "damaged base file"
                raise AlphaQError(f"{path}: {problem}: expected {expected:,} bytes, found {size:,}", _HINT)
            tokens = np.fromfile(path, "<i4", n_tokens, offset=_HEADER.itemsize)
        except OSError as error:
            raise AlphaQError(f"{path}: cannot read it: {error.strerror}") from None
        self.windows = tokens.reshape(self.n_windows, self.n_ctx).astype(np.int64)
        if self.windows.min() < 0 or self.windows.max() >= self.n_vocab:
            found = f"tokens from {self.windows.min()} to {self.windows.max()}, expected 0 to {self.n_vocab - 1}"
            raise AlphaQError(f"{path}: damaged base file: it holds {found}", _HINT)

    def rows(self, i: int) -> np.ndarray:
        """Compressed rows of window `i`, uint16 [scored positions, row_words]."""
        start = self._rows_at + i * _n_bytes(self._shape)
        try:
            rows = np.fromfile(self.path, "<u2", self._shape[0] * self._shape[1], offset=start).reshape(self._shape)
        except (OSError, ValueError) as error:
            raise AlphaQError(f"{self.path}: cannot read window {i + 1} of {self.n_windows}: {error}") from None
        if not np.isfinite(rows[:, :4].view("<f4")).all():
            raise AlphaQError(f"{self.path}: damaged base file: no probabilities in window {i + 1}", _HINT)
        return rows


class BaseWriter:
    """Writes a base file of `windows` int64 [n, n_ctx], one window's rows at a time.

    It grows as `path` + ".partial" and takes its name when it is left with all windows in it; left earlier it stays,
    and the next one of the same windows and vocabulary goes on: `n_done` windows are there already. OutputError when
    it cannot be written.
    """

    def __init__(self, path: Path, windows: np.ndarray, n_vocab: int) -> None:
        self.path = path
        n_windows, n_ctx = windows.shape
        header = np.array([(_MAGIC, n_ctx, n_vocab, n_windows)], _HEADER).tobytes() + windows.astype("<i4").tobytes()
        self._shape = _window_shape(n_ctx, n_vocab)
        self._n_windows = n_windows
        per_window = _n_bytes(self._shape)
        try:
            check_space(path, len(header) + n_windows * per_window)
            partial = partial_path(path)
            self._file = partial.open("r+b" if partial.exists() else "w+b")
            self.n_done = 0
            if self._file.read(len(header)) == header:
                self.n_done = min((partial.stat().st_size - len(header)) // per_window, n_windows)
                self._file.seek(len(header) + self.n_done * per_window)
            else:
                self._file.seek(0)
                self._file.write(header)
            # What an interrupted run left of another file, or of a window that it did not finish.
            self._file.truncate()
        except OSError as error:
            raise self._failure(error) from None

    def __enter__(self) -> Self:
        return self

    def append(self, rows: np.ndarray) -> None:
        """Add the next window's rows, uint16 [scored positions, row_words]."""
        if rows.shape != self._shape or self.n_done == self._n_windows:
            raise ValueError(f"rows of shape {rows.shape} for window {self.n_done}, expected {self._shape}")
        try:
            self._file.write(np.ascontiguousarray(rows, "<u2").data)
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from None
        self.n_done += 1

    def __exit__(self, *_: object) -> None:
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            if self.n_done == self._n_windows:
                partial_path(self.path).replace(self.path)
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}: cannot write it: {error.strerror}", "free some space or name another directory"
        )


_HINT = "make it again: llama-perplexity -m MODEL -f TEXT --kl-divergence-base FILE"


def _window_shape(n_ctx: int, n_vocab: int) -> tuple[int, int]:
    positions = scored(n_ctx)
    return positions.stop - positions.start, row_words(n_vocab)


def _n_bytes(shape: tuple[int, int]) -> int:
    return 2 * shape[0] * shape[1]
