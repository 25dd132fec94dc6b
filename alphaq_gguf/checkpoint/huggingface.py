"""A Hugging Face directory: config.json, tokenizer.json and safetensors, experts one by one or fused."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from gguf import GGUFType, GGUFValueType, GGUFWriter, Metadata, size_label

from ..arch import FAMILIES, UNFIT, Config, Family, Part, TensorPlan
from ..arch.base import read_json
from ..arch.tokenizer import add_tokenizer
from ..errors import SourceError
from ..gguf_file import Field, TensorInfo, make_field
from ..qtypes import QType
from .base import Source
from .quantised import check_method, dequantise
from .shards import TORCH_DTYPES, LocalShard, SafetensorsWeights, Shard, Weights

# What a token of the vocabulary takes in the metadata with its type and merge: 39 for Qwen's 151,936.
_TOKEN_BYTES = 40

CONFIG_KEY = "alphaq.config"
"""The metadata key under which files keep the language model's config.json."""

# What config.json says about loading a model and not about the model, beside other models inside it (`*_config`).
_LOADING = ("attn_implementation", "auto_map", "dtype", "experts_implementation", "torch_dtype", "transformers_version")


def read_config(directory: Path, label: str) -> Config:
    """A model directory's config.json; SourceError when there is none. `label` is what messages call the model."""
    path = directory / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        what = "holds no config.json: not a model directory" if any(directory.iterdir()) else "is empty"
        hint = "give a Hugging Face checkpoint directory or a .gguf file"
        raise SourceError(f"{label} {what}", hint) from None
    # Models that also see or hear keep the language model's fields one level down.
    text = config.get("text_config")
    return Config({**config, **(text if isinstance(text, dict) else {})}, str(path))


def describe_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that make the language model, without those that say how to load it."""
    return {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and not key.endswith("_config") and key not in _LOADING
    }


class HuggingFaceSource(Source):
    """Reads a checkpoint directory; the family in `arch/` says which GGUF tensors it becomes.

    `shards` are the safetensors files by name where they lie elsewhere, `label` is what messages call
    the checkpoint and `name` what files made of it are called. Without `with_tokenizer`, `fields` holds
    the rest and no tokenizer file is looked for.
    """

    def __init__(
        self,
        path: Path,
        *,
        pre_tokenizer: str | None = None,
        shards: Mapping[str, Callable[[], Shard]] | None = None,
        label: str = "",
        name: str = "",
        with_tokenizer: bool = True,
    ) -> None:
        super().__init__(path, label=label, name=name)
        self.pre_tokenizer = pre_tokenizer
        self.with_tokenizer = with_tokenizer
        self.config = read_config(path, self.label)
        # A copy, since families note in their config what they found among the tensors.
        self.model_config = describe_model(self.config)
        self.family = self._find_family()
        self._weights = self._open_weights(shards)
        self._kept: tuple[Part | None, torch.Tensor] = (None, torch.empty(0))
        self.family.check(self.config)
        self._plans = {plan.name: plan for plan in self.family.plan_tensors(self.config, self._weights.shapes)}
        self._refuse_leftovers()
        self.architecture = self.family.gguf_arch
        self.tensors = {
            plan.name: TensorInfo(plan.name, plan.shape, self._qtype(plan)) for plan in self._plans.values()
        }
        self.require_experts()
        self.omitted_bytes = 0 if with_tokenizer else self.config.need("vocab_size") * _TOKEN_BYTES

    def _open_weights(self, shards: Mapping[str, Callable[[], Shard]] | None) -> Weights:
        if shards is None:
            names = [p.name for p in self.path.iterdir()]
            stored = SafetensorsWeights(self.path, self.label, names, lambda name: LocalShard(self.path / name))
        else:
            stored = SafetensorsWeights(self.path, self.label, shards, lambda name: shards[name]())
        return dequantise(stored, self.config)

    def _qtype(self, plan: TensorPlan) -> QType:
        """The type that holds all parts exactly."""
        found = {self._weights.qtype(part.tensor) for part in plan.parts}
        return found.pop() if len(found) == 1 and not plan.computed else QType.F32

    @property
    def weights(self) -> Weights:
        """The checkpoint's own tensors, under their own names."""
        return self._weights

    @property
    def fields(self) -> list[Field]:
        return self._metadata[0]

    def require_metadata(self) -> None:
        """SourceError when the file's metadata cannot be made."""
        _ = self._metadata

    @property
    def remarks(self) -> list[str]:
        """What the family and its tokenizer are known to differ in; needs the tokenizer as `fields` does."""
        return self._metadata[1]

    @cached_property
    def _metadata(self) -> tuple[list[Field], list[str]]:
        """The fields llama.cpp's own converter writes (general, hyper-parameters, tokenizer), and the remarks."""
        remarks = self.family.remarks(self.config)
        writer = GGUFWriter(None, self.architecture)
        writer.add_type(GGUFType.MODEL)
        self._add_description(writer)
        self.family.add_metadata(self.config, writer)
        if self.with_tokenizer:
            n_vocab, rules = self.config.need("vocab_size"), self.family.tokenizer
            remarks += add_tokenizer(self.path, n_vocab, writer, self.pre_tokenizer, rules)
        fields = [
            make_field(key, value.type, value.value, value.sub_type)
            for pairs in writer.kv_data
            for key, value in pairs.items()
        ]
        config = json.dumps(self.model_config, separators=(",", ":"))
        return [*fields, make_field(CONFIG_KEY, GGUFValueType.STRING, config)], remarks

    @property
    def files(self) -> list[Path]:
        return sorted(p for p in self.path.iterdir() if p.is_file())

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        rows = self._read_torch(name, start, stop)
        return rows.contiguous().view(torch.uint8).numpy().reshape(stop - start, -1)

    def _load_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(self._read_torch(name, start, stop).float().numpy())

    def _read_torch(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) in the stored dtype, gathered from the parts they lie in."""
        plan, info = self._plans[name], self.tensors[name]
        height = info.n_rows // len(plan.parts)
        pieces = []
        for i in range(start // height, -(-stop // height)):
            first, last = max(start - i * height, 0), min(stop - i * height, height)
            part = plan.parts[i]
            if part.transform:
                piece = self._transformed(part, info)[first:last]
            else:
                offset = part.rows[0] if part.rows else 0
                piece = self._weights.read(part.tensor, part.expert, offset + first, offset + last)
            pieces.append(piece.to(TORCH_DTYPES[info.qtype]))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _transformed(self, part: Part, info: TensorInfo) -> torch.Tensor:
        """All rows of a part with a transform; the last one is kept, because rows are asked for in order."""
        kept = self._kept
        if part is not kept[0]:
            assert part.transform is not None
            shape = self._weights.shapes[part.tensor]
            shape = shape if part.expert is None else shape[1:]
            whole = self._weights.read(part.tensor, part.expert, 0, shape[0]).reshape(shape)
            rows = part.transform(whole.float() if self._plans[info.name].computed else whole)
            kept = self._kept = (part, rows.reshape(-1, info.n_cols))
        return kept[1]

    def _find_family(self) -> Family:
        model_type = self.config.get("model_type")
        check_method(self.config, self.path, self.label)
        family = FAMILIES.get(str(model_type))
        if family is not None:
            return family
        if model_type in UNFIT:
            raise SourceError(f"{self.label}: model family {model_type!r}: {UNFIT[model_type]}")
        if not any("expert" in key for key in self.config):
            raise SourceError(
                f"{self.label}: model_type {model_type!r} is a dense model: config.json names no experts",
                "alphaq-gguf allocates bits to experts; use llama-quantize for dense models",
            )
        raise SourceError(
            f"{self.label}: model family {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}",
            "convert it to an f16 GGUF with llama.cpp's convert_hf_to_gguf.py and give that file instead",
        )

    def _refuse_leftovers(self) -> None:
        """Every checkpoint tensor must end up in the file, so that a misread layout cannot lose weights."""
        used = {part.tensor for plan in self._plans.values() for part in plan.parts}
        if self.config.get("tie_word_embeddings"):
            used.add("lm_head.weight")
        left = [n for n in self._weights.shapes if n not in used and not self.family.ignores(self.config, n)]
        if left:
            shown = ", ".join(left[:3]) + (" ..." if len(left) > 3 else "")
            raise SourceError(
                f"{self.label}: {len(left)} tensors have no place in {self.family.gguf_arch}: {shown}",
                "the checkpoint is not a plain model of this family",
            )

    def _add_description(self, writer: GGUFWriter) -> None:
        """`general.*` from the model card, generation_config.json and the directory's name."""
        total = sum(info.n_weights for info in self.tensors.values())
        try:
            with self._named_directory() as directory:
                metadata = Metadata.load(None, directory, None, total)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            line = str(error).splitlines()[0]
            raise SourceError(
                f"{self.path / 'README.md'}: unreadable model card header: {line}", "fix or remove the file"
            ) from None
        metadata.name = metadata.name or self.name
        if metadata.size_label is None:
            experts = sum(s.n_rows * s.n_cols for s in self.stacks)
            shared = total - sum(s.n_weights for s in self.stacks)
            metadata.size_label = size_label(total, shared, experts, self.stacks[0].n_experts)
        metadata.set_gguf_meta_model(writer)

    @contextmanager
    def _named_directory(self) -> Iterator[Path]:
        """A directory with the description files that bears the model's name, which a download cache does not."""
        if self.path.resolve().name == self.name:
            yield self.path
            return
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / self.name
            directory.mkdir()
            for file in ("README.md", "config.json", "generation_config.json"):
                if (self.path / file).is_file():
                    shutil.copyfile(self.path / file, directory / file)
            yield directory
