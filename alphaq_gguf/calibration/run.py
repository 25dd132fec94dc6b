"""Calibration from start to end: texts to windows of tokens, through the model, to what strategies read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Source
from ..checkpoint.huggingface import HuggingFaceSource
from ..encode import library_version
from ..errors import AlphaQError
from ..qtypes import QType, candidates
from ..reporter import Reporter, Silent
from ..text_windows import cut_texts
from ..writer import check_output, replacing
from .data import Calibration, LayerUsage
from .experts import block_errors, unmodelled
from .imatrix import is_draft
from .own_text import OWN, OWN_TOKENS, own_windows, runnable
from .statistics import LayerSums, TokenSample
from .store import load_calibration, save_calibration

SCHEMA = 1


@dataclass(frozen=True)
class CalibrationSettings:
    """How a model is calibrated.

    `n_ctx` tokens make a window; of each text `max_tokens` at most are used, None for all, and of its own text that
    many are written (None: 8192). Block errors are measured on `sample` tokens, drawn with `seed` (0: not at
    all), for `types` (None: all that fit). `batch` windows go through a layer at once.
    """

    n_ctx: int = 512
    max_tokens: int | None = None
    sample: int = 4096
    types: tuple[QType, ...] | None = None
    batch: int = 8
    seed: int = 0


def calibrate(
    source: Source,
    texts: Sequence[Path | str],
    settings: CalibrationSettings,
    out: Path,
    *,
    cache_dir: Path,
    force: bool = False,
    device: str = "cpu",
    threads: int = 1,
    gpu_layers: int = 0,
    reporter: Reporter | None = None,
) -> Calibration:
    """Run `source` over `texts`, files or OWN for text it writes itself, and write what its experts did to `out`.

    A Hugging Face source runs in PyTorch on `device`, one layer in memory at a time; a GGUF runs in llama.cpp with
    `gpu_layers` on a GPU. An interrupted run continues when called again. AlphaQError for texts that are too
    short or no text, and for what the model or the file cannot do.
    """
    reporter = reporter or Silent()
    check_output(out, force=force, inputs=[*source.files, *(text for text in texts if isinstance(text, Path))])
    names = [text if isinstance(text, str) else text.name for text in texts]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise AlphaQError(f"two texts are called {twice.pop()!r}", "each is a dataset of its own: rename one")
    engine: _PyTorch | _LlamaCpp = _LlamaCpp(source, threads, gpu_layers)
    if isinstance(source, HuggingFaceSource):
        engine = _PyTorch(source, device, settings.batch)
    max_windows = None if settings.max_tokens is None else max(1, settings.max_tokens // settings.n_ctx)
    cut = cut_texts(
        source,
        engine,
        texts,
        settings.n_ctx,
        max_windows,
        seed=settings.seed,
        cache_dir=cache_dir,
        threads=threads,
        reporter=reporter,
    )
    windows, dataset_of = np.concatenate(cut), np.repeat(np.arange(len(cut)), [len(w) for w in cut])
    asked = {**asdict(settings), "types": None if settings.types is None else [q.name for q in settings.types]}
    key = _key(source, asked, windows.tobytes().hex(), dataset_of.tolist(), engine.name, library_version())
    work_dir = cache_dir / f"calibration-{key}"
    work_dir.mkdir(parents=True, exist_ok=True)
    sums, errors = _measure(engine, source, windows, dataset_of, settings, work_dir, device, threads, reporter)
    calibration = Calibration(
        out.name,
        tuple(names),
        tuple(int(n) for n in np.bincount(dataset_of, minlength=len(texts)) * settings.n_ctx),
        {bid: sums[bid].usage for bid in sorted(sums)},
        errors,
        {name: found for bid in sorted(sums) for name, found in sums[bid].moments.items()},
    )
    note_unrouted(calibration, reporter)
    with replacing(out) as temporary:
        save_calibration(
            temporary,
            calibration,
            source_fingerprint=source.fingerprint,
            settings={**asked, "engine": engine.name},
            chunk_size=settings.n_ctx,
        )
    shutil.rmtree(work_dir)
    return calibration


def own_usage(
    source: Source, *, cache_dir: Path, threads: int = 1, seed: int = 0, reporter: Reporter | None = None
) -> Calibration:
    """How often tokens that the model wrote itself are routed to each expert; kept in `cache_dir`."""
    from .llama_engine import collect

    reporter = reporter or Silent()
    settings = CalibrationSettings(seed=seed)
    key = _key(source, asdict(settings), OWN_TOKENS, library_version())
    stored = cache_dir / f"own-usage-{key}.gguf"
    if stored.is_file():
        return load_calibration(stored, source)
    work_dir = cache_dir / f"own-usage-{key}"
    work_dir.mkdir(parents=True, exist_ok=True)
    with runnable(source, cache_dir, threads, reporter) as gguf:
        windows = own_windows(
            source,
            nullcontext(gguf),
            OWN_TOKENS // settings.n_ctx,
            settings.n_ctx,
            seed=seed,
            cache_dir=cache_dir,
            threads=threads,
            reporter=reporter,
        )
        none = np.empty(0, dtype=np.int64)
        dataset_of = np.zeros(len(windows), dtype=np.int64)
        found = collect(
            gguf, source, windows, dataset_of, 1, none, work_dir, threads=threads, counts_only=True, reporter=reporter
        )
    layers = {bid: LayerUsage(layer.usage.tokens) for bid, (layer, _) in sorted(found.items())}
    calibration = Calibration(OWN, (OWN,), (windows.size,), layers)
    with replacing(stored) as temporary:
        save_calibration(
            temporary,
            calibration,
            source_fingerprint=source.fingerprint,
            settings={"seed": seed},
            chunk_size=settings.n_ctx,
        )
    shutil.rmtree(work_dir)
    return calibration


def note_unrouted(calibration: Calibration, reporter: Reporter) -> None:
    """Say how many experts no token reached."""
    unused = sum(int((usage.tokens.sum(axis=0) == 0).sum()) for usage in calibration.layers.values())
    if unused:
        total = sum(usage.tokens.shape[1] for usage in calibration.layers.values())
        reporter.warn(f"{unused} of {total} experts were reached by no token: nothing is known of their inputs")


Collected = Iterator[tuple[int, LayerSums, TokenSample | None]]
"""(layer, its sums, the sampled tokens), layer by layer."""


@dataclass(frozen=True)
class _Tokens:
    """What is run: `windows` int [n, n_ctx] of `n_datasets` texts, `sample` the positions to look at closely."""

    windows: np.ndarray
    dataset_of: np.ndarray
    n_datasets: int
    sample: np.ndarray


class _PyTorch:
    """Runs a Hugging Face source layer by layer, `batch` windows at once."""

    name = "pytorch"

    def __init__(self, source: HuggingFaceSource, device: str, batch: int) -> None:
        from ..evaluate.layerwise import LayerwiseModel

        self.source = source
        self.batch = batch
        self.model = LayerwiseModel(source, device)

    def windows(self, text: str, n_ctx: int) -> list[list[int]]:
        return self.model.windows(text, n_ctx)

    def collect(self, tokens: _Tokens, work_dir: Path, skip: Container[int], reporter: Reporter) -> Collected:
        from .torch_engine import collect

        return collect(
            self.source,
            self.model,
            tokens.windows,
            tokens.dataset_of,
            tokens.n_datasets,
            tokens.sample,
            work_dir,
            skip=skip,
            batch=self.batch,
            reporter=reporter,
        )


class _LlamaCpp:
    """Runs a GGUF in llama.cpp."""

    name = "llama.cpp"

    def __init__(self, source: Source, threads: int, gpu_layers: int) -> None:
        self.source = source
        self.threads = threads
        self.gpu_layers = gpu_layers

    def windows(self, text: str, n_ctx: int) -> list[list[int]]:
        from ..evaluate.llama import LlamaVocabulary

        with LlamaVocabulary(self.source.files[0]) as vocabulary:
            return vocabulary.windows(text, n_ctx)

    def collect(self, tokens: _Tokens, work_dir: Path, skip: Container[int], reporter: Reporter) -> Collected:
        from .llama_engine import collect

        if all(bid in skip for bid in _layers(self.source)):
            return
        found = collect(
            self.source.files[0],
            self.source,
            tokens.windows,
            tokens.dataset_of,
            tokens.n_datasets,
            tokens.sample,
            work_dir,
            threads=self.threads,
            gpu_layers=self.gpu_layers,
            reporter=reporter,
        )
        for bid, (layer, sample) in found.items():
            if bid not in skip:
                yield bid, layer, sample


def _measure(
    engine: _PyTorch | _LlamaCpp,
    source: Source,
    windows: np.ndarray,
    dataset_of: np.ndarray,
    settings: CalibrationSettings,
    work_dir: Path,
    device: str,
    threads: int,
    reporter: Reporter,
) -> tuple[dict[int, LayerSums], dict[tuple[int, int, str, QType], float]]:
    """Sums by layer and block errors; each finished layer is kept in `work_dir`."""
    wanted = {} if settings.sample == 0 else {s.name: candidates(s.n_cols, settings.types) for s in source.stacks}
    if wanted and (reason := unmodelled(source)):
        reporter.warn(f"no block errors, which pmq needs: experts of {source.architecture} are not modelled: {reason}")
        wanted = {}
    sample = _draw(windows.size, settings.sample if wanted else 0, settings.seed)
    errors: dict[tuple[int, int, str, QType], float] = {}
    sums: dict[int, LayerSums] = {}
    kept = {bid: found for bid in _layers(source) if (found := _load(work_dir, bid)) is not None}
    for bid, (layer, found) in kept.items():
        sums[bid] = layer
        errors |= found
    run = _Tokens(windows, dataset_of, int(dataset_of.max()) + 1, sample)
    for bid, layer, tokens in engine.collect(run, work_dir, kept, reporter):
        found = {}
        if wanted and tokens is not None:
            found = _block_errors(source, bid, tokens, wanted, device, threads, reporter)
        _save(work_dir, bid, layer, found)
        sums[bid] = layer
        errors |= found
    return sums, errors


def _draw(n_tokens: int, size: int, seed: int) -> np.ndarray:
    """Positions of sampled tokens in ascending order, int64."""
    return np.sort(np.random.default_rng(seed).choice(n_tokens, min(size, n_tokens), replace=False))


def _block_errors(
    source: Source,
    bid: int,
    tokens: TokenSample,
    wanted: Mapping[str, tuple[QType, ...]],
    device: str,
    threads: int,
    reporter: Reporter,
) -> dict[tuple[int, int, str, QType], float]:
    total = sum(s.n_weights * len(wanted[s.name]) for s in source.stacks if s.bid == bid)
    with reporter.task(f"Errors of layer {bid}'s output", total, "weights") as advance:
        return block_errors(source, bid, tokens, wanted, threads, advance, device=device)


def _layers(source: Source) -> list[int]:
    """The layers with experts that a model runs."""
    return sorted({stack.bid for stack in source.stacks if not is_draft(source, stack.bid)})


def _key(source: Source, *values: Any) -> str:
    return hashlib.sha256(json.dumps([SCHEMA, source.fingerprint, *values], default=str).encode()).hexdigest()[:24]


def _save(work_dir: Path, bid: int, layer: LayerSums, errors: dict[tuple[int, int, str, QType], float]) -> None:
    """Keep a finished layer, so that an interrupted run need not repeat it."""
    places = np.array(json.dumps([[xid, proj, qtype.name] for _, xid, proj, qtype in errors]))
    values = np.array([*errors.values()])
    with replacing(work_dir / f"layer-{bid}.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, places=places, errors=values, allow_pickle=False, **layer.arrays())


def _load(work_dir: Path, bid: int) -> tuple[LayerSums, dict[tuple[int, int, str, QType], float]] | None:
    path = work_dir / f"layer-{bid}.npz"
    if not path.is_file():
        return None
    with np.load(path) as file:
        arrays = dict(file)
    places, values = json.loads(str(arrays.pop("places"))), arrays.pop("errors")
    errors = {(bid, xid, proj, QType[name]): float(v) for (xid, proj, name), v in zip(places, values, strict=True)}
    return LayerSums.from_arrays(arrays), errors
