"""FP8 and MXFP4 tensors read as floats, against the formats' definitions in plain torch and the `gguf` package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from alphaq_gguf.arch import Config
from alphaq_gguf.checkpoint.quantised import check_method, dequantise
from alphaq_gguf.checkpoint.shards import LocalShard, SafetensorsWeights, Weights
from alphaq_gguf.errors import SourceError
from alphaq_gguf.qtypes import QType

FP8: dict[str, object] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
MXFP4: dict[str, object] = {"quant_method": "mxfp4"}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]

# One directory serves all examples: each overwrites its file.
many_examples = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def open_weights(directory: Path, tensors: Mapping[str, torch.Tensor], quantisation: object) -> Weights:
    save_file(dict(tensors), directory / "model.safetensors")
    stored = SafetensorsWeights(directory, "here", ["model.safetensors"], lambda name: LocalShard(directory / name))
    return dequantise(stored, Config({"quantization_config": quantisation}, "here/config.json"))


def random_fp8(*shape: int, seed: int = 0) -> torch.Tensor:
    """Every byte, NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)


def random_bytes(*shape: int, below: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, below, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def scale_blocks(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    spread = scales.float().repeat_interleave(block[0], dim=-2).repeat_interleave(block[1], dim=-1)
    return codes.float() * spread[..., : codes.shape[-2], : codes.shape[-1]]


@st.composite
def row_ranges(draw: st.DrawFn, n_rows: int) -> tuple[int, int]:
    first = draw(st.integers(0, n_rows - 1))
    return first, draw(st.integers(first + 1, n_rows))


@many_examples
@given(st.data())
def test_fp8_rows_are_their_codes_times_the_scales_of_their_blocks(tmp_path: Path, data: st.DataObject) -> None:
    block = data.draw(st.sampled_from([(128, 128), (16, 64), (1, 32), (96, 128)]))
    rows, cols = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    expert = data.draw(st.none() | st.integers(0, 2))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    leading = () if expert is None else (3,)
    codes = random_fp8(*leading, rows, cols, seed=rows)
    scales = torch.randn(*leading, -(-rows // block[0]), -(-cols // block[1])).to(dtype)
    weights = open_weights(
        tmp_path, {"w.weight": codes, "w.weight_scale_inv": scales}, {**FP8, "weight_block_size": list(block)}
    )
    assert weights.shapes == {"w.weight": tuple(codes.shape)}
    assert weights.qtype("w.weight") == QType.F32
    first, last = data.draw(row_ranges(rows))
    found = weights.read("w.weight", expert, first, last)
    expected = scale_blocks(codes, scales, block)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found, (expected if expert is None else expected[expert])[first:last])


def test_fp8_codes_are_e4m3(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128)
    weights = open_weights(tmp_path, {"w": codes, "w_scale_inv": torch.ones(1, 1)}, FP8)
    values = []
    for byte in range(128):
        exponent, mantissa = byte >> 3, byte & 7
        values.append(2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)
    values[127] = np.nan
    np.testing.assert_array_equal(weights.read("w", None, 0, 2), [values, [-value for value in values]])


def test_tensors_left_alone_by_fp8_stay_as_stored_and_activation_scales_go(tmp_path: Path) -> None:
    plain = {"norm": torch.randn(8).half(), "gate.weight": torch.randn(4, 8).bfloat16(), "head": torch.randn(3, 8)}
    scales = {"q.weight_scale_inv": torch.ones(1, 1), "q.activation_scale": torch.tensor(2.0)}
    tensors = {**plain, **scales, "q.weight": random_fp8(4, 8), "experts.up_proj_activation_scale": torch.ones(4)}
    weights = open_weights(tmp_path, {**tensors, "q.input_scale": torch.tensor(2.0)}, FP8)
    assert weights.shapes == {"norm": (8,), "gate.weight": (4, 8), "head": (3, 8), "q.weight": (4, 8)}
    assert [weights.qtype(name) for name in plain] == [QType.F16, QType.BF16, QType.F32]
    assert torch.equal(weights.read("norm", None, 0, 1), plain["norm"][None])
    assert torch.equal(weights.read("gate.weight", None, 1, 3), plain["gate.weight"][1:3])


def test_without_a_quantization_config_all_is_as_stored(tmp_path: Path) -> None:
    weights = open_weights(tmp_path, {"w_blocks": torch.ones(2, 3), "w_scales": torch.ones(2)}, None)
    assert weights.shapes == {"w_blocks": (2, 3), "w_scales": (2,)}


@many_examples
@given(st.data())
def test_mxfp4_rows_are_their_codes_times_powers_of_two(tmp_path: Path, data: st.DataObject) -> None:
    experts, rows, groups = (data.draw(st.integers(1, n)) for n in (3, 40, 5))
    blocks = random_bytes(experts, rows, groups, 16, seed=rows)
    scales = random_bytes(experts, rows, groups, below=255, seed=groups)
    weights = open_weights(tmp_path, {"w_blocks": blocks, "w_scales": scales, "w_bias": torch.ones(2)}, MXFP4)
    assert weights.shapes == {"w_blocks": (experts, rows, groups * 32), "w_bias": (2,)}
    assert weights.qtype("w_blocks") == QType.BF16
    assert weights.qtype("w_bias") == QType.F32
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    exact = torch.tensor(E2M1, dtype=torch.float64)[codes.long()] * 2.0 ** (scales.double()[..., None] - 127)
    expert = data.draw(st.integers(0, experts - 1))
    first, last = data.draw(row_ranges(rows))
    found = weights.read("w_blocks", expert, first, last)
    assert found.dtype == torch.bfloat16
    np.testing.assert_array_equal(found.float(), exact.flatten(-2)[expert, first:last].float())


def test_every_mxfp4_byte_under_every_scale_is_what_gguf_makes_of_it(tmp_path: Path) -> None:
    # A row per scale, with every byte; 255 is NaN by the standard, and finite in part for ggml.
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1).repeat(1, 1, 16)
    found = open_weights(tmp_path, {"w_blocks": blocks, "w_scales": scales}, MXFP4).read("w_blocks", 0, 0, 256)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).reshape(256, 16, 2, 16)
    packed = torch.cat([scales[0, :, :, None], codes[:, :, 0] | codes[:, :, 1] << 4], dim=-1).reshape(256, -1)
    with np.errstate(over="ignore"):
        expected = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(found[:255].float(), expected[:255])
    assert np.isinf(expected[254]).any()
    assert (expected[0] != 0).any()
    assert found[255].isnan().all()


@pytest.mark.parametrize("quantisation", [FP8, MXFP4])
def test_rows_of_a_fused_tensor_without_an_expert_are_whole_experts(quantisation: object, tmp_path: Path) -> None:
    tensors = (
        {"w": random_fp8(3, 200, 96), "w_scale_inv": torch.randn(3, 2, 1)}
        if quantisation is FP8
        else {"w_blocks": random_bytes(3, 8, 2, 16), "w_scales": random_bytes(3, 8, 2, below=255)}
    )
    weights = open_weights(tmp_path, tensors, quantisation)
    (name,) = weights.shapes
    found = weights.read(name, None, 1, 3)
    height = weights.shapes[name][1]
    np.testing.assert_array_equal(found.float(), [weights.read(name, i, 0, height).float().numpy() for i in (1, 2)])


X, XS = random_fp8(200, 300), torch.ones(2, 3)
B, BS = random_bytes(2, 4, 3, 16), random_bytes(2, 4, 3)
BAD = {
    "no scale": (FP8, {"w": X}, "w has no w_scale_inv"),
    "transposed scale": (FP8, {"w": X, "w_scale_inv": XS.T.contiguous()}, "shape [3, 2], w calls for [2, 3]"),
    "one scale": (FP8, {"w": X, "w_scale_inv": torch.ones(1)}, "w_scale_inv has shape [1], w calls for [2, 3]"),
    "scale without weight": (FP8, {"v_scale_inv": XS}, "v_scale_inv belongs to no quantised tensor"),
    "scaled float": (FP8, {"v": X.float(), "v_scale_inv": XS}, "v_scale_inv belongs to no quantised tensor"),
    "integer scale": (FP8, {"w": X, "w_scale_inv": XS.int()}, "w_scale_inv has dtype I32, expected BF16, F16 or F32"),
    "FP8 vector": (FP8, {"w": X[0], "w_scale_inv": XS}, "w is FP8 and has shape [300], expected two or three dim"),
    "no config": (None, {"w": X, "w_scale_inv": XS}, "w is FP8, and config.json has no quantization_config"),
    "no blocks": ({**FP8, "weight_block_size": None}, {"w": X}, "weight_block_size in quantization_config is None"),
    "odd blocks": ({**FP8, "weight_block_size": [0, 128]}, {"w": X}, "is [0, 128], expected [rows, columns]"),
    "no MXFP4 scales": (MXFP4, {"w_blocks": B}, "w_blocks has no w_scales"),
    "no MXFP4 blocks": (MXFP4, {"w_scales": BS}, "w_scales belongs to no quantised tensor"),
    "float blocks": (MXFP4, {"w_blocks": B.float(), "w_scales": BS}, "w_blocks has dtype F32, expected U8"),
    "float scales": (MXFP4, {"w_blocks": B, "w_scales": BS.float()}, "w_scales has dtype F32, expected U8"),
    "short MXFP4 scales": (
        MXFP4,
        {"w_blocks": B, "w_scales": BS[:, :3].contiguous()},
        "w_scales has shape [2, 3, 3], w_blocks calls for [2, 4, 3]",
    ),
    "unpacked blocks": (
        MXFP4,
        {"w_blocks": B[..., :8].contiguous(), "w_scales": BS},
        "w_blocks has shape [2, 4, 3, 8], expected [experts, rows, columns / 32, 16]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_and_scales_that_do_not_match_are_named(case: str, tmp_path: Path) -> None:
    quantisation, tensors, message = BAD[case]
    with pytest.raises(SourceError, match=re.escape(message)) as caught:
        open_weights(tmp_path, tensors, quantisation)
    assert caught.value.message.startswith("here")
    assert caught.value.hint


OTHERS = (
    *("awq", "gptq", "bitsandbytes", "compressed-tensors", "hqq", "quanto", "torchao", "fbgemm_fp8", "modelopt"),
    *("aqlm", "bitnet", "quark", "vptq", "auto-round", "spqr", "eetq", "higgs"),
)


@pytest.mark.parametrize("method", OTHERS)
def test_other_quantisations_are_refused_by_name(method: str, tmp_path: Path) -> None:
    config = Config({"quantization_config": {"quant_method": method, "bits": 4}}, "")
    with pytest.raises(SourceError) as caught:
        check_method(config, tmp_path, "org/model")
    assert f"org/model: already quantised ({method})" in caught.value.message
    assert "requantising would add its error to ours" in caught.value.message
    assert caught.value.hint == "use the original bf16, f16 or f32 checkpoint"


@pytest.mark.parametrize("found", [{"bits": 4}, "int8", {"quant_method": ["gptq"]}])
def test_a_quantization_config_without_a_known_method_is_refused(found: object, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="already quantised"):
        check_method(Config({"quantization_config": found}, ""), tmp_path, "model")


@pytest.mark.parametrize("found", [None, {}, FP8, MXFP4, "fp8"])
def test_what_is_read_is_not_refused_by_its_method(found: object, tmp_path: Path) -> None:
    check_method(Config({"quantization_config": found}, ""), tmp_path, "model")


CARD = "---\nlicense: mit\nbase_model: {}\n---\n# A model\n"
ORIGINALS = {
    "base_model": (CARD.format("someone/Big-MoE"), {}, {}, "base_model in README.md names someone/Big-MoE"),
    "list": (CARD.format("[a/B-1.5, c/D]"), {}, {}, "base_model in README.md names a/B-1.5"),
    "config": ("", {"_name_or_path": "a/B"}, {}, "_name_or_path in config.json names a/B"),
    "quantiser": ("", {}, {"model_name_or_path": "a/B"}, "quantization_config in config.json names a/B"),
    "tokenizer": ("", {}, {"tokenizer": "a/B"}, "quantization_config in config.json names a/B"),
    "card first": (CARD.format("a/B"), {"_name_or_path": "c/D"}, {}, "base_model in README.md names a/B"),
    "local path": ("", {"_name_or_path": "/home/me/models/B"}, {}, ""),
    "empty list": (CARD.format("[]"), {}, {"tokenizer": None}, ""),
    "unreadable card": ("---\nbase_model: [a/B\n---\n", {"_name_or_path": "a/B"}, {}, "_name_or_path in config.json"),
    "card in Latin-1": ("---\nbase_model: a/Bä\n---\n", {}, {"tokenizer": "a/C"}, "config.json names a/C"),
}


@pytest.mark.parametrize("case", ORIGINALS)
def test_the_hint_names_the_original_where_something_tells_it(case: str, tmp_path: Path) -> None:
    card, fields, settings, original = ORIGINALS[case]
    if card:
        (tmp_path / "README.md").write_text(card, encoding="latin-1")
    config = Config({"quantization_config": {"quant_method": "gptq", **settings}, **fields}, "")
    with pytest.raises(SourceError) as caught:
        check_method(config, tmp_path, "model")
    assert caught.value.hint.startswith("use the original bf16, f16 or f32 checkpoint")
    assert original in caught.value.hint
    assert ("names" in caught.value.hint) == bool(original)
