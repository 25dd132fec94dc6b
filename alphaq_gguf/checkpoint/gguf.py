"""A float GGUF file of any architecture whose experts are stacked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..encode import decode_rows
from ..errors import SourceError
from ..gguf_file import read_header
from ..qtypes import FLOAT_TYPES, row_bytes
from .base import Source


class GGUFSource(Source):
    """Reads one GGUF file; metadata is carried over byte for byte."""

    kind = "gguf"

    def __init__(self, path: Path, *, allow_requantize: bool = False) -> None:
        super().__init__(path)
        self.header = read_header(path)
        architecture = self.header.get("general.architecture")
        if not isinstance(architecture, str):
            raise SourceError(f"{path}: no general.architecture in its metadata", "this is not a model file")
        self.architecture = architecture
        self.fields = list(self.header.fields.values())
        self.tensors = self.header.tensors
        if self.header.get("split.count", 0) > 1:
            raise SourceError(
                f"{path}: one of {self.header.get('split.count')} split files",
                "merge them first: llama-gguf-split --merge FIRST-FILE OUT.gguf",
            )
        quantised = [s for s in self.stacks if self.tensors[s.name].qtype not in FLOAT_TYPES]
        if quantised and not allow_requantize:
            raise SourceError(
                f"{path}: already quantised: {quantised[0].name} is {self.tensors[quantised[0].name].qtype.name}",
                "start from the F32, F16 or BF16 file, or pass --allow-requantize and accept the added error",
            )
        self.require_experts()

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        info = self.tensors[name]
        width = row_bytes(info.qtype, info.n_cols)
        with self.path.open("rb") as file:
            file.seek(self.header.data_offset + info.offset + start * width)
            data = np.fromfile(file, dtype=np.uint8, count=(stop - start) * width)
        if data.size != (stop - start) * width:
            raise SourceError(f"{self.path}: {name} ended early; the file changed while it was read")
        return data.reshape(stop - start, width)

    def _load_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        info = self.tensors[name]
        return decode_rows(self.read_bytes(name, start, stop), info.qtype, info.n_cols)
