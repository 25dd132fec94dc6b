"""FP8 and MXFP4 checkpoints convert as llama.cpp's converter and transformers read them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from checkpoints import build_moe
from gguf import GGUFReader
from hub_server import HubServer
from oracles import convert_with_llama_cpp
from safetensors.torch import load_file, save_file

from alphaq_gguf.evaluate.llama import LlamaModel

WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]
TOKENS = list(range(3, 48))


def rewrite(directory: Path, change: Callable[[Tensors], Tensors], **config: object) -> Path:
    """Change a checkpoint's tensors and fields of its config.json."""
    save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS, metadata={"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return directory


def write_fp8(directory: Path, *, block: int = 128, keep: str = "$^", static: bool = False, bf16: bool = False) -> Path:
    """Quantise a checkpoint's attention and expert matrices to FP8 blocks, as FP8 releases do.

    Names that `keep` matches stay; `static` adds activation scales, `bf16` stores the scales so.
    """

    def quantise(tensors: Tensors) -> Tensors:
        out: Tensors = {}
        for name, weight in tensors.items():
            if weight.ndim < 2 or not re.search(r"_proj(\.weight)?$", name) or re.search(keep, name):
                out[name] = weight
                continue
            rows, cols = weight.shape[-2:]
            padded = torch.nn.functional.pad(weight.float(), (0, -cols % block, 0, -rows % block))
            tiles = padded.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
            scale = tiles.abs().amax(dim=(-3, -1)) / 448
            scale = scale.bfloat16() if bf16 else scale
            codes = (tiles / scale.float()[..., :, None, :, None]).to(torch.float8_e4m3fn)
            out[name] = codes.flatten(-4, -3).flatten(-2)[..., :rows, :cols].contiguous()
            out[f"{name}_scale_inv"] = scale
            if static and name.endswith(".weight"):
                out[name.replace(".weight", ".activation_scale")] = torch.tensor(0.5)
        return out

    settings = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [block, block],
        "activation_scheme": "static" if static else "dynamic",
    }
    return rewrite(directory, quantise, quantization_config=settings)


def write_twin(source: Path, out: Path) -> Path:
    """The same checkpoint as plain float32, dequantised block by block."""

    def dequantise(tensors: Tensors) -> Tensors:
        plain = {name: weight.float() for name, weight in tensors.items() if not name.endswith("_scale_inv")}
        for name, scale in tensors.items():
            if name.endswith("_scale_inv"):
                weight = plain[name.removesuffix("_scale_inv")]
                for i, j in np.ndindex(*scale.shape[-2:]):
                    weight[..., i * 128 : i * 128 + 128, j * 128 : j * 128 + 128] *= scale[..., i, j, None, None]
        return plain

    return rewrite(Path(shutil.copytree(source, out)), dequantise, quantization_config=None)


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def convert_to_f32(source: Path, out: Path, cli) -> dict[str, gguf.ReaderTensor]:
    code, _, err = cli("convert", source, "-o", out, "--bpw", 32, "--tensor-type", r"\.weight$=F32")
    assert code == 0, err
    return tensors_of(out)


def assert_same_as_llama_cpps(source: Path, tmp_path: Path, cli) -> None:
    convert_with_llama_cpp(source, tmp_path / "theirs.gguf")
    theirs, ours = tensors_of(tmp_path / "theirs.gguf"), convert_to_f32(source, tmp_path / "ours.gguf", cli)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape.tolist() == tensor.shape.tolist(), name
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(ours[name].data.shape)
        np.testing.assert_array_equal(ours[name].data, expected, err_msg=name)


LAYOUTS = {
    "one by one": ({}, {}),
    "fused": ({"fused": True}, {}),
    # 176 rows end inside a block; fused, a block straddles gate and up.
    "odd sizes": ({"moe_intermediate_size": 176, "head_dim": 40}, {}),
    "fused, odd sizes": ({"moe_intermediate_size": 176, "fused": True}, {}),
    "other blocks": ({}, {"block": 48}),
    "bf16 scales, some modules left in bf16": (
        {"dtype": "bfloat16"},
        {"bf16": True, "keep": r"layers\.0\.self_attn|experts\.1\.up_proj"},
    ),
    "static activations": ({}, {"static": True}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_becomes_the_floats_of_llama_cpps_converter(layout: str, tmp_path: Path, cli) -> None:
    build, quantise = LAYOUTS[layout]
    source = write_fp8(build_moe(tmp_path / "model", "Qwen3Moe", **build), **quantise)
    assert_same_as_llama_cpps(source, tmp_path, cli)


@pytest.mark.parametrize("n_ff", [256, 176])
def test_fp8_gives_the_logits_of_transformers(n_ff: int, tmp_path: Path, cli) -> None:
    from transformers import AutoModelForCausalLM

    source = write_fp8(build_moe(tmp_path / "model", "Qwen3Moe", moe_intermediate_size=n_ff))
    convert_to_f32(source, tmp_path / "out.gguf", cli)
    reference = AutoModelForCausalLM.from_pretrained(write_twin(source, tmp_path / "twin"), dtype=torch.float32)
    with torch.no_grad():
        expected = reference.eval()(torch.tensor([TOKENS])).logits[0].numpy()
    with LlamaModel(tmp_path / "out.gguf", n_ctx=64, threads=1, exact=True) as model:
        found = model.logits(TOKENS)
    spread = expected.max() - expected.min()
    assert spread > 1, "logits too small for the comparison to mean anything"
    assert np.abs(found - expected).max() / spread < 2e-5


def test_fp8_quantises_as_its_dequantised_twin(tmp_path: Path, cli) -> None:
    source = write_fp8(build_moe(tmp_path / "model", "Qwen3Moe"))
    twin = write_twin(source, tmp_path / "twin")
    for directory in (source, twin):
        code, _, err = cli("convert", directory, "-o", tmp_path / f"{directory.name}.gguf", "--bpw", 4)
        assert code == 0, err
    found, expected = tensors_of(tmp_path / "model.gguf"), tensors_of(tmp_path / "twin.gguf")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        assert found[name].data.tobytes() == tensor.data.tobytes(), name


def write_mxfp4(directory: Path) -> Path:
    """Put random MXFP4 blocks, of a weight's usual size but for a few, in the place of fused experts."""
    random = np.random.default_rng(0)

    def quantise(tensors: Tensors) -> Tensors:
        out: Tensors = {}
        for name, weight in tensors.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                out[name] = weight
                continue
            n_experts, cols, rows = weight.shape
            scales = random.integers(118, 123, (n_experts, rows, cols // 32), dtype=np.uint8)
            scales[0, :2, :2] = [[0, 1], [2, 140]]
            blocks = random.integers(0, 256, (*scales.shape, 16), dtype=np.uint8)
            out |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
        return out

    return rewrite(directory, quantise, quantization_config={"quant_method": "mxfp4"})


def test_mxfp4_becomes_the_floats_of_llama_cpps_converter(tmp_path: Path, cli) -> None:
    source = write_mxfp4(build_moe(tmp_path / "model", "GptOss", fused=True, dtype="bfloat16"))
    assert_same_as_llama_cpps(source, tmp_path, cli)


def test_mxfp4_quantises_as_the_floats_transformers_reads(tmp_path: Path, cli) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    def dequantise(tensors: Tensors) -> Tensors:
        out = {name: weight for name, weight in tensors.items() if not name.endswith(("_blocks", "_scales"))}
        for name in tensors.keys() - out.keys():
            if name.endswith("_blocks"):
                scales = tensors[name.replace("_blocks", "_scales")]
                out[name.removesuffix("_blocks")] = convert_moe_packed_tensors(tensors[name], scales)
        return out

    source = write_mxfp4(build_moe(tmp_path / "model", "GptOss", fused=True, dtype="bfloat16"))
    twin = rewrite(Path(shutil.copytree(source, tmp_path / "twin")), dequantise, quantization_config=None)
    found, expected = (convert_to_f32(d, tmp_path / f"{d.name}.gguf", cli) for d in (source, twin))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].data.tobytes() == tensor.data.tobytes(), name


Q_SCALE = "model.layers.1.self_attn.q_proj.weight_scale_inv"
BROKEN: dict[str, tuple[dict[str, torch.Tensor | None], dict[str, object], str]] = {
    "scale is gone": ({Q_SCALE: None}, {}, "model.layers.1.self_attn.q_proj.weight has no"),
    "scale of another shape": ({Q_SCALE: torch.ones(2)}, {}, f"{Q_SCALE} has shape [2]"),
    "weight is gone": ({Q_SCALE.removesuffix("_scale_inv"): None}, {}, "belongs to no quantised tensor"),
    "not declared": ({}, {"quantization_config": None}, "is FP8, and config.json has no quantization_config"),
    "one scale per tensor": ({}, {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size"),
    "another method": ({}, {"quantization_config": {"quant_method": "awq"}}, "already quantised (awq)"),
    "infinite scale": ({Q_SCALE: torch.full((2, 2), torch.inf)}, {}, "attn_q.weight has 65536 NaN or infinite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_fp8_checkpoint_is_refused_in_one_line(case: str, tmp_path: Path, cli) -> None:
    changes, config, message = BROKEN[case]
    source = write_fp8(build_moe(tmp_path / "model", "Qwen3Moe"))
    rewrite(source, lambda tensors: {n: t for n, t in {**tensors, **changes}.items() if t is not None}, **config)
    code, out, err = cli("convert", source, "-o", tmp_path / "out.gguf", "--bpw", 4, "--quiet")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert message in err
    assert not (tmp_path / "out.gguf").exists()


def test_an_mxfp4_scale_of_nan_is_refused_by_its_place(tmp_path: Path, cli) -> None:
    source = write_mxfp4(build_moe(tmp_path / "model", "GptOss", fused=True))

    def damage(tensors: Tensors) -> Tensors:
        tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 7, 3] = 255
        return tensors

    rewrite(source, damage)
    code, _, err = cli("convert", source, "-o", tmp_path / "out.gguf", "--bpw", 4, "--quiet")
    assert code == 1
    assert "blk.1.ffn_down_exps.weight has 32 NaN or infinite weights, first at expert 2, row 7, column 96" in err


@pytest.mark.parametrize("layout", ["fp8", "fp8 fused", "mxfp4"])
def test_a_quantised_checkpoint_streams_as_it_reads_from_disk(layout: str, tmp_path: Path, cli, monkeypatch) -> None:
    if layout == "mxfp4":
        source = write_mxfp4(build_moe(tmp_path / "model", "GptOss", fused=True, dtype="bfloat16"))
    else:
        source = write_fp8(
            build_moe(tmp_path / "model", "Qwen3Moe", fused="fused" in layout, moe_intermediate_size=352)
        )
    local, streamed = tmp_path / "local.gguf", tmp_path / "streamed.gguf"
    assert cli("convert", source, "-o", local, "--bpw", 5.2, "--strategy", "mse")[0] == 0
    with HubServer() as server:
        server.add_repo("tiny/model", source)
        server.patch(monkeypatch, tmp_path / "cache")
        own_cache = ("--cache-dir", tmp_path / "measured")
        arguments = ("--bpw", 5.2, "--strategy", "mse", "--stream", *own_cache)
        code, _, err = cli("convert", "tiny/model", "-o", streamed, *arguments)
    assert code == 0, err
    assert streamed.read_bytes() == local.read_bytes()
