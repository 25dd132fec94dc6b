"""A checkpoint run in PyTorch one decoder layer at a time, by transformers' own modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from ..checkpoint.huggingface import HuggingFaceSource
from ..checkpoint.shards import TORCH_DTYPES, Weights
from ..errors import AlphaQError, WeightError
from .llama import LlamaVocabulary
from .transformers_library import open_transformers, parameters_on_meta

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens", "model.norm", "lm_head"
# The modules that are loaded. Checkpoints with a vision tower hold the language model one level down.
_MODULE = re.compile(rf"(?:language_model\.)?(model\.layers\.\d+|{_EMBEDDING}|{_NORM}|{_HEAD})\.")
_EXPERTS = ".experts."
# MXFP4 tensors are matrices as llama.cpp has them; transformers' are transposed.
_MXFP4 = "_blocks"


class LayerwiseModel:
    """The decoder of `source` in float32 on `device`, of which no more than one layer is in memory.

    Each call loads what it needs and lets go of it. While a layer's experts are put together, memory holds a third more
    than the layer; twice it and more, if they are not stored in 16 bits. AlphaQError when transformers is missing or
    cannot run the model.
    """

    def __init__(self, source: HuggingFaceSource, device: str = "cpu") -> None:
        self.source = source
        self.device = device
        with open_transformers(source.label, _OTHER_WAY) as library:
            config = library.AutoConfig.from_pretrained(source.path, trust_remote_code=False).get_text_config()
            # Weights come as floats whatever they are stored as, and no layer runs where routers' outputs are gathered.
            for name, value in (("quantization_config", None), ("output_router_logits", False)):
                if hasattr(config, name):
                    setattr(config, name, value)
            with parameters_on_meta():
                model = library.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        self._model: Any = model.eval()
        self._decoder: Any = model.model
        self.n_layers = len(self._decoder.layers)
        self.width: int = config.hidden_size
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._stored = self._sort_tensors()
        # It is small, and no pass through the decoder does without it.
        self._load(_NORM)

    def _sort_tensors(self) -> dict[str, dict[str, _Stored]]:
        """The checkpoint's tensors by module, under the names that transformers knows."""
        modules: dict[str, dict[str, _Stored]] = {}
        for name in self.source.weights.shapes:
            match = _MODULE.match(name)
            if match and not self.source.family.ignores(self.source.config, name):
                known = name[match.start(1) :].removesuffix(_MXFP4)
                modules.setdefault(match[1], {})[known] = _Stored(self.source.weights, name)
        if self._model.config.tie_word_embeddings:
            modules[_HEAD] = {f"{_HEAD}.weight": stored for stored in modules[_EMBEDDING].values()}
        return modules

    @cached_property
    def _vocabulary(self) -> LlamaVocabulary:
        return LlamaVocabulary.of_fields(self.source.fields)

    @property
    def bos(self) -> int | None:
        """The token every sequence must start with, None when the model wants none."""
        return self._vocabulary.bos

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text` as llama.cpp will see them, without BOS; SourceError without a tokenizer."""
        return self._vocabulary.tokenize(text)

    def windows(self, text: str, n_ctx: int) -> list[list[int]]:
        """`text` cut as llama-perplexity does: whole windows of `n_ctx` tokens, each begun by BOS if there is one."""
        return self._vocabulary.windows(text, n_ctx)

    def has_experts(self, bid: int) -> bool:
        """Whether layer `bid` is one of a mixture of experts."""
        return _expert_block(self._decoder.layers[bid]) is not None

    def n_used(self, bid: int) -> int:
        """How many experts the router of layer `bid` chooses for a token, 0 where there is none."""
        block = _expert_block(self._decoder.layers[bid])
        return 0 if block is None else _router(block).top_k

    def embed(self, windows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """What the first layer is given for token ids [n, n_ctx]: float32 [n, n_ctx, width], in `out` if given."""
        if out is None:
            out = np.empty((*windows.shape, self.width), dtype=np.float32)
        with torch.no_grad(), self._loaded(_EMBEDDING):
            for i, window in enumerate(windows):
                tokens = torch.from_numpy(np.array(window, dtype=np.int64)[None]).to(self.device)
                with self._recording() as calls:
                    self._decoder(input_ids=tokens, use_cache=False)
                out[i] = calls[0][0][0].cpu().numpy()
        return out

    def run_layer(
        self,
        bid: int,
        hidden: np.ndarray,
        out: np.ndarray,
        moe_inputs: np.ndarray | None = None,
        batch: int = 1,
        advance: Callable[[int], None] = lambda amount: None,
        chosen: np.ndarray | None = None,
    ) -> None:
        """Write to `out` what layer `bid` makes of `hidden`, `batch` windows at a time; `advance` is told of tokens.

        All arrays are float32 [n, n_ctx, width], and may be mapped files. `moe_inputs` gets what the layer's
        experts and router are given, if it has any, and `chosen` [n, n_ctx, n_used] the experts that its router sends
        tokens to, in no order. WeightError when an output is NaN or infinite.
        """
        seen: list[torch.Tensor] = []
        sent: list[torch.Tensor] = []

        def note(router: nn.Module, _: Any, output: tuple[torch.Tensor, ...]) -> None:
            sent.append(_chosen(router, output))

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            layer = stack.enter_context(self._loaded(f"model.layers.{bid}"))
            block = _expert_block(layer)
            if block is not None:
                stack.enter_context(block.register_forward_pre_hook(lambda _, given: seen.append(given[0])))
                stack.enter_context(_router(block).register_forward_hook(note))
            arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
            for start in range(0, len(hidden), batch):
                rows = slice(start, start + batch)
                x = torch.from_numpy(np.array(hidden[rows])).to(self.device)
                if len(x) not in arguments:
                    arguments = {len(x): self._arguments(bid, x)}
                positional, named = arguments[len(x)]
                y = layer(x, *positional, **named)
                y = y[0] if isinstance(y, tuple) else y
                if not y.isfinite().all():
                    raise WeightError(
                        f"{self.source.label}: layer {bid} computes NaN or infinite values",
                        "the checkpoint is damaged: download it again",
                    )
                out[rows] = y.cpu().numpy()
                if seen and moe_inputs is not None:
                    moe_inputs[rows] = seen[0].reshape(x.shape).cpu().numpy()
                if sent and chosen is not None:
                    chosen[rows] = sent[0].reshape(*x.shape[:2], -1).cpu().numpy()
                seen.clear()
                sent.clear()
                advance(x.shape[0] * x.shape[1])

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits for the last layer's outputs [n, n_ctx, width], float32 [n, n_ctx, n_vocab]."""
        return np.stack([*self.each_logits(hidden)])

    @torch.no_grad()
    def each_logits(self, hidden: np.ndarray) -> Iterator[np.ndarray]:
        """The same window by window, each float32 [n_ctx, n_vocab], with the head in memory until the last."""
        with self._loaded(_HEAD):
            for window in hidden:
                x = torch.from_numpy(np.array(window)[None]).to(self.device)
                with self._recording(output=x):
                    logits = self._model(inputs_embeds=x, use_cache=False).logits[0].cpu().numpy()
                yield logits

    def _arguments(self, bid: int, x: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the decoder gives layer `bid` beside hidden states shaped as `x`: masks, positions and the like."""
        with self._recording() as calls:
            self._decoder(inputs_embeds=x, use_cache=False)
        return calls[bid][1:]

    @contextmanager
    def _recording(
        self, output: torch.Tensor | None = None
    ) -> Iterator[list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]]]:
        """Layers note how they are called instead of running, and return `output`, or what they are given."""
        calls: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def record(hidden_states: torch.Tensor, *positional: Any, **named: Any) -> torch.Tensor:
            calls.append((hidden_states, positional, named))
            return hidden_states if output is None else output

        for layer in self._decoder.layers:
            layer.forward = record
        try:
            yield calls
        finally:
            for layer in self._decoder.layers:
                del layer.forward

    @contextmanager
    def _loaded(self, path: str) -> Iterator[nn.Module]:
        """The module at `path` with its weights, which are gone afterwards."""
        module = self._model.get_submodule(path)
        empty = [
            (owner, name, parameter)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
        ]
        try:
            self._load(path)
            yield module
        finally:
            for owner, name, parameter in empty:
                setattr(owner, name, parameter)

    def _load(self, path: str) -> None:
        """Fill the module at `path` as transformers does, which renames tensors and fuses experts."""
        module, tensors = self._model.get_submodule(path), self._stored[path]
        # Experts are fused as they are stored, which takes less memory than as floats of 32 bits.
        kinds = {tensor.dtype for name, tensor in tensors.items() if _EXPERTS in name}
        with open_transformers(self.source.label, _OTHER_WAY) as library:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import convert_and_load_state_dict_in_model
            from transformers.modeling_utils import LoadStateDictConfig

            # A device called "disk", used or not, makes it read tensors when they are needed and not all ahead.
            devices: dict[str, str] = {"": self.device, "nothing": "disk"}
            mapping: Any = get_model_conversion_mapping(self._model)
            plan = {_EXPERTS: kinds.pop()} if len(kinds) == 1 else {}
            settings = LoadStateDictConfig(device_map=devices, weight_mapping=mapping, dtype_plan=plan)
            found, _ = convert_and_load_state_dict_in_model(self._model, tensors, settings)
        expected = {f"{path}.{name}" for name in module.state_dict()}
        problems = {
            "lacks": expected & found.missing_keys,
            "has no place for": found.unexpected_keys,
            "expects another shape of": {name for name, *_ in found.mismatched_keys},
            "cannot convert": set(found.conversion_errors),
        }
        for problem, names in problems.items():
            if names:
                raise AlphaQError(
                    f"{self.source.label}: transformers {library.__version__} {problem} {min(names)}",
                    f"install a newer transformers, or {_OTHER_WAY}",
                )
        for owner in module.modules():
            for name in [name for name, _ in owner.named_parameters(recurse=False)]:
                setattr(owner, name, nn.Parameter(getattr(owner, name).float(), requires_grad=False))


class _Stored:
    """A tensor of a checkpoint, read when it is sliced, as safetensors' own slices are."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._weights = weights
        self._name = name

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self._weights.qtype(self._name)]

    def __getitem__(self, _: object) -> torch.Tensor:
        shape = self._weights.shapes[self._name]
        whole = self._weights.read(self._name, None, 0, shape[0]).reshape(shape)
        return whole.transpose(1, 2) if self._name.endswith(_MXFP4) else whole


_OTHER_WAY = "convert the checkpoint to a float GGUF and give that instead"


def _expert_block(layer: nn.Module) -> nn.Module | None:
    """The module of a layer that holds its router and its experts."""
    return next((module for module in layer.modules() if "experts" in dict(module.named_children())), None)


def _router(block: nn.Module) -> Any:
    """The router of an expert block."""
    children = dict(block.named_children())
    return children["router" if "router" in children else "gate"]


def _chosen(router: Any, output: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Which experts a router's output names: it holds their numbers, or nothing but scores and logits of all."""
    numbers = next((part for part in output if not part.is_floating_point()), None)
    return output[-1].topk(router.top_k, dim=-1).indices if numbers is None else numbers
