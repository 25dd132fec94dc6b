"""What tokens do in the expert layers of a Hugging Face checkpoint, gathered while PyTorch runs it layer by layer."""

from __future__ import annotations

from collections.abc import Container, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..checkpoint.huggingface import HuggingFaceSource
from ..evaluate.layer_pass import LayerPass
from ..evaluate.layerwise import LayerwiseModel
from ..prefetch import prefetch
from ..reporter import Reporter
from ..routing import Router, Routing, read_routers, route
from .experts import LayerExperts
from .statistics import LayerSums, TokenSample

# Tokens whose inputs are in memory at once, in double precision.
_CHUNK = 1024


def collect(
    source: HuggingFaceSource,
    model: LayerwiseModel,
    windows: np.ndarray,
    dataset_of: np.ndarray,
    n_datasets: int,
    sample: np.ndarray,
    work_dir: Path,
    *,
    skip: Container[int],
    batch: int,
    reporter: Reporter,
) -> Iterator[tuple[int, LayerSums, TokenSample]]:
    """Run all windows of tokens [n, n_ctx] through the layers of `model`, `batch` at once; yield what expert layers do.

    Window i belongs to dataset `dataset_of[i]`; `sample` are ascending positions in the flattened windows. Layers in
    `skip` are run and not yielded, those after the last one wanted are not run. Hidden states lie in `work_dir`, which
    belongs to these windows alone: called again, it goes on with the layer that was not finished. A layer is finished
    when the next one is asked for. OutputError when the disk cannot hold them.
    """
    wanted = [bid for bid in range(model.n_layers) if model.has_experts(bid) and bid not in skip]
    if not wanted:
        return
    routers = read_routers(source)
    passing = LayerPass(model, windows, work_dir, batch=batch, reporter=reporter, keep_inputs=True)
    owners = np.repeat(dataset_of, windows.shape[1])
    for bid in passing.run(wanted[-1] + 1, inputs_of=wanted):
        if bid in wanted:
            rows = passing.inputs.reshape(-1, model.width)
            yield bid, *_gather(source, model.device, bid, routers[bid], rows, owners, n_datasets, sample, reporter)


@torch.inference_mode()
def _gather(
    source: HuggingFaceSource,
    device: str,
    bid: int,
    router: Router,
    inputs: np.ndarray,
    owners: np.ndarray,
    n_datasets: int,
    sample: np.ndarray,
    reporter: Reporter,
) -> tuple[LayerSums, TokenSample]:
    """The sums and the sample of a layer whose router and experts read `inputs` [T, H]; `owners` [T] are datasets."""
    layer = LayerExperts(source, bid, device)
    sums = LayerSums(n_datasets, layer.n_experts)
    stacks = {stack.proj: stack.name for stack in source.stacks if stack.bid == bid}
    down = stacks.pop("down")
    routed = []
    for start in range(0, len(inputs), _CHUNK):
        x = np.asarray(inputs[start : start + _CHUNK])
        routed.append(route(router, x))
        chosen, gates, _ = routed[-1]
        read = x[:, None] * gates[..., None] if layer.rule.scales_input else x
        for name in stacks.values():
            sums.add_inputs(name, chosen, read)
    chosen, gates, scores = Routing(*map(np.concatenate, zip(*routed, strict=True)))

    activations = np.empty(chosen.shape)
    used = np.unique(chosen)
    experts = prefetch(partial(layer.read, int(xid)) for xid in used)
    with reporter.task(f"Experts of layer {bid}", chosen.size, "tokens") as advance:
        for xid, expert in zip(used, experts, strict=True):
            places = np.argwhere(chosen == xid)
            for start in range(0, len(places), _CHUNK):
                tokens, ranks = places[start : start + _CHUNK].T
                x = torch.from_numpy(inputs[tokens]).to(device)
                weights = torch.from_numpy(gates[tokens, ranks]).to(device, torch.float32)
                a = expert.intermediate(expert.inputs(x, weights)).cpu().numpy()
                activations[tokens, ranks] = np.abs(a).mean(axis=1)
                sums.add_inputs(down, chosen[tokens, ranks, None], a)
                advance(len(tokens))
    for dataset in range(n_datasets):
        own = owners == dataset
        sums.add_tokens(dataset, chosen[own], gates[own], scores[own], activations[own])
    share = len(sample) / len(inputs)
    return sums, TokenSample(np.array(inputs[sample]), chosen[sample], gates[sample].astype(np.float32), share)
