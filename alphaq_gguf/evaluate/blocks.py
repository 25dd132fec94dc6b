"""Where the PyTorch path gets a model's GGUF blocks from: a file, or a recipe that is followed while it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.imatrix import ImportanceMatrix
from ..checkpoint import ExpertStack, Source
from ..checkpoint.gguf import GGUFSource
from ..checkpoint.huggingface import HuggingFaceSource, describe_model, read_config
from ..conversion import check_imatrix
from ..encode import find_encoder
from ..errors import AlphaQError
from ..qtypes import QType, fits
from ..recipe import Recipe
from .llama import LlamaVocabulary


class Blocks(ABC):
    """Tensors as GGUF blocks, under llama.cpp's names, with the config.json of the model they make.

    `types` has a type for each matrix of an expert stack, and one for any other tensor.
    """

    source: Source
    label: str
    config: dict[str, Any]
    types: dict[str, Sequence[QType]]

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) as stored, which are of one type: uint8 [rows, row_bytes]."""

    @abstractmethod
    def open_vocabulary(self) -> LlamaVocabulary:
        """llama.cpp's tokenizer of the model."""


class FileBlocks(Blocks):
    """The blocks of a GGUF, quantised or not, in one file or split.

    The config.json is that of the directory `model`, or the one that the file carries. SourceError when the file is
    none or damaged, AlphaQError when there is no config.json.
    """

    def __init__(self, path: Path, model: Path | None = None) -> None:
        self.source = GGUFSource(path, allow_requantize=True)
        self.label = str(path)
        config = self.source.model_config
        if model is not None:
            if not model.is_dir():
                raise AlphaQError(f"{model} is no directory", "give a Hugging Face directory with a config.json")
            config = describe_model(read_config(model, str(model)))
        if config is None:
            raise AlphaQError(
                f"{path}: does not say how transformers is to build the model: no config.json in its metadata",
                "give the Hugging Face directory it was made from, or its config.json alone in one: --model DIR",
            )
        self.config = config
        counts = {stack.name: stack.n_experts for stack in self.source.stacks}
        self.types = {name: [info.qtype] * counts.get(name, 1) for name, info in self.source.tensors.items()}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.source.read_bytes(name, start, stop)

    def open_vocabulary(self) -> LlamaVocabulary:
        return LlamaVocabulary(self.source.files[0])


class RecipeBlocks(Blocks):
    """The blocks that `recipe`, of any granularity, makes of `source`, encoded when they are read, on `device`.

    AlphaQError when the recipe is for another source or importance matrix, or does not cover the source.
    """

    def __init__(
        self,
        source: HuggingFaceSource,
        recipe: Recipe,
        imatrix: ImportanceMatrix | None = None,
        threads: int = 1,
        device: str = "cpu",
    ) -> None:
        self.source = source
        self.label = source.label
        self.config = source.model_config
        self._imatrix = imatrix
        self._threads = threads
        self._encode = find_encoder(recipe.settings.get("encoder", "libggml"), device).encode
        check_imatrix(recipe, imatrix, "recipe")
        if recipe.source != source.fingerprint:
            raise AlphaQError(
                f"recipe: made for another model, {recipe.source[:12]}: {source.label} is {source.fingerprint[:12]}",
                "allocate again for this model",
            )
        self.types = _types_by_matrix(recipe, source)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        types, info = self.types[name], self.source.tensors[name]
        height = info.n_rows // len(types)
        weights = None if self._imatrix is None else self._imatrix.weights(name)
        importance = None
        if weights is not None:
            # One vector for each matrix of the tensor, or the same for all.
            importance = weights[0 if len(weights) == 1 else start * len(weights) // info.n_rows]
        return self._encode(self.source.read_rows(name, start, stop), types[start // height], self._threads, importance)

    def open_vocabulary(self) -> LlamaVocabulary:
        return LlamaVocabulary.of_fields(self.source.fields)


def _types_by_matrix(recipe: Recipe, source: Source) -> dict[str, Sequence[QType]]:
    """The type of each tensor that is no expert stack, and of each expert of those that are."""
    stacks: dict[str, ExpertStack] = {stack.name: stack for stack in source.stacks}
    found: dict[str, Sequence[QType]] = {name: [qtype] for name, qtype in recipe.tensors.items()}
    chosen: dict[str, dict[int, QType]] = {}
    named: Counter[tuple[str, int]] = Counter()
    for unit in recipe.units:
        stack = stacks.get(unit.tensor)
        experts = range(stack.n_experts) if stack and unit.expert is None else [unit.expert or 0]
        for xid in experts:
            named[unit.tensor, xid] += 1
            chosen.setdefault(unit.tensor, {})[xid] = unit.qtype
    for name, types in chosen.items():
        found[name] = [types[xid] for xid in sorted(types)]
    expected = {(stack.name, xid) for stack in source.stacks for xid in range(stack.n_experts)}
    if expected != named.keys() or set(named.values()) != {1} or found.keys() != source.tensors.keys():
        raise AlphaQError("recipe: does not cover the model's tensors exactly, each once", "allocate again")
    for name, types in found.items():
        n_cols = source.tensors[name].n_cols
        unfit = next((qtype for qtype in types if not fits(qtype, n_cols)), None)
        if unfit is not None:
            raise AlphaQError(f"recipe: {name} has rows of {n_cols}, which {unfit.name} blocks do not divide")
    return found
