"""A GGUF's contents as plain values, read from its header alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint.base import ExpertStack, find_stacks
from .container import Container
from .errors import SourceError
from .file_containers import check_declared, read_containers
from .gguf_file import Header, TensorInfo, read_header
from .guard import ARCHITECTURE, Declaration, read_declaration
from .qtypes import bpw, row_bytes

_PREFIX = "alphaq."


def describe_file(path: Path) -> dict[str, Any]:
    """Sizes, types per stack and in total, bpw, and our own metadata; SourceError for a file that is no GGUF.

    Weights count by the types of the experts that they are in; what containers take beside these is `unused_bytes`.
    """
    if not path.is_file():
        raise SourceError(f"{path} is not a file", "give a .gguf file")
    header = read_header(path)
    declaration = read_declaration(header.fields, str(path))
    found = find_stacks(header.tensors.values())
    containers = _containers(path, header, found, declaration)
    types: dict[str, dict[str, int]] = {}
    for info in header.tensors.values():
        container = containers.get(info.name)
        parts = Counter(container.types) if container else Counter([info.qtype])
        rows = info.n_rows // parts.total()
        for qtype, count in parts.items():
            group = types.setdefault(qtype.name, {"tensors": 0, "weights": 0, "bytes": 0})
            group["tensors"] += 1
            group["weights"] += count * rows * info.n_cols
            group["bytes"] += count * rows * row_bytes(qtype, info.n_cols)
    stacks = [_stack(stack, header.tensors[stack.name], containers.get(stack.name)) for stack in found]
    n_weights = sum(group["weights"] for group in types.values())
    tensor_bytes = sum(info.n_bytes for info in header.tensors.values())
    expert_weights = sum(s["experts"] * s["n_rows"] * s["n_cols"] for s in stacks)
    expert_bytes = sum(s["bytes"] for s in stacks)
    own = {key.removeprefix(_PREFIX): field.value for key, field in header.fields.items() if key.startswith(_PREFIX)}
    return {
        "path": str(path),
        "name": header.get("general.name"),
        "architecture": declaration.architecture if declaration else header.get(ARCHITECTURE),
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
            "containers": len(containers),
            "unused_bytes": sum(s["unused_bytes"] for s in stacks),
        }
        if stacks
        else None,
        "stacks": stacks,
        "alphaq": {key: value for key, value in own.items() if key not in ("recipe", "config")},
        "recipe": _parse(own.get("recipe")),
    }


def _containers(
    path: Path, header: Header, stacks: Sequence[ExpertStack], declaration: Declaration | None
) -> dict[str, Container]:
    """The stacks of one file that are containers; SourceError when they are damaged, or others than declared."""
    declared = declaration.tensors if declaration else ()
    places = {stack.name: (path, header.data_offset + header.tensors[stack.name].offset) for stack in stacks}
    containers = read_containers([header.tensors[stack.name] for stack in stacks], places, declared)
    # The first of several files tells of all of them.
    if header.get("split.count", 0) <= 1:
        check_declared(containers, declared, header.tensors, str(path))
    return containers


def _stack(stack: ExpertStack, info: TensorInfo, container: Container | None) -> dict[str, Any]:
    experts = Counter(container.types) if container else Counter({info.qtype: stack.n_experts})
    return {
        "tensor": stack.name,
        "layer": stack.bid,
        "proj": stack.proj,
        "experts": stack.n_experts,
        "n_rows": stack.n_rows,
        "n_cols": stack.n_cols,
        "qtype": info.qtype.name,
        "types": {qtype.name: count for qtype, count in sorted(experts.items())},
        "bpw": bpw(info.qtype),
        "bytes": info.n_bytes,
        "unused_bytes": info.n_bytes - container.n_payload_bytes if container else 0,
    }


def _parse(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError:
        return None
