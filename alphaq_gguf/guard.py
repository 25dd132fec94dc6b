"""What keeps llama.cpp from computing with containers as if they were ordinary tensors, and what lets it load them.

A file with containers names as its architecture a sentence that no program knows, so that everything but the plug-in's
launchers refuses it and says why. The architecture itself is in a key of its own; overriding the first with it is what
a launcher does.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from gguf import GGUFValueType

from .container import VERSION
from .errors import SourceError
from .gguf_file import Field, make_field

T = TypeVar("T")

DEVICE = "ALPHAQ"
"""The plug-in's device and buffer type that computes with containers where the file is mapped."""
REPACKING_DEVICE = "ALPHAQ_REPACK"
"""The same with the experts rearranged for the processor, in memory of their own."""

ARCHITECTURE = "general.architecture"
_PREFIX = "alphaq.container."
VERSION_KEY = _PREFIX + "version"
ARCHITECTURE_KEY = _PREFIX + "architecture"
TENSORS_KEY = _PREFIX + "tensors"
OPTIONS_KEY = _PREFIX + "options"

_SIGN = " in alphaq containers: "
_REMEDY = "convert the model again"
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight$")


def refusal(architecture: str) -> str:
    """What a file with containers names as its architecture: llama.cpp's error for an unknown one quotes it."""
    return f"{architecture}{_SIGN}runs only with the ggml plug-in of alphaq-gguf"


def declare(
    fields: Iterable[Field], architecture: str, containers: Sequence[str], stacks: Sequence[str]
) -> list[Field]:
    """The metadata of a file whose tensors `containers`, of all its expert `stacks`, are containers."""
    guarded = make_field(ARCHITECTURE, GGUFValueType.STRING, refusal(architecture))
    options = shlex.join(launch_options(architecture, containers, stacks))
    return [guarded if field.key == ARCHITECTURE else field for field in fields] + [
        make_field(VERSION_KEY, GGUFValueType.UINT32, VERSION),
        make_field(ARCHITECTURE_KEY, GGUFValueType.STRING, architecture),
        make_field(TENSORS_KEY, GGUFValueType.ARRAY, list(containers), GGUFValueType.STRING),
        make_field(OPTIONS_KEY, GGUFValueType.STRING, options),
    ]


@dataclass(frozen=True)
class Declaration:
    """What a file with containers says of itself: the model's architecture, and which tensors are containers."""

    architecture: str
    tensors: tuple[str, ...]


def read_declaration(fields: Mapping[str, Field], where: str) -> Declaration | None:
    """What the metadata of a file says of its containers, None for an ordinary file.

    SourceError when that is not whole, or of a version that this one does not read.
    """
    guarded = fields.get(ARCHITECTURE)
    if not any(key.startswith(_PREFIX) for key in fields):
        if guarded is not None and _SIGN in str(guarded.value):
            raise SourceError(f"{where}: its architecture is {guarded.value!r}, but it lacks {VERSION_KEY}", _REMEDY)
        return None
    version = _value(fields, VERSION_KEY, int, where)
    if version != VERSION:
        raise SourceError(
            f"{where}: containers of version {version}, this version reads {VERSION}",
            "update alphaq-gguf" if version > VERSION else _REMEDY,
        )
    tensors = _value(fields, TENSORS_KEY, list, where)
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise SourceError(f"{where}: {TENSORS_KEY} is damaged: expected names of tensors", _REMEDY)
    return Declaration(_value(fields, ARCHITECTURE_KEY, str, where), tuple(tensors))


def _value(fields: Mapping[str, Field], key: str, kind: type[T], where: str) -> T:
    """The value of a key, of which the declaration needs one of this kind."""
    value = fields[key].value if key in fields else None
    # A truth value is no version.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SourceError(f"{where}: has containers, but {'a damaged' if key in fields else 'no'} {key}", _REMEDY)
    return value


def restore(fields: Iterable[Field], architecture: str) -> list[Field]:
    """The metadata as it was before `declare`."""
    named = make_field(ARCHITECTURE, GGUFValueType.STRING, architecture)
    return [named if field.key == ARCHITECTURE else field for field in fields if not field.key.startswith(_PREFIX)]


def launch_options(architecture: str, containers: Sequence[str], stacks: Sequence[str]) -> list[str]:
    """The options with which llama.cpp's programs load such a file, the plug-in being named by GGML_BACKEND_PATH."""
    return ["-ot", f"{tensor_pattern(containers, stacks)}={DEVICE}", "--override-kv", override(architecture)]


def override(architecture: str) -> str:
    """The value of `--override-kv` that gives the file its architecture back."""
    return f"{ARCHITECTURE}=str:{architecture}"


def tensor_pattern(containers: Sequence[str], stacks: Sequence[str]) -> str:
    """A regular expression, without commas, that finds the tensors `containers` and no other of `stacks`."""
    if set(containers) == set(stacks):
        return "exps.weight"
    layers: dict[str, list[str]] = {}
    for name in containers:
        match = _LAYER.match(name)
        assert match
        layers.setdefault(match[2], []).append(match[1])
    return "|".join(rf"blk\.({'|'.join(numbers)})\.{rest}\.weight" for rest, numbers in layers.items())
