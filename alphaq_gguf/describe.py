"""A GGUF's contents as plain values, read from its header alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .checkpoint.base import find_stacks
from .errors import SourceError
from .gguf_file import read_header
from .qtypes import bpw

_PREFIX = "alphaq."


def describe_file(path: Path) -> dict[str, Any]:
    """Sizes, types per stack and in total, bpw, and our own metadata; SourceError for a file that is no GGUF."""
    if not path.is_file():
        raise SourceError(f"{path} is not a file", "give a .gguf file")
    header = read_header(path)
    types: dict[str, dict[str, int]] = {}
    for info in header.tensors.values():
        group = types.setdefault(info.qtype.name, {"tensors": 0, "weights": 0, "bytes": 0})
        group["tensors"] += 1
        group["weights"] += info.n_weights
        group["bytes"] += info.n_bytes
    stacks = [
        {
            "tensor": stack.name,
            "layer": stack.bid,
            "proj": stack.proj,
            "experts": stack.n_experts,
            "n_rows": stack.n_rows,
            "n_cols": stack.n_cols,
            "qtype": header.tensors[stack.name].qtype.name,
            "bpw": bpw(header.tensors[stack.name].qtype),
            "bytes": header.tensors[stack.name].n_bytes,
        }
        for stack in find_stacks(header.tensors.values())
    ]
    n_weights = sum(group["weights"] for group in types.values())
    tensor_bytes = sum(group["bytes"] for group in types.values())
    expert_weights = sum(s["experts"] * s["n_rows"] * s["n_cols"] for s in stacks)
    expert_bytes = sum(s["bytes"] for s in stacks)
    own = {key.removeprefix(_PREFIX): field.value for key, field in header.fields.items() if key.startswith(_PREFIX)}
    return {
        "path": str(path),
        "name": header.get("general.name"),
        "architecture": header.get("general.architecture"),
        "size_bytes": path.stat().st_size,
        "tensor_bytes": tensor_bytes,
        "weights": n_weights,
        "bpw": tensor_bytes * 8 / n_weights if n_weights else 0.0,
        "types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"])),
        "experts": {
            "count": stacks[0]["experts"],
            "weights": expert_weights,
            "bytes": expert_bytes,
            "bpw": expert_bytes * 8 / expert_weights,
        }
        if stacks
        else None,
        "stacks": stacks,
        "alphaq": {key: value for key, value in own.items() if key not in ("recipe", "config")},
        "recipe": _parse(own.get("recipe")),
    }


def _parse(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError:
        return None
