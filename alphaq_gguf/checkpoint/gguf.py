"""A GGUF of any architecture whose experts are stacked, in one file or split into several."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..encode import decode_rows
from ..errors import SourceError
from ..file_containers import check_declared, read_containers
from ..gguf_file import Field, Header, TensorInfo, read_header
from ..guard import ARCHITECTURE, read_declaration, restore
from ..qtypes import FLOAT_TYPES, QType, row_bytes
from .base import Source
from .huggingface import CONFIG_KEY, describe_model

_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf$")
# How the source was cut into files says nothing of the file we write.
_SPLIT_KEYS = "split."


class GGUFSource(Source):
    """Reads a GGUF, or all files of a split one given any of them; metadata is carried over byte for byte.

    `containers` are the stacks whose experts have types of their own, all of them checked. `read_bytes` takes such a
    stack for what it is declared as; `read_blocks` gives its experts' rows, and `fields` is what the metadata of a file
    without containers would be.
    """

    def __init__(self, path: Path, *, allow_requantize: bool = False) -> None:
        super().__init__(path)
        headers = _read_split(path)
        first = next(iter(headers.values()))
        declaration = read_declaration(first.fields, str(path))
        architecture = declaration.architecture if declaration else first.get(ARCHITECTURE)
        if not isinstance(architecture, str):
            raise SourceError(f"{path}: no general.architecture in its metadata", "this is not a model file")
        self.architecture = architecture
        self._fields = [field for key, field in first.fields.items() if not key.startswith(_SPLIT_KEYS)]
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for file, header in headers.items():
            for name, info in header.tensors.items():
                if name in self.tensors:
                    raise SourceError(f"{file}: tensor {name} is also in {self._places[name][0].name}")
                self.tensors[name] = info
                self._places[name] = (file, header.data_offset + info.offset)
        self._files = list(headers)
        if declaration:
            self._fields = restore(self._fields, architecture)
        stacks = [self.tensors[stack.name] for stack in self.stacks]
        declared = declaration.tensors if declaration else ()
        self.containers = read_containers(stacks, self._places, declared)
        check_declared(self.containers, declared, self.tensors, str(path))
        if not allow_requantize:
            self.refuse_containers()
        quantised = [s for s in self.stacks if self.tensors[s.name].qtype not in FLOAT_TYPES]
        if quantised and not allow_requantize:
            raise SourceError(
                f"{path}: already quantised: {quantised[0].name} is {self.tensors[quantised[0].name].qtype.name}",
                "start from the F32, F16 or BF16 file, or pass --allow-requantize and accept the added error",
            )
        self.require_experts()

    @property
    def matrix_types(self) -> dict[str, list[QType]]:
        """The type of each expert of every stack, and one type for each other tensor."""
        counts = {stack.name: stack.n_experts for stack in self.stacks}
        return {
            name: list(self.containers[name].types) if name in self.containers else [info.qtype] * counts.get(name, 1)
            for name, info in self.tensors.items()
        }

    def refuse_containers(self) -> None:
        """SourceError when experts have types of their own, which nothing is to be made of but what it is."""
        if self.containers:
            name = next(iter(self.containers))
            raise SourceError(
                f"{self.path}: already quantised: each expert of {name} has a type of its own, and quantising again "
                "would add error to error",
                "start from the F32, F16 or BF16 file",
            )

    @property
    def fields(self) -> list[Field]:
        return self._fields

    @property
    def model_config(self) -> dict[str, Any] | None:
        """The language model's config.json if the file keeps it; SourceError when that is damaged."""
        text = next((field.value for field in self._fields if field.key == CONFIG_KEY), None)
        if text is None:
            return None
        try:
            config = json.loads(text)
        except (json.JSONDecodeError, TypeError):
            config = None
        if not isinstance(config, dict):
            raise SourceError(f"{self.path}: {CONFIG_KEY} is damaged: expected a JSON object", "convert it again")
        return describe_model(config)

    @property
    def files(self) -> list[Path]:
        return self._files

    def read_bytes(self, name: str, start: int, stop: int) -> np.ndarray:
        width = row_bytes(self.tensors[name].qtype, self.tensors[name].n_cols)
        return self._read(name, start * width, stop - start, width)

    def read_blocks(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as stored, of a container within one expert: uint8 [rows, row_bytes]."""
        container = self.containers.get(name)
        if container is None:
            return self.read_bytes(name, start, stop)
        xid, first = divmod(start, container.shape[1])
        if stop > (xid + 1) * container.shape[1]:
            raise ValueError(f"rows {start} to {stop} of {name} are of several experts")
        width = row_bytes(container.types[xid], container.shape[2])
        return self._read(name, container.offsets[xid] + first * width, stop - start, width)

    def _read(self, name: str, offset: int, n_rows: int, width: int) -> np.ndarray:
        path, position = self._places[name]
        with path.open("rb") as file:
            file.seek(position + offset)
            data = np.fromfile(file, dtype=np.uint8, count=n_rows * width)
        if data.size != n_rows * width:
            raise SourceError(f"{path}: {name} ended early; the file changed while it was read")
        return data.reshape(n_rows, width)

    def _load_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        info, container = self.tensors[name], self.containers.get(name)
        if container is None:
            return decode_rows(self.read_bytes(name, start, stop), info.qtype, info.n_cols)
        height = container.shape[1]
        ends = sorted({start, stop, *range(-(-start // height) * height, stop, height)})
        parts = [
            decode_rows(self.read_blocks(name, a, b), container.types[a // height], info.n_cols)
            for a, b in pairwise(ends)
        ]
        return np.concatenate(parts or [np.empty((0, info.n_cols), np.float32)])


def _read_split(path: Path) -> dict[Path, Header]:
    """The headers of `path` and of the files it is split with, in order; metadata is in the first one.

    llama.cpp names them NAME-00001-of-0000N.gguf and says in `split.count` how many there are.
    SourceError names a part that is missing or does not belong.
    """
    header = read_header(path)
    count = header.get("split.count", 0)
    if count <= 1:
        return {path: header}
    match = _SPLIT_NAME.match(path.name)
    if not match or int(match[3]) != count:
        raise SourceError(
            f"{path}: one of {count} split files, but not named NAME-00001-of-{count:05d}.gguf",
            "give the files the names llama.cpp gave them",
        )
    parts = [path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise SourceError(
            f"{path}: split file {missing[0]} is missing ({len(missing)} of {count} absent)", "finish the download"
        )
    headers = {part: read_header(part) for part in parts}
    for number, (part, found) in enumerate(headers.items()):
        if found.get("split.no") != number or found.get("split.count") != count:
            raise SourceError(f"{part}: says it is part {found.get('split.no')} of {found.get('split.count')}")
    total = sum(len(found.tensors) for found in headers.values())
    expected = headers[parts[0]].get("split.tensors.count", total)
    if expected != total:
        raise SourceError(f"{path}: the split files hold {total} tensors, {expected} were promised")
    return headers
