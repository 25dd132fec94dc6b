"""The reference's logits and routing on the text: computed once, kept in the cache, resumed where they broke off."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from ..alone import alone
from ..calibration.own_text import OWN
from ..checkpoint import Source
from ..checkpoint.huggingface import HuggingFaceSource
from ..evaluate.base_file import BaseFile, BaseWriter
from ..evaluate.isolated import run_isolated
from ..evaluate.metrics import TOKEN, Estimate, compress, own_loss, row_words, scored, summarize
from ..evaluate.routes_file import RoutesFile, RoutesWriter
from ..reporter import Reporter, Silent
from ..text_windows import cut_texts
from ..writer import write_atomically
from .data import ReferenceInfo, TextInfo
from .texts import open_vocabulary

_SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Reference:
    """What files are held against: log-probabilities `base` of `windows` int64 [n, n_ctx], and which experts it chose.

    `routes` is None where the experts cannot be seen.
    """

    info: ReferenceInfo
    text: TextInfo
    windows: np.ndarray
    base: BaseFile
    routes: RoutesFile | None


def make_reference(
    source: Source,
    texts: Sequence[Path | str],
    *,
    n_ctx: int = 512,
    max_windows: int | None = None,
    cache_dir: Path,
    device: str = "cpu",
    threads: int = 1,
    gpu_layers: int = 0,
    exact: bool = False,
    batch: int = 8,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Reference:
    """Run `source` over windows of `texts`, files or OWN for text it writes itself with `seed`.

    Of each text `max_windows` at most are used, and of its own that many are written (None: OWN_TOKENS in all). A
    Hugging Face source runs in PyTorch on `device`, one layer in memory at a time and `batch` windows at once; a GGUF
    runs in llama.cpp with `gpu_layers` on a GPU, by its defaults or `exact` (see LlamaModel). What `cache_dir` has of
    it is not computed again, and an interrupted run goes on. AlphaQError for texts that are too short or no text, and
    for a model that cannot run.
    """
    reporter = reporter or Silent()
    with open_vocabulary(source) as vocabulary:
        n_vocab = vocabulary.llm.n_vocab()
        cut = cut_texts(
            source,
            vocabulary,
            texts,
            n_ctx,
            max_windows,
            seed=seed,
            cache_dir=cache_dir,
            threads=threads,
            reporter=reporter,
        )
    windows = np.concatenate(cut)
    engine, packages = "llama.cpp, exact" if exact else "llama.cpp", ["llama-cpp-python"]
    if isinstance(source, HuggingFaceSource):
        engine, packages = "pytorch", ["torch", "transformers"]
    key = _key(source, windows, engine, packages)
    directory = cache_dir / f"reference-{key}"
    base, routes, described = (directory / name for name in ("base.kld", "routes.npy", "reference.json"))
    with alone(directory, reporter):
        if not described.is_file():
            work_dir = directory / "layers"
            if not base.is_file() and isinstance(source, HuggingFaceSource):
                work_dir.mkdir(exist_ok=True)
                _run_layers(source, windows, n_vocab, base, routes, work_dir, device, batch, reporter)
            elif not base.is_file():
                running = source.files[0], source.name, windows, n_vocab, base, routes, threads, gpu_layers, exact
                run_isolated(_run_windows, *running, label=f"{source.files[0]}, the reference", reporter=reporter)
            shutil.rmtree(work_dir, ignore_errors=True)
            perplexity = _own_perplexity(BaseFile(base), reporter)
            versions = {name: _version(name) for name in packages}
            about = {"name": source.name, "engine": engine, "versions": versions}
            about["perplexity"] = [*vars(perplexity).values()]
            write_atomically(described, json.dumps(about, indent=1) + "\n")
    perplexity = Estimate(*json.loads(described.read_text(encoding="utf-8"))["perplexity"])
    return Reference(
        ReferenceInfo(source.name, source.fingerprint, engine, perplexity),
        _describe([text if isinstance(text, str) else text.name for text in texts], windows, OWN in texts),
        windows,
        BaseFile(base),
        RoutesFile(routes) if routes.is_file() else None,
    )


def read_reference(path: Path, reporter: Reporter | None = None) -> Reference:
    """The reference in a base file of llama-perplexity, which does not tell where tokens were sent.

    It is identified by the sha256 of its tokens and log-probabilities. AlphaQError for a file that is none.
    """
    base = BaseFile(path)
    digest = hashlib.sha256(f"{base.n_vocab} {base.windows.shape}".encode() + base.windows.tobytes())
    perplexity = _own_perplexity(base, reporter or Silent(), lambda rows: digest.update(rows.data))
    info = ReferenceInfo(path.name, digest.hexdigest(), "file", perplexity)
    return Reference(info, _describe([path.name], base.windows, False), base.windows, base, None)


def _run_layers(
    source: HuggingFaceSource,
    windows: np.ndarray,
    n_vocab: int,
    base: Path,
    routes: Path,
    work_dir: Path,
    device: str,
    batch: int,
    reporter: Reporter,
) -> None:
    """Write `base` and `routes` layer by layer, then the logits window by window."""
    from ..evaluate.layer_pass import LayerPass
    from ..evaluate.layerwise import LayerwiseModel

    model = LayerwiseModel(source, device)
    part = scored(windows.shape[1])
    n_bytes = 2 * len(windows) * (part.stop - part.start) * row_words(n_vocab)
    passing = LayerPass(model, windows, work_dir, batch=batch, reporter=reporter, beside=n_bytes)
    n_used = {bid: model.n_used(bid) for bid in range(model.n_layers) if model.has_experts(bid)}
    experts = RoutesWriter(routes, len(windows), windows.shape[1], n_used)
    for _ in passing.run(model.n_layers, chosen=experts.layers):
        experts.flush()
    task = reporter.task(f"Logits of {source.name}", len(windows), "windows")
    with BaseWriter(base, windows, n_vocab) as writer, task as advance:
        advance(writer.n_done)
        for logits in model.each_logits(passing.hidden(model.n_layers)[writer.n_done :, part]):
            writer.append(compress(logits))
            advance(1)


def _run_windows(
    gguf: Path,
    name: str,
    windows: np.ndarray,
    n_vocab: int,
    base: Path,
    routes: Path,
    threads: int,
    gpu_layers: int,
    exact: bool,
    reporter: Reporter,
) -> None:
    """Write `base` and `routes`, window by window in llama.cpp, in a process of its own."""
    from ..evaluate.engines import LlamaEngine

    n_windows, n_ctx = windows.shape
    experts: RoutesWriter | None = None
    part = scored(n_ctx)
    with (
        BaseWriter(base, windows, n_vocab) as writer,
        LlamaEngine(gguf, n_ctx=n_ctx, threads=threads, gpu_layers=gpu_layers, exact=exact) as engine,
        reporter.task(f"Running {name}", n_windows, "windows") as advance,
    ):
        advance(writer.n_done)
        for i in range(writer.n_done, n_windows):
            logits, chosen = engine.run(windows[i].tolist())
            if chosen:
                n_used = {bid: numbers.shape[1] for bid, numbers in chosen.items()}
                experts = experts or RoutesWriter(routes, n_windows, n_ctx, n_used)
                experts.put(i, chosen)
                experts.flush()
            writer.append(compress(logits[part]))
            advance(1)
        for note in engine.notes:
            reporter.warn(f"{name}: {note}")


def _own_perplexity(
    base: BaseFile, reporter: Reporter, see: Callable[[np.ndarray], None] = lambda rows: None
) -> Estimate:
    """The perplexity of the base itself; `see` is shown all its rows."""
    part = scored(base.n_ctx)
    losses = []
    with reporter.task(f"Reading {base.path.name}", base.n_windows, "windows") as advance:
        for i, window in enumerate(base.windows):
            rows = base.rows(i)
            see(rows)
            losses.append(own_loss(rows, window[part.start + 1 : part.stop + 1]))
            advance(1)
    # Held against itself.
    stats = np.zeros(sum(map(len, losses)), TOKEN)
    stats["nll"] = stats["nll_base"] = np.concatenate(losses)
    return summarize(stats)[1]


def _describe(names: Sequence[str], windows: np.ndarray, is_own: bool) -> TextInfo:
    n_windows, n_ctx = windows.shape
    part = scored(n_ctx)
    return TextInfo(tuple(names), _digest(windows), n_ctx, n_windows, n_windows * (part.stop - part.start), is_own)


def _digest(windows: np.ndarray) -> str:
    return hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest()


def _key(source: Source, windows: np.ndarray, engine: str, packages: Sequence[str]) -> str:
    """What the reference depends on: weights, metadata with the hyper-parameters, tokens, and what computes it."""
    metadata = hashlib.sha256()
    for field in source.fields:
        metadata.update(field.key.encode() + field.raw)
    versions = [_version(name) for name in packages]
    parts = [_SCHEMA, source.fingerprint, metadata.hexdigest(), windows.shape, _digest(windows), engine, versions]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
