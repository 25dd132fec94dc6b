"""What a file with containers asks of those who load it, read from its header and its containers' alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..container import Container
from ..errors import SourceError
from ..file_containers import read_containers
from ..gguf_file import FormatError, Header, read_field, read_header
from ..guard import ARCHITECTURE, read_declaration, tensor_pattern
from ..qtypes import QType

_STACK = "exps.weight"


@dataclass(frozen=True)
class ContainerFile:
    """The architecture that a file with containers really has, its containers, and a pattern that finds only them."""

    architecture: str
    containers: dict[str, Container]
    pattern: str

    @property
    def types(self) -> set[QType]:
        """Of the experts in containers."""
        return {qtype for container in self.containers.values() for qtype in container.types}


def read_container_file(path: Path) -> ContainerFile | None:
    """What the file at `path` declares, None for one without containers; of a split one all parts are read.

    SourceError for damaged containers and for those of a newer version. It takes hardly longer than opening an ordinary
    file, and imports no more: what else llama.cpp's process loads would count as memory that it takes.
    """
    try:
        named = read_field(path, ARCHITECTURE)
    except (FormatError, OSError, UnicodeDecodeError):
        # Not a GGUF, which is for those to say who load it.
        return None
    # No architecture's name has a space, but every guard's sentence.
    if not isinstance(named, str) or " " not in named:
        return None
    header = read_header(path)
    declared = read_declaration(header.fields, str(path))
    if declared is None:
        return None
    containers: dict[str, Container] = {}
    stacks: list[str] = []
    for part, found in _parts(path, header).items():
        stacks += [name for name in found.tensors if _STACK in name]
        infos = [info for name, info in found.tensors.items() if name in declared.tensors]
        places = {info.name: (part, found.data_offset + info.offset) for info in infos}
        containers |= read_containers(infos, places, declared.tensors)
    for name in declared.tensors:
        if name not in containers:
            raise SourceError(f"{path}: declares container {name}, which does not exist", "convert the model again")
    return ContainerFile(declared.architecture, containers, tensor_pattern(declared.tensors, stacks))


def _parts(path: Path, header: Header) -> dict[Path, Header]:
    """The headers of a file and of those it was split into, under llama.cpp's names."""
    count = header.get("split.count", 0)
    ending = f"-00001-of-{count:05d}.gguf"
    if count <= 1 or not path.name.endswith(ending):
        return {path: header}
    start = path.name.removesuffix(ending)
    others = [path.with_name(f"{start}-{number:05d}-of-{count:05d}.gguf") for number in range(2, count + 1)]
    return {path: header, **{part: read_header(part) for part in others}}
