"""A model run in PyTorch from GGUF blocks: logits, or text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
import torch

from ..errors import AlphaQError
from .blocks import Blocks
from .decoding import Decoder, pick_likeliest
from .llama import LlamaVocabulary
from .packed_experts import DenselyCalled, PackedLayer
from .torch_loader import load_model

# Tokens less likely than this share of the likeliest one's probability are not drawn, as llama.cpp does by default.
_LEAST_SHARE = 0.05

# Where transformers' module of a layer is.
_LAYER = re.compile(r"\blayers\.(\d+)\.")

# A decoder's cache has room for a multiple of so many tokens, so that the next text may be somewhat longer.
_CACHE_STEP = 256


@dataclass(frozen=True, eq=False)
class _WatchedLayer(PackedLayer):
    """A layer that puts the experts it is asked for into `seen`; of `top_k` where each token comes so often."""

    layer: PackedLayer
    seen: dict[int, torch.Tensor]
    number: int
    top_k: int | None

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        self.seen[self.number] = chosen if self.top_k is None else chosen.view(self.top_k, -1).T
        return self.layer(x, chosen, gates)


class TorchModel:
    """transformers' model with the experts of `blocks` as they are; it runs `n_ctx` tokens at most.

    `dtype` is what everything but experts' blocks is held and computed in: by default float32 on the CPU, else
    bfloat16. `round_activations` rounds what is multiplied with quantised weights as llama.cpp does on the CPU: the
    same file then gives its logits, for proof, at the pace of plain PyTorch. `note` is called with what is worth
    telling of how text is decoded. AlphaQError as `load_model` says.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        n_ctx: int = 512,
        threads: int = 1,
        seed: int = 0,
        round_activations: bool = False,
        note: Callable[[str], None] = lambda note: None,
    ) -> None:
        self.blocks = blocks
        self.n_ctx = n_ctx
        self.device = torch.device(device)
        dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        with self.within_memory():
            self.model = load_model(blocks, self.device, dtype, threads, round_activations)
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._note = note
        self._decoder: Decoder | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.vocabulary.llm.close()

    @property
    def n_vocab(self) -> int:
        """Tokens that have logits."""
        return self.model.get_output_embeddings().weight.shape[0]

    @cached_property
    def vocabulary(self) -> LlamaVocabulary:
        """llama.cpp's tokenizer."""
        return self.blocks.open_vocabulary()

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template of its own."""
        return self.vocabulary.has_chat_template

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits after every token of one sequence, float32 [len(tokens), n_vocab]."""
        with torch.no_grad(), self.within_memory():
            ids = torch.tensor([list(tokens)], device=self.device)
            return self.model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()

    def generate(
        self, prompt: str, *, max_tokens: int, temperature: float, chat: bool, system: str | None = None
    ) -> Iterator[str]:
        """Pieces of text as they are drawn; `chat` applies the model's own chat template."""
        tokens = self._chat_tokens(prompt, system) if chat else self._text_tokens(prompt)
        if len(tokens) >= self.n_ctx:
            raise AlphaQError(
                f"the prompt has {len(tokens)} tokens, the context {self.n_ctx}", f"--ctx {len(tokens) + max_tokens}"
            )
        # A character may be spread over several tokens.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in self._draw(tokens, min(max_tokens, self.n_ctx - len(tokens)), temperature):
            yield decoder.decode(self.vocabulary.llm.detokenize([token]))
        yield decoder.decode(b"", final=True)

    def _draw(self, tokens: Sequence[int], n_tokens: int, temperature: float) -> Iterator[int]:
        """Tokens that follow `tokens`, until one that ends the text; greedy at temperature 0."""
        import llama_cpp

        vocabulary: Any = llama_cpp.llama_model_get_vocab(self.vocabulary.llm.model)
        pick = pick_likeliest if temperature == 0 else partial(self._sample, temperature=temperature)
        with self.within_memory():
            for ids in self._open_decoder(len(tokens) + n_tokens).draw(tokens, n_tokens, pick):
                token = int(ids)
                if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                    return
                yield token

    def _open_decoder(self, n_tokens: int) -> Decoder:
        """A decoder for so many tokens, the last one where it suffices."""
        if self._decoder is None or self._decoder.n_ctx < n_tokens:
            # The memory of the last one is given back first.
            self._decoder = None
            self._decoder = Decoder(self.model, min(self.n_ctx, -(-n_tokens // _CACHE_STEP) * _CACHE_STEP))
            if self._decoder.note:
                self._note(self._decoder.note)
        return self._decoder

    def _sample(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """The next token for logits [1, n_vocab]: [1, 1]."""
        p = (logits / temperature).softmax(-1)
        p = p.where(p >= _LEAST_SHARE * p.max(), torch.zeros_like(p))
        return torch.multinomial(p, 1, generator=self._generator)

    def _text_tokens(self, text: str) -> list[int]:
        lead = [] if self.vocabulary.bos is None else [self.vocabulary.bos]
        tokens = lead + self.vocabulary.tokenize(text, special=True)
        if not tokens:
            raise AlphaQError("the prompt is empty", "say something")
        return tokens

    def _chat_tokens(self, prompt: str, system: str | None) -> list[int]:
        """The conversation as the model's chat template writes it, rendered as llama-cpp-python does."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        llm = self.vocabulary.llm
        eos, bos = (
            llm.detokenize([token], special=True).decode("utf-8", "replace") if token >= 0 else ""
            for token in (llm.token_eos(), llm.token_bos())
        )
        formatter = Jinja2ChatFormatter(llm.metadata["tokenizer.chat_template"], eos_token=eos, bos_token=bos)
        messages: list[Any] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        try:
            text = formatter(messages=messages).prompt
        except Exception as error:  # a template is a program, and may fail in any way
            reason = f"{self.blocks.label}: its chat template refuses the conversation: {error}"
            raise AlphaQError(reason, "continue plain text: --raw") from None
        return self.vocabulary.tokenize(text, special=True)

    @contextmanager
    def watching_experts(self) -> Iterator[dict[int, torch.Tensor]]:
        """The experts that the last sequence run meanwhile chose, by layer: ids [tokens, top_k]."""
        chosen: dict[int, torch.Tensor] = {}
        watched: list[tuple[Any, PackedLayer]] = []
        for name, module in self.model.named_modules():
            layer, number = getattr(module, "packed", None), _LAYER.search(name)
            if isinstance(layer, PackedLayer) and number:
                top_k = module.top_k if isinstance(module, DenselyCalled) else None
                watched.append((module, layer))
                module.packed = _WatchedLayer(
                    **vars(layer), layer=layer, seen=chosen, number=int(number[1]), top_k=top_k
                )
        try:
            yield chosen
        finally:
            for module, layer in watched:
                module.packed = layer

    @contextmanager
    def within_memory(
        self, hint: str = "use a shorter --ctx, another --device, or --engine llama with some --gpu-layers"
    ) -> Iterator[None]:
        """An AlphaQError with `hint` in place of PyTorch's own when the device's memory does not suffice."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise AlphaQError(f"{self.blocks.label}: out of memory on {self.device}: {reason}", hint) from None
