"""Estimates against what llama.cpp itself reports, for public models' hyper-parameters and without any weights.

transformers builds each model on its meta device, its checkpoint is a header and a hole, llama.cpp's converter makes
a header and a hole of it, and llama.cpp loads that with `no_alloc`, which computes all sizes and allocates nothing.
"""

from __future__ import annotations

import ctypes
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType
from oracles import convert_with_llama_cpp, load_tool

from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.gguf_file import Field, Header, TensorInfo, build_header, make_field, read_header
from alphaq_gguf.memory import ContextSettings, memory_need
from alphaq_gguf.qtypes import QType

MIB = 1 << 20
LAYERS_OF = {"S": "sliding_attention", "F": "full_attention", "L": "linear_attention", "C": "conv", "M": "moe"}


def layers(pattern: str) -> list[str]:
    return [LAYERS_OF[letter] for letter in pattern]


@dataclass(frozen=True)
class Model:
    """transformers' class prefix and configuration; `added` is what its config.json lacks for llama.cpp's converter."""

    prefix: str
    config: dict[str, Any]
    added: dict[str, Any] = field(default_factory=dict)
    renamed: tuple[str, str] = ("", "")
    mtp: bool = False


def shape(vocab: int, width: int, n_layers: int, heads: int, kv: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 131072,
        **more,
    }


def experts(used: int, width: int, count: int = 16, **more: Any) -> dict[str, Any]:
    """Experts under all of transformers' names; fewer than public models have, which changes next to nothing."""
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), count)
    return {
        **counts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        "n_group": 1,
        "topk_group": 1,
        **more,
    }


LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
SIGMOID = {"scoring_func": "sigmoid"}
V3 = shape(129280, 7168, 4, 128, 128, intermediate_size=18432, q_lora_rank=1536, **LATENT) | experts(8, 2048)
KIMI = {"full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7], "short_conv_kernel_size": 4, "head_dim": 128}
MIMO = {
    **{"swa_head_dim": 192, "swa_v_head_dim": 128, "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8},
    **{"topk_method": "noaux_tc", "n_shared_experts": None, "layernorm_epsilon": 1e-5, "sliding_window": 128},
    **{"hybrid_layer_pattern": [0, 1, 1, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1, 1, 1], "swa_rope_theta": 10000},
    "rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.334},
}

MODELS = {
    "qwen2moe": Model(
        "Qwen2Moe", shape(151936, 2048, 24, 16, 16) | experts(4, 1408, shared_expert_intermediate_size=5632)
    ),
    "qwen3moe": Model("Qwen3Moe", shape(151936, 2048, 48, 32, 4, head_dim=128) | experts(8, 768, norm_topk_prob=True)),
    "mixtral": Model("Mixtral", shape(32000, 4096, 32, 32, 8, intermediate_size=14336) | experts(2, 14336, 8)),
    "olmoe": Model("Olmoe", shape(50304, 2048, 16, 16, 16, intermediate_size=1024) | experts(8, 1024)),
    "deepseek2-lite": Model(
        "DeepseekV2",
        shape(102400, 2048, 27, 16, 16, intermediate_size=10944, q_lora_rank=None, n_shared_experts=2, **LATENT)
        | experts(6, 1408, first_k_dense_replace=1),
    ),
    "deepseek2": Model("DeepseekV3", V3, SIGMOID),
    "deepseek32": Model("DeepseekV32", V3, SIGMOID),
    "qwen3next": Model(
        "Qwen3Next",
        shape(151936, 2048, 48, 16, 2, head_dim=256, shared_expert_intermediate_size=512) | experts(10, 512),
    ),
    "qwen35moe": Model(
        "Qwen3_5Moe", shape(248320, 2048, 8, 16, 2, shared_expert_intermediate_size=512) | experts(8, 512)
    ),
    "gpt-oss": Model("GptOss", shape(201088, 2880, 24, 64, 8, intermediate_size=2880, head_dim=64) | experts(4, 2880)),
    "llama4": Model(
        "Llama4", shape(202048, 5120, 8, 40, 8, intermediate_size=8192, intermediate_size_mlp=16384) | experts(1, 8192)
    ),
    "phimoe": Model(
        "Phimoe",
        shape(32064, 4096, 4, 32, 8, intermediate_size=6400, sliding_window=2047)
        | experts(2, 6400, attention_bias=True, lm_head_bias=True),
        {"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": 4096},
    ),
    "glm4moe": Model(
        "Glm4Moe",
        shape(151552, 4096, 3, 96, 8, intermediate_size=10944, head_dim=128, first_k_dense_replace=1)
        | experts(8, 1408),
        {"num_nextn_predict_layers": 1},
        mtp=True,
    ),
    "ernie4_5-moe": Model(
        "Ernie4_5_Moe",
        shape(103424, 2560, 4, 20, 4, intermediate_size=12288)
        | experts(6, 1536, moe_num_experts=16, moe_k=6, moe_num_shared_experts=2),
    ),
    "granitemoe": Model("GraniteMoe", shape(49155, 1536, 4, 24, 8, intermediate_size=512) | experts(8, 512)),
    "granitehybrid": Model(
        "GraniteMoeHybrid",
        shape(100352, 1536, 4, 12, 4, intermediate_size=512, shared_intermediate_size=1024, layer_types=layers("LLFL"))
        | experts(6, 512, mamba_n_heads=48, mamba_d_head=64, mamba_d_state=128, position_embedding_type="nope"),
        {"layer_types": ["mamba", "mamba", "attention", "mamba"]},
    ),
    "jamba": Model("Jamba", shape(65536, 4096, 8, 32, 8, intermediate_size=14336) | experts(2, 14336)),
    "nemotron_h_moe": Model(
        "NemotronH",
        shape(131072, 2688, 4, 32, 2, layers_block_type=layers("LMFM"), mamba_num_heads=64)
        | experts(6, 1856, moe_shared_expert_intermediate_size=3712),
        {"hybrid_override_pattern": "ME*E"},
    ),
    "lfm2moe": Model(
        "Lfm2Moe",
        shape(65536, 2048, 4, 32, 8, intermediate_size=7168, layer_types=layers("CCFC")) | experts(4, 1792),
    ),
    "kimi-linear": Model(
        "KimiLinear",
        shape(163840, 2304, 8, 32, 32, layer_types=layers("LLLFLLLF"), **LATENT) | experts(8, 1024),
        {"linear_attn_config": KIMI, "first_k_dense_replace": 1, **SIGMOID},
        ("layers.0.block_sparse_moe.", "layers.0.mlp."),
    ),
    "afmoe": Model("Afmoe", shape(200192, 2048, 8, 32, 4, sliding_window=2048) | experts(8, 1024)),
    "cohere2moe": Model("Cohere2Moe", shape(256000, 4096, 8, 32, 8, sliding_window=4096) | experts(8, 2048)),
    "exaone-moe": Model("ExaoneMoe", shape(102400, 4096, 8, 32, 8, sliding_window=4096) | experts(8, 2048), SIGMOID),
    "gemma4": Model(
        "Gemma4",
        shape(262144, 2816, 12, 16, 8, intermediate_size=2112, sliding_window=1024, num_kv_shared_layers=6)
        | experts(8, 704, enable_moe_block=True, top_k_experts=8, hidden_size_per_layer_input=0),
    ),
    "laguna": Model("Laguna", shape(100352, 2048, 8, 48, 8, sliding_window=512) | experts(8, 512)),
    "mellum": Model(
        "Mellum", shape(98304, 2304, 8, 32, 4, sliding_window=1024, layer_types=layers("SSSFSSSF")) | experts(8, 896)
    ),
    "mimo2": Model("MiMoV2Flash", shape(152576, 4096, 6, 64, 4) | experts(8, 2048), MIMO),
}

_CONVERT = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import gguf, torch
from conversion import get_model_class
from conversion.base import ModelBase, ModelType, get_model_architecture

def write_hole(self, *, progress=False):
    self.write_ti_data_to_file()
    for file, tensors in zip(self.fout, self.tensors):
        self.write_padding(file, file.tell())
        file.truncate(file.tell() + sum(self.ggml_pad(t.nbytes, self.data_alignment) for t in tensors.values()))

def set_no_vocabulary(self):
    self.gguf_writer.add_tokenizer_model("none")
    self.gguf_writer.kv_data[0].pop(f"{self.gguf_writer.arch}.vocab_size", None)
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

gguf.GGUFWriter.write_tensors_to_file = write_hole
for directory in map(Path, sys.argv[2:]):
    config = ModelBase.load_hparams(directory, False)
    family = get_model_class(get_model_architecture(config, ModelType.TEXT))
    family.set_vocab = set_no_vocabulary
    family.no_mtp = not config.get("num_nextn_predict_layers")
    with torch.inference_mode():
        family(directory, gguf.LlamaFileType.MOSTLY_Q8_0, directory.with_suffix(".gguf")).write()
"""


def write_checkpoint(directory: Path, model: Model) -> None:
    """The checkpoint of `model` with a hole for weights."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    directory.mkdir()
    family = getattr(transformers, f"{model.prefix}ForCausalLM")
    config = family.config_class(**model.config)
    with torch.device("meta"):
        module = family(config).to(torch.bfloat16)
    state = module.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    shapes = {k.replace(*model.renamed): tuple(v.shape) for k, v in revert_weight_conversion(module, state).items()}
    if model.mtp:
        n, width = config.num_hidden_layers, config.hidden_size
        last, extra = f"model.layers.{n - 1}.", f"model.layers.{n}."
        shapes |= {k.replace(last, extra): v for k, v in shapes.items() if k.startswith(last)}
        shapes |= {f"{extra}{name}.weight": (width,) for name in ("enorm", "hnorm", "shared_head.norm")}
        shapes[f"{extra}eh_proj.weight"] = (width, 2 * width)
    header, end = {}, 0
    for name, dims in shapes.items():
        start, end = end, end + 2 * torch.Size(dims).numel()
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    values = {**config.to_dict(), "architectures": [family.__name__], **model.added}
    (directory / "config.json").write_text(json.dumps(values))
    # Gemma's converter counts its entries.
    tokens = {"model": {"vocab": {}}, "added_tokens": [0] * config.vocab_size}
    (directory / "tokenizer.json").write_text(json.dumps(tokens))


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where the GGUF of a model in MODELS lies."""
    oracle = load_tool("fetch_llama_cpp").oracle_dir()
    if not oracle.is_dir():
        pytest.skip("llama.cpp's converter is absent: run python tools/fetch_llama_cpp.py")
    root = tmp_path_factory.mktemp("headers")
    for name, model in MODELS.items():
        write_checkpoint(root / name, model)
    command = [sys.executable, "-c", _CONVERT, str(oracle), *(str(root / name) for name in MODELS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return lambda name: root / f"{name}.gguf"


@dataclass(frozen=True)
class Report:
    """MiB as llama.cpp prints them: each KV cache and recurrent memory, compute and output buffers, weights."""

    caches: list[float]
    buffers: float
    weights: float


def report(path: Path, contexts: Iterable[ContextSettings], *, allocate: bool = False) -> list[Report]:
    """What llama.cpp says about running `path` on the CPU."""
    import llama_cpp

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, _user: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", "replace"))

    def sizes(pattern: str) -> list[float]:
        return [float(size) for size in re.findall(pattern + r" = +([\d.]+) MiB", "".join(lines))]

    previous, user = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.pointer(previous), ctypes.pointer(user))
    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = not allocate
    params.load_mode = 1 if allocate else 0
    params.use_extra_bufts = False
    model = None
    try:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert model, "".join(lines[-5:])
        weights = sum(sizes(r"model buffer size"))
        found = []
        for context in contexts:
            lines.clear()
            settings = llama_cpp.llama_context_default_params()
            settings.n_ctx, settings.n_batch, settings.n_ubatch = context.n_ctx, 2048, context.n_ubatch
            settings.type_k, settings.type_v = context.type_k, context.type_v
            settings.flash_attn_type = int(context.flash_attention)
            settings.swa_full = context.swa_full
            settings.n_seq_max, settings.kv_unified = context.n_seq_max, True
            settings.n_outputs_max = context.n_outputs or 0
            handle = llama_cpp.llama_init_from_model(model, settings)
            assert handle, "".join(lines[-5:])
            llama_cpp.llama_free(handle)
            caches = sizes(r"llama_kv_cache\w*: size") + sizes(r"llama_memory_recurrent: size")
            found.append(Report(caches, sum(sizes(r"(?:compute|output) buffer size")), weights))
    finally:
        if model:
            llama_cpp.llama_model_free(model)
        llama_cpp.llama_log_set(previous, user)
    return found


def check(path: Path, contexts: list[ContextSettings]) -> None:
    """KV caches to the printed digit; buffers never underestimated, and by at most half and 64 MiB over."""
    header = read_header(path)
    for context, found in zip(contexts, report(path, contexts), strict=True):
        need = memory_need(header.fields.values(), header.tensors, context)
        assert need.kv_cache / MIB == pytest.approx(sum(found.caches), abs=0.00501 * len(found.caches)), context
        slack = 64 * context.n_ubatch / 512
        assert found.buffers <= need.compute / MIB <= 1.5 * found.buffers + slack, context


DEFAULT = ContextSettings(8192)
CONTEXTS = [
    DEFAULT,
    ContextSettings(300),
    ContextSettings(40000, n_ubatch=256),
    ContextSettings(131072),
    replace(DEFAULT, swa_full=True),
    replace(DEFAULT, n_seq_max=4, n_outputs=4),
    replace(DEFAULT, type_k=QType.Q8_0, type_v=QType.Q8_0),
    replace(DEFAULT, flash_attention=False),
]


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_reports_what_was_estimated(name: str, headers: Callable[[str], Path]) -> None:
    check(headers(name), CONTEXTS)


def rewrite(source: Path, out: Path, change: Callable[[Header], tuple[list[Field], list[TensorInfo]]]) -> Path:
    """The header of `source` with other metadata or tensors, and a hole."""
    header, _, size = build_header(*change(read_header(source)))
    with out.open("wb") as file:
        file.write(header)
        file.truncate(size)
    return out


PATTERN = "attention.sliding_window_pattern"


@pytest.mark.parametrize("period", [None, 2, 3])
@pytest.mark.parametrize("name", ["gpt-oss", "cohere2moe", "exaone-moe", "mellum", "laguna", "afmoe"])
def test_windowed_layers_without_a_list(
    name: str, period: int | None, headers: Callable[[str], Path], tmp_path: Path
) -> None:
    def change(header: Header) -> tuple[list[Field], list[TensorInfo]]:
        fields = [f for f in header.fields.values() if not f.key.endswith(PATTERN)]
        if period is not None:
            fields.append(make_field(f"{name}.{PATTERN}", GGUFValueType.UINT32, period))
        return fields, list(header.tensors.values())

    check(rewrite(headers(name), tmp_path / "out.gguf", change), [DEFAULT])


LIST = make_field(PATTERN, GGUFValueType.ARRAY, [True, False, True] * 16, GGUFValueType.BOOL)


def uint(key: str, value: int) -> Field:
    return make_field(key, GGUFValueType.UINT32, value)


@pytest.mark.parametrize(
    ("like", "arch", "more"),
    [
        ("mixtral", "smallthinker", [uint("attention.sliding_window", 1000)]),
        ("qwen3moe", "step35", [uint("attention.sliding_window", 512), LIST]),
        ("qwen3moe", "maple", [uint("attention.sliding_window", 128), LIST]),
    ],
)
def test_architectures_transformers_does_not_have(
    like: str, arch: str, more: list[Field], headers: Callable[[str], Path], tmp_path: Path
) -> None:
    # Their tensors are those of another architecture.
    def change(header: Header) -> tuple[list[Field], list[TensorInfo]]:
        old = header.get("general.architecture")
        own = [replace(f, key=f.key.removeprefix(old + ".")) for f in header.fields.values() if f.key.startswith(old)]
        floats = GGUFValueType.FLOAT32
        own += [*more, make_field("rope.freq_base_swa", floats, 10000.0), uint("expert_gating_func", 1)]
        clamps = make_field("swiglu_clamp_exp", GGUFValueType.ARRAY, [0.0] * header.get(f"{old}.block_count"), floats)
        if "expert_feed_forward_length" not in {f.key for f in own}:
            own.append(uint("expert_feed_forward_length", header.get(f"{old}.feed_forward_length")))
        general = [f for f in header.fields.values() if f.key.startswith(("general.file", "tokenizer."))]
        name = make_field("general.architecture", GGUFValueType.STRING, arch)
        fields = [name, *general, *(replace(f, key=f"{arch}.{f.key}") for f in [*own, clamps])]
        return fields, list(header.tensors.values())

    check(rewrite(headers(like), tmp_path / "out.gguf", change), CONTEXTS[:4])


def test_llama_cpp_allocates_what_it_reports(tiny: Path, tmp_path: Path) -> None:
    # Guards the oracle: sizes without allocation are those of a model that really runs.
    path = tmp_path / "tiny.gguf"
    convert_with_llama_cpp(tiny, path)
    context = [ContextSettings(20000)]
    (simulated,), (real,) = report(path, context), report(path, context, allocate=True)
    assert (simulated.caches, simulated.buffers) == (real.caches, real.buffers)
    header = read_header(path)
    need = memory_need(header.fields.values(), header.tensors, context[0])
    assert need.tensors / MIB == pytest.approx(real.weights, abs=0.02)
    source = open_source(tiny)
    assert memory_need(source.fields, source.tensors, context[0]) == need
