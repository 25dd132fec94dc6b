"""A Hugging Face directory: config.json, tokenizer.json and safetensors, experts one by one or fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from gguf import GGUFType, GGUFWriter, Metadata, size_label
from safetensors import SafetensorError, safe_open

from ..arch import FAMILIES, Config, Family, Part
from ..arch.base import read_json
from ..arch.tokenizer import add_tokenizer
from ..errors import SourceError
from ..gguf_file import Field, TensorInfo, make_field
from ..qtypes import QType
from .base import Source

_DTYPES = {"F32": QType.F32, "F16": QType.F16, "BF16": QType.BF16}
_INDEX = "model.safetensors.index.json"


class HuggingFaceSource(Source):
    """Reads a checkpoint directory; the family in `arch/` says which GGUF tensors it becomes."""

    def __init__(self, path: Path, *, pre_tokenizer: str | None = None) -> None:
        super().__init__(path)
        self.pre_tokenizer = pre_tokenizer
        self.config = self._read_config()
        self.family = self._find_family()
        self._shards = _Shards(path)
        self.family.check(self.config)
        self._plans = {plan.name: plan for plan in self.family.plan_tensors(self.config, self._shards.shapes)}
        self._refuse_leftovers()
        self.architecture = self.family.gguf_arch
        self.tensors = {
            plan.name: TensorInfo(plan.name, plan.shape, self._shards.qtype(plan.parts[0].tensor))
            for plan in self._plans.values()
        }
        self.require_experts()
        self.fields = self._make_fields()

    def _make_fields(self) -> list[Field]:
        """The metadata llama.cpp's own converter writes: general, hyper-parameters, tokenizer."""
        writer = GGUFWriter(None, self.architecture)
        writer.add_type(GGUFType.MODEL)
        self._add_description(writer)
        self.family.add_metadata(self.config, writer)
        add_tokenizer(self.path, self.config.need("vocab_size"), writer, self.pre_tokenizer)
        return [
            make_field(key, value.type, value.value, value.sub_type)
            for pairs in writer.kv_data
            for key, value in pairs.items()
        ]

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
            piece = self._shards.read(plan.parts[i], first, last)
            pieces.append(piece.to(_torch_dtype(info.qtype)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _read_config(self) -> Config:
        path = self.path / "config.json"
        try:
            return Config(read_json(path), str(path))
        except FileNotFoundError:
            what = "holds no config.json: not a model directory" if any(self.path.iterdir()) else "is empty"
            hint = "give a Hugging Face checkpoint directory or a .gguf file"
            raise SourceError(f"{self.path} {what}", hint) from None

    def _find_family(self) -> Family:
        model_type = self.config.get("model_type")
        quantised = self.config.get("quantization_config")
        if quantised:
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            raise SourceError(
                f"{self.path}: already quantised ({method}); requantising adds its error to ours",
                "use the original bf16, f16 or f32 checkpoint",
            )
        family = FAMILIES.get(str(model_type))
        if family is not None:
            return family
        if not any("expert" in key for key in self.config):
            raise SourceError(
                f"{self.path}: model_type {model_type!r} is a dense model: config.json names no experts",
                "alphaq-gguf allocates bits to experts; use llama-quantize for dense models",
            )
        raise SourceError(
            f"{self.path}: model family {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}",
            "convert it to an f16 GGUF with llama.cpp's convert_hf_to_gguf.py and give that file instead",
        )

    def _refuse_leftovers(self) -> None:
        """Every checkpoint tensor must end up in the file, so that a misread layout cannot lose weights."""
        used = {part.tensor for plan in self._plans.values() for part in plan.parts}
        tied = {"lm_head.weight"} if self.config.get("tie_word_embeddings") else set()
        left = [n for n in self._shards.shapes if n not in used | tied and not n.endswith(self.family.ignored)]
        if left:
            shown = ", ".join(left[:3]) + (" ..." if len(left) > 3 else "")
            raise SourceError(
                f"{self.path}: {len(left)} tensors have no place in {self.family.gguf_arch}: {shown}",
                "the checkpoint is not a plain model of this family",
            )

    def _add_description(self, writer: GGUFWriter) -> None:
        """`general.*` from the model card, generation_config.json and the directory's name."""
        total = sum(info.n_weights for info in self.tensors.values())
        try:
            metadata = Metadata.load(None, self.path, None, total)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            line = str(error).splitlines()[0]
            raise SourceError(
                f"{self.path / 'README.md'}: unreadable model card header: {line}", "fix or remove the file"
            ) from None
        metadata.name = metadata.name or self.path.resolve().name
        if metadata.size_label is None:
            experts = sum(s.n_rows * s.n_cols for s in self.stacks)
            shared = total - sum(s.n_weights for s in self.stacks)
            metadata.size_label = size_label(total, shared, experts, self.stacks[0].n_experts)
        metadata.set_gguf_meta_model(writer)


def _torch_dtype(qtype: QType) -> torch.dtype:
    return {QType.F32: torch.float32, QType.F16: torch.float16, QType.BF16: torch.bfloat16}[qtype]


class _Shards:
    """The safetensors files of a directory behind one name -> tensor lookup."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._dtypes: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file, expected in self._list_files().items():
            handle = self._open(file)
            names = set(handle.keys())
            missing = [name for name in expected or names if name not in names]
            if missing:
                raise SourceError(f"{directory / file}: {_INDEX} promises tensor {missing[0]}, the file lacks it")
            for name in sorted(expected or names):
                piece = handle.get_slice(name)
                self._file_of[name] = file
                self.shapes[name] = tuple(piece.get_shape())
                self._dtypes[name] = piece.get_dtype()

    def _list_files(self) -> dict[str, list[str] | None]:
        """File name -> tensors the index expects in it (None: whatever it holds)."""
        index = self.directory / _INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise SourceError(f"{index}: not a valid shard index: no weight_map", "download it again")
            files: dict[str, list[str] | None] = {}
            for name, file in weight_map.items():
                files[file] = [*(files.get(file) or []), name]
            absent = sorted(file for file in files if not (self.directory / file).is_file())
            if absent:
                raise SourceError(
                    f"{self.directory}: shard {absent[0]} is missing ({len(absent)} of {len(files)} shards absent)",
                    "finish the download",
                )
            return files
        single = sorted(p.name for p in self.directory.glob("*.safetensors"))
        if "model.safetensors" in single:
            return {"model.safetensors": None}
        if single:
            return dict.fromkeys(single)
        pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.directory.glob(pattern)]
        if pickles:
            raise SourceError(
                f"{self.directory}: only a pickle checkpoint ({sorted(pickles)[0]}), which can run code when opened",
                "use a repository or revision with safetensors, or convert it with transformers first",
            )
        raise SourceError(f"{self.directory}: no .safetensors file", "finish the download")

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            path = self.directory / file
            try:
                # pread keeps memory to what is asked for; a mapped file counts as resident memory.
                self._handles[file] = safe_open(path, framework="pt", backend="pread")
            except (SafetensorError, OSError) as error:
                raise SourceError(
                    f"{path}: truncated or corrupt safetensors file: {str(error).splitlines()[0]}", "download it again"
                ) from None
        return self._handles[file]

    def qtype(self, name: str) -> QType:
        """The stored type as a GGUF type; SourceError for a dtype that is not a plain float."""
        found = self._dtypes[name]
        if found not in _DTYPES:
            raise SourceError(
                f"{self.directory / self._file_of[name]}: {name} has dtype {found}, expected BF16, F16 or F32",
                "use the unquantised checkpoint",
            )
        return _DTYPES[found]

    def read(self, part: Part, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) of a part, 2-D (a vector is one row)."""
        piece = self._open(self._file_of[part.tensor]).get_slice(part.tensor)
        offset = part.rows[0] if part.rows else 0
        rows = slice(offset + first, offset + last)
        try:
            if part.expert is not None:
                return piece[part.expert, rows, :]
            if len(self.shapes[part.tensor]) == 1:
                return piece[:].reshape(1, -1)
            return piece[rows, :]
        except SafetensorError as error:
            raise SourceError(f"{self.directory / self._file_of[part.tensor]}: {part.tensor}: {error}") from None
