"""Checkpoints run layer by layer compute what transformers computes with all of the model in memory."""

from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, LAYOUTS, build_moe
from hub_server import HubServer
from oracles import convert_with_llama_cpp
from safetensors.torch import load_file, save_file
from test_quantised_checkpoints import rewrite, write_fp8, write_mxfp4, write_twin
from test_routing_of_transformers import dense_gates, router_modules
from tokenizer_files import edit_json

from alphaq_gguf.calibration.statistics import LayerSums, TokenSample
from alphaq_gguf.calibration.torch_engine import collect
from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.checkpoint.huggingface import HuggingFaceSource
from alphaq_gguf.errors import AlphaQError, OutputError, WeightError
from alphaq_gguf.evaluate.layerwise import LayerwiseModel
from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.reporter import Silent

WINDOWS = np.random.default_rng(0).integers(3, 390, (3, 40))
# Share of the range of values that grouping windows in other batches may cost.
BOUND = 1e-5


def opened(directory: Path | str, **options: Any) -> HuggingFaceSource:
    source = open_source(directory, **options)
    assert isinstance(source, HuggingFaceSource)
    return source


def run_all(source: HuggingFaceSource) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Logits, and the inputs of expert blocks by layer, one layer in memory at a time."""
    model = LayerwiseModel(source)
    hidden, found = model.embed(WINDOWS), {}
    for bid in range(model.n_layers):
        after, inputs = np.full_like(hidden, np.nan), np.full_like(hidden, np.nan)
        model.run_layer(bid, hidden, after, inputs, batch=2)
        assert all(parameter.is_meta for parameter in model._decoder.layers.parameters())
        assert model.has_experts(bid) == np.isfinite(inputs).all() != np.isnan(inputs).all()
        if model.has_experts(bid):
            found[bid] = inputs
        hidden = after
    logits = model.logits(hidden)
    norm = {id(parameter) for parameter in model._decoder.norm.parameters()}
    assert all(parameter.is_meta for parameter in model._model.parameters() if id(parameter) not in norm)
    return logits, found


def run_whole(directory: Path) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The same by transformers as it is meant to be used."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found: dict[int, np.ndarray] = {}
    for bid, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if "Experts" in "".join(type(child).__name__ for child in module.children()):
                module.register_forward_pre_hook(lambda _, x, bid=bid: found.update({bid: x[0].numpy()}))
    with torch.no_grad():
        return model(torch.from_numpy(WINDOWS)).logits.numpy(), found


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    spread = expected.max() - expected.min()
    assert spread > 1, "values too small for the comparison to mean anything"
    assert np.abs(found - expected).max() / spread < BOUND


def assert_same_run(source: HuggingFaceSource, reference: Path) -> None:
    logits, inputs = run_all(source)
    expected_logits, expected_inputs = run_whole(reference)
    assert_close(logits, expected_logits)
    assert inputs.keys() == expected_inputs.keys() != set()
    for bid, expected in expected_inputs.items():
        assert_close(inputs[bid], expected.reshape(inputs[bid].shape))


VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILIES},
    **{
        name: LAYOUTS[name]
        for name in (
            "DeepseekV3 with YaRN",
            "GraniteMoe tied, with biases",
            "Llama4 as Maverick",
            "Llama4 tied, with Scout's rope scaling",
            "Mixtral fused",
            "Qwen3Next tied, another order of layers",
        )
    },
    "sharded": {"shards": True},
    "bfloat16": {"dtype": "bfloat16"},
    "fused and tied": {"fused": True, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("layout", VARIANTS)
def test_logits_and_expert_inputs_are_those_of_the_whole_model(layout: str, tmp_path: Path) -> None:
    directory = build_moe(tmp_path / "model", **VARIANTS[layout])
    assert_same_run(opened(directory), directory)


def test_a_model_that_also_sees(tmp_path: Path) -> None:
    plain = build_moe(tmp_path / "plain", "Llama4")
    seeing = Path(shutil.copytree(plain, tmp_path / "seeing"))
    tensors = {f"language_model.{name}": t for name, t in load_file(plain / "model.safetensors").items()}
    tensors["vision_model.model.layers.0.mlp.fc1.weight"] = torch.ones(8, 8)
    save_file(tensors, seeing / "model.safetensors")
    config = {"model_type": "llama4", "text_config": json.loads((plain / "config.json").read_text())}
    (seeing / "config.json").write_text(json.dumps(config))
    assert_same_run(opened(seeing), plain)


@pytest.mark.parametrize("fused", [False, True])
def test_fp8(fused: bool, tmp_path: Path) -> None:
    source = write_fp8(build_moe(tmp_path / "model", "Qwen3Moe", fused=fused))
    assert_same_run(opened(source), write_twin(source, tmp_path / "twin"))


def test_mxfp4(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    def dequantise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {name: weight for name, weight in tensors.items() if not name.endswith(("_blocks", "_scales"))}
        for name in tensors.keys() - out.keys():
            if name.endswith("_blocks"):
                scales = tensors[name.replace("_blocks", "_scales")]
                out[name.removesuffix("_blocks")] = convert_moe_packed_tensors(tensors[name], scales)
        return out

    source = write_mxfp4(build_moe(tmp_path / "model", "GptOss", fused=True, dtype="bfloat16"))
    twin = rewrite(Path(shutil.copytree(source, tmp_path / "twin")), dequantise, quantization_config=None)
    assert_same_run(opened(source), twin)


def test_a_checkpoint_that_stays_on_the_hub(tmp_path: Path, monkeypatch) -> None:
    directory = build_moe(tmp_path / "model", shards=True, dtype="bfloat16")
    with HubServer() as server:
        server.add_repo("tiny/model", directory)
        server.patch(monkeypatch, tmp_path / "cache")
        assert_same_run(opened("tiny/model", stream=True), directory)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["without BOS", "with BOS", "SentencePiece"])
def test_windows_are_those_of_llama_cpp(kind: str, tmp_path: Path, heldout: str) -> None:
    from tokenizers import Tokenizer, processors

    directory = build_moe(tmp_path / "model", "Ernie4_5_Moe" if kind == "SentencePiece" else "Qwen2Moe")
    if kind == "with BOS":
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
        tokenizer.save(str(directory / "tokenizer.json"))
        edit_json(directory, "tokenizer_config.json", bos_token="<|endoftext|>")
    convert_with_llama_cpp(directory, tmp_path / "out.gguf")
    text = heldout[:3000] + "<|im_end|> </s>"
    model = LayerwiseModel(opened(directory))
    with LlamaModel(tmp_path / "out.gguf", n_ctx=64, threads=1) as theirs:
        expected = theirs.windows(text, 48)
        assert model.bos == theirs.bos
        assert model.tokenize(text) == theirs.tokenize(text)
    assert len(expected) > 20
    assert model.windows(text, 48) == expected
    assert (model.bos is None) == (kind == "without BOS")


def expected_layer(directory: Path, bid: int, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gate weights [T, E] by transformers' router, what each expert reads [T, E, H], and its activations [T, E, I]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    experts = next(module for module in model.model.layers[bid].modules() if "Experts" in type(module).__name__)
    x = torch.from_numpy(inputs)
    with torch.no_grad():
        gates = torch.from_numpy(dense_gates(experts.num_experts, router_modules(model)[bid](x)))
        weights = experts.gate_up_proj
        if "Llama4" in type(experts).__name__:
            reads, weights = x[:, None] * gates[..., None], weights.transpose(1, 2)
        else:
            reads = x[:, None].expand(-1, len(weights), -1)
        gate, up = torch.einsum("teh,eih->tei", reads, weights).chunk(2, dim=-1)
        return gates.numpy(), reads.numpy(), (torch.nn.functional.silu(gate) * up).numpy()


def gather(
    directory: Path, work_dir: Path, reporter: Any, skip: tuple[int, ...] = ()
) -> Iterator[tuple[int, LayerSums, TokenSample]]:
    source = opened(directory)
    work_dir.mkdir(exist_ok=True)
    sample, owners = np.array([0, 7, 41, 99]), np.array([0, 1, 0])
    return collect(
        source,
        LayerwiseModel(source),
        WINDOWS,
        owners,
        2,
        sample,
        work_dir,
        skip=skip,
        batch=2,
        reporter=reporter,
    )


@pytest.mark.parametrize("family", ["Qwen2Moe", "Llama4"])
def test_sums_are_those_of_every_expert_on_every_token(family: str, tmp_path: Path) -> None:
    directory = build_moe(tmp_path / "model", family)
    _, expected_inputs = run_whole(directory)
    owners = np.repeat([0, 1, 0], WINDOWS.shape[1])
    found = {bid: (sums, sample) for bid, sums, sample in gather(directory, tmp_path / "work", Silent())}
    assert found.keys() == expected_inputs.keys()
    for bid, (sums, sample) in found.items():
        inputs = expected_inputs[bid].reshape(WINDOWS.size, -1)
        gates, reads, activations = expected_layer(directory, bid, inputs)
        used, means = gates > 0, np.abs(activations).mean(axis=2)
        for dataset in (0, 1):
            own = owners == dataset
            usage = {
                name: values[dataset] for name, values in vars(sums.usage).items() if isinstance(values, np.ndarray)
            }
            assert usage["tokens"].tolist() == used[own].sum(axis=0).tolist()
            assert usage["gates"] == pytest.approx(gates[own].sum(axis=0), rel=1e-4)
            assert usage["squared_gates"] == pytest.approx((gates[own] ** 2).sum(axis=0), rel=1e-4)
            assert usage["activations"] == pytest.approx((means * used)[own].sum(axis=0), rel=1e-4)
            assert usage["significance"] == pytest.approx((means * gates)[own].sum(axis=0), rel=1e-4)
        for proj, values in (("gate", reads), ("up", reads), ("down", activations)):
            moments = sums.moments[f"blk.{bid}.ffn_{proj}_exps.weight"]
            squares = (values**2 * used[..., None]).sum(axis=0)
            np.testing.assert_allclose(moments.sums, squares, rtol=1e-3, atol=1e-4 * squares.max())
            assert moments.counts.tolist() == used.sum(axis=0).tolist()
        assert sample.share == 4 / WINDOWS.size
        assert_close(sample.inputs, inputs[[0, 7, 41, 99]])
        sampled = np.zeros((4, gates.shape[1]))
        np.put_along_axis(sampled, sample.chosen, sample.gates, axis=1)
        np.testing.assert_allclose(sampled, gates[[0, 7, 41, 99]], atol=1e-5)


class Interrupting(Silent):
    """Notes what is reported, and interrupts the run the second time that a task called `label` advances."""

    def __init__(self, label: str = "") -> None:
        self.label, self.tasks, self.count = label, [], 0

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        self.tasks.append(label)

        def advance(amount: int) -> None:
            self.count += label == self.label
            if self.count == 2:
                raise KeyboardInterrupt

        yield advance


def test_an_interrupted_run_goes_on_with_the_layer_it_was_in(tmp_path: Path) -> None:
    directory = build_moe(tmp_path / "model", "Glm4Moe", num_hidden_layers=5)
    whole = {bid: (sums, sample) for bid, sums, sample in gather(directory, tmp_path / "whole", Silent())}
    assert set(whole) == {1, 2, 3, 4}
    found = {}

    def go_on(label: str) -> list[str]:
        reporter = Interrupting(label)
        try:
            for bid, *rest in gather(directory, tmp_path / "work", reporter, tuple(found)):
                assert bid not in found
                found[bid] = rest
        except KeyboardInterrupt:
            assert label
        return reporter.tasks

    assert go_on("Layer 2 of 5")[-1] == "Layer 2 of 5"
    assert go_on("Experts of layer 3")[0] == "Layer 2 of 5"
    # Ended while layer 3 was in the hands of the caller, who kept it.
    run: Any = gather(directory, tmp_path / "work", Silent(), tuple(found))
    bid, *found[3] = next(run)
    run.close()
    assert bid == 3
    assert go_on("") == ["Layer 3 of 5", "Layer 4 of 5", "Experts of layer 4"]
    assert go_on("") == []
    assert found.keys() == whole.keys()
    for bid, (sums, sample) in whole.items():
        for name, values in sums.arrays().items():
            np.testing.assert_array_equal(found[bid][0].arrays()[name], values, err_msg=name)
        np.testing.assert_array_equal(found[bid][1].inputs, sample.inputs)


def test_layers_after_the_last_one_wanted_are_not_run(tiny: Path, tmp_path: Path) -> None:
    reporter = Interrupting()
    assert [bid for bid, *_ in gather(tiny, tmp_path / "work", reporter, skip=(1,))] == [0]
    assert reporter.tasks == ["Layer 0 of 2", "Experts of layer 0"]


def test_a_full_disk_is_said_before_anything_runs(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 1000))
    with pytest.raises(OutputError, match=f"disk full: hidden states take {3 * 4 * WINDOWS.size * 256:,} bytes"):
        next(gather(tiny, tmp_path / "work", Silent()))


def test_without_transformers_one_line_says_so(tiny: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AlphaQError, match="needs transformers, which is not installed"):
        LayerwiseModel(opened(tiny))


def test_a_layer_that_overflows_is_named(tiny_copy: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.input_layernorm.weight"][3] = torch.nan
        return tensors

    model = LayerwiseModel(opened(rewrite(tiny_copy, damage)))
    hidden = model.embed(WINDOWS)
    model.run_layer(0, hidden, hidden)
    with pytest.raises(WeightError, match="layer 1 computes NaN"):
        model.run_layer(1, hidden, hidden)
    assert all(parameter.is_meta for parameter in model._decoder.layers.parameters())


def test_a_tensor_that_transformers_does_not_know_is_named(tmp_path: Path) -> None:
    directory = build_moe(tmp_path / "model", "Glm4Moe", use_qk_norm=True)
    # The family reads query norms wherever they are; transformers only where config.json announces them.
    edit_json(directory, "config.json", use_qk_norm=False)
    model = LayerwiseModel(opened(directory))
    hidden = model.embed(WINDOWS)
    with pytest.raises(AlphaQError, match=r"has no place for model\.layers\.0\.self_attn\.k_norm\.weight"):
        model.run_layer(0, hidden, hidden)
