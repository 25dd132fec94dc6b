"""Text that a model writes itself, so that its routing can be seen without any outside data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np

from ..alone import alone
from ..budget import make_units, matrices_bytes
from ..checkpoint import Source
from ..checkpoint.gguf import GGUFSource
from ..conversion import convert
from ..encode import library_version
from ..evaluate.llama import LlamaModel
from ..qtypes import bpw
from ..recipe import Recipe, RecipeUnit
from ..reporter import Reporter
from ..tensor_types import choose_types

OWN = "self"
"""What a dataset is called that the model wrote."""
OWN_TOKENS = 8192
_SIDE_BY_SIDE = 8


@contextmanager
def runnable(source: Source, directory: Path, threads: int, reporter: Reporter) -> Iterator[Path]:
    """A GGUF that llama.cpp runs `source` from: itself if it is one, else a temporary one with 8-bit experts."""
    if isinstance(source, GGUFSource):
        yield source.files[0]
        return
    tensors, _ = choose_types(source, ())
    units = []
    for unit in make_units(source.stacks, {}, None):
        qtype = max(unit.options, key=bpw)
        n_bytes = matrices_bytes(unit.matrices, qtype)
        units.append(RecipeUnit(unit.name, unit.bid, unit.proj, unit.n_weights, qtype, n_bytes))
    recipe = Recipe("", source.fingerprint, source.architecture, {}, {}, tuple(units), tensors)
    home = directory / f"own-text-{source.fingerprint[:24]}"
    path = home / "temporary.gguf"
    with alone(home, reporter):
        try:
            reporter.note(f"Writing a temporary GGUF with 8-bit experts, for the model to run in llama.cpp: {path}")
            convert(source, recipe, path, force=True, threads=threads, reporter=reporter)
            yield path
        finally:
            path.unlink(missing_ok=True)


def own_windows(
    source: Source,
    running: AbstractContextManager[Path],
    n_windows: int,
    n_ctx: int,
    *,
    seed: int,
    cache_dir: Path,
    threads: int,
    reporter: Reporter,
) -> np.ndarray:
    """Windows of tokens that `source` draws from its own distribution, int64 [n_windows, n_ctx].

    `running` gives a GGUF of it, where one is needed at all. Each window starts at a token that begins a document: BOS
    where the model wants one, else the end of the one before.
    Nothing is done to the distribution (temperature 1, no truncation), the seed differs by window. Windows are
    kept in `cache_dir`, a JSON list a line, and an interrupted run goes on from there.
    """
    key = hashlib.sha256(f"{source.fingerprint} {n_ctx} {seed} {library_version()}".encode()).hexdigest()[:24]
    stored = cache_dir / f"own-text-{key}.jsonl"
    windows = _read_windows(stored, n_ctx)[:n_windows]
    if len(windows) < n_windows:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with running as gguf:
            # Rewritten, so that a line cut short by a kill disappears.
            stored.write_text("".join(json.dumps(w) + "\n" for w in windows), encoding="utf-8")
            model = LlamaModel(gguf, n_ctx=n_ctx, threads=threads, all_logits=False, n_sequences=_SIDE_BY_SIDE)
            todo = (n_windows - len(windows)) * (n_ctx - 1)
            task = reporter.task("Writing text", todo, "tokens")
            with model, stored.open("a", encoding="utf-8") as file, task as advance:
                while len(windows) < n_windows:
                    seeds = range(seed + len(windows), seed + min(len(windows) + _SIDE_BY_SIDE, n_windows))
                    for window in model.draw(n_ctx, seeds, advance).tolist():
                        windows.append(window)
                        file.write(json.dumps(window) + "\n")
                    file.flush()
    return np.array(windows, dtype=np.int64)


def _read_windows(stored: Path, n_ctx: int) -> list[list[int]]:
    """The whole windows of an earlier run."""
    windows = []
    for line in stored.read_text(encoding="utf-8").splitlines() if stored.is_file() else []:
        try:
            window = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(window, list) or len(window) != n_ctx:
            break
        windows.append(window)
    return windows
