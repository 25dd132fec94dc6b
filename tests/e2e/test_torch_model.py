"""Models run in PyTorch from GGUF blocks: logits against llama.cpp on the same file, and against transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, LAYOUTS, build_moe

from alphaq_gguf.encode import encode_rows
from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.evaluate.blocks import FileBlocks, RecipeBlocks
from alphaq_gguf.evaluate.llama import LlamaModel, log_softmax
from alphaq_gguf.evaluate.packed_experts import PackedLayer
from alphaq_gguf.evaluate.torch_loader import check_memory
from alphaq_gguf.evaluate.torch_model import TorchModel
from alphaq_gguf.gguf_file import Field, TensorInfo, build_header, make_field, read_header
from alphaq_gguf.pipeline import AllocationSettings, allocate, open_source
from alphaq_gguf.qtypes import QType
from alphaq_gguf.tensor_types import parse_overrides

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Share of the logit range that f32 arithmetic in another order costs.
BOUND = 2e-5
TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 390, 48)]
FLOATS = ("--bpw", 32, "--tensor-type", r"\.weight$=F32")
OTHERS_FLOAT = r"^(?!.*_exps).*\.weight$=F32"
MIXED = [
    part
    for proj, qtype in (("gate", "Q3_K"), ("up", "Q4_K"), ("down", "Q6_K"))
    for part in ("--tensor-type", f"ffn_{proj}_exps={qtype}")
]
# Every family, and some whose output is tied to the embedding.
VARIANTS = [*FAMILIES, "Ernie4_5_Moe without shared experts", "Llama4 tied, with Scout's rope scaling"]


def open_model(path: Path, **settings: Any) -> TorchModel:
    return TorchModel(FileBlocks(path), **settings)


def packed_layers(model: TorchModel) -> list[Any]:
    """The modules that hold experts."""
    return [m for m in model.model.modules() if isinstance(getattr(m, "packed", None), PackedLayer)]


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the range."""
    return float(np.abs(found - expected).max() / (expected.max() - expected.min()))


def write_file(path: Path, fields: Sequence[Field], tensors: Sequence[tuple[TensorInfo, np.ndarray]]) -> Path:
    header, placed, size = build_header(fields, [info for info, _ in tensors])
    content = bytearray(size)
    content[: len(header)] = header
    for info, (_, data) in zip(placed, tensors, strict=True):
        start = len(header) + info.offset
        content[start : start + info.n_bytes] = data.tobytes()
    path.write_bytes(content)
    return path


def rewrite(
    source: Path,
    out: Path,
    change: Callable[[TensorInfo, np.ndarray], tuple[TensorInfo, np.ndarray] | None] = lambda *kept: kept,
    config: Callable[[dict[str, Any]], Any] | None = lambda config: config,
) -> Path:
    """A file like `source` with its tensors changed, or left out, and so its config.json."""
    header = read_header(source)
    fields = [field for key, field in header.fields.items() if key != "alphaq.config"]
    if config is not None:
        text = json.dumps(config(json.loads(header.get("alphaq.config"))))
        fields.append(make_field("alphaq.config", gguf.GGUFValueType.STRING, text))
    data = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source).tensors}
    changed = (change(info, data[name]) for name, info in header.tensors.items())
    return write_file(out, fields, [pair for pair in changed if pair is not None])


def as_floats(info: TensorInfo, data: np.ndarray) -> tuple[TensorInfo, np.ndarray]:
    return TensorInfo(info.name, info.shape, QType.F32), gguf.dequantize(data, info.qtype).astype(np.float32)


@pytest.fixture(scope="module")
def trained_file(trained: Path, tmp_path_factory, cache_dir: Path) -> Callable[..., Path]:
    """The bundled model with experts of one type; further options as `convert` has them."""
    from alphaq_gguf.cli import main

    directory = tmp_path_factory.mktemp("torch")

    def convert(qtype: str, *options: str) -> Path:
        out = directory / f"{qtype}-{len(options)}.gguf"
        if not out.exists():
            types = ("--tensor-type", f"_exps={qtype}", *options)
            arguments = ["convert", str(trained), "-o", str(out), "-q", "--cache-dir", str(cache_dir), "--bpw", "32"]
            assert main([*arguments, *types]) == 0
        return out

    return convert


@pytest.mark.parametrize("layout", VARIANTS)
def test_logits_equal_those_of_llama_cpp_and_blocks_count_as_what_they_decode_to(
    layout: str, tmp_path: Path, cli
) -> None:
    source = build_moe(tmp_path / "model", **LAYOUTS[layout])
    floats, mixed = tmp_path / "f32.gguf", tmp_path / "mixed.gguf"
    assert cli("convert", source, "-o", floats, *FLOATS)[0] == 0
    with LlamaModel(floats, n_ctx=64, threads=1, exact=True) as llama:
        expected = llama.logits(TOKENS)
    assert expected.max() - expected.min() > 1, "logits too small for the comparison to mean anything"
    model = open_model(floats)
    assert distance(model.logits(TOKENS), expected) < BOUND
    # So few tokens take another way through the experts.
    assert distance(model.logits(TOKENS[:9]), expected[:9]) < BOUND

    code, _, err = cli("convert", source, "-o", mixed, "--bpw", 32, *MIXED)
    assert code == 0, err
    found = open_model(mixed).logits(TOKENS)
    twin = open_model(rewrite(mixed, tmp_path / "twin.gguf", as_floats)).logits(TOKENS)
    assert distance(found, twin) < 1e-5
    assert distance(found, expected) > 1e-4, "quantising changed nothing, so that nothing was compared"


def test_experts_stay_packed_whatever_their_types(tmp_path: Path, tiny: Path, cli) -> None:
    out = tmp_path / "mixed.gguf"
    assert cli("convert", tiny, "-o", out, "--bpw", 32, *MIXED)[0] == 0
    model = open_model(out)
    stacks = [t for t in gguf.GGUFReader(out).tensors if "_exps" in t.name]
    layers = packed_layers(model)
    packed = [getattr(module.packed, proj) for module in layers for proj in ("gate", "up", "down")]
    assert sum(experts.data.numel() for experts in packed) == sum(stack.n_bytes for stack in stacks)
    assert [name for name, _ in model.model.named_parameters() if ".experts." in name] == []
    assert all(module._parameters == {} for module in layers)
    assert len(layers) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_its_rounding_alone(dtype: torch.dtype, trained_file, heldout: str) -> None:
    path = trained_file("Q4_K")
    exact, half = open_model(path), open_model(path, dtype=dtype)
    assert half.model.model.layers[0].self_attn.q_proj.weight.dtype == dtype
    window = exact.vocabulary.windows(heldout, 128)[0]
    p, q = (log_softmax(model.logits(window).astype(np.float64)) for model in (exact, half))
    assert 0 < (np.exp(p) * (p - q)).sum(axis=1).mean() < 0.02


@pytest.mark.parametrize("granularity", ["expert", "expert-shared", "stack"])
def test_a_recipe_runs_from_its_checkpoint(granularity: str, tiny: Path, cache_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = open_source(tiny)
    settings = AllocationSettings(
        bpw=4, strategy="mse", granularity=granularity, overrides=tuple(parse_overrides([OTHERS_FLOAT]))
    )
    recipe = allocate(source, settings, cache_dir=cache_dir)
    expected = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    seen: dict[str, set[QType]] = {}
    with torch.no_grad():
        for unit in recipe.units:
            experts = expected.model.layers[unit.layer].mlp.experts
            fused = experts.down_proj if unit.proj == "down" else experts.gate_up_proj
            rows = slice(256, 512) if unit.proj == "up" else slice(0, 256)
            for xid in range(4) if unit.expert is None else [unit.expert]:
                matrix = fused[xid, rows]
                blocks = encode_rows(matrix.contiguous().numpy(), unit.qtype)
                matrix.copy_(torch.from_numpy(gguf.dequantize(blocks, unit.qtype)))
            seen.setdefault(unit.tensor, set()).add(unit.qtype)
        logits = expected(torch.tensor([TOKENS])).logits[0].numpy()
    assert any(len(types) > 1 for types in seen.values()) == (granularity != "stack")
    model = TorchModel(RecipeBlocks(source, recipe))
    assert distance(model.logits(TOKENS), logits) < BOUND


def test_a_recipe_for_another_model_or_of_other_tensors_is_refused(tiny: Path, trained: Path, cache_dir: Path) -> None:
    source = open_source(tiny)
    recipe = allocate(source, AllocationSettings(bpw=4, strategy="uniform", granularity="expert"), cache_dir=cache_dir)
    with pytest.raises(AlphaQError, match="made for another model"):
        RecipeBlocks(open_source(trained), recipe)
    with pytest.raises(AlphaQError, match="does not cover the model's tensors exactly"):
        RecipeBlocks(source, replace(recipe, units=recipe.units[1:]))
    with pytest.raises(AlphaQError, match="does not cover the model's tensors exactly"):
        RecipeBlocks(source, replace(recipe, units=(*recipe.units, recipe.units[0])))


def test_greedy_text_is_that_of_llama_cpp(trained_file) -> None:
    path = trained_file("F32", "--tensor-type", OTHERS_FLOAT)
    asked = {"max_tokens": 40, "temperature": 0.0}
    with LlamaModel(path, n_ctx=256, threads=1, exact=True) as llama, open_model(path) as ours:
        for prompt, chat, system in [
            ("def __init__(", False, None),
            ("What does json.dumps do?", True, None),
            ("What does json.dumps do?", True, "Answer in one word."),
        ]:
            expected = "".join(llama.generate(prompt, chat=chat, system=system, **asked))
            assert "".join(ours.generate(prompt, chat=chat, system=system, **asked)) == expected != ""


def test_drawn_text_depends_on_the_seed_alone(trained_file) -> None:
    path = trained_file("Q4_K")

    def draw(seed: int) -> str:
        model = open_model(path, seed=seed)
        return "".join(model.generate("import ", max_tokens=30, temperature=1.5, chat=False))

    assert draw(1) == draw(1) != draw(2)


def test_the_context_bounds_prompt_and_text(trained_file) -> None:
    model = open_model(trained_file("Q4_K"), n_ctx=16)
    prompt = model.vocabulary.tokenize("import os")
    pieces = list(model.generate("import os", max_tokens=99, temperature=0, chat=False))
    # The last piece ends a character that was cut off.
    assert len(prompt) + len(pieces) - 1 == 16
    with pytest.raises(AlphaQError, match="the context 16"):
        next(model.generate("import os " * 9, max_tokens=99, temperature=0, chat=False))


def test_the_config_is_the_checkpoints_and_survives_another_conversion(tiny: Path, tmp_path: Path, cli) -> None:
    source = json.loads((tiny / "config.json").read_text())
    floats, again = tmp_path / "f32.gguf", tmp_path / "again.gguf"
    assert cli("convert", tiny, "-o", floats, *FLOATS)[0] == 0
    assert cli("convert", floats, "-o", again, "--bpw", 32, "--tensor-type", "_exps=Q4_K")[0] == 0
    kept = json.loads(read_header(floats).get("alphaq.config"))
    assert read_header(again).get("alphaq.config") == read_header(floats).get("alphaq.config")
    assert kept.items() <= source.items()
    assert source.keys() - kept.keys() <= {"dtype", "transformers_version"}


def test_a_file_without_config_needs_a_directory_with_it(tiny: Path, tmp_path: Path, cli) -> None:
    floats = tmp_path / "f32.gguf"
    assert cli("convert", tiny, "-o", floats, *FLOATS)[0] == 0
    bare = rewrite(floats, tmp_path / "bare.gguf", config=None)
    with pytest.raises(AlphaQError, match="to build the model: no config") as caught:
        FileBlocks(bare)
    assert "--model" in caught.value.hint
    with pytest.raises(AlphaQError, match="is no directory"):
        FileBlocks(bare, tmp_path / "nowhere")
    found = TorchModel(FileBlocks(bare, tiny)).logits(TOKENS)
    np.testing.assert_array_equal(found, open_model(floats).logits(TOKENS))


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory, cache_dir: Path) -> Path:
    from alphaq_gguf.cli import main

    out = tmp_path_factory.mktemp("whole") / "whole.gguf"
    assert main([str(a) for a in ("convert", tiny, "-o", out, "-q", "--cache-dir", cache_dir, *FLOATS)]) == 0
    return out


def unreadable(info: TensorInfo, data: np.ndarray) -> tuple[TensorInfo, np.ndarray]:
    if info.name != "blk.1.ffn_up_exps.weight":
        return info, data
    changed = TensorInfo(info.name, info.shape, QType.IQ4_XS)
    return changed, np.zeros(changed.n_bytes, np.uint8)


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "a type the kernels lack": ({"change": unreadable}, "up_exps.weight is IQ4_XS.*Q2_K, .*BF16"),
    "a missing tensor": (
        {"change": lambda info, data: None if info.name == "blk.0.attn_q.weight" else (info, data)},
        "tensor blk.0.attn_q.weight is missing",
    ),
    "another shape": ({"config": lambda c: {**c, "vocab_size": 500}}, r"token_embd.weight has shape \[400, 256\]"),
    "an unknown model": ({"config": lambda c: {**c, "model_type": "odd"}}, "type 'odd' .qwen2moe. do not run"),
    "another family's config": ({"config": lambda c: {**c, "model_type": "olmoe"}}, "of architecture qwen2moe"),
    "a config that is none": ({"config": lambda c: [1]}, "alphaq.config is damaged"),
    "an impossible config": ({"config": lambda c: {**c, "num_attention_heads": "many"}}, "cannot load it"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_run_is_said_in_one_line(damage: str, whole: Path, tmp_path: Path) -> None:
    changes, message = DAMAGE[damage]
    with pytest.raises(AlphaQError, match=message):
        open_model(rewrite(whole, tmp_path / "damaged.gguf", **changes))


def with_vectors(source: Path, out: Path, *names: str) -> Path:
    """`source` with more vectors."""
    header = read_header(source)
    tensors = [(header.tensors[t.name], t.data) for t in gguf.GGUFReader(source).tensors]
    tensors += [(TensorInfo(name, (32,), QType.F32), np.ones(32, np.float32)) for name in names]
    return write_file(out, list(header.fields.values()), tensors)


def test_tensors_that_llama_cpp_alone_needs_are_passed_over(whole: Path, tmp_path: Path) -> None:
    path = with_vectors(whole, tmp_path / "more.gguf", "blk.2.nextn.enorm.weight", "rope_freqs.weight")
    np.testing.assert_array_equal(open_model(path).logits(TOKENS), open_model(whole).logits(TOKENS))


def test_a_tensor_without_a_place_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(AlphaQError, match=r"blk.1.odd.weight has no place"):
        open_model(with_vectors(whole, tmp_path / "more.gguf", "blk.1.odd.weight"))


def test_a_parameter_that_nothing_in_the_file_tells_is_named(tmp_path: Path, cli) -> None:
    source, out = build_moe(tmp_path / "model", "DeepseekV2"), tmp_path / "f32.gguf"
    assert cli("convert", source, "-o", out, *FLOATS)[0] == 0
    biased = rewrite(out, tmp_path / "biased.gguf", config=lambda config: {**config, "attention_bias": True})
    with pytest.raises(AlphaQError, match=r"nothing in the file tells transformers' model.layers.\d.self_attn.\S+bias"):
        open_model(biased)


def test_a_model_larger_than_the_memory_says_how_much_it_needs() -> None:
    check_memory("model", 1 << 20, torch.device("cpu"))
    with pytest.raises(AlphaQError, match=r"model: needs 1048576.00 GiB on cpu"):
        check_memory("model", 1 << 50, torch.device("cpu"))


def test_without_transformers_the_error_says_what_to_install(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AlphaQError, match="needs transformers, which is not installed") as caught:
        open_model(whole)
    assert "torch-path" in caught.value.hint
