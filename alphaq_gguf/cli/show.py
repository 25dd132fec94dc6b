"""How results look on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..console import Console, format_count
from ..qtypes import QType, bpw
from ..recipe import Recipe
from ..strategy_comparison import StrategyComparison

# Gap below which an allocation is called optimal.
_PROVEN = 1e-8


def type_grid(cells: Iterable[tuple[int, str, str]]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of a table of type names: a row per run of equal layers, a column per projection."""
    layers: dict[int, dict[str, str]] = {}
    for layer, proj, name in cells:
        layers.setdefault(layer, {})[proj] = name
    projs = [p for p in ("gate_up", "gate", "up", "down") if any(p in row for row in layers.values())]
    runs: list[tuple[int, int, list[str]]] = []
    for layer in sorted(layers):
        names = [layers[layer].get(proj, "-") for proj in projs]
        if runs and runs[-1][2] == names and runs[-1][1] == layer - 1:
            runs[-1] = (runs[-1][0], layer, names)
        else:
            runs.append((layer, layer, names))
    rows = [[str(a) if a == b else f"{a}-{b}", *names] for a, b, names in runs]
    return ["layers", *projs], rows


def gap_text(gap: float, method: str) -> str:
    """How near a solution is to the optimum."""
    near = "optimal" if gap < _PROVEN else f"at most {100 * gap:.2g} % above the optimum"
    return f"{near} (gap {gap:.1e}, {method})"


def show_recipe(console: Console, recipe: Recipe) -> None:
    """The allocation as a table, its budget, and how near the optimum it is."""
    if recipe.granularity == "stack":
        columns, rows = type_grid((u.layer, u.proj, u.qtype.name) for u in recipe.units)
        console.table("Types of the expert stacks", columns, rows)
    else:
        console.table("Experts by type", *_expert_grid(recipe))
    result = recipe.result
    if result.get("gamma") is not None:
        console.result(f"gamma {result['gamma']:.3g}")
    if result.get("gap") is not None:
        console.result(f"Predicted error {result['cost']:.6g}, {gap_text(result['gap'], result['method'])}")
    if result.get("distortion_standard_error"):
        console.result(f"Sampling error of the predicted error: {100 * result['distortion_standard_error']:.2g} %")
    if result.get("stacking"):
        console.result(_stacking_text(result["stacking"]))
    shares = ", ".join(
        f"{name} {100 * count / sum(recipe.histogram().values()):.0f} %"
        for name, count in sorted(recipe.histogram().items())
    )
    n_bytes, bits = result.get("expert_bytes", recipe.expert_bytes), result.get("expert_bpw", recipe.expert_bpw)
    unused = ""
    if result.get("containers"):
        unused = f", of which {100 * result['wasted_bytes'] / n_bytes:.2g} % unused"
    console.result(f"Experts: {bits:.4g} bits per weight, {format_count(n_bytes, 'bytes')}{unused} ({shares})")
    if "containers" in result:
        n_stacks = len({unit.tensor for unit in recipe.units})
        console.result(f"Stacks: {n_stacks - result['containers']} plain, {result['containers']} in containers")
    if result.get("file_bytes"):
        console.result(f"File: {format_count(result['file_bytes'], 'bytes')}")
    if result.get("memory_bytes"):
        need, ctx = format_count(result["memory_bytes"], "bytes"), recipe.settings.get("n_ctx")
        console.result(f"Memory to run it at a context of {ctx}: {need}")


def show_comparison(console: Console, comparison: StrategyComparison) -> None:
    """A row a strategy, then how much their choices agree."""
    known = [result for result in comparison.results if result.types is not None]
    names = {name for result in known for name in result.types or {}}
    types = [q.name for q in sorted((QType[name] for name in names), key=bpw)]
    rows = []
    for result in sorted(known, key=lambda r: r.squared_error or 0.0):
        total = sum((result.types or {}).values())
        shares = [f"{100 * (result.types or {}).get(name, 0) / total:.0f} %" for name in types]
        size = format_count(result.expert_bytes, "bytes")
        rows.append([result.strategy, f"{result.squared_error:.6g}", f"{result.expert_bpw:.4g}", size, *shares])
    console.table(
        "Strategies at one budget, by squared encoding error",
        ["strategy", "error", "bits per weight", "size", *types],
        rows,
    )
    for result in comparison.results:
        if result.reason:
            console.result(f"{result.strategy}: {result.reason}")
    order = [row[0] for row in rows]
    console.table(
        "Rank correlation of the bits they give",
        ["", *(str(i) for i in range(1, len(order) + 1))],
        [[f"{i} {a}", *(_number(comparison.correlations[a, b]) for b in order)] for i, a in enumerate(order, start=1)],
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _expert_grid(recipe: Recipe) -> tuple[list[str], list[list[str]]]:
    """How many experts of all layers have each type, by projection."""
    projs = list(dict.fromkeys(unit.proj for unit in recipe.units))
    counts = Counter((unit.qtype, unit.proj) for unit in recipe.units)
    types = sorted({unit.qtype for unit in recipe.units}, key=bpw)
    return ["type", *projs], [[q.name, *(str(counts[q, proj]) for proj in projs)] for q in types]


def _stacking_text(losses: dict[str, Any]) -> str:
    """What it costs that the experts of a stack share a type."""
    text = f"At the same bytes one type per expert: predicted error {losses['per_expert']:.6g}, "
    text += f"per stack {losses['per_stack']:.6g}"
    if losses["uniform"] is not None:
        text += f", one for all {losses['uniform']:.6g}"
    if losses["kept"] is not None:
        layers = [layer["kept"] for layer in losses["layers"].values() if layer["kept"] is not None]
        text += f". Stacking keeps {100 * losses['kept']:.0f} % of the gain"
        text += f" ({100 * min(layers):.0f} to {100 * max(layers):.0f} % by layer)" if len(layers) > 1 else ""
    return text
