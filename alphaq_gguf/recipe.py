"""The recipe: an allocation as a readable JSON file, and as llama-quantize's --tensor-type-file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import Source
from .encode import ENCODERS
from .errors import AlphaQError
from .qtypes import QType, fits, parse_qtype, row_bytes

FORMAT = "alphaq-recipe"
SCHEMA = 1
GRANULARITIES = ("stack", "expert", "expert-shared")

_SIZES = ("file_bytes", "memory_bytes")


@dataclass(frozen=True)
class RecipeUnit:
    """The type of an expert stack, or of one `expert` in it.

    `n_bytes` without alignment; `cost` None for strategies without a cost table.
    """

    tensor: str
    layer: int
    proj: str
    n_weights: int
    qtype: QType
    n_bytes: int
    expert: int | None = None
    alpha_median: float | None = None
    alpha_min: float | None = None
    alpha_max: float | None = None
    sensitivity: float | None = None
    cost: float | None = None


@dataclass(frozen=True)
class Recipe:
    """An allocation. `units` are expert stacks or experts, `tensors` the types of all other tensors."""

    tool: str
    source: str
    architecture: str
    settings: dict[str, Any]
    result: dict[str, Any]
    units: tuple[RecipeUnit, ...]
    tensors: dict[str, QType] = field(default_factory=dict)
    granularity: str = "stack"

    @property
    def expert_bytes(self) -> int:
        return sum(unit.n_bytes for unit in self.units)

    @property
    def expert_bpw(self) -> float:
        """Stored bits per expert weight."""
        return self.expert_bytes * 8 / sum(unit.n_weights for unit in self.units)

    @property
    def types(self) -> dict[str, QType]:
        """Every tensor's type. ValueError for a recipe that has no such thing, with a type for each expert."""
        if self.granularity != "stack":
            raise ValueError(f"a recipe of granularity {self.granularity!r} has no type per tensor")
        return {**self.tensors, **{unit.tensor: unit.qtype for unit in self.units}}

    def histogram(self) -> Counter[str]:
        """Expert weights by type name."""
        counts: Counter[str] = Counter()
        for unit in self.units:
            counts[unit.qtype.name] += unit.n_weights
        return counts


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, in the order a reader wants them."""
    units = []
    for unit in recipe.units:
        entry = asdict(unit)
        entry["qtype"] = unit.qtype.name
        units.append({key: value for key, value in entry.items() if value is not None})
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "granularity": recipe.granularity,
        "tool": recipe.tool,
        "source": recipe.source,
        "architecture": recipe.architecture,
        "settings": recipe.settings,
        "result": recipe.result,
        "units": units,
        "tensors": {name: qtype.name for name, qtype in recipe.tensors.items()},
    }


def embedded_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it is kept in the GGUF that it makes, where types of single experts are told by stack and type.

    The file's own tensor table holds the other tensors' types, and its size would describe the very file it is in:
    leaving both out keeps the metadata small and the layout free of a cycle.
    """
    data = {key: value for key, value in to_json(recipe).items() if key != "tensors"}
    data["result"] = {key: value for key, value in data["result"].items() if key not in _SIZES}
    stacks: dict[str, list[RecipeUnit]] = {}
    for unit in recipe.units:
        if unit.expert is not None:
            stacks.setdefault(unit.tensor, []).append(unit)
    whole = [entry for entry in data["units"] if "expert" not in entry]
    data["units"] = whole + [_by_type(units) for units in stacks.values()]
    return data


def _by_type(units: Sequence[RecipeUnit]) -> dict[str, Any]:
    """The experts of one stack as one unit, with their numbers by type."""
    experts: dict[str, list[int | None]] = {}
    for unit in units:
        experts.setdefault(unit.qtype.name, []).append(unit.expert)
    return {
        "tensor": units[0].tensor,
        "layer": units[0].layer,
        "proj": units[0].proj,
        "n_weights": sum(unit.n_weights for unit in units),
        "n_bytes": sum(unit.n_bytes for unit in units),
        "experts": experts,
    }


def from_json(data: Any, where: str) -> Recipe:
    """Parse a recipe; AlphaQError says what is wrong with it."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise AlphaQError(f'{where}: not a recipe (no "format": "{FORMAT}")', "write one with `alphaq-gguf allocate`")
    if data.get("schema") != SCHEMA or data.get("granularity") not in GRANULARITIES:
        raise AlphaQError(
            f"{where}: recipe of schema {data.get('schema')} and granularity {data.get('granularity')!r}, "
            f"this version reads schema {SCHEMA} and granularity {' or '.join(GRANULARITIES)}",
            "allocate again with this version",
        )
    try:
        for key, kind in (("tool", str), ("source", str), ("architecture", str), ("settings", dict), ("result", dict)):
            if not isinstance(data[key], kind):
                raise TypeError(f"{key} is {data[key]!r}")
        for values, key in ((data["settings"], "bpw"), (data["settings"], "size_bytes"), (data["result"], "gamma")):
            if not isinstance(values.get(key), int | float | None):
                raise TypeError(f"{key} is {values[key]!r}")
        imatrix = data["settings"].get("imatrix")
        if imatrix is not None and not all(isinstance(imatrix[key], str) for key in ("file", "digest")):
            raise TypeError(f"imatrix is {imatrix!r}")
        if data["settings"].get("encoder", "libggml") not in ENCODERS:
            raise ValueError(f"encoder is {data['settings']['encoder']!r}, known are {', '.join(ENCODERS)}")
        units = tuple(RecipeUnit(**{**entry, "qtype": parse_qtype(entry["qtype"])}) for entry in data["units"])
        if not all(isinstance(unit.tensor, str) for unit in units):
            raise TypeError("a unit without a tensor name")
        if not all(unit.expert is None or type(unit.expert) is int for unit in units):
            raise TypeError("a unit's expert that is no number")
        tensors = {name: QType[qtype] for name, qtype in data["tensors"].items()}
        return Recipe(
            data["tool"],
            data["source"],
            data["architecture"],
            data["settings"],
            data["result"],
            units,
            tensors,
            data["granularity"],
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise AlphaQError(f"{where}: damaged recipe: {error}", "allocate again") from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe as JSON, one unit a line."""
    data = to_json(recipe)
    units = data.pop("units")
    tensors = data.pop("tensors")
    head = json.dumps(data, indent=2)[:-2]
    lines = ",\n".join("    " + json.dumps(unit) for unit in units)
    tail = json.dumps(tensors, indent=4)[:-1].rstrip() + "\n  }"
    path.write_text(f'{head},\n  "units": [\n{lines}\n  ],\n  "tensors": {tail}\n}}\n', encoding="utf-8")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file; AlphaQError when it is missing, not JSON or not a recipe."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AlphaQError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AlphaQError(f"{path}: not valid JSON: {error}", "allocate again") from None
    return from_json(data, str(path))


def check_source(recipe: Recipe, source: Source, where: str) -> None:
    """AlphaQError unless the recipe was made for `source`."""
    if recipe.source != source.fingerprint:
        raise AlphaQError(
            f"{where}: made for another model, {recipe.source[:12]}: {source.label} is {source.fingerprint[:12]}",
            "allocate again for this model",
        )


def check_recipe(recipe: Recipe, source: Source, where: str) -> None:
    """AlphaQError unless the recipe was made for `source`, gives each tensor a type, and one its rows can take."""
    check_source(recipe, source, where)
    matrix_types(recipe, source, where)
    heights = {stack.name: stack.n_rows for stack in source.stacks}
    for unit in recipe.units:
        info, label = source.tensors[unit.tensor], _label(unit.tensor, unit.expert)
        n_rows = info.n_rows if unit.expert is None else heights[unit.tensor]
        n_weights, n_bytes = n_rows * info.n_cols, n_rows * row_bytes(unit.qtype, info.n_cols)
        if unit.n_weights != n_weights:
            raise AlphaQError(
                f"{where}: {label} has {n_weights} weights, the recipe says {unit.n_weights}", "allocate again"
            )
        if unit.n_bytes != n_bytes:
            raise AlphaQError(
                f"{where}: {label} as {unit.qtype.name} takes {n_bytes} bytes, the recipe says {unit.n_bytes}",
                "change qtype and n_bytes together, or allocate again",
            )


def matrix_types(recipe: Recipe, source: Source, where: str = "recipe") -> dict[str, list[QType]]:
    """The type of each expert of every stack, and one type for each other tensor, in the source's order.

    AlphaQError unless the recipe gives everything exactly one type, and one its rows can take.
    """
    n_experts = {stack.name: stack.n_experts for stack in source.stacks}
    # A stack's experts by number, None for the whole of any other tensor.
    parts = {name: range(n_experts[name]) if name in n_experts else (None,) for name in source.tensors}
    named = [(name, None, qtype) for name, qtype in recipe.tensors.items()]
    for unit in recipe.units:
        whole = unit.expert is None and unit.tensor in n_experts
        named += [(unit.tensor, xid, unit.qtype) for xid in (parts[unit.tensor] if whole else (unit.expert,))]
    chosen: dict[tuple[str, int | None], QType] = {}
    for name, xid, qtype in named:
        if (name, xid) in chosen:
            raise _uncovered(where, name, xid)
        chosen[name, xid] = qtype
    expected = {(name, xid) for name, xids in parts.items() for xid in xids}
    for name, xid in sorted(expected ^ chosen.keys(), key=str):
        raise _uncovered(where, name, xid)
    for (name, _), qtype in chosen.items():
        n_cols = source.tensors[name].n_cols
        if not fits(qtype, n_cols):
            raise AlphaQError(f"{where}: {name} has rows of {n_cols}, which {qtype.name} blocks do not divide")
    return {name: [chosen[name, xid] for xid in xids] for name, xids in parts.items()}


def _uncovered(where: str, name: str, xid: int | None) -> AlphaQError:
    return AlphaQError(
        f"{where}: does not cover the model's tensors exactly, each once: {_label(name, xid)}", "allocate again"
    )


def _label(name: str, xid: int | None) -> str:
    return name if xid is None else f"{name} expert {xid}"


def tensor_type_lines(recipe: Recipe) -> str:
    """What `llama-quantize --tensor-type-file` reads: one anchored `^name$=type` per tensor that is quantised.

    Tensors that stay F32 are left out, since llama-quantize keeps those by itself.
    """
    return "".join(
        f"^{re.escape(name)}$={qtype.name.lower()}\n" for name, qtype in recipe.types.items() if qtype != QType.F32
    )
