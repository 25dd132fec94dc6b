"""Sums over tokens, by expert: what a layer's usage and the second moments of its inputs are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from .data import LayerUsage, Moments

_USAGE = tuple(LayerUsage.__dataclass_fields__)
_SUMS, _COUNTS = "sums of ", "counts of "


@dataclass(frozen=True, eq=False)
class TokenSample:
    """Some of all tokens at a layer's experts: `inputs` float32 [S, H], `chosen` and `gates` [S, K].

    `share` is S over the number of all tokens.
    """

    inputs: np.ndarray
    chosen: np.ndarray
    gates: np.ndarray
    share: float

    def __post_init__(self) -> None:
        if self.inputs.ndim != 2 or self.chosen.shape[:-1] != self.inputs.shape[:1]:
            raise ValueError(f"expected [S, H] and [S, K], found {self.inputs.shape} and {self.chosen.shape}")
        if self.chosen.ndim != 2 or self.gates.shape != self.chosen.shape:
            raise ValueError(f"expected two of [S, K], found {self.chosen.shape} and {self.gates.shape}")


class LayerSums:
    """Float64 sums over the tokens of one layer, to which batches are added in any order."""

    def __init__(self, n_datasets: int, n_experts: int) -> None:
        self.n_experts = n_experts
        self._usage = {name: np.zeros((n_datasets, n_experts)) for name in _USAGE}
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}

    def add_tokens(
        self, dataset: int, chosen: np.ndarray, gates: np.ndarray, scores: np.ndarray, activations: np.ndarray
    ) -> None:
        """Add tokens of a dataset, all arrays [T, K].

        `scores` are gate weights before they are renormalised and scaled, `activations` the means of the absolute
        intermediate activations. ValueError for other shapes and for experts that there are not.
        """
        experts = self._experts(chosen)
        given = {"gates": gates, "scores": scores, "activations": activations}
        for name, values in given.items():
            if values.shape != chosen.shape:
                raise ValueError(f"{name}: expected shape {chosen.shape}, found {values.shape}")
        gates, scores, activations = (values.ravel().astype(np.float64) for values in given.values())
        added = {
            "tokens": None,
            "gates": gates,
            "squared_gates": gates**2,
            "scores": scores,
            "activations": activations,
            "significance": gates * activations,
        }
        for name, values in added.items():
            self._usage[name][dataset] += np.bincount(experts, values, minlength=self.n_experts)

    def add_inputs(self, stack: str, chosen: np.ndarray, inputs: np.ndarray) -> None:
        """Add inputs of an expert stack: [T, n_cols], read by all K experts of `chosen` [T, K], or [T, K, n_cols]."""
        experts = self._experts(chosen)
        if inputs.shape[:-1] not in (chosen.shape, chosen.shape[:1]):
            raise ValueError(f"{stack}: inputs {inputs.shape} of experts {chosen.shape}")
        rows = np.arange(chosen.size) // (chosen.shape[1] if inputs.ndim == 2 else 1)
        n_cols = inputs.shape[-1]
        sums = self._sums.setdefault(stack, np.zeros((self.n_experts, n_cols)))
        if sums.shape[1] != n_cols:
            raise ValueError(f"{stack}: expected inputs of {sums.shape[1]} columns, found {n_cols}")
        squares = np.square(inputs.reshape(-1, n_cols), dtype=np.float64)
        readers = sparse.csr_array((np.ones(len(experts)), (experts, rows)), (self.n_experts, len(squares)))
        sums += readers @ squares
        counts = self._counts.setdefault(stack, np.zeros(self.n_experts))
        counts += np.bincount(experts, minlength=self.n_experts)

    def _experts(self, chosen: np.ndarray) -> np.ndarray:
        if chosen.ndim != 2 or not np.issubdtype(chosen.dtype, np.integer):
            raise ValueError(f"experts: expected integers [T, K], found {chosen.dtype} {chosen.shape}")
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < self.n_experts:
            raise ValueError(f"experts {chosen.min()} to {chosen.max()} of {self.n_experts}")
        return chosen.ravel()

    @property
    def usage(self) -> LayerUsage:
        return LayerUsage(**{name: values.copy() for name, values in self._usage.items()})

    @property
    def moments(self) -> dict[str, Moments]:
        """By stack."""
        return {name: Moments(sums.astype(np.float32), self._counts[name].copy()) for name, sums in self._sums.items()}

    @property
    def is_finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return all(np.isfinite(values).all() for values in self.arrays().values())

    def merge(self, other: LayerSums) -> None:
        """Add what another one summed over other tokens."""
        mine, others = self.arrays(), other.arrays()
        for name, values in others.items():
            if name in mine and mine[name].shape != values.shape:
                raise ValueError(f"{name}: expected shape {mine[name].shape}, found {values.shape}")
        self._set({**mine, **{name: mine.get(name, 0) + values for name, values in others.items()}})

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything, as `from_arrays` takes it."""
        return {
            **self._usage,
            **{_SUMS + name: values for name, values in self._sums.items()},
            **{_COUNTS + name: values for name, values in self._counts.items()},
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> LayerSums:
        found = cls(*arrays["tokens"].shape)
        found._set(arrays)
        return found

    def _set(self, arrays: Mapping[str, np.ndarray]) -> None:
        copies = {name: np.array(arrays[name], dtype=np.float64) for name in arrays}
        self._usage = {name: copies[name] for name in _USAGE}
        for prefix, kept in ((_SUMS, self._sums), (_COUNTS, self._counts)):
            kept |= {name.removeprefix(prefix): copies[name] for name in copies if name.startswith(prefix)}
