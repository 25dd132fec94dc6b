"""What the studies share: a float reference in llama.cpp, KLD against it, and plots.

The plots need matplotlib, the extra `report`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from alphaq_gguf.checkpoint import Source
from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.evaluate.llama import LlamaModel, log_softmax
from alphaq_gguf.pipeline import AllocationSettings, allocate, convert
from alphaq_gguf.qtypes import QType
from alphaq_gguf.recipe import Recipe
from alphaq_gguf.reporter import Reporter

_FLOATS = ((r"\.weight$", QType.F32),)


class Reference:
    """A source in F32 at `path`, and what it says of windows of a text, kept in the directory `scratch`.

    `recipe` makes floats of any source with these tensors; `ppl` is the perplexity over the second halves of
    the windows. llama.cpp runs on `threads`. AlphaQError when the text does not fill one window.
    """

    def __init__(
        self,
        source: Source,
        text: Path,
        *,
        n_ctx: int,
        n_windows: int,
        scratch: Path,
        threads: int,
        reporter: Reporter,
    ) -> None:
        self.threads = threads
        self.path = scratch / "f32.gguf"
        settings = AllocationSettings(bpw=32, strategy="uniform", overrides=_FLOATS)
        self.recipe: Recipe = allocate(source, settings, cache_dir=scratch)
        convert(source, self.recipe, self.path, threads=threads, reporter=reporter)
        losses: list[np.ndarray] = []
        with self._load(self.path, n_ctx) as model:
            self.windows = model.windows(text.read_text(encoding="utf-8"), n_ctx)[:n_windows]
            if not self.windows:
                raise AlphaQError(f"{text}: fewer than {n_ctx} tokens", "give more text, or a shorter --ctx")
            self.stored = [scratch / f"{i}.npy" for i in range(len(self.windows))]
            with reporter.task("Reference", len(self.windows), "windows") as advance:
                for window, stored in zip(self.windows, self.stored, strict=True):
                    losses.append(model.score(window)[1])
                    # Logits, because log-probabilities rounded to float32 would blur divergences below 1e-8.
                    np.save(stored, model.logits(window)[len(window) // 2 : -1])
                    advance(1)
        self.n_tokens = sum(map(len, losses))
        self.ppl = float(np.exp(np.concatenate(losses).mean()))

    def compare(self, path: Path) -> dict[str, float]:
        """Perplexity of another file, mean KL(reference || file) per token, and how often both rank a token first."""
        losses, divergences, same = [], [], []
        with self._load(path, len(self.windows[0])) as model:
            for window, stored in zip(self.windows, self.stored, strict=True):
                logp, loss = model.score(window)
                base = log_softmax(np.load(stored).astype(np.float64))
                losses.append(loss)
                divergences.append((np.exp(base) * (base - logp)).sum(axis=1))
                same.append(base.argmax(axis=1) == logp.argmax(axis=1))
        kld = np.concatenate(divergences)
        return {
            "ppl": float(np.exp(np.concatenate(losses).mean())),
            "kld": float(kld.mean()),
            "kld_standard_error": float(kld.std() / np.sqrt(len(kld))),
            "top1": float(np.concatenate(same).mean()),
        }

    def _load(self, path: Path, n_ctx: int) -> LlamaModel:
        return LlamaModel(path, n_ctx=n_ctx, threads=self.threads, exact=True)


def digest_of(path: Path | None) -> str | None:
    """The sha256 of a file; AlphaQError when it cannot be read."""
    try:
        return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise AlphaQError(f"{path}: cannot be read: {error.strerror}") from None


def write_plot(output: Path, figure: Figure) -> None:
    """RESULT.svg; the same figure gives the same bytes."""
    with rc_context({"svg.hashsalt": "alphaq-gguf", "svg.fonttype": "none"}):
        figure.savefig(output.with_name(output.name + ".svg"), metadata={"Date": None})
