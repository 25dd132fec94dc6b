"""llama.cpp through llama-cpp-python: load a file, get logits, perplexity, or text."""

from __future__ import annotations

import ctypes
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import AlphaQError
from ..gguf_file import Field, build_header
from ..guard import ARCHITECTURE
from ..plugin import ContainerFile, build_plugin, cache_dir, check_types, load_plugin, read_container_file
from ..reporter import Reporter, Silent
from .llama_log import collect_errors
from .watch import Watch

_GGML_TYPE_F32 = 0


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood) over `n_tokens` scored tokens, with its standard error."""

    value: float
    standard_error: float
    n_tokens: int


class _WithVocabulary:
    """What a loaded GGUF offers with or without weights."""

    llm: Any
    path: Path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.close()

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, without BOS; `special` parses control tokens written out in the text."""
        return self.llm.tokenize(text.encode("utf-8"), add_bos=False, special=special)

    @property
    def has_chat_template(self) -> bool:
        """Whether the file carries a chat template of its own."""
        return "tokenizer.chat_template" in self.llm.metadata

    @property
    def bos(self) -> int | None:
        """The token every sequence must start with, None when the model wants none."""
        import llama_cpp

        vocab: Any = llama_cpp.llama_model_get_vocab(self.llm.model)
        return self.llm.token_bos() if llama_cpp.llama_vocab_get_add_bos(vocab) else None

    @property
    def document_start(self) -> int:
        """A token that a document begins with: BOS where the model wants one, else the end of the one before."""
        token = self.llm.token_eos() if self.bos is None else self.bos
        if token < 0:
            raise AlphaQError(f"{self.path}: its vocabulary has no token that ends a document, for text to start from")
        return token

    def windows(self, text: str, n_ctx: int) -> list[list[int]]:
        """`text` cut as llama-perplexity does: whole windows of `n_ctx` tokens, each begun by BOS if there is one."""
        lead = [] if self.bos is None else [self.bos]
        tokens = lead + self.tokenize(text)
        starts = range(0, len(tokens) - n_ctx + 1, n_ctx)
        return [lead + tokens[start + len(lead) : start + n_ctx] for start in starts]


class LlamaVocabulary(_WithVocabulary):
    """llama.cpp's tokenizer of a GGUF, which need not hold weights. AlphaQError for a file without one."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        asked = read_container_file(path)
        # llama-cpp-python's own log callback fails on the cut-off tokens that llama.cpp prints.
        with one_line_errors(path):
            self.llm = llama_cpp.Llama(
                str(path), vocab_only=True, verbose=False, kv_overrides=None if asked is None else metadata_of(asked)
            )
        self.path = path

    @classmethod
    def of_fields(cls, fields: Iterable[Field]) -> Self:
        """The tokenizer that a file with this metadata would have."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "vocabulary.gguf"
            path.write_bytes(build_header(fields, [])[0])
            return cls(path)


class LlamaModel(_WithVocabulary):
    """A GGUF loaded by llama.cpp on the CPU (or `gpu_layers` of it on a GPU).

    It runs as llama.cpp's programs do by default, with flash attention and a KV cache of 16 bits; `exact` selects the
    numerical protocol for comparisons with float references: f32 KV cache, no flash attention. Without `all_logits`
    there is no more of the KV cache than sliding windows need; `repack` lets it rearrange weights for the processor, as
    its programs do too. `n_sequences` can be drawn side by side, of `n_ctx` tokens each. `watch` sees the tensors that
    it computes, of all tokens in the last layer too only with `all_logits`. Files with containers run with the plug-in,
    which is built first if it has not been. AlphaQError carries llama.cpp's own reason when the file does not load.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 512,
        threads: int | None = None,
        exact: bool = False,
        all_logits: bool = True,
        gpu_layers: int = 0,
        seed: int = 0,
        n_sequences: int = 1,
        repack: bool = False,
        watch: Watch | None = None,
    ) -> None:
        import llama_cpp

        kv_type: dict[str, Any] = {"type_k": _GGML_TYPE_F32, "type_v": _GGML_TYPE_F32} if exact else {}
        asked = read_container_file(path)
        placing = weights_placed(path, asked, repack=repack)
        with one_line_errors(path), placing as placed, _context_defaults(watch, n_sequences):
            self.llm = llama_cpp.Llama(
                str(path),
                n_ctx=n_ctx * n_sequences,
                n_batch=min(n_ctx, 512),
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=all_logits,
                n_gpu_layers=gpu_layers,
                flash_attn=not exact,
                swa_full=all_logits,
                seed=seed,
                verbose=False,
                kv_overrides=None if asked is None else metadata_of(asked),
                **kv_type,
            )
        self.path = path
        # llama.cpp keeps bare pointers to these: they must not be collected.
        self._watch, self._placed = watch, placed

    def draw(self, n_tokens: int, seeds: Sequence[int], advance: Callable[[int], None]) -> np.ndarray:
        """Documents drawn from the model's own distribution as it is, one by seed: int64 [len(seeds), n_tokens].

        They grow side by side, because a step takes hardly longer for several tokens than for one.
        """
        import llama_cpp

        context, n_vocab = self.llm.ctx, self.llm.n_vocab()
        memory: Any = llama_cpp.llama_get_memory(context)
        llama_cpp.llama_memory_clear(memory, True)
        drawn = np.full((len(seeds), n_tokens), self.document_start, dtype=np.int64)
        generators = [np.random.default_rng(seed) for seed in seeds]
        batch = llama_cpp.llama_batch_init(len(seeds), 0, 1)
        try:
            batch.n_tokens = len(seeds)
            for position in range(n_tokens - 1):
                for i, token in enumerate(drawn[:, position]):
                    batch.token[i], batch.pos[i], batch.logits[i] = int(token), position, True
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, i
                if llama_cpp.llama_decode(context, batch):
                    raise AlphaQError(f"{self.path}: llama.cpp cannot run {len(seeds)} sequences of {n_tokens} tokens")
                for i, generator in enumerate(generators):
                    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (n_vocab,))
                    mass = np.exp(logits.astype(np.float64) - logits.max()).cumsum()
                    drawn[i, position + 1] = mass.searchsorted(generator.random() * mass[-1], side="right")
                advance(len(seeds))
        finally:
            llama_cpp.llama_batch_free(batch)
        return drawn

    def run(self, tokens: Sequence[int]) -> None:
        """Run one sequence from an empty context."""
        self.llm.reset()
        self.llm.eval(list(tokens))
        if self._watch is not None:
            self._watch.reraise()

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits after every token of one sequence, float32 [len(tokens), n_vocab]."""
        self.run(tokens)
        return np.array(self.llm.scores[: len(tokens)], dtype=np.float32)

    def score(self, window: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The second half of a window: log-probabilities float64 [n, n_vocab], and the true tokens' losses [n]."""
        first = len(window) // 2
        logp = log_softmax(self.logits(window)[first:-1].astype(np.float64))
        return logp, -logp[np.arange(len(logp)), window[first + 1 :]]

    def perplexity(
        self, text: str, *, n_ctx: int = 512, max_windows: int | None = None, reporter: Reporter | None = None
    ) -> Perplexity:
        """Perplexity by llama-perplexity's protocol: windows of `n_ctx` tokens, second half scored.

        AlphaQError when the text has fewer than two windows' worth of tokens.
        """
        reporter = reporter or Silent()
        available = self.windows(text, n_ctx)
        if len(available) < 2:
            found = f"the text fills {len(available)} windows of {n_ctx} tokens"
            raise AlphaQError(f"{found}, at least 2 are needed", "give more text")
        windows = available[:max_windows]
        nll: list[np.ndarray] = []
        with reporter.task(f"Perplexity {self.path.name}", len(windows), "windows") as advance:
            for window in windows:
                nll.append(self.score(window)[1])
                advance(1)
        losses = np.concatenate(nll)
        value = math.exp(losses.mean())
        return Perplexity(value, value * float(losses.std()) / math.sqrt(len(losses) - 1), len(losses))

    def generate(
        self, prompt: str, *, max_tokens: int, temperature: float, chat: bool, system: str | None = None
    ) -> Iterator[str]:
        """Pieces of text as llama.cpp produces them; `chat` applies the file's own chat template."""
        if chat:
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": prompt})
            stream = self.llm.create_chat_completion(
                messages, max_tokens=max_tokens, temperature=temperature, stream=True
            )
            for chunk in stream:
                yield chunk["choices"][0]["delta"].get("content") or ""
        else:
            stream = self.llm.create_completion(prompt, max_tokens=max_tokens, temperature=temperature, stream=True)
            for chunk in stream:
                yield chunk["choices"][0]["text"]


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """AlphaQError with llama.cpp's own reason when a file does not load in the block."""
    errors = collect_errors()
    errors.clear()
    try:
        yield
    except (ValueError, AssertionError) as error:
        reasons = [line for line in errors if "failed to load model" not in line] or [str(error)]
        raise AlphaQError(f"{path}: llama.cpp cannot load it: {reasons[0]}") from None


def metadata_of(asked: ContainerFile) -> dict[str, bool | int | float | str]:
    """What a file with containers has other values for, in `Llama`'s `kv_overrides`."""
    return {ARCHITECTURE: asked.architecture}


@contextmanager
def weights_placed(path: Path, asked: ContainerFile | None, *, repack: bool) -> Iterator[object]:
    """Have models that load in the block keep their weights as stored, or with `repack` rearranged for the processor.

    Repacked weights round differently on each machine, and the AMX ones crash where a virtual machine
    shows the instructions and lacks them, and abort on latent attention. The containers that the file at `path` has
    are in the plug-in's buffers. What this yields is to be kept as long as the model is, because llama.cpp has a bare
    pointer to it. AlphaQError when the plug-in cannot be built or loaded, or lacks a type.
    """
    values: dict[str, Any] = {} if repack else {"use_extra_bufts": False}
    placed = None
    if asked is not None:
        plugin = load_plugin(build_plugin(cache_dir(), Silent()))
        check_types(asked.types, str(path))
        placed = plugin.place(asked.pattern, repack=repack)
        values["tensor_buft_overrides"] = ctypes.addressof(placed)
    with changed_defaults("llama_model_default_params", **values):
        yield placed


def _context_defaults(watch: Watch | None, n_sequences: int) -> AbstractContextManager[None]:
    values: dict[str, Any] = {} if watch is None else {"cb_eval": watch.callback}
    return changed_defaults("llama_context_default_params", n_seq_max=n_sequences, **values)


@contextmanager
def changed_defaults(function: str, **values: Any) -> Iterator[None]:
    """Have llama.cpp's `function` return other default parameters: `Llama` has no arguments for these."""
    import llama_cpp.llama_cpp as library

    make_defaults = getattr(library, function)

    def make_params() -> Any:
        params = make_defaults()
        for name, value in values.items():
            setattr(params, name, value)
        return params

    setattr(library, function, make_params)
    try:
        yield
    finally:
        setattr(library, function, make_defaults)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities along the last axis, in the input's precision."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
