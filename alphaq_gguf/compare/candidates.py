"""What a file to judge is, told from its header or recipe alone: size, types, and how it came about."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from ..checkpoint import Source
from ..checkpoint.gguf import GGUFSource
from ..errors import AlphaQError, SourceError
from ..gguf_file import TensorInfo
from ..layout import expert_bpw, lay_out, stored_tensors
from ..qtypes import FLOAT_TYPES, QType
from ..recipe import check_source, load_recipe, matrix_types
from .data import Candidate, StackTypes


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
    recipe = _embedded_recipe(file)
    file_type = next((field.value for field in file.fields if field.key == "general.file_type"), None)
    preset = "" if file.containers else _preset_of(file_type, file.tensors.values())
    return _candidate(
        path,
        file,
        file.matrix_types,
        file.tensors.values(),
        fingerprint=digest.hexdigest(),
        n_bytes=sum(part.stat().st_size for part in file.files),
        recipe=recipe,
        origin=str(recipe["settings"]["strategy"]) if recipe else preset,
        granularity=recipe.get("granularity", "expert") if file.containers else "stack",
    )


def _embedded_recipe(file: GGUFSource) -> dict[str, Any]:
    """The recipe in the file; {} where there is none, or the types are not those it says.

    llama-quantize copies the metadata of what it quantises, and with it a recipe.
    """
    text = next((field.value for field in file.fields if field.key == "alphaq.recipe"), "{}")
    try:
        recipe, types = json.loads(text), file.matrix_types
        own = all(_named_types(unit, types[unit["tensor"]]) for unit in recipe["units"])
        whole = isinstance(recipe["settings"], dict) and isinstance(recipe["result"], dict)
        return recipe if own and whole and "strategy" in recipe["settings"] else {}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return {}


def _named_types(unit: dict[str, Any], types: Sequence[QType]) -> bool:
    """Whether a unit of an embedded recipe gives a tensor's matrices these types, all the same or by expert."""
    if "experts" not in unit:
        return {qtype.name for qtype in types} == {unit["qtype"]}
    named = [(xid, name) for name, experts in unit["experts"].items() for xid in experts]
    return sorted(named) == [(xid, qtype.name) for xid, qtype in enumerate(types)]


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
    check_source(recipe, source, str(path))
    types = matrix_types(recipe, source, str(path))
    infos, containers = stored_tensors(source.tensors.values(), types)
    return _candidate(
        path,
        source,
        types,
        infos,
        fingerprint=recipe_fingerprint(path),
        # As the file's would be, but for the recipe in it.
        n_bytes=lay_out(source, source.fields, infos, containers).size,
        recipe={"settings": recipe.settings, "result": recipe.result},
        origin=str(recipe.settings.get("strategy") or ""),
        granularity=recipe.granularity,
    )


def recipe_fingerprint(path: Path) -> str:
    """What identifies a recipe, in which the model it was made for is named."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _candidate(
    path: Path,
    source: Source,
    matrices: Mapping[str, Sequence[QType]],
    stored: Iterable[TensorInfo],
    *,
    fingerprint: str,
    n_bytes: int,
    recipe: Mapping[str, Any],
    origin: str,
    granularity: str,
) -> Candidate:
    """`matrices` are the types of each tensor's, `stored` the tensors as the file declares them."""
    types: Counter[str] = Counter()
    for name, found in matrices.items():
        for qtype, count in Counter(found).items():
            types[qtype.name] += source.tensors[name].n_weights // len(found) * count
    stored = list(stored)
    return Candidate(
        name=path.stem,
        fingerprint=fingerprint,
        n_bytes=n_bytes,
        bpw=8 * sum(info.n_bytes for info in stored) / types.total(),
        expert_bpw=expert_bpw(stored),
        granularity=granularity,
        origin=origin,
        budget_bpw=recipe.get("settings", {}).get("bpw"),
        types=dict(types),
        stacks=tuple(
            StackTypes(
                stack.bid,
                stack.proj,
                {qtype.name: count for qtype, count in sorted(Counter(matrices[stack.name]).items())},
            )
            for stack in source.stacks
        ),
        stacking=recipe.get("result", {}).get("stacking"),
    )
