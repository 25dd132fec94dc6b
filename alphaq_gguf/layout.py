"""A file laid out before any weight is read: header, tensors with offsets, size."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from .calibration.imatrix import ImportanceMatrix
from .checkpoint import Source
from .checkpoint.base import find_stacks
from .checkpoint.huggingface import CONFIG_KEY
from .container import Container, stack_type
from .errors import AlphaQError
from .gguf_file import Field, TensorInfo, build_header, make_field
from .guard import declare
from .qtypes import QType, file_type, row_bytes
from .recipe import Recipe, embedded_json, matrix_types

# Keys that describe the output and not the source; the last are those of llama-quantize.
_OWN_KEYS = ("general.file_type", "general.quantization_version", "general.quantized_by")
_OWN_PREFIXES = ("alphaq.", "quantize.imatrix.")


@dataclass(frozen=True)
class Plan:
    """A file laid out: header bytes, tensors with offsets in writing order, size in bytes.

    `containers` are the stacks whose experts have types of their own, with the places of these.
    """

    header: bytes
    tensors: list[TensorInfo]
    size: int
    containers: dict[str, Container]

    @property
    def expert_bpw(self) -> float:
        """Stored bits per expert weight, with what containers leave unused."""
        return expert_bpw(self.tensors)


def expert_bpw(tensors: Iterable[TensorInfo]) -> float:
    """Stored bits per weight of the expert stacks among a file's tensors."""
    found = {info.name: info for info in tensors}
    stacks = [found[stack.name] for stack in find_stacks(found.values())]
    return sum(info.n_bytes for info in stacks) * 8 / sum(info.n_weights for info in stacks)


def alignment_of(source: Source) -> int:
    """Bytes that every tensor of the output is aligned to: as in the source, else the format's default."""
    return next((f.value for f in source.fields if f.key == "general.alignment"), GGUF_DEFAULT_ALIGNMENT)


def plan_file(source: Source, recipe: Recipe, imatrix: ImportanceMatrix | None = None) -> Plan:
    """Lay out the file `recipe` makes of `source`, rounded with `imatrix` if given, without reading any weights.

    AlphaQError when the recipe does not give each tensor one type, or a stack types that nothing can hold.
    """
    types = matrix_types(recipe, source)
    infos, containers = stored_tensors(source.tensors.values(), types)
    return lay_out(source, _output_fields(source, recipe, infos, types, imatrix), infos, containers)


def lay_out(
    source: Source, fields: Iterable[Field], infos: Sequence[TensorInfo], containers: dict[str, Container]
) -> Plan:
    """The file of these tensors and this metadata, which tells of the containers as well."""
    if containers:
        fields = declare(fields, source.architecture, list(containers), [stack.name for stack in source.stacks])
    header, placed, size = build_header(fields, infos, alignment_of(source))
    return Plan(header, placed, size, containers)


def stored_tensors(
    tensors: Iterable[TensorInfo], types: Mapping[str, Sequence[QType]]
) -> tuple[list[TensorInfo], dict[str, Container]]:
    """The tensors as a file declares them when their matrices have these `types`, and those that are containers."""
    infos, containers = [], {}
    for info in tensors:
        qtype, shape = types[info.name][0], info.shape
        if len(types[info.name]) > 1:
            try:
                qtype, container = stack_type((shape[0], shape[1], shape[2]), types[info.name])
            except ValueError as error:
                raise AlphaQError(f"{info.name}: {error}", "give all of its experts one type") from None
            if container is not None:
                containers[info.name] = container
        infos.append(TensorInfo(info.name, shape, qtype))
    return infos, containers


def _output_fields(
    source: Source,
    recipe: Recipe,
    infos: Sequence[TensorInfo],
    types: Mapping[str, Sequence[QType]],
    imatrix: ImportanceMatrix | None,
) -> list[Field]:
    """The source's metadata unchanged, then what describes this file."""
    by_type: dict[QType, int] = {}
    for info in infos:
        for qtype in types[info.name]:
            rows = info.n_rows // len(types[info.name])
            by_type[qtype] = by_type.get(qtype, 0) + rows * row_bytes(qtype, info.n_cols)
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
        ("alphaq.expert_bpw", GGUFValueType.FLOAT32, expert_bpw(infos)),
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
    own.append(("alphaq.recipe", GGUFValueType.STRING, json.dumps(embedded_json(recipe), separators=(",", ":"))))
    return kept + [make_field(*entry) for entry in own]
