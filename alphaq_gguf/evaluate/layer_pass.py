"""All windows sent through a model one layer at a time, hidden states on the disk, so that it can be interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

import numpy as np

from ..errors import OutputError
from ..reporter import Reporter
from ..writer import write_atomically
from .layerwise import LayerwiseModel


class LayerPass:
    """Windows of tokens [n, n_ctx] on their way through the layers of `model`, `batch` at once.

    Hidden states lie in `work_dir`, which belongs to these windows alone: made again, it goes on with the layer that
    was not finished. With `keep_inputs` there is room for what a layer's experts read. OutputError when the disk
    cannot hold them, and `beside` bytes that the caller will write.
    """

    def __init__(
        self,
        model: LayerwiseModel,
        windows: np.ndarray,
        work_dir: Path,
        *,
        batch: int,
        reporter: Reporter,
        keep_inputs: bool = False,
        beside: int = 0,
    ) -> None:
        self._model = model
        self._batch = batch
        self._reporter = reporter
        self._n_tokens = windows.size
        self._state = work_dir / "finished-layers"
        is_new = not self._state.is_file()
        names = ("hidden-0", "hidden-1", *(["expert-inputs"] if keep_inputs else []))
        shape = (*windows.shape, model.width)
        if is_new:
            _check_space(work_dir, len(names) * 4 * int(np.prod(shape)), beside)
        mode = "w+" if is_new else "r+"
        # What a layer reads and what it writes, in turns, and what its experts read.
        self._files = [np.lib.format.open_memmap(work_dir / f"{n}.npy", mode, np.dtype("f4"), shape) for n in names]
        if is_new:
            label = model.source.label
            reporter.note(f"Running {label} layer by layer, {windows.size:,} tokens through each")
            model.embed(windows, self.hidden(0))
            self._finish(0)
        self._finished = int(self._state.read_text(encoding="utf-8"))

    def hidden(self, bid: int) -> np.ndarray:
        """What layer `bid` is given, and the one before it made: float32 [n, n_ctx, width]; of the last two layers."""
        return self._files[bid % 2]

    @property
    def inputs(self) -> np.ndarray:
        """What the experts of the latest layer that kept them are given: float32 [n, n_ctx, width]."""
        return self._files[2]

    def run(
        self, stop: int, inputs_of: Container[int] = (), chosen: Mapping[int, np.ndarray] | None = None
    ) -> Iterator[int]:
        """Run the layers below `stop` that are not finished; yield each, which is finished when the next is asked for.

        Those in `inputs_of` keep what their experts are given; `chosen` has arrays for the experts that tokens are
        sent to, as `LayerwiseModel.run_layer` fills them, by layer.
        """
        for bid in range(self._finished, stop):
            label = f"Layer {bid} of {self._model.n_layers}"
            with self._reporter.task(label, self._n_tokens, "tokens") as advance:
                self._model.run_layer(
                    bid,
                    self.hidden(bid),
                    self.hidden(bid + 1),
                    self.inputs if bid in inputs_of else None,
                    self._batch,
                    advance,
                    chosen=None if chosen is None else chosen.get(bid),
                )
            yield bid
            self._finish(bid + 1)

    def _finish(self, n_layers: int) -> None:
        """Note that so many layers are finished, and their output is on the disk."""
        self._files[n_layers % 2].flush()
        write_atomically(self._state, str(n_layers))


def _check_space(work_dir: Path, need: int, beside: int) -> None:
    """A mapped file that outgrows its disk would end the process."""
    free = shutil.disk_usage(work_dir).free
    if need + beside > free:
        more = f" and the file made of them {beside:,}" if beside else ""
        raise OutputError(
            f"{work_dir}: disk full: hidden states take {need:,} bytes{more}, {free:,} are free",
            "give fewer tokens, or another --cache-dir",
        )
