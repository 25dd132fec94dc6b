"""Decoding: a prompt at once, then one token a step, on a GPU as a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .transformers_library import cache_name


def pick_likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Ids [1, 1] for logits [1, n_vocab]."""
    return logits.argmax(-1, keepdim=True)


class Decoder:
    """One sequence at a time, of `n_ctx` tokens at most, through a transformers model and a cache of fixed size.

    On a GPU a step is captured as a CUDA graph when the decoder is made, and replayed for every token of every
    sequence; `graphs=False` leaves that out. Where the step reads from the device, so that no graph can hold it, it
    runs as it does on the CPU, and `note` says why. Models that transformers does not vouch for with a cache of fixed
    size get one that grows, and no graph.
    """

    def __init__(self, model: Any, n_ctx: int, *, graphs: bool = True) -> None:
        self.n_ctx = n_ctx
        self.note: str | None = None
        self._model = model
        self._cache_name = cache_name(model)
        self._device: torch.device = model.device
        self._is_static = bool(model._can_compile_fullgraph)
        self._cache: Any = _make_static_cache(model.config, n_ctx) if self._is_static else None
        self._length = 0
        self._sequence = object()
        self._graph: torch.cuda.CUDAGraph | None = None
        # A prompt that fills the context leaves no step to capture.
        if graphs and self._device.type == "cuda" and n_ctx > 1:
            self._capture()

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int]) -> torch.Tensor:
        """Begin a sequence: logits after the last of `tokens`, float32 [1, n_vocab]. ValueError if they do not fit."""
        if not 0 < len(tokens) <= self.n_ctx:
            raise ValueError(f"a sequence begins with 1 to {self.n_ctx} tokens, not {len(tokens)}")
        if self._is_static:
            self._cache.reset()
        else:
            self._cache = None
        self._length, self._sequence = len(tokens), object()
        return self._forward(torch.tensor([list(tokens)], device=self._device))

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits after one more token, ids [1, 1] on the model's device. ValueError before any prompt and when full."""
        if not 0 < self._length < self.n_ctx:
            raise ValueError(f"no step after {self._length} tokens in a context of {self.n_ctx}")
        self._length += 1
        if self._graph is None:
            return self._forward(ids)
        self._ids.copy_(ids)
        self._graph.replay()
        return self._logits.clone()

    def draw(
        self, tokens: Sequence[int], n_tokens: int, pick: Callable[[torch.Tensor], torch.Tensor] = pick_likeliest
    ) -> Iterator[torch.Tensor]:
        """Ids [1, 1] of `n_tokens` tokens that follow `tokens`, each made when it is asked for.

        The first takes the prompt; the others wait for the device only if the model does, so that a caller can time
        both with its own clock or events. RuntimeError when another sequence has begun meanwhile.
        """
        ids = sequence = None
        for _ in range(n_tokens):
            if ids is None:
                logits = self.prefill(tokens)
                sequence = self._sequence
            elif self._sequence is sequence:
                logits = self.step(ids)
            else:
                raise RuntimeError("another sequence took this decoder's cache")
            ids = pick(logits)
            yield ids

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        output = self._model(input_ids=ids, use_cache=True, logits_to_keep=1, **{self._cache_name: self._cache})
        self._cache = output[self._cache_name]
        return output.logits[:, -1].float()

    def _capture(self) -> None:
        if not self._is_static:
            self.note = "Decodes without CUDA graphs: transformers has no cache of fixed size for this model"
            return
        self._ids = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        try:
            # Compiles and tunes the kernels, which may wait for the device.
            self._rehearse("default")
            self._rehearse("error")
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
            # A capture that fails does not leave its stream; the outer context does.
            with (
                torch.no_grad(),
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self._logits = self._forward(self._ids)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.note = f"Decodes without CUDA graphs: {reason}"
        else:
            self._graph = graph
        self._length = 0

    def _rehearse(self, sync_debug_mode: str) -> None:
        """A first step; where it would wait for the device, the mode "error" makes it a RuntimeError."""
        self.prefill([0])
        before = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings():
                # That the mode is a prototype.
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode(sync_debug_mode)
            self.step(self._ids)
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _make_static_cache(config: Any, n_ctx: int) -> Any:
    """transformers' static cache of the model, every attention layer as long as the context.

    Layers as long as an attention window keep count of tokens on the host, where a graph cannot follow. Over whole
    layers the model's masks alone keep the window.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    cache = StaticCache(config=config, max_cache_len=n_ctx)
    cache.layers = [StaticLayer(n_ctx) if getattr(layer, "is_sliding", False) else layer for layer in cache.layers]
    return cache
