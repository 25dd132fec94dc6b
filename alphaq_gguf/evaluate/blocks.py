"""Where the PyTorch path gets a model's GGUF blocks from: a file, or a recipe that is followed while it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..calibration.imatrix import ImportanceMatrix
from ..checkpoint import Source
from ..checkpoint.gguf import GGUFSource
from ..checkpoint.huggingface import HuggingFaceSource, describe_model, read_config
from ..conversion import check_imatrix
from ..encode import find_encoder
from ..errors import AlphaQError
from ..qtypes import QType
from ..recipe import Recipe, check_source, matrix_types
from .llama import LlamaVocabulary


class Blocks(ABC):
    """Tensors as GGUF blocks, under llama.cpp's names, with the config.json of the model they make.

    `types` has a type for each matrix of an expert stack, and one for any other tensor.
    """

    source: Source
    label: str
    config: dict[str, Any]
    types: Mapping[str, Sequence[QType]]

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
        self.source = self._file = GGUFSource(path, allow_requantize=True)
        self.label = str(path)
        config = self._file.model_config
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
        self.types = self._file.matrix_types

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._file.read_blocks(name, start, stop)

    def open_vocabulary(self) -> LlamaVocabulary:
        return LlamaVocabulary(self._file.files[0])


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
        check_source(recipe, source, "recipe")
        self.types = matrix_types(recipe, source)

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
