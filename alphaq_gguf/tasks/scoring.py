"""How likely an engine takes given tokens to be, over many sequences that begin alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import AlphaQError
from ..evaluate.decoding import Decoder
from ..evaluate.llama import LlamaModel
from ..evaluate.torch_model import TorchModel

_OUT_OF_MEMORY = "use another --device, or leave this engine out"

# Tokens in one pass of PyTorch, padding included.
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Request:
    """The last logits after `tokens` are to be held against `targets`, one each."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """The targets' log-probability in nats, and whether each of them is the likeliest token at its place."""

    logprob: float
    is_greedy: bool


class Scorer(ABC):
    """An engine; sequences are of `n_ctx` tokens at most, ids those of `vocabulary`, llama.cpp's tokenizer."""

    vocabulary: Any
    n_ctx: int

    @abstractmethod
    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Answers with their requests' indices, in an order that suits the engine."""

    @abstractmethod
    def continue_greedily(self, tokens: Sequence[int]) -> Iterator[int]:
        """The likeliest tokens, one by one, until the context is full."""


def open_scorer(model: LlamaModel | TorchModel) -> Scorer:
    """The scorer of a loaded model, which stays the caller's; a LlamaModel must have been loaded with all logits."""
    return LlamaScorer(model) if isinstance(model, LlamaModel) else TorchScorer(model)


class LlamaScorer(Scorer):
    """llama.cpp; what a sequence shares with the one before is not computed again."""

    def __init__(self, model: LlamaModel) -> None:
        self.vocabulary = self._model = model
        self.n_ctx = model.llm.n_ctx()
        # Tokens whose keys and values the context holds; whoever ran the model before left others there.
        self._held: tuple[int, ...] = ()

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        # Sorted by tokens, neighbours share the longest beginnings.
        for i in sorted(range(len(requests)), key=lambda i: requests[i].tokens):
            targets, logprob, is_greedy = requests[i].targets, 0.0, True
            for logits in self._last_logits(requests[i].tokens, len(targets)):
                part = _hold_against(logits, targets[: len(logits)])
                targets = targets[len(logits) :]
                logprob, is_greedy = logprob + part.logprob, is_greedy and part.is_greedy
            yield i, Answer(logprob, is_greedy)

    def continue_greedily(self, tokens: Sequence[int]) -> Iterator[int]:
        drawn = tuple(tokens)
        while len(drawn) < self.n_ctx:
            (logits,) = self._last_logits(drawn, 1)
            token = int(logits.argmax())
            yield token
            drawn += (token,)

    def _last_logits(self, tokens: tuple[int, ...], n_last: int) -> Iterator[torch.Tensor]:
        """The last `n_last` logits of a sequence, in blocks [n, n_vocab]."""
        import llama_cpp

        llm = self._model.llm
        memory: Any = llama_cpp.llama_get_memory(llm.ctx)
        first = len(tokens) - n_last
        kept = min(_count_shared(self._held, tokens), first)
        # A recurrent state cannot be taken back to an earlier token.
        if not llama_cpp.llama_memory_seq_rm(memory, 0, kept, -1):
            llama_cpp.llama_memory_clear(memory, True)
            kept = 0
        self._held = tokens[:kept]
        batch = llama_cpp.llama_batch_init(llm.n_batch, 0, 1)
        try:
            for start in range(kept, len(tokens), llm.n_batch):
                part = tokens[start : start + llm.n_batch]
                batch.n_tokens = len(part)
                for i, token in enumerate(part):
                    batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, start + i >= first
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                if llama_cpp.llama_decode(llm.ctx, batch):
                    raise AlphaQError(f"{self._model.path}: llama.cpp cannot run {len(tokens)} tokens")
                self._held += part
                n_rows = min(start + len(part) - first, len(part))
                if n_rows > 0:
                    logits: Any = llama_cpp.llama_get_logits(llm.ctx)
                    yield torch.from_numpy(np.ctypeslib.as_array(logits, (n_rows, llm.n_vocab())).copy())
        finally:
            llama_cpp.llama_batch_free(batch)


class TorchScorer(Scorer):
    """PyTorch; sequences of like length run side by side, and those that differ in the last target alone as one.

    Experts' blocks are decoded once a pass, which costs more than some tokens that were already seen.
    """

    def __init__(self, model: TorchModel) -> None:
        self.vocabulary = model.vocabulary
        self.n_ctx = model.n_ctx
        self._model = model
        self._decoder: Decoder | None = None

    def score(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        askers: dict[tuple[int, ...], list[int]] = {}
        for i, request in enumerate(requests):
            askers.setdefault(request.tokens, []).append(i)
        # The longest first, so that what does not fit into memory fails at once.
        rows = sorted(askers, key=lambda tokens: (-len(tokens), tokens))
        while rows:
            n_rows = max(1, _BATCH_TOKENS // len(rows[0]))
            batch, rows = rows[:n_rows], rows[n_rows:]
            first = min(len(tokens) - len(requests[i].targets) for tokens in batch for i in askers[tokens])
            for tokens, logits in zip(batch, self._logits(batch, first), strict=True):
                for i in askers[tokens]:
                    targets, end = requests[i].targets, len(tokens) - first
                    yield i, _hold_against(logits[end - len(targets) : end], targets)

    def continue_greedily(self, tokens: Sequence[int]) -> Iterator[int]:
        with self._model.within_memory(_OUT_OF_MEMORY):
            if self._decoder is None:
                self._decoder = Decoder(self._model.model, self.n_ctx)
            for ids in self._decoder.draw(tokens, self.n_ctx - len(tokens)):
                yield int(ids)

    def _logits(self, rows: Sequence[tuple[int, ...]], first: int) -> torch.Tensor:
        """Logits from the token `first` on of sequences with the longest first: [rows, longest - first, n_vocab]."""
        # Tokens see what is before them, so it does not matter what fills up the shorter ones.
        ids = torch.zeros(len(rows), len(rows[0]), dtype=torch.int64)
        for i, tokens in enumerate(rows):
            ids[i, : len(tokens)] = torch.tensor(tokens)
        with torch.no_grad(), self._model.within_memory(_OUT_OF_MEMORY):
            n_last = ids.shape[1] - first
            return self._model.model(
                input_ids=ids.to(self._model.device), use_cache=False, logits_to_keep=n_last
            ).logits


def _hold_against(logits: torch.Tensor, targets: Sequence[int]) -> Answer:
    """Logits [n, n_vocab] for `n` targets."""
    ids = torch.tensor(targets, device=logits.device)
    logprobs = logits.float().log_softmax(-1).gather(1, ids[:, None])
    return Answer(float(logprobs.sum(dtype=torch.float64)), bool((logits.argmax(-1) == ids).all()))


def _count_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
