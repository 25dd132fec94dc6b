"""Calibration files: our own, which llama-quantize takes as an imatrix, and the imatrices of llama-imatrix.

Ours hold, beside what an imatrix does, by dataset and expert `blk.N.alphaq.tokens` and the other sums of LayerUsage,
and by expert `blk.N.alphaq.block_error.PROJ.TYPE`, -1 where there is none.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from ..checkpoint import Source
from ..errors import AlphaQError, SourceError
from ..gguf_file import Header, TensorInfo, build_header, make_field
from ..qtypes import QType
from .data import Calibration, LayerUsage
from .imatrix import (
    COUNTS,
    MEASURE,
    SUMS,
    check_values,
    dataset_names,
    fitting,
    gguf_entries,
    is_draft,
    legacy_entries,
    open_file,
    other_weights,
    read_array,
)

SCHEMA = 1

_USAGE = "|".join(field.name for field in fields(LayerUsage))
_OWN_TENSOR = re.compile(rf"blk\.(\d+)\.alphaq\.(?:block_error\.(\w+)\.(\w+)|({_USAGE}))$")
_NO_ERROR = -1.0
# Counts are stored in single precision.
_COUNT_TOLERANCE = 1e-6


def save_calibration(
    path: Path, calibration: Calibration, *, source_fingerprint: str, settings: dict[str, Any], chunk_size: int
) -> None:
    """Write a calibration to `path`; `settings` is what it was measured with, `chunk_size` the tokens of a window."""
    tensors: dict[str, np.ndarray] = {}
    for name, moments in calibration.moments.items():
        tensors[name + SUMS] = moments.sums
        tensors[name + COUNTS] = moments.counts.reshape(-1, 1)
    for bid, usage in calibration.layers.items():
        tensors |= {f"blk.{bid}.alphaq.{key}": values for key, values in vars(usage).items() if values is not None}
    for (bid, xid, proj, qtype), error in calibration.block_errors.items():
        n_experts = calibration.layers[bid].tokens.shape[1]
        name = f"blk.{bid}.alphaq.block_error.{proj}.{qtype.name}"
        tensors.setdefault(name, np.full(n_experts, _NO_ERROR))[xid] = error
    kinds = GGUFValueType
    metadata = [
        make_field("general.type", kinds.STRING, "imatrix"),
        make_field("imatrix.datasets", kinds.ARRAY, calibration.datasets, kinds.STRING),
        make_field("imatrix.chunk_count", kinds.UINT32, sum(calibration.n_tokens) // chunk_size),
        make_field("imatrix.chunk_size", kinds.UINT32, chunk_size),
        make_field("alphaq.schema", kinds.UINT32, SCHEMA),
        make_field("alphaq.source", kinds.STRING, source_fingerprint),
        make_field("alphaq.settings", kinds.STRING, json.dumps(settings, sort_keys=True)),
        make_field("alphaq.n_tokens", kinds.ARRAY, calibration.n_tokens, kinds.UINT64),
    ]
    header, _, _ = build_header(metadata, [TensorInfo(name, v.shape, QType.F32) for name, v in tensors.items()])
    with path.open("wb") as file:
        file.write(header)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values, dtype="<f4").data)
            file.write(b"\0" * (-file.tell() % GGUF_DEFAULT_ALIGNMENT))


def load_calibration(path: Path, source: Source) -> Calibration:
    """Read how text uses the experts of `source`, from a file of ours or an imatrix.gguf; without its moments.

    An imatrix tells the tokens routed to each expert alone, summed over its texts, which count as one dataset. Draft
    layers, which nothing runs, are taken to use all experts alike. AlphaQError for a file of another model, damaged
    ones, and the old format, which does not tell how many tokens reached an expert.
    """
    header, data = open_file(path)
    if header is None:
        legacy_entries(path, data)
        raise AlphaQError(
            f"{path}: an imatrix in the old format, which does not count tokens by expert",
            "give an imatrix.gguf (llama-imatrix --output-format gguf) or a file of `alphaq-gguf calibrate`",
        )
    own = "alphaq.source" in header.fields
    calibration = (_from_own if own else _from_counts)(path, header, data, source)
    example = next(iter(calibration.layers.values()), None)
    for stack in source.stacks:
        if stack.bid in calibration.layers:
            continue
        if example is None or not is_draft(source, stack.bid):
            raise AlphaQError(f"{path}: nothing of the experts of layer {stack.bid} of {source.label}", MEASURE)
        calibration.layers[stack.bid] = _evened(example, stack.n_experts)
    return calibration


def _evened(usage: LayerUsage, n_experts: int) -> LayerUsage:
    """What a layer is used in all, shared out evenly over `n_experts`."""
    sums = {name: values.sum(axis=1) for name, values in vars(usage).items() if values is not None}
    return LayerUsage(**{name: np.tile(total[:, None] / n_experts, n_experts) for name, total in sums.items()})


def _from_own(path: Path, header: Header, data: np.ndarray, source: Source) -> Calibration:
    again = "run `alphaq-gguf calibrate` on this model"
    if header.get("alphaq.schema") != SCHEMA:
        raise AlphaQError(
            f"{path}: calibration of schema {header.get('alphaq.schema')}, this version reads schema {SCHEMA}", again
        )
    datasets, n_tokens = dataset_names(header), header.get("alphaq.n_tokens")
    if not isinstance(n_tokens, list) or len(n_tokens) != len(datasets) or not datasets:
        raise AlphaQError(f"{path}: damaged: {len(datasets)} datasets with tokens {n_tokens}", again)
    empty = [name for name, n in zip(datasets, n_tokens, strict=True) if n <= 0]
    if empty:
        raise AlphaQError(f"{path}: dataset {empty[0]} has no tokens", again)
    n_experts = {stack.bid: stack.n_experts for stack in source.stacks}
    usages: dict[int, dict[str, np.ndarray]] = {}
    errors: dict[tuple[int, int, str, QType], float] = {}
    for name in header.tensors:
        match = _OWN_TENSOR.match(name)
        if not match or int(match[1]) not in n_experts:
            continue
        bid, proj, qtype, key = int(match[1]), match[2], match[3], match[4]
        values = read_array(path, header, data, name).astype(np.float64)
        shape = (len(datasets), n_experts[bid]) if key else (n_experts[bid],)
        if values.shape != shape:
            raise AlphaQError(f"{path}: {name}: expected shape {list(shape)}, found {list(values.shape)}", again)
        if key:
            check_values(path, name, values.T, "expert")
            usages.setdefault(bid, {})[key] = values
        else:
            check_values(path, name, np.where(values == _NO_ERROR, 0, values), "expert")
            known = np.flatnonzero(values != _NO_ERROR)
            errors |= {(bid, int(xid), proj, QType[qtype]): float(values[xid]) for xid in known}
    layers = {bid: LayerUsage(**usages[bid]) for bid in sorted(usages) if "tokens" in usages[bid]}
    remarks = [] if header.get("alphaq.source") == source.fingerprint else [other_weights(path, source)]
    return Calibration(str(path), datasets, tuple(n_tokens), layers, errors, remarks=tuple(remarks))


def _from_counts(path: Path, header: Header, data: np.ndarray, source: Source) -> Calibration:
    """Tokens by layer and expert from the counts of its stacks, which are the same for all of a layer."""
    entries = fitting(path, gguf_entries(path, header, data), source)
    layers: dict[int, LayerUsage] = {}
    for stack in source.stacks:
        if stack.name not in entries:
            continue
        counts = entries[stack.name].counts
        if len(counts) != stack.n_experts:
            raise AlphaQError(
                f"{path}: {stack.name}: expected counts of {stack.n_experts} experts, found one for all, as files "
                "converted from the old format have",
                MEASURE,
            )
        tokens = layers.setdefault(stack.bid, LayerUsage(counts[None].astype(np.float64))).tokens[0]
        if (differ := np.flatnonzero(tokens != counts)).size:
            xid = differ[0]
            raise AlphaQError(
                f"{path}: {stack.name}, expert {xid}: {counts[xid]:.0f} tokens, of the layer's other stacks "
                f"{tokens[xid]:.0f}",
                MEASURE,
            )
    key = f"{source.architecture}.expert_used_count"
    n_used = next((field.value for field in source.fields if field.key == key), 0)
    n_tokens = 0
    for bid, usage in layers.items():
        used = n_used[bid] if isinstance(n_used, list) else n_used
        if not used:
            raise SourceError(f"{source.label}: no {key} for layer {bid}", "convert the checkpoint to GGUF again")
        routed = usage.tokens.sum()
        n_tokens = n_tokens or round(routed / used)
        if not routed:
            raise AlphaQError(f"{path}: no tokens in layer {bid}", MEASURE)
        if abs(routed - n_tokens * used) > _COUNT_TOLERANCE * routed:
            raise AlphaQError(
                f"{path}: the counts of layer {bid} sum to {routed:.0f}, expected {n_tokens} tokens x {used} experts",
                f"do not change {key} while measuring: {MEASURE}",
            )
    datasets = " + ".join(dataset_names(header)) or path.name
    return Calibration(str(path), (datasets,), (n_tokens,), layers)
