"""A float GGUF of any architecture whose experts are stacked, in one file or split into several."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..encode import decode_rows
from ..errors import SourceError
from ..gguf_file import Field, Header, TensorInfo, read_header
from ..qtypes import FLOAT_TYPES, row_bytes
from .base import Source
from .huggingface import CONFIG_KEY, describe_model

_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf$")
# How the source was cut into files says nothing of the file we write.
_SPLIT_KEYS = "split."


class GGUFSource(Source):
    """Reads a GGUF, or all files of a split one given any of them; metadata is carried over byte for byte."""

    def __init__(self, path: Path, *, allow_requantize: bool = False) -> None:
        super().__init__(path)
        headers = _read_split(path)
        first = next(iter(headers.values()))
        architecture = first.get("general.architecture")
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
        quantised = [s for s in self.stacks if self.tensors[s.name].qtype not in FLOAT_TYPES]
        if quantised and not allow_requantize:
            raise SourceError(
                f"{path}: already quantised: {quantised[0].name} is {self.tensors[quantised[0].name].qtype.name}",
                "start from the F32, F16 or BF16 file, or pass --allow-requantize and accept the added error",
            )
        self.require_experts()

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
        info = self.tensors[name]
        path, offset = self._places[name]
        width = row_bytes(info.qtype, info.n_cols)
        with path.open("rb") as file:
            file.seek(offset + start * width)
            data = np.fromfile(file, dtype=np.uint8, count=(stop - start) * width)
        if data.size != (stop - start) * width:
            raise SourceError(f"{path}: {name} ended early; the file changed while it was read")
        return data.reshape(stop - start, width)

    def _load_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        info = self.tensors[name]
        return decode_rows(self.read_bytes(name, start, stop), info.qtype, info.n_cols)


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
