"""Texts as windows of tokens, cut as llama-perplexity cuts them: files, and text that the model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from .calibration.own_text import OWN, OWN_TOKENS, own_windows, runnable
from .checkpoint import Source
from .errors import AlphaQError
from .reporter import Reporter


class Cutter(Protocol):
    """Whole windows of `n_ctx` tokens of a text, each begun by BOS where the model wants one."""

    def windows(self, text: str, n_ctx: int) -> list[list[int]]: ...


def cut_texts(
    source: Source,
    cutter: Cutter,
    texts: Sequence[Path | str],
    n_ctx: int,
    max_windows: int | None,
    *,
    seed: int,
    cache_dir: Path,
    threads: int,
    reporter: Reporter,
) -> list[np.ndarray]:
    """Windows of each text, a file or OWN for one that `source` writes with `seed`: int64 [n, n_ctx].

    `max_windows` of each at most, and of its own text that many (None: OWN_TOKENS in all), which stay in `cache_dir`.
    AlphaQError as `read_windows`, before anything is written.
    """
    # A file that is no text shows at once, the model's own takes minutes.
    cut = {text: read_windows(cutter, Path(text), n_ctx, max_windows) for text in texts if text != OWN}
    if OWN in texts:
        cut[OWN] = own_windows(
            source,
            runnable(source, cache_dir, threads, reporter),
            max_windows or max(1, OWN_TOKENS // n_ctx),
            n_ctx,
            seed=seed,
            cache_dir=cache_dir,
            threads=threads,
            reporter=reporter,
        )
    return [cut[text] for text in texts]


def read_windows(cutter: Cutter, path: Path, n_ctx: int, max_windows: int | None = None) -> np.ndarray:
    """A text file as windows of tokens, `max_windows` of them at most: int64 [n, n_ctx].

    AlphaQError when it cannot be read, is no UTF-8 text, empty, or too short for one window.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise AlphaQError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise AlphaQError(f"{path}: no UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise AlphaQError(f"{path}: an empty text", "give text that is like what the model will be used for")
    # llama.cpp's programs leave out the line break at a file's end.
    windows = cutter.windows(text.removesuffix("\n"), n_ctx)[:max_windows]
    if not windows:
        raise AlphaQError(
            f"{path}: too short: less than one window of {n_ctx} tokens", "give more text, or a smaller --ctx"
        )
    return np.array(windows, dtype=np.int64)
