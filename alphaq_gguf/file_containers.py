"""The containers of a GGUF: found in its tensors, checked, and compared with what its metadata declares."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from .container import MAGIC, Container, header_bytes, parse_container
from .errors import SourceError
from .gguf_file import TensorInfo
from .guard import TENSORS_KEY

_REMEDY = "convert the model again"


def read_containers(
    stacks: Iterable[TensorInfo], places: Mapping[str, tuple[Path, int]], declared: Collection[str]
) -> dict[str, Container]:
    """Those of the expert stacks that are `declared` to be containers or begin like one, by name.

    `places` are their files and positions; no more than headers is read. SourceError for a damaged one.
    """
    found = {}
    for info in stacks:
        path, position = places[info.name]
        with path.open("rb") as file:
            file.seek(position)
            head = file.read(min(header_bytes(info.shape[0] if info.shape else 0), info.n_bytes))
        if info.name in declared or head.startswith(MAGIC):
            found[info.name] = parse_container(head, info, str(path))
    return found


def check_declared(found: Collection[str], declared: Collection[str], tensors: Collection[str], where: str) -> None:
    """SourceError unless the containers that were `found` are those that the metadata of `tensors` declares."""
    for name in declared:
        if name not in found:
            problem = "is no expert stack" if name in tensors else "does not exist"
            raise SourceError(f"{where}: {TENSORS_KEY} names {name}, which {problem}", _REMEDY)
    for name in found:
        if name not in declared:
            raise SourceError(f"{where}: {name} is a container, but {TENSORS_KEY} does not name it", _REMEDY)
