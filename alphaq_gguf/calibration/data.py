"""What calibration found, as strategies read it: sums over the tokens of each dataset, by layer and expert."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import AlphaQError
from ..qtypes import QType

WHOLE = "all"
"""The projection that stands for all of an expert's matrices at once."""


@dataclass(frozen=True, eq=False)
class LayerUsage:
    """What tokens did in one layer: float64 [datasets, experts], each a sum over the tokens routed to an expert.

    `tokens` counts them; `gates` sums their gate weights as the model applies them, `squared_gates` the squares of
    those, `scores` the gate weights before they are renormalised and scaled; `activations` sums the mean absolute
    intermediate activation, `significance` that times the gate weight. None is what a file does not tell.
    """

    tokens: np.ndarray
    gates: np.ndarray | None = None
    squared_gates: np.ndarray | None = None
    scores: np.ndarray | None = None
    activations: np.ndarray | None = None
    significance: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of a tensor's inputs: `sums` of squares, float32 [matrices, n_cols], over `counts` [matrices].

    An expert stack has one matrix per expert, any other tensor usually one.
    """

    sums: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, eq=False)
class Calibration:
    """Usage of the experts of a model by one or more datasets.

    `label` is what messages call it; `n_tokens` are the tokens of each dataset. `block_errors` are by (layer, expert,
    projection or WHOLE, type): the sum over all tokens of the squared change of the block's output when that
    alone is encoded. `moments` are by tensor name. `remarks` are one-line doubts whether it fits the model.
    """

    label: str
    datasets: tuple[str, ...]
    n_tokens: tuple[int, ...]
    layers: dict[int, LayerUsage]
    block_errors: dict[tuple[int, int, str, QType], float] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def frequency(self, bid: int) -> np.ndarray:
        """Share of all tokens routed to each expert, float64 [experts]; shares sum to the number of experts used."""
        return self._usage(bid, "tokens").sum(axis=0) / sum(self.n_tokens)

    def squared_gate(self, bid: int) -> np.ndarray:
        """Mean squared gate weight over all tokens, 0 where an expert is not chosen, float64 [experts]."""
        return self._usage(bid, "squared_gates").sum(axis=0) / sum(self.n_tokens)

    def score(self, bid: int) -> np.ndarray:
        """Mean gate weight before renormalisation over all tokens, 0 where not chosen, float64 [experts]."""
        return self._usage(bid, "scores").sum(axis=0) / sum(self.n_tokens)

    def significance(self, bid: int) -> np.ndarray:
        """Share of each expert in the sum of gate weight x mean absolute activation, float64 [datasets, experts]."""
        found = self._usage(bid, "significance")
        return found / found.sum(axis=1, keepdims=True)

    def of(self, dataset: str) -> Calibration:
        """The usage by one dataset alone, without what is not kept apart."""
        i = self.datasets.index(dataset)
        layers = {
            bid: replace(usage, **{name: v[i : i + 1] for name, v in vars(usage).items() if v is not None})
            for bid, usage in self.layers.items()
        }
        return Calibration(self.label, (dataset,), (self.n_tokens[i],), layers)

    def _usage(self, bid: int, name: str) -> np.ndarray:
        found = getattr(self.layers[bid], name) if bid in self.layers else None
        if found is None:
            raise AlphaQError(
                f"{self.label}: no {name.replace('_', ' ')} of the experts of layer {bid}",
                "measure them with `alphaq-gguf calibrate`",
            )
        return found
