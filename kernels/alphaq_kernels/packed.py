"""What the expert kernels take: the packed matrices of all experts of one projection, and activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional

from .dequantize import dequantize
from .formats import FORMATS, BlockFormat

# Experts may also be left unquantised; these are no block types, so `dequantize` does not know them.
FLOAT_FORMATS = (BlockFormat("F32", 0, 1, 4), BlockFormat("F16", 1, 1, 2), BlockFormat("BF16", 30, 1, 2))

_FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BY_KEY: dict[int | str, BlockFormat] = {k: f for f in (*FORMATS, *FLOAT_FORMATS) for k in (f.type_id, f.name)}


# The fields of each block that `PackedExperts.to_planar` separates, in its order: where one starts, its bytes.
_FIELDS = {
    "Q4_0": ((2, 16), (0, 2)),
    "Q5_0": ((6, 16), (2, 4), (0, 2)),
    "Q5_1": ((8, 16), (4, 4), (0, 4)),
    "Q8_0": ((2, 32), (0, 2)),
    "Q2_K": ((16, 64), (0, 16), (80, 4)),
    "Q3_K": ((32, 64), (0, 32), (96, 12), (108, 2)),
    "Q4_K": ((16, 128), (0, 16)),
    "Q5_K": ((48, 128), (16, 32), (0, 16)),
    "Q6_K": ((0, 128), (128, 64), (192, 16), (208, 2)),
    "IQ4_NL": ((2, 16), (0, 2)),
}


def find_alignment(fmt: BlockFormat, planar: bool) -> int:
    """Of what number of bytes the start of an expert must be a multiple."""
    return 16 if planar or fmt.name in _FLOAT_DTYPES else math.gcd(fmt.type_size, 16)


def find_expert_format(qtype: int | str) -> BlockFormat:
    """The format with this ggml type id or name, F32, F16 and BF16 among them; raises ValueError for any other."""
    found = _BY_KEY.get(qtype)
    if found is None:
        known = ", ".join(f.name for f in (*FORMATS, *FLOAT_FORMATS))
        raise ValueError(f"unknown expert type {qtype!r}: expected one of {known}, or its ggml type id")
    return found


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """The matrices [n_rows, n_cols] of all experts of one projection, each of a block type of its own.

    `data` is uint8 [n_bytes]; expert `xid` has the ggml type `type_ids[xid]` (int32 [n_experts]) and its rows of
    blocks, one after another, from byte `offsets[xid]` (int64 [n_experts]) of `data` on; `bias` is float32
    [n_experts, n_rows] or None. All are contiguous and on one device. Experts may share or skip bytes: the two halves
    of a fused gate_up stack are two objects over the same `data`.

    Blocks lie as in a GGUF file, or, if `planar`, as `to_planar` leaves them.

    Raises ValueError for a wrong dtype, shape, device, type, extent or alignment: an expert starts at a multiple of
    the largest power of two, at most 16, that divides the bytes of one of its blocks, as in any stack of a GGUF;
    float and planar experts at a multiple of 16. The check reads `offsets` and `type_ids` back to the host, here only.
    """

    data: torch.Tensor
    offsets: torch.Tensor
    type_ids: torch.Tensor
    n_rows: int
    n_cols: int
    bias: torch.Tensor | None = None
    planar: bool = False
    # Offset and format of each expert, for the host.
    table: tuple[tuple[int, BlockFormat], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_stack(
        cls, blocks: torch.Tensor, qtype: int | str, n_experts: int, bias: torch.Tensor | None = None
    ) -> PackedExperts:
        """All experts of one type, uint8 [n_experts * n_rows, row_bytes] or [n_experts, n_rows, row_bytes]: no copy."""
        fmt = find_expert_format(qtype)
        if blocks.ndim not in (2, 3) or n_experts < 1 or math.prod(blocks.shape[:-1]) % n_experts:
            raise ValueError(f"blocks of shape {list(blocks.shape)} do not hold the rows of {n_experts} experts")
        if not blocks.is_contiguous():
            raise ValueError(f"blocks must be contiguous, not of strides {list(blocks.stride())}")
        n_rows = math.prod(blocks.shape[:-1]) // n_experts
        return cls(
            data=blocks.view(-1),
            offsets=torch.arange(n_experts, dtype=torch.int64, device=blocks.device) * (n_rows * blocks.shape[-1]),
            type_ids=torch.full((n_experts,), fmt.type_id, dtype=torch.int32, device=blocks.device),
            n_rows=n_rows,
            n_cols=_count_cols(blocks.shape[-1], fmt),
            bias=bias,
        )

    @classmethod
    def from_experts(
        cls, experts: Sequence[tuple[torch.Tensor, int | str]], bias: torch.Tensor | None = None
    ) -> PackedExperts:
        """Each expert's uint8 [n_rows, row_bytes] and type, copied into one buffer, every start 16-byte aligned."""
        if not experts:
            raise ValueError("there must be at least one expert")
        formats = [find_expert_format(qtype) for _, qtype in experts]
        n_rows, device = experts[0][0].shape[0], experts[0][0].device
        shapes, offsets, at = set(), [], 0
        for (blocks, _), fmt in zip(experts, formats, strict=True):
            if blocks.dtype != torch.uint8 or blocks.ndim != 2 or blocks.device != device:
                raise ValueError(
                    f"each expert must be torch.uint8 [n_rows, row_bytes] on {device}, "
                    f"not {blocks.dtype} {list(blocks.shape)} on {blocks.device}"
                )
            shapes.add((blocks.shape[0], _count_cols(blocks.shape[1], fmt)))
            offsets.append(at)
            at += -(-blocks.numel() // 16) * 16
        if len(shapes) > 1:
            raise ValueError(f"experts must all have one shape, not {sorted(shapes)}")
        data = torch.zeros(at, dtype=torch.uint8, device=device)
        for (blocks, _), start in zip(experts, offsets, strict=True):
            data[start : start + blocks.numel()] = blocks.reshape(-1)
        return cls(
            data=data,
            offsets=torch.tensor(offsets, dtype=torch.int64, device=device),
            type_ids=torch.tensor([f.type_id for f in formats], dtype=torch.int32, device=device),
            n_rows=n_rows,
            n_cols=shapes.pop()[1],
            bias=bias,
        )

    @property
    def n_experts(self) -> int:
        return len(self.table)

    @property
    def n_bytes(self) -> int:
        """Bytes of all experts' blocks, bytes shared with another expert counted again."""
        return sum(self.n_rows * self._row_bytes(fmt) for _, fmt in self.table)

    @property
    def types(self) -> tuple[int, ...]:
        """The ggml type ids present, ascending."""
        return tuple(sorted({fmt.type_id for _, fmt in self.table}))

    def to(self, device: torch.device | str) -> PackedExperts:
        """The same experts on another device; all of `data` moves, also what other objects share."""
        return PackedExperts(
            self.data.to(device),
            self.offsets.to(device),
            self.type_ids.to(device),
            self.n_rows,
            self.n_cols,
            None if self.bias is None else self.bias.to(device),
            self.planar,
        )

    def to_planar(self) -> PackedExperts:
        """The same experts in a layout of as many bytes that kernels load in words of 16 bytes, where GGUF's allow 2.

        An expert's blocks are taken apart: first the longest field (of the structs of ggml-common.h) of all its
        blocks in order, then the next, and so on: Q6_K becomes { ql[n][128]; qh[n][64]; scales[n][16]; d[n]; } of n
        blocks; d and dmin, d and m, and in Q4_K and Q5_K d, dmin and scales stay together. Floats stay as they are.
        """
        if self.planar:
            return self
        experts = []
        for xid in range(self.n_experts):
            rows, fmt = self._rows(xid), self.table[xid][1]
            blocks = rows.view(-1, fmt.type_size)
            planes = [blocks[:, start : start + size].reshape(-1) for start, size in _FIELDS.get(fmt.name, ())]
            experts.append((torch.cat(planes).view_as(rows) if planes else rows, fmt.type_id))
        return replace(PackedExperts.from_experts(experts, self.bias), planar=True)

    def dequantize(self, xid: int, dtype: torch.dtype = torch.float32, *, backend: str = "auto") -> torch.Tensor:
        """The weights of one expert, `dtype` [n_rows, n_cols]; `backend` is that of `alphaq_kernels.dequantize`."""
        rows, fmt = self._rows(xid), self.table[xid][1]
        if fmt.name in _FLOAT_DTYPES:
            # Cloned, since a view as floats needs an aligned address.
            return rows.clone().view(_FLOAT_DTYPES[fmt.name]).to(dtype)
        if self.planar:
            n_blocks = rows.numel() // fmt.type_size
            blocks = rows.new_empty(n_blocks, fmt.type_size)
            planes = rows.view(-1).split([n_blocks * size for _, size in _FIELDS[fmt.name]])
            for plane, (start, size) in zip(planes, _FIELDS[fmt.name], strict=True):
                blocks[:, start : start + size] = plane.view(n_blocks, size)
            rows = blocks.view_as(rows)
        return dequantize(rows, fmt.type_id, dtype, backend=backend)

    def validate(self) -> None:
        """Raise ValueError unless all fields are as the class says; fills `table`."""
        for name, dtype in (("data", torch.uint8), ("offsets", torch.int64), ("type_ids", torch.int32)):
            _check_tensor(name, getattr(self, name), dtype, 1, self.data.device)
        if self.offsets.shape != self.type_ids.shape or not len(self.offsets):
            raise ValueError(f"there are {len(self.offsets)} offsets and {len(self.type_ids)} type_ids")
        if self.n_rows < 1 or self.n_cols < 1:
            raise ValueError(f"experts must have rows and columns, not [{self.n_rows}, {self.n_cols}]")
        if self.bias is not None:
            _check_tensor("bias", self.bias, torch.float32, 2, self.data.device)
            if self.bias.shape != (len(self.offsets), self.n_rows):
                raise ValueError(f"bias must be {[len(self.offsets), self.n_rows]}, not {list(self.bias.shape)}")
        formats = [find_expert_format(type_id) for type_id in self.type_ids.tolist()]
        table = tuple(zip(self.offsets.tolist(), formats, strict=True))
        for xid, (offset, fmt) in enumerate(table):
            if self.n_cols % fmt.block_size:
                raise ValueError(
                    f"expert {xid}: {self.n_cols} columns are not whole {fmt.name} blocks of {fmt.block_size}"
                )
            if offset < 0 or offset + self.n_rows * self._row_bytes(fmt) > self.data.numel():
                raise ValueError(
                    f"expert {xid}: {self.n_rows} rows of {self._row_bytes(fmt)} bytes from byte {offset} on "
                    f"are not within the {self.data.numel()} bytes of data"
                )
            if offset % find_alignment(fmt, self.planar):
                raise ValueError(
                    f"expert {xid}: byte {offset} is no multiple of {find_alignment(fmt, self.planar)}, "
                    f"as {'planar ' if self.planar else ''}{fmt.name} needs"
                )
        object.__setattr__(self, "table", table)

    def _rows(self, xid: int) -> torch.Tensor:
        offset, fmt = self.table[xid]
        return self.data[offset : offset + self.n_rows * self._row_bytes(fmt)].view(self.n_rows, -1)

    def _row_bytes(self, fmt: BlockFormat) -> int:
        return self.n_cols // fmt.block_size * fmt.type_size


@dataclass(frozen=True)
class Activation:
    """What makes one hidden vector of gate and up: act(gate) * up for "silu", "gelu" (by tanh) and "relu".

    "swiglu_oai" is gpt-oss's: gate * sigmoid(alpha * gate) * (up + 1), gate clamped to at most `limit` and up to
    +-`limit` before; the others ignore `alpha` and `limit`.
    """

    name: str = "silu"
    alpha: float = 1.702
    limit: float = math.inf

    def __post_init__(self) -> None:
        if self.name not in ("silu", "gelu", "relu", "swiglu_oai"):
            raise ValueError(f"unknown activation {self.name!r}: expected silu, gelu, relu or swiglu_oai")

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        match self.name:
            case "silu":
                return functional.silu(gate) * up
            case "gelu":
                return functional.gelu(gate, approximate="tanh") * up
            case "relu":
                return functional.relu(gate) * up
            case _:
                gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
                return gate * torch.sigmoid(self.alpha * gate) * (up + 1)


def _count_cols(row_bytes: int, fmt: BlockFormat) -> int:
    if row_bytes % fmt.type_size:
        raise ValueError(f"rows of {row_bytes} bytes are not whole {fmt.name} blocks of {fmt.type_size} bytes")
    return row_bytes // fmt.type_size * fmt.block_size


def _check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, ndim: int, device: torch.device) -> None:
    if tensor.dtype != dtype or tensor.ndim != ndim:
        raise ValueError(f"{name} must be {dtype} of {ndim} dimensions, not {tensor.dtype} {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not of strides {list(tensor.stride())}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, as data is, not on {tensor.device}")
