"""What a file to judge is, told from its header or recipe alone: size, types, and how it came about."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from ..checkpoint import Source
from ..checkpoint.gguf import GGUFSource
from ..errors import AlphaQError, SourceError
from ..gguf_file import TensorInfo, align, build_header
from ..layout import alignment_of
from ..qtypes import FLOAT_TYPES, QType, fits, row_bytes
from ..recipe import Recipe, load_recipe
from .data import Candidate, StackTypes

_Counts = dict[str, Counter[QType]]
"""Of each tensor how many matrices have a type: of an expert stack its experts, of any other tensor one."""


def describe_candidate(path: Path, source: Source | None = None) -> Candidate:
    """What there is to know of a GGUF, or of a recipe for `source`, before it runs.

    Weights are read for the fingerprint only, of large files samples. AlphaQError for a file that is neither, and for a
    recipe without the source it was made for.
    """
    if not path.is_file():
        raise SourceError(f"{path} is not a file", "give a .gguf file, or a recipe (.json)")
    return _describe_recipe(path, source) if path.suffix == ".json" else _describe_gguf(path)


def _describe_gguf(path: Path) -> Candidate:
    file = GGUFSource(path, allow_requantize=True)
    # The weights alone do not make the model: hyper-parameters and the tokenizer are in the metadata.
    digest = hashlib.sha256(file.fingerprint.encode())
    for field in file.fields:
        digest.update(f"{field.key} {field.vtype.name} {len(field.raw)} ".encode() + field.raw)
    matrices = {stack.name: stack.n_experts for stack in file.stacks}
    counts: _Counts = {name: Counter({info.qtype: matrices.get(name, 1)}) for name, info in file.tensors.items()}
    recipe = _embedded_recipe(file)
    file_type = next((field.value for field in file.fields if field.key == "general.file_type"), None)
    return _candidate(
        path,
        file,
        counts,
        fingerprint=digest.hexdigest(),
        n_bytes=sum(part.stat().st_size for part in file.files),
        recipe=recipe,
        origin=str(recipe["settings"]["strategy"]) if recipe else _preset_of(file_type, file.tensors.values()),
    )


def _embedded_recipe(file: GGUFSource) -> dict[str, Any]:
    """The recipe in the file; {} where there is none, or the types are not those it says.

    llama-quantize copies the metadata of what it quantises, and with it a recipe.
    """
    text = next((field.value for field in file.fields if field.key == "alphaq.recipe"), "{}")
    try:
        recipe = json.loads(text)
        own = all(file.tensors[unit["tensor"]].qtype.name == unit["qtype"] for unit in recipe["units"])
        whole = isinstance(recipe["settings"], dict) and isinstance(recipe["result"], dict)
        return recipe if own and whole and "strategy" in recipe["settings"] else {}
    except (json.JSONDecodeError, KeyError, TypeError):
        return {}


def _preset_of(file_type: Any, tensors: Iterable[TensorInfo]) -> str:
    """The origin of a quantised file without a recipe, by its label; "" for floats and labels that name nothing."""
    labels = {member.value: member.name for member in LlamaFileType}
    label = labels.get(file_type, "") if isinstance(file_type, int) else ""
    if not label.startswith("MOSTLY_") or all(info.qtype in FLOAT_TYPES for info in tensors):
        return ""
    return f"preset {label.removeprefix('MOSTLY_')}"


def _describe_recipe(path: Path, source: Source | None) -> Candidate:
    recipe = load_recipe(path)
    if source is None:
        raise AlphaQError(
            f"{path}: a recipe is no file without the model it was made for", "give the model as --reference"
        )
    if recipe.source != source.fingerprint:
        raise AlphaQError(
            f"{path}: made for another model, {recipe.source[:12]}: {source.label} is {source.fingerprint[:12]}",
            "allocate again for this model",
        )
    counts = _recipe_counts(path, source, recipe)
    # As the file's would be, but for the recipe in it.
    infos = [TensorInfo(info.name, info.shape, min(counts[info.name])) for info in source.tensors.values()]
    alignment = alignment_of(source)
    header = build_header(source.fields, infos, alignment)[0]
    tensors = sum(align(_n_bytes(info, counts[info.name]), alignment) for info in source.tensors.values())
    return _candidate(
        path,
        source,
        counts,
        fingerprint=recipe_fingerprint(path),
        n_bytes=len(header) + tensors,
        recipe={"settings": recipe.settings, "result": recipe.result},
        origin=str(recipe.settings.get("strategy") or ""),
        granularity=recipe.granularity,
    )


def recipe_fingerprint(path: Path) -> str:
    """What identifies a recipe, in which the model it was made for is named."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _recipe_counts(path: Path, source: Source, recipe: Recipe) -> _Counts:
    """The types a recipe gives each tensor; AlphaQError unless it covers all, with types that fit their rows."""
    experts = {stack.name: stack.n_experts for stack in source.stacks}
    counts: _Counts = {name: Counter({qtype: 1}) for name, qtype in recipe.tensors.items()}
    for unit in recipe.units:
        n_experts = experts.get(unit.tensor, 0) if unit.expert is None else 1
        counts.setdefault(unit.tensor, Counter())[unit.qtype] += n_experts
    if {name: found.total() for name, found in counts.items()} != {
        name: experts.get(name, 1) for name in source.tensors
    }:
        raise AlphaQError(f"{path}: does not cover the model's tensors exactly, each once", "allocate again")
    for name, found in counts.items():
        n_cols = source.tensors[name].n_cols
        if unfit := [qtype.name for qtype in found if not fits(qtype, n_cols)]:
            raise AlphaQError(f"{path}: {name} has rows of {n_cols}, which {unfit[0]} blocks do not divide")
    return counts


def _candidate(
    path: Path,
    source: Source,
    counts: _Counts,
    *,
    fingerprint: str,
    n_bytes: int,
    recipe: Mapping[str, Any],
    origin: str,
    granularity: str = "stack",
) -> Candidate:
    tensors = source.tensors
    stacks = {stack.name: stack for stack in source.stacks}
    types: Counter[str] = Counter()
    for name, found in counts.items():
        for qtype, count in found.items():
            types[qtype.name] += tensors[name].n_weights // found.total() * count
    tensor_bytes = {name: _n_bytes(tensors[name], found) for name, found in counts.items()}
    return Candidate(
        name=path.stem,
        fingerprint=fingerprint,
        n_bytes=n_bytes,
        bpw=8 * sum(tensor_bytes.values()) / types.total(),
        expert_bpw=8 * sum(tensor_bytes[name] for name in stacks) / sum(stack.n_weights for stack in stacks.values()),
        granularity=granularity,
        origin=origin,
        budget_bpw=recipe.get("settings", {}).get("bpw"),
        types=dict(types),
        stacks=tuple(
            StackTypes(stack.bid, stack.proj, {qtype.name: count for qtype, count in sorted(counts[name].items())})
            for name, stack in stacks.items()
        ),
        stacking=recipe.get("result", {}).get("stacking"),
    )


def _n_bytes(info: TensorInfo, counts: Counter[QType]) -> int:
    """Stored bytes of a tensor whose matrices have these types."""
    rows = info.n_rows // counts.total()
    return sum(count * rows * row_bytes(qtype, info.n_cols) for qtype, count in counts.items())
