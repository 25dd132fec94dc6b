"""What tokens do in the expert layers of a GGUF, gathered while llama.cpp runs it."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Source
from ..errors import AlphaQError
from ..evaluate.llama import LlamaModel
from ..evaluate.watch import Tensor, Watch, weights_name
from ..reporter import Reporter, Silent
from ..writer import replacing
from .statistics import LayerSums, TokenSample

# The stages of gate weights as llama.cpp's graphs name them; the last one that a layer has is applied.
_GATES = re.compile(r"ffn_moe_weights(_softmax|_norm|_scaled)?-(\d+)$")
# Block inputs times gate weights, by which some architectures weigh experts' inputs instead of their outputs.
_WEIGHTED = "ffn_moe_weighted-"
_SAVE_EVERY_S = 60
# Of large models the sums have gigabytes: saving takes no more than this share of the time.
_SAVE_SHARE = 0.05


def collect(
    path: Path,
    source: Source,
    windows: np.ndarray,
    dataset_of: np.ndarray,
    n_datasets: int,
    sample: np.ndarray,
    work_dir: Path,
    *,
    threads: int,
    gpu_layers: int = 0,
    counts_only: bool = False,
    reporter: Reporter | None = None,
) -> dict[int, tuple[LayerSums, TokenSample | None]]:
    """Run every window of tokens in `windows` [n, n_ctx], each from an empty context, through the GGUF at `path`.

    `source` knows the expert stacks of the same model. Window i belongs to dataset `dataset_of[i]`; `sample` are
    ascending positions in the flattened windows. The result is by layer, without draft layers, which llama.cpp does
    not run; samples are memory-mapped files in `work_dir`. Second moments are of what llama.cpp multiplies with the
    experts, as llama-imatrix has them; a sample's inputs are those of the block, before any gate weights.

    `counts_only` counts tokens, which is faster: all other sums stay 0, and there are no samples.

    `work_dir` is of this call alone: when it is killed and called again it goes on after the last saved window.
    AlphaQError for a model without expert stacks, one that llama.cpp does not run them of as expected, and
    for activations that are NaN or infinite.
    """
    source.require_experts()
    collector = _Collector(path, source, windows.shape[1], n_datasets, sample, work_dir, counts_only)
    done = collector.resume()
    if done < len(windows):
        watch = Watch(collector.wants, collector.take)
        with LlamaModel(
            path, n_ctx=windows.shape[1], threads=threads, exact=True, gpu_layers=gpu_layers, watch=watch
        ) as model:
            collector.expect(_run_layers(source, model))
            _run(model, collector, windows, dataset_of, done, reporter or Silent())
    return collector.results(windows.size)


def _run(
    model: LlamaModel,
    collector: _Collector,
    windows: np.ndarray,
    dataset_of: np.ndarray,
    done: int,
    reporter: Reporter,
) -> None:
    """Run the windows that are not done, saving now and then and at the end."""
    saved_at, save_s = time.monotonic(), 0.0
    with reporter.task(f"Running {model.path.name}", len(windows), "windows") as advance:
        advance(done)
        for i in range(done, len(windows)):
            collector.start(i, int(dataset_of[i]))
            model.run(windows[i].tolist())
            collector.finish()
            now = time.monotonic()
            if i == len(windows) - 1 or now - saved_at > max(_SAVE_EVERY_S, save_s / _SAVE_SHARE):
                collector.save(i + 1)
                saved_at = time.monotonic()
                save_s = saved_at - now
            advance(1)


def _run_layers(source: Source, model: LlamaModel) -> set[int]:
    """Layers with expert stacks that llama.cpp runs: all but the draft layers, which are the last."""
    metadata = model.llm.metadata
    prefix = metadata["general.architecture"]
    n_layers = int(metadata[f"{prefix}.block_count"]) - int(metadata.get(f"{prefix}.nextn_predict_layers", 0))
    return {stack.bid for stack in source.stacks if stack.bid < n_layers}


@dataclass
class _Layer:
    """One layer: its sums, its sampled tokens, and what is known so far of the batch that passes through it."""

    sums: LayerSums
    n_seen: int = 0
    gates: np.ndarray = field(default_factory=lambda: np.empty(0))
    scores: np.ndarray = field(default_factory=lambda: np.empty(0))
    inputs: np.ndarray = field(default_factory=lambda: np.empty(0))
    scaled: bool = False
    sampled: np.memmap | None = None


class _Collector:
    """Takes tensors as llama.cpp computes them, layer by layer, a batch of tokens at a time.

    A layer's gate weights come first, then its gate and up stacks, last the down stack, which ends the batch.
    """

    def __init__(
        self,
        path: Path,
        source: Source,
        n_ctx: int,
        n_datasets: int,
        sample: np.ndarray,
        work_dir: Path,
        counts_only: bool,
    ) -> None:
        self.path = path
        self.n_ctx = n_ctx
        self.sample = sample[:0] if counts_only else sample
        self.work_dir = work_dir
        self.counts_only = counts_only
        self.stacks = {s.name: s for s in source.stacks if s.proj == "down" or not counts_only}
        self.layers = {s.bid: _Layer(LayerSums(n_datasets, s.n_experts)) for s in source.stacks}
        self.window = 0
        self.dataset = 0

    def expect(self, layers: set[int]) -> None:
        """Collect of these layers."""
        self.layers = {bid: layer for bid, layer in self.layers.items() if bid in layers}

    def start(self, window: int, dataset: int) -> None:
        self.window, self.dataset = window, dataset
        for layer in self.layers.values():
            layer.n_seen = 0

    def finish(self) -> None:
        """AlphaQError unless every layer has seen every token of the window once."""
        for bid, layer in self.layers.items():
            if layer.n_seen != self.n_ctx:
                raise AlphaQError(
                    f"{self.path}: {layer.n_seen} of {self.n_ctx} tokens were seen at the experts of layer {bid}:"
                    " llama.cpp runs this architecture in a way that is not known here",
                    "calibrate the Hugging Face checkpoint instead",
                )

    def wants(self, tensor: Tensor) -> bool:
        if tensor.op == "MUL_MAT_ID":
            return weights_name(tensor) in self.stacks
        match = None if self.counts_only else _GATES.match(tensor.name)
        return match is not None and int(match[2]) in self.layers

    def take(self, tensor: Tensor) -> None:
        if match := _GATES.match(tensor.name):
            self._take_gates(self.layers[int(match[2])], match[1], tensor.array())
            return
        stack = self.stacks[weights_name(tensor)]
        layer = self.layers[stack.bid]
        _, inputs, ids = tensor.sources
        chosen = ids.array()[0, 0]
        if self.counts_only:
            nothing = np.zeros(chosen.shape)
            layer.sums.add_tokens(self.dataset, chosen, nothing, nothing, nothing)
            layer.n_seen += len(chosen)
            return
        # [T, K, n_cols], or [T, 1, n_cols] where one input is for all chosen experts.
        values = inputs.array()[0]
        layer.sums.add_inputs(stack.name, chosen, values[:, 0] if values.shape[1] == 1 else values)
        if stack.proj == "down":
            self._end_batch(stack.bid, layer, chosen, values)
        elif self.sample.size:
            layer.inputs, layer.scaled = values, inputs.name.startswith(_WEIGHTED)

    def _take_gates(self, layer: _Layer, stage: str | None, values: np.ndarray) -> None:
        layer.gates = values
        # A softmax over the chosen experts is where those gate weights begin: before it they are logits.
        if stage in (None, "_softmax"):
            layer.scores = values

    def _end_batch(self, bid: int, layer: _Layer, chosen: np.ndarray, intermediates: np.ndarray) -> None:
        if layer.gates.size != chosen.size:
            raise AlphaQError(
                f"{self.path}: llama.cpp computed no gate weights ffn_moe_weights-{bid} of layer {bid}",
                "calibrate the Hugging Face checkpoint instead",
            )
        gates, scores = layer.gates.reshape(chosen.shape), layer.scores.reshape(chosen.shape)
        activations = np.abs(intermediates).mean(axis=2, dtype=np.float64)
        layer.sums.add_tokens(self.dataset, chosen, gates, scores, activations)
        first = self.window * self.n_ctx + layer.n_seen
        start, stop = np.searchsorted(self.sample, [first, first + len(chosen)])
        if start < stop:
            rows = self.sample[start:stop] - first
            kept = self._sampled(bid, layer, layer.inputs.shape[2], chosen.shape[1])[start:stop]
            kept["inputs"] = _unscaled(layer.inputs[rows], gates[rows]) if layer.scaled else layer.inputs[rows, 0]
            kept["chosen"], kept["gates"] = chosen[rows], gates[rows]
        layer.n_seen += len(chosen)
        layer.gates = layer.scores = layer.inputs = np.empty(0)

    def _sampled(self, bid: int, layer: _Layer, width: int, n_used: int) -> np.ndarray:
        """The file of a layer's sampled tokens, a new one unless the run goes on from an earlier one's."""
        if layer.sampled is None:
            parts = [
                ("inputs", np.float32, (width,)),
                ("chosen", np.int32, (n_used,)),
                ("gates", np.float32, (n_used,)),
            ]
            file = self._sample_file(bid)
            layer.sampled = np.lib.format.open_memmap(file, "w+", np.dtype(parts), self.sample.shape)
        return layer.sampled

    def _sample_file(self, bid: int) -> Path:
        return self.work_dir / f"sample-{bid}.npy"

    @property
    def _sums_file(self) -> Path:
        return self.work_dir / "sums.npz"

    def save(self, done: int) -> None:
        """Keep what is known after `done` windows; AlphaQError when it is not finite."""
        arrays: dict[str, Any] = {"done": np.array(done)}
        for bid, layer in self.layers.items():
            if not layer.sums.is_finite:
                raise AlphaQError(
                    f"{self.path}: activations of layer {bid} are NaN or infinite",
                    "see whether the file generates sensible text: alphaq-gguf run",
                )
            if layer.sampled is not None:
                layer.sampled.flush()
            arrays |= {f"{bid} {name}": values for name, values in layer.sums.arrays().items()}
        with replacing(self._sums_file) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def resume(self) -> int:
        """Take up what an earlier run saved; the number of windows that it is of."""
        if not self._sums_file.is_file():
            return 0
        by_layer: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
        with np.load(self._sums_file) as file:
            done = int(file["done"])
            for key in file.files:
                if key != "done":
                    bid, name = key.split(" ", 1)
                    by_layer[int(bid)][name] = file[key]
        self.layers = {bid: _Layer(LayerSums.from_arrays(arrays)) for bid, arrays in by_layer.items()}
        for bid, layer in self.layers.items():
            # Not there yet if no token of those windows was sampled.
            if self.sample.size and self._sample_file(bid).is_file():
                layer.sampled = np.lib.format.open_memmap(self._sample_file(bid), "r+")
        return done

    def results(self, n_tokens: int) -> dict[int, tuple[LayerSums, TokenSample | None]]:
        share = self.sample.size / n_tokens
        return {
            bid: (
                layer.sums,
                None
                if layer.sampled is None
                else TokenSample(layer.sampled["inputs"], layer.sampled["chosen"], layer.sampled["gates"], share),
            )
            for bid, layer in self.layers.items()
        }


def _unscaled(inputs: np.ndarray, gates: np.ndarray) -> np.ndarray:
    """Block inputs [T, n_cols] from their products with gate weights [T, K]: divided by the largest of them."""
    best = gates.argmax(axis=1)
    tokens = np.arange(len(gates))
    return inputs[tokens, best] / gates[tokens, best][:, None]
