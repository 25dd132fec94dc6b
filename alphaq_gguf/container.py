"""Containers: the bytes of an expert stack whose experts have types of their own, inside one ordinary GGUF tensor.

The tensor keeps its name and shape and is declared as a type large enough. Its bytes are a header with one entry for
each expert, then the experts' blocks, and zeros up to the tensor's size; docs/container.md has it byte by byte.
llama.cpp computes with it only through the plug-in under kernels/ggml_plugin.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from .errors import AlphaQError, SourceError
from .gguf_file import TensorInfo, align
from .qtypes import EXPERT_TYPES, FLOAT_TYPES, QType, bpw, fits, row_bytes

MAGIC = b"ALPHAQEX"
VERSION = 1
ALIGNMENT = 32
"""Bytes that the first expert of each type is aligned to, counted from the tensor's start: as GGUF aligns tensors."""

PAYLOAD_TYPES = (*EXPERT_TYPES, *FLOAT_TYPES)
"""Types that experts inside a container may have."""

# Magic, version, experts, rows and columns of each, bytes up to the end of the last block, CRC-32 of header and table.
_HEADER = struct.Struct("<8sIIIIQII")
_CRC_AT = _HEADER.size - 8
# Type and a reserved zero, offset from the tensor's start.
_ENTRY = struct.Struct("<IIQ")

# What llama.cpp loads as a stack without looking into it, finely spaced. Not Q8_1: its size differs between ggml and
# its Python package. Not NVFP4: llama.cpp asks for scales beside it.
_CONTAINER_TYPES = (
    QType.IQ1_S,
    QType.TQ1_0,
    QType.IQ1_M,
    QType.TQ2_0,
    QType.IQ2_XS,
    QType.IQ2_S,
    QType.Q2_K,
    QType.IQ3_XXS,
    QType.Q3_K,
    QType.IQ4_XS,
    QType.MXFP4,
    QType.Q4_0,
    QType.Q4_1,
    QType.Q5_0,
    QType.Q5_1,
    QType.Q6_K,
    QType.I8,
    QType.Q8_0,
    QType.F16,
    QType.F32,
)

_REMEDY = "convert the model again"


@dataclass(frozen=True)
class Container:
    """Where the experts of a stack lie in its tensor's bytes.

    `shape` is (n_experts, n_rows, n_cols), `types` and `offsets` (bytes from the tensor's start) are by expert. Experts
    of one type lie next to each other without gaps, by rising number.
    """

    shape: tuple[int, int, int]
    types: tuple[QType, ...]
    offsets: tuple[int, ...]
    payload_end: int
    """Bytes from the tensor's start to the end of the last block."""

    def expert_bytes(self, xid: int) -> int:
        """Stored bytes of one expert."""
        return self.shape[1] * row_bytes(self.types[xid], self.shape[2])

    @property
    def n_payload_bytes(self) -> int:
        """Stored bytes of all experts."""
        return sum(self.expert_bytes(xid) for xid in range(self.shape[0]))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Experts as they follow each other."""
        return tuple(sorted(range(self.shape[0]), key=self.offsets.__getitem__))

    def header(self) -> bytes:
        """Header and table."""
        n_experts, n_rows, n_cols = self.shape
        head = bytearray(_HEADER.pack(MAGIC, VERSION, n_experts, n_rows, n_cols, self.payload_end, 0, 0))
        for qtype, offset in zip(self.types, self.offsets, strict=True):
            head += _ENTRY.pack(qtype, 0, offset)
        struct.pack_into("<I", head, _CRC_AT, zlib.crc32(head))
        return bytes(head)


def header_bytes(n_experts: int) -> int:
    """Length of header and table."""
    return _HEADER.size + n_experts * _ENTRY.size


def lay_out(shape: tuple[int, int, int], types: Sequence[QType]) -> Container:
    """Place the experts: by type, types by rising number, each type's first expert aligned.

    ValueError unless there is a type for each expert, which its rows can take.
    """
    n_experts, n_rows, n_cols = shape
    if len(types) != n_experts:
        raise ValueError(f"{len(types)} types for {n_experts} experts")
    offsets = [0] * n_experts
    at = header_bytes(n_experts)
    for qtype in sorted(set(types)):
        at = align(at, ALIGNMENT)
        for xid in range(n_experts):
            if types[xid] == qtype:
                offsets[xid] = at
                at += n_rows * row_bytes(qtype, n_cols)
    return Container(shape, tuple(types), tuple(offsets), at)


def container_types(n_cols: int) -> tuple[QType, ...]:
    """Types that a container with such rows can be declared as, by rising size."""
    return tuple(qtype for qtype in sorted(_CONTAINER_TYPES, key=bpw) if fits(qtype, n_cols))


def container_bytes(qtype: QType, shape: tuple[int, int, int]) -> int:
    """Bytes of a tensor of this type and shape."""
    return shape[0] * shape[1] * row_bytes(qtype, shape[2])


def choose_container(container: Container) -> QType:
    """The smallest type whose tensor holds the container. ValueError when none does."""
    for qtype in container_types(container.shape[2]):
        if container_bytes(qtype, container.shape) >= container.payload_end:
            return qtype
    raise ValueError(f"no GGUF type holds {container.payload_end} bytes in shape {container.shape}")


def stack_type(shape: tuple[int, int, int], types: Sequence[QType]) -> tuple[QType, Container | None]:
    """What a stack is declared as in a file, and how its experts lie in it.

    Experts that share one type make an ordinary stack, without a container.
    """
    if len(set(types)) == 1:
        return types[0], None
    container = lay_out(shape, types)
    return choose_container(container), container


def parse_container(data: bytes | memoryview, info: TensorInfo, where: str) -> Container:
    """Read a container's header from the start of a tensor's bytes, of which `data` holds at least `header_bytes`.

    SourceError names what is wrong with it: every field is checked against the tensor and against the others.
    """

    def damaged(problem: str) -> SourceError:
        return SourceError(f"{where}: {info.name}: damaged container: {problem}", _REMEDY)

    if len(info.shape) != 3:
        raise damaged(f"expected [experts, rows, cols], found shape {list(info.shape)}")
    if len(data) < _HEADER.size or bytes(data[: len(MAGIC)]) != MAGIC:
        raise damaged("it does not start with a container's magic")
    _, version, n_experts, n_rows, n_cols, payload_end, crc, reserved = _HEADER.unpack_from(data)
    if version != VERSION:
        raise AlphaQError(
            f"{where}: {info.name}: container of version {version}, this version reads {VERSION}",
            "update alphaq-gguf" if version > VERSION else _REMEDY,
        )
    if (n_experts, n_rows, n_cols) != info.shape:
        raise damaged(f"made for shape {[n_experts, n_rows, n_cols]}, the tensor's is {list(info.shape)}")
    length = header_bytes(n_experts)
    if length > min(len(data), info.n_bytes):
        raise damaged(f"its table takes {length} bytes, the tensor has {info.n_bytes}")
    head = bytearray(data[:length])
    struct.pack_into("<I", head, _CRC_AT, 0)
    if zlib.crc32(head) != crc:
        raise damaged("the checksum of its table does not match")
    if reserved:
        raise damaged("a reserved field is not zero")
    types, offsets = [], []
    for xid in range(n_experts):
        number, reserved, offset = _ENTRY.unpack_from(head, _HEADER.size + xid * _ENTRY.size)
        qtype = next((known for known in PAYLOAD_TYPES if known == number), None)
        if qtype is None or reserved:
            raise damaged(f"expert {xid} has type {number}, which experts cannot have")
        if not fits(qtype, n_cols):
            raise damaged(f"expert {xid}: rows of {n_cols} do not divide into {qtype.name} blocks")
        types.append(qtype)
        offsets.append(offset)
    container = Container(info.shape, tuple(types), tuple(offsets), payload_end)
    _check_places(container, info, damaged)
    return container


def _check_places(container: Container, info: TensorInfo, damaged) -> None:
    """Experts lie behind the table, inside the tensor, apart from each other, and those of a type without gaps."""
    ends = [container.offsets[xid] + container.expert_bytes(xid) for xid in range(container.shape[0])]
    last = max(ends)
    if min(container.offsets) < header_bytes(container.shape[0]) or last > info.n_bytes:
        raise damaged(f"experts reach from byte {min(container.offsets)} to {last} of {info.n_bytes}")
    if last != container.payload_end:
        raise damaged(f"experts end at byte {last}, the header says {container.payload_end}")
    for a, b in pairwise(container.order):
        if ends[a] > container.offsets[b]:
            raise damaged(f"experts {a} and {b} overlap")
    for qtype in set(container.types):
        group = [xid for xid, found in enumerate(container.types) if found == qtype]
        if container.offsets[group[0]] % ALIGNMENT:
            raise damaged(f"the experts of type {qtype.name} start at byte {container.offsets[group[0]]}, unaligned")
        for a, b in pairwise(group):
            if container.offsets[b] != ends[a]:
                raise damaged(f"experts {a} and {b}, both {qtype.name}, do not follow each other")
