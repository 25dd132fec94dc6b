"""What every source offers: metadata fields, tensors as rows, and which of them are expert stacks."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from ..errors import SourceError, WeightError
from ..gguf_file import Field, TensorInfo
from ..prefetch import prefetch

_STACK = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps\.weight$")
_UNSTACKED = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight$")
# Models up to this size are hashed whole for the fingerprint; of larger ones three samples per tensor,
# read side by side because each waits for the disk or the network.
_WHOLE_BYTES = 1 << 26
_SAMPLE_BYTES = 1 << 16
_PARALLEL_SAMPLES = 8


@dataclass(frozen=True)
class ExpertMatrix:
    """One expert's weight matrix of one projection: `n_rows` rows of the stack from row `start`."""

    stack: str
    bid: int
    xid: int
    proj: str
    start: int
    n_rows: int
    n_cols: int

    @property
    def label(self) -> str:
        return f"{self.stack} expert {self.xid} ({self.proj})"


@dataclass(frozen=True)
class ExpertStack:
    """A GGUF tensor [n_experts, n_rows, n_cols] that holds all experts of a projection in one layer.

    `proj` is gate, up, down or gate_up; a fused gate_up stack holds two matrices per expert, gate first.
    """

    name: str
    bid: int
    proj: str
    n_experts: int
    n_rows: int
    n_cols: int

    @property
    def n_weights(self) -> int:
        return self.n_experts * self.n_rows * self.n_cols

    @property
    def matrices(self) -> list[ExpertMatrix]:
        """The expert matrices in row order."""
        projs = ("gate", "up") if self.proj == "gate_up" else (self.proj,)
        height = self.n_rows // len(projs)
        return [
            ExpertMatrix(self.name, self.bid, xid, proj, xid * self.n_rows + i * height, height, self.n_cols)
            for xid in range(self.n_experts)
            for i, proj in enumerate(projs)
        ]


def find_stacks(tensors: Iterable[TensorInfo]) -> list[ExpertStack]:
    """The expert stacks among `tensors`, by llama.cpp's tensor names; SourceError on an odd shape."""
    stacks = []
    for info in tensors:
        match = _STACK.match(info.name)
        if not match:
            continue
        if len(info.shape) != 3 or (match[2] == "gate_up" and info.shape[1] % 2):
            raise SourceError(f"{info.name}: expected [experts, rows, cols], found shape {list(info.shape)}")
        stacks.append(ExpertStack(info.name, int(match[1]), match[2], *info.shape))
    return stacks


class Source(ABC):
    """A checkpoint opened for reading; nothing is loaded until rows are asked for.

    `tensors` maps GGUF names to shape (torch order) and stored type, in the order they are to be
    written; `fields` is the metadata a converted file starts from. `label` is what messages call the
    source, `name` what files made of it are called.
    """

    architecture: str
    """The GGUF architecture name."""
    tensors: dict[str, TensorInfo]
    omitted_bytes: int = 0
    """About how many bytes of metadata `fields` leaves out."""

    def __init__(self, path: Path, *, label: str = "", name: str = "") -> None:
        self.path = path
        self.label = label or str(path)
        self.name = name or path.resolve().name

    @property
    @abstractmethod
    def fields(self) -> list[Field]:
        """The metadata; SourceError when it cannot be made, for instance without a tokenizer."""

    @property
    def remarks(self) -> Sequence[str]:
        """Where llama.cpp is known to compute otherwise than the model."""
        return ()

    @abstractmethod
    def _load_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor as float32 [rows, n_cols]."""

    @abstractmethod
    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as stored, in the tensor's own type: uint8 [rows, row_bytes]."""

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """Every input file; none of them may be the output."""

    @cached_property
    def stacks(self) -> list[ExpertStack]:
        """Expert stacks by layer, then in the order gate, up, down."""
        order = {"gate_up": 0, "gate": 1, "up": 2, "down": 3}
        return sorted(find_stacks(self.tensors.values()), key=lambda s: (s.bid, order[s.proj]))

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) as C-contiguous float32; WeightError names the tensor on NaN or infinity."""
        info = self.tensors[name]
        rows = self._load_rows(name, start, info.n_rows if stop is None else stop)
        finite = np.isfinite(rows)
        if not finite.all():
            row, col = (int(i) for i in np.argwhere(~finite)[0])
            where = f"row {start + row}, column {col}"
            if len(info.shape) == 3:
                where = f"expert {(start + row) // info.shape[1]}, row {(start + row) % info.shape[1]}, column {col}"
            raise WeightError(
                f"{self.label}: {name} has {int((~finite).sum())} NaN or infinite weights, first at {where}",
                "the checkpoint is damaged: download it again",
            )
        return rows

    def read_matrix(self, matrix: ExpertMatrix) -> np.ndarray:
        """One expert's weights of one projection, float32 [n_rows, n_cols]."""
        return self.read_rows(matrix.stack, matrix.start, matrix.start + matrix.n_rows)

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 that identifies the weights: architecture, every tensor's name, shape and type, and contents.

        Contents are all bytes up to 64 MiB of weights; of larger models the first, middle and last
        64 KiB of each tensor, so that hundreds of GiB are identified in seconds, also over a network.
        """
        digest = hashlib.sha256(self.architecture.encode())
        whole = sum(info.n_bytes for info in self.tensors.values()) <= _WHOLE_BYTES
        spans: list[tuple[TensorInfo, int, int]] = []
        for info in self.tensors.values():
            digest.update(f"{info.name} {info.shape} {info.qtype.name}".encode())
            rows = max(1, _SAMPLE_BYTES * info.n_rows // max(info.n_bytes, 1))
            samples = sorted({0, info.n_rows // 2, max(0, info.n_rows - rows)})
            starts = range(0, info.n_rows, rows) if whole else samples
            spans += [(info, start, min(start + rows, info.n_rows)) for start in starts]
        reads = (partial(self.read_bytes, info.name, start, stop) for info, start, stop in spans)
        for sample in prefetch(reads, _PARALLEL_SAMPLES):
            digest.update(sample.data)
        return digest.hexdigest()

    def require_experts(self) -> None:
        """SourceError when the model is dense."""
        if not self.stacks and any(_UNSTACKED.match(name) for name in self.tensors):
            raise SourceError(
                f"{self.label}: one tensor per expert (blk.N.ffn_gate.M.weight), which llama.cpp no longer loads",
                "convert the checkpoint to GGUF again with a current convert_hf_to_gguf.py",
            )
        if not self.stacks:
            raise SourceError(
                f"{self.label}: a dense model: no expert tensors (blk.N.ffn_*_exps.weight) among {len(self.tensors)}",
                "alphaq-gguf allocates bits to experts; use llama-quantize for dense models",
            )
