"""A file laid out before any weight is read: header, tensors with offsets, size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from .calibration.imatrix import ImportanceMatrix
from .checkpoint import Source
from .checkpoint.huggingface import CONFIG_KEY
from .gguf_file import Field, TensorInfo, build_header, make_field
from .qtypes import QType, file_type
from .recipe import Recipe, to_json

_SIZES = ("file_bytes", "memory_bytes")
# Keys that describe the output and not the source; the last are those of llama-quantize.
_OWN_KEYS = ("general.file_type", "general.quantization_version", "general.quantized_by")
_OWN_PREFIXES = ("alphaq.", "quantize.imatrix.")


@dataclass(frozen=True)
class Plan:
    """A file laid out: header bytes, tensors with offsets in writing order, size in bytes."""

    header: bytes
    tensors: list[TensorInfo]
    size: int


def alignment_of(source: Source) -> int:
    """Bytes that every tensor of the output is aligned to: as in the source, else the format's default."""
    return next((f.value for f in source.fields if f.key == "general.alignment"), GGUF_DEFAULT_ALIGNMENT)


def plan_file(source: Source, recipe: Recipe, imatrix: ImportanceMatrix | None = None) -> Plan:
    """Lay out the file `recipe` makes of `source`, rounded with `imatrix` if given, without reading any weights."""
    types = recipe.types
    infos = [TensorInfo(info.name, info.shape, types[info.name]) for info in source.tensors.values()]
    fields = _output_fields(source, recipe, infos, imatrix)
    header, placed, size = build_header(fields, infos, alignment_of(source))
    return Plan(header, placed, size)


def _output_fields(
    source: Source, recipe: Recipe, infos: Sequence[TensorInfo], imatrix: ImportanceMatrix | None
) -> list[Field]:
    """The source's metadata unchanged, then what describes this file."""
    by_type: dict[QType, int] = {}
    for info in infos:
        by_type[info.qtype] = by_type.get(info.qtype, 0) + info.n_bytes
    kept = [
        f
        for f in source.fields
        if f.key == CONFIG_KEY or (f.key not in _OWN_KEYS and not f.key.startswith(_OWN_PREFIXES))
    ]
    own: list[tuple[str, GGUFValueType, Any]] = [
        ("general.quantized_by", GGUFValueType.STRING, "alphaq-gguf"),
        ("general.file_type", GGUFValueType.UINT32, int(file_type(by_type))),
        ("general.quantization_version", GGUFValueType.UINT32, GGML_QUANT_VERSION),
        ("alphaq.version", GGUFValueType.STRING, recipe.tool.removeprefix("alphaq-gguf ")),
        ("alphaq.strategy", GGUFValueType.STRING, str(recipe.settings.get("strategy"))),
        ("alphaq.expert_bpw", GGUFValueType.FLOAT32, recipe.expert_bpw),
        ("alphaq.source_hash", GGUFValueType.STRING, recipe.source),
    ]
    for key in ("bpw", "size_bytes"):
        if recipe.settings.get(key) is not None:
            vtype = GGUFValueType.FLOAT32 if key == "bpw" else GGUFValueType.UINT64
            own.append((f"alphaq.budget_{key}", vtype, recipe.settings[key]))
    if recipe.result.get("gamma") is not None:
        own.append(("alphaq.gamma", GGUFValueType.FLOAT32, recipe.result["gamma"]))
    if imatrix is not None:
        own.append(("quantize.imatrix.file", GGUFValueType.STRING, Path(imatrix.label).name))
        if imatrix.datasets:
            own.append(("quantize.imatrix.dataset", GGUFValueType.STRING, ", ".join(imatrix.datasets)))
    # The file's own tensor table holds the other tensors' types, and its size would describe the very
    # file it is in: leaving both out keeps the metadata small and the layout free of a cycle.
    data = {key: value for key, value in to_json(recipe).items() if key != "tensors"}
    data["result"] = {key: value for key, value in data["result"].items() if key not in _SIZES}
    own.append(("alphaq.recipe", GGUFValueType.STRING, json.dumps(data, separators=(",", ":"))))
    return kept + [make_field(*entry) for entry in own]
