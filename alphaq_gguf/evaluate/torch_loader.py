"""transformers' model of GGUF blocks: each tensor put back where its rows came from, experts left packed."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from typing import Any

import torch
from torch import nn

from ..arch import FAMILIES, Config, Family, TensorPlan
from ..arch.experts import EXPERT_RULES, ExpertRule
from ..checkpoint.base import ExpertStack, find_stacks
from ..encode import decode_rows, row_spans
from ..errors import AlphaQError
from ..gguf_file import TensorInfo
from ..qtypes import QType, row_bytes
from .activation_rounding import round_products
from .blocks import Blocks
from .packed_experts import IMPLEMENTATION, READABLE_TYPES, PackedLayer, activation_of, attach, pack, register
from .transformers_library import open_transformers, parameters_on_meta

_OTHER_ENGINE = "run it with --engine llama"
_OUTPUT = "output.weight"
_LAYER = re.compile(r"blk\.(\d+)\.")
_EXPERTS = re.compile(r"_exps\.(weight|bias)$")
# llama.cpp's copies of what transformers computes from config.json.
_ROPE_FACTORS = "rope_f"
# Weights decoded at once: 64 MiB of float32.
_CHUNK_WEIGHTS = 1 << 24


def load_model(
    blocks: Blocks, device: torch.device, dtype: torch.dtype, threads: int = 1, round_activations: bool = False
) -> Any:
    """transformers' model of `blocks` on `device`: experts as blocks, all else as `dtype`.

    Takes about as much memory as these, and one tensor. With `round_activations` it rounds what it multiplies with
    quantised weights as llama.cpp does. AlphaQError when transformers is missing or does not know the model,
    config.json and tensors do not match, experts are of types that the kernels lack, or memory does not suffice.
    """
    family = _find_family(blocks)
    with open_transformers(blocks.label, _OTHER_ENGINE) as library:
        register()
        model = _build(library, blocks, family, dtype)
    loader = _Loader(blocks, family, model, device, dtype, threads)
    model = loader.load()
    if round_activations:
        round_products(model, loader.plans.values(), blocks.types)
    return model


def check_memory(label: str, n_bytes: int, device: torch.device) -> None:
    """AlphaQError when `device` has not so much memory: a GPU what is free, the CPU what is installed."""
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if n_bytes > available:
        raise AlphaQError(
            f"{label}: needs {n_bytes / 2**30:.2f} GiB on {device} without its KV cache, which has "
            f"{available / 2**30:.2f} GiB",
            "use another --device, a smaller file, or --engine llama with some --gpu-layers",
        )


def _find_family(blocks: Blocks) -> Family:
    arch, model_type = blocks.source.architecture, str(blocks.config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(sorted({family.gguf_arch for family in FAMILIES.values()}))
        raise AlphaQError(
            f"{blocks.label}: models of type {model_type!r} ({arch}) do not run in PyTorch, only {known}", _OTHER_ENGINE
        )
    if family.gguf_arch != arch:
        raise AlphaQError(
            f"{blocks.label}: of architecture {arch}, but its config.json is one of {model_type} ({family.gguf_arch})",
            "give the directory of the model that the file was made from",
        )
    return family


def _build(library: Any, blocks: Blocks, family: Family, dtype: torch.dtype) -> Any:
    """The model without weights, its output tied to its embedding where the file has no other."""
    known, model_type = library.CONFIG_MAPPING, blocks.config["model_type"]
    # Where a family goes by another name, checkpoints bring code of their own, which computes the same.
    config = known[model_type if model_type in known else family.model_type].from_dict(blocks.config)
    config.tie_word_embeddings = _OUTPUT not in blocks.types
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    with parameters_on_meta():
        model = library.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.config._experts_implementation = IMPLEMENTATION
    return model.eval()


class _Loader:
    """Fills one model. `plans` are the GGUF tensors that the model's own tensors would become."""

    def __init__(
        self, blocks: Blocks, family: Family, model: Any, device: torch.device, dtype: torch.dtype, threads: int
    ) -> None:
        self.blocks = blocks
        self.model = model
        self.device = device
        self.dtype = dtype
        self.threads = threads
        self.rule = EXPERT_RULES.get(family.gguf_arch, ExpertRule())
        self._in_float32 = set(model._keep_in_fp32_modules_strict or ())
        if dtype == torch.float16:
            self._in_float32 |= set(model._keep_in_fp32_modules or ())
        tied = {"tie_word_embeddings": model.config.tie_word_embeddings}
        config = Config({**blocks.config, **tied}, f"{blocks.label}: config.json")
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        plans = family.plan_tensors(config, shapes)
        # Constants are what llama.cpp needs and transformers computes from config.json.
        self.constants = {plan.name for plan in plans if plan.computed and plan.parts[0].inverse is None}
        self.plans = {plan.name: plan for plan in plans if plan.name not in self.constants}
        self.stacks = find_stacks(TensorInfo(p.name, p.shape, QType.F32) for p in self.plans.values())
        self._filled: Counter[str] = Counter()

    def load(self) -> Any:
        self._check_tensors()
        self._check_types()
        check_memory(self.blocks.label, self._n_bytes(), self.device)
        self._pack_experts()
        for plan in self.plans.values():
            if not _EXPERTS.search(plan.name):
                self._fill(plan)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        self.model.tie_weights()
        self._check_filled()
        return self.model

    def _check_tensors(self) -> None:
        """AlphaQError unless the file has what the model needs, shaped so, and nothing more."""
        found = self.blocks.source.tensors
        for name, plan in self.plans.items():
            if name not in found:
                raise self._mismatch(f"tensor {name} is missing")
            if _squeezed(found[name].shape) != _squeezed(plan.shape):
                raise self._mismatch(f"{name} has shape {list(found[name].shape)}, the model's is {list(plan.shape)}")
        n_layers = self.model.config.num_hidden_layers
        for name in found.keys() - self.plans.keys() - self.constants:
            layer = _LAYER.match(name)
            is_draft = layer is not None and int(layer[1]) >= n_layers
            if not is_draft and not name.startswith(_ROPE_FACTORS):
                raise self._mismatch(f"tensor {name} has no place in transformers' model")

    def _mismatch(self, problem: str) -> AlphaQError:
        hint = f"see that the config.json is that of this very model, or {_OTHER_ENGINE}"
        return AlphaQError(f"{self.blocks.label}: {problem}", hint)

    def _check_types(self) -> None:
        for stack in self.stacks:
            for qtype in self.blocks.types[stack.name]:
                if qtype not in READABLE_TYPES:
                    known = ", ".join(readable.name for readable in READABLE_TYPES)
                    raise AlphaQError(
                        f"{self.blocks.label}: {stack.name} is {qtype.name}, which the kernels do not read; "
                        f"they read {known}",
                        f"convert it again with --types, or {_OTHER_ENGINE}",
                    )

    def _n_bytes(self) -> int:
        """What the filled model takes."""
        packed = sum(
            stack.n_rows * row_bytes(qtype, stack.n_cols)
            for stack in self.stacks
            for qtype in self.blocks.types[stack.name]
        )
        other = sum(math.prod(plan.shape) for name, plan in self.plans.items() if not _EXPERTS.search(name))
        return packed + other * self.dtype.itemsize

    def _pack_experts(self) -> None:
        layers: dict[int, dict[str, ExpertStack]] = {}
        for stack in self.stacks:
            layers.setdefault(stack.bid, {})[stack.proj] = stack
        for stacks in layers.values():
            packed = {}
            for proj, stack in stacks.items():
                spans = row_spans(stack.n_experts * stack.n_rows, stack.n_rows)
                matrices = (torch.from_numpy(self.blocks.read(stack.name, *span)) for span in spans)
                bias_name = stack.name.removesuffix("weight") + "bias"
                bias = self._read(self.plans[bias_name]) if bias_name in self.plans else None
                packed[proj] = pack(zip(matrices, self.blocks.types[stack.name], strict=True), bias, self.device)
            layer = PackedLayer(**packed, activation=activation_of(self.rule))
            module = self.plans[stacks["down"].name].parts[0].tensor.rpartition(".")[0]
            attach(self.model, module, layer, self.rule, self.model.config.num_experts_per_tok)

    def _read(self, plan: TensorPlan, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a tensor that holds no experts' matrices, all of them by default: float32 [rows, n_cols]."""
        stop = math.prod(plan.shape[:-1]) if stop is None else stop
        blocks = self.blocks.read(plan.name, start, stop)
        return torch.from_numpy(decode_rows(blocks, self.blocks.types[plan.name][0], plan.shape[-1], self.threads))

    def _fill(self, plan: TensorPlan) -> None:
        """Put a tensor's rows where the plan takes them from."""
        height, n_cols = math.prod(plan.shape[:-1]) // len(plan.parts), plan.shape[-1]
        for i, part in enumerate(plan.parts):
            whole = self._target(part.tensor)
            whole = whole if part.expert is None else whole[part.expert]
            first = i * height
            if part.transform is None:
                rows = (whole[slice(*part.rows)] if part.rows else whole).view(height, n_cols)
                for start, stop in row_spans(height, max(1, _CHUNK_WEIGHTS // n_cols)):
                    rows[start:stop] = self._read(plan, first + start, first + stop)
            else:
                values = self._read(plan, first, first + height)
                if part.inverse is not None:
                    whole.copy_(part.inverse(values.view(whole.shape)))
                else:
                    # Where each weight went is what became of its number.
                    places = part.transform(torch.arange(whole.numel()).view(whole.shape))
                    whole.view(-1)[places.flatten().to(self.device)] = values.flatten().to(whole)
            self._filled[part.tensor] += height * n_cols

    def _target(self, name: str) -> torch.Tensor:
        """The model's parameter or buffer `name`, given memory when it is first asked for."""
        path, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(path)
        tensor = getattr(owner, leaf)
        if name not in self._filled:
            is_parameter = isinstance(tensor, nn.Parameter)
            dtype = torch.float32 if not is_parameter or any(p in name for p in self._in_float32) else self.dtype
            tensor = torch.empty(tensor.shape, dtype=dtype, device=self.device)
            setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        return tensor.detach()

    def _check_filled(self) -> None:
        """AlphaQError unless every parameter and stored buffer, or what it is tied to, has got all of its values."""
        tensors = self.model.state_dict(keep_vars=True)
        filled = {id(tensors[name]) for name, count in self._filled.items() if tensors[name].numel() == count}
        for name, tensor in tensors.items():
            if id(tensor) not in filled:
                raise self._mismatch(f"nothing in the file tells transformers' {name}")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without leading dimensions of 1, which converters write or leave out."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
