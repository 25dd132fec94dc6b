"""Importance matrices: how strongly each column of a tensor is driven, as llama-imatrix and `calibrate` write it.

A GGUF of `general.type` imatrix holds, for a tensor NAME with a matrix per expert or just one, `NAME.in_sum2`
[matrices, n_cols], the sums of squares of its inputs, and `NAME.counts` [matrices, 1], over how many tokens.
llama-imatrix' old format (.dat) has no counts.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..checkpoint import Source
from ..errors import AlphaQError
from ..gguf_file import MAGIC, Header, read_header
from ..qtypes import QType

SUMS, COUNTS = ".in_sum2", ".counts"
MEASURE = "measure this model with llama-imatrix or `alphaq-gguf calibrate`"
# llama.cpp's tensor names are shorter than 64 bytes; a longer one in an old file says that it is none.
_LONGEST_NAME = 64
# ggml's encoders multiply importance and powers of weights in single precision.
_MOST_IMPORTANCE = 1e20


@dataclass(frozen=True, eq=False)
class Entry:
    """Statistics of a tensor: `sums` flat, `counts` one for each matrix or one for all, both float32."""

    sums: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, eq=False)
class ImportanceMatrix:
    """How strongly each column of a source's tensors is driven, to weigh rounding by; read when asked for.

    `remarks` are one-line doubts whether the file fits the source.
    """

    label: str
    datasets: tuple[str, ...]
    remarks: tuple[str, ...]
    _source: Source
    _entries: dict[str, Entry]

    def weights(self, name: str) -> np.ndarray | None:
        """Mean squares of a tensor's inputs, float32 [matrices, n_cols], as llama-quantize has them; None if unknown.

        They are 1 for matrices without tokens.
        """
        entry = self._entries.get(name)
        if entry is None:
            return None
        counts = entry.counts[:, None]
        sums = entry.sums.reshape(len(counts), -1)
        means = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
        return means.reshape(-1, self._source.tensors[name].n_cols)

    def never_routed(self) -> dict[str, int]:
        """Expert stacks by name, with how many of their experts have no tokens; those without any are left out."""
        found = {}
        for stack in self._source.stacks:
            if (entry := self._entries.get(stack.name)) is None:
                continue
            if len(entry.counts) == stack.n_experts:
                unrouted = entry.counts == 0
            else:
                # The old format writes ones for an expert without tokens.
                unrouted = (self.weights(stack.name) == 1).all(axis=1)
            if unrouted.any():
                found[stack.name] = int(unrouted.sum())
        return found

    @cached_property
    def digest(self) -> str:
        """A sha256 of all statistics of the source's tensors."""
        digest = hashlib.sha256()
        for name, entry in sorted(self._entries.items()):
            digest.update(f"{name} {entry.counts.size} {entry.sums.size}\n".encode())
            digest.update(entry.counts.data)
            digest.update(entry.sums.data)
        return digest.hexdigest()


def open_importance(path: Path, source: Source) -> ImportanceMatrix:
    """Open an imatrix in either format, or a calibration of ours, for `source`.

    AlphaQError when it cannot be of this model or holds impossible values. That it was measured on a file with other
    bytes is a remark, because the same model in another format is one.
    """
    header, data = open_file(path)
    if header is None:
        entries, datasets = legacy_entries(path, data)
        fingerprint = None
    else:
        entries, datasets = gguf_entries(path, header, data), dataset_names(header)
        fingerprint = header.get("alphaq.source")
    entries = fitting(path, entries, source)
    remarks = []
    if fingerprint not in (None, source.fingerprint):
        remarks.append(other_weights(path, source))
    missing = [s.name for s in source.stacks if s.name not in entries and not is_draft(source, s.bid)]
    if missing:
        remarks.append(f"{path}: nothing of {len(missing)} of {len(source.stacks)} expert stacks, first {missing[0]}")
    matrix = ImportanceMatrix(str(path), datasets, tuple(remarks), source, entries)
    stacks = {stack.name for stack in source.stacks}
    for name in entries:
        means = matrix.weights(name)
        assert means is not None
        check_values(path, name, means, "expert" if name in stacks else "matrix", _MOST_IMPORTANCE)
    return matrix


def other_weights(path: Path, source: Source) -> str:
    """The remark that a file was measured on another source, which may be the same model in another format."""
    return f"{path}: measured on other weights than those of {source.label}, or in another format"


def open_file(path: Path) -> tuple[Header | None, np.ndarray]:
    """The header of an imatrix, None in the old format, and the bytes of the file, mapped into memory."""
    try:
        data = np.asarray(np.memmap(path, np.uint8, mode="r")) if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise AlphaQError(f"{path}: cannot be read: {error.strerror}") from None
    if data[:4].tobytes() != MAGIC:
        return None, data
    header = read_header(path)
    kind = header.get("general.type")
    if kind != "imatrix":
        raise AlphaQError(f"{path}: no importance matrix: general.type is {kind!r}, expected 'imatrix'", MEASURE)
    return header, data


def read_array(path: Path, header: Header, data: np.ndarray, name: str) -> np.ndarray:
    """A float32 tensor of the file, read where it is used."""
    info = header.tensors[name]
    if info.qtype != QType.F32:
        raise AlphaQError(f"{path}: {name} is {info.qtype.name}, expected F32", MEASURE)
    start = header.data_offset + info.offset
    return data[start : start + info.n_bytes].view("<f4").reshape(info.shape)


def dataset_names(header: Header) -> tuple[str, ...]:
    found = header.get("imatrix.datasets")
    return tuple(str(name) for name in found) if isinstance(found, list) else ()


def gguf_entries(path: Path, header: Header, data: np.ndarray) -> dict[str, Entry]:
    """The statistics in a GGUF by tensor name, their counts checked."""
    names = dict.fromkeys(name.removesuffix(SUMS).removesuffix(COUNTS) for name in header.tensors)
    entries = {}
    for name in names:
        present = [suffix for suffix in (SUMS, COUNTS) if name + suffix in header.tensors]
        if not present:
            continue
        if len(present) == 1:
            lacking = COUNTS if present == [SUMS] else SUMS
            raise AlphaQError(f"{path}: {name}{present[0]} without {name}{lacking}: a damaged file", MEASURE)
        sums, counts = (read_array(path, header, data, name + suffix).ravel() for suffix in (SUMS, COUNTS))
        if not counts.size or not sums.size or sums.size % counts.size:
            raise AlphaQError(f"{path}: {name}: {sums.size} sums do not divide into {counts.size} counts", MEASURE)
        check_values(path, name + COUNTS, counts, "expert" if counts.size > 1 else "matrix")
        # llama.cpp rounds half away from zero.
        entries[name] = Entry(sums, np.floor(counts.astype(np.float64) + 0.5).astype(np.float32))
    return entries


def legacy_entries(path: Path, data: np.ndarray) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """The statistics in the old format by tensor name, and its dataset.

    Little-endian: int32 entries; each int32 length, name, int32 calls, int32 values, float32 means x calls; then
    possibly int32 chunks, int32 length, dataset.
    """
    view = data.data
    entries: dict[str, Entry] = {}
    n_entries, at = 0, 4
    try:
        (n_entries,) = struct.unpack_from("<i", view)
        while len(entries) < n_entries:
            (length,) = struct.unpack_from("<i", view, at)
            if not 0 < length < _LONGEST_NAME:
                raise ValueError
            name, n_calls, n_values = struct.unpack_from(f"<{length}sii", view, at + 4)
            start = at + 12 + length
            stop = start + 4 * n_values
            if n_calls < 0 or n_values < 1 or stop > data.size:
                raise ValueError
            counts = np.array([max(n_calls, 1)], np.float32)
            entries[name.decode("ascii")] = Entry(data[start:stop].view("<f4"), counts)
            at = stop
    except (struct.error, ValueError):
        if entries:
            raise AlphaQError(
                f"{path}: an imatrix that is truncated or damaged: {len(entries)} of {n_entries} entries are "
                f"readable, up to byte {at} of {data.size}",
                MEASURE,
            ) from None
    if not entries:
        raise AlphaQError(f"{path}: neither a GGUF file nor an imatrix in the old format", MEASURE)
    try:
        (length,) = struct.unpack_from("<i", view, at + 4)
        (dataset,) = struct.unpack_from(f"<{length}s", view, at + 8)
    except struct.error:
        return entries, ()
    return entries, (dataset.decode("utf-8", "replace"),)


def fitting(path: Path, entries: dict[str, Entry], source: Source) -> dict[str, Entry]:
    """The entries for the source's tensors; AlphaQError when a size differs or no expert stack is among them."""
    if not any(stack.name in entries for stack in source.stacks):
        raise AlphaQError(f"{path}: no in_sum2 and counts of any expert stack of {source.label}", MEASURE)
    fitting = {name: entry for name, entry in entries.items() if name in source.tensors}
    for name, entry in fitting.items():
        info = source.tensors[name]
        matrices, size, n_counts = math.prod(info.shape[:-2]), entry.sums.size, entry.counts.size
        if size != matrices * info.n_cols or n_counts not in (1, matrices):
            found = f"{n_counts} x {size // n_counts}" if n_counts > 1 else f"{size}"
            raise AlphaQError(
                f"{path}: {name}: expected {matrices} x {info.n_cols} values for {source.label}, found {found}",
                f"it is of another model: {MEASURE}",
            )
    return fitting


def check_values(path: Path, name: str, values: np.ndarray, unit: str, most: float = np.inf) -> None:
    """AlphaQError for NaN, negative values and values from `most` on, the first axis being that of `unit`."""
    wrong = ~((values >= 0) & (values < most))
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AlphaQError(
            f"{path}: {name}, {unit} {where[0]}: {values[where]:g}, expected at least 0 and less than {most:g}",
            MEASURE,
        )


def is_draft(source: Source, bid: int) -> bool:
    """Whether a layer drafts tokens (multi-token prediction) and has no part in the model itself."""
    return f"blk.{bid}.nextn.eh_proj.weight" in source.tensors
