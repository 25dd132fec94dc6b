"""Files with a type per expert in llama.cpp: with the plug-in it computes what it computes with their decoded weights.

The oracle is a twin of each file, with those weights in F32, which llama.cpp runs without the plug-in.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from container_bytes import by_expert, write_file, write_twin
from gguf import GGUFReader

from alphaq_gguf.checkpoint.huggingface import HuggingFaceSource
from alphaq_gguf.errors import AlphaQError, SourceError
from alphaq_gguf.evaluate.engines import LlamaEngine
from alphaq_gguf.evaluate.llama import LlamaModel, LlamaVocabulary
from alphaq_gguf.gguf_file import make_field, read_header
from alphaq_gguf.pipeline import AllocationSettings, allocate, convert
from alphaq_gguf.plugin import build_plugin, cache_dir, load_plugin, unload_plugin
from alphaq_gguf.qtypes import QType
from alphaq_gguf.reporter import Silent

N_CTX = 256
PLAIN = "blk.1.ffn_gate_exps.weight"
QUANTISED = (QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q6_K, QType.Q8_0, QType.IQ4_NL)
# Of weights in these types products are those of the twin but for roundings of float16.
FINE = (QType.F32, QType.F16)


@pytest.fixture(scope="module")
def files(trained: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """quantised.gguf and fine.gguf, all stacks but one in containers, and their twins quantised-twin.gguf and so on."""
    directory = tmp_path_factory.mktemp("per-expert")
    source = HuggingFaceSource(trained)
    settings = AllocationSettings(bpw=8.5, strategy="uniform", overrides=((r"^(?!.*_exps).*\.weight$", QType.F32),))
    uniform = allocate(source, settings, cache_dir=cache_dir)
    draw = np.random.default_rng(1)
    for name, types in (("quantised", QUANTISED), ("fine", FINE)):
        chosen = {
            stack.name: [types[0]] * stack.n_experts
            if stack.name == PLAIN
            else [types[i] for i in draw.permutation(np.arange(stack.n_experts) % len(types))]
            for stack in source.stacks
        }
        file = directory / f"{name}.gguf"
        assert len(convert(source, by_expert(uniform, source, chosen), file).containers) == len(source.stacks) - 1
        write_twin(file, directory / f"{name}-twin.gguf")
    return directory


def kld(reference: np.ndarray, logits: np.ndarray) -> float:
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (reference.astype(float), logits.astype(float)))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.fixture(scope="module")
def window(files: Path, heldout: str) -> list[int]:
    with LlamaVocabulary(files / "fine-twin.gguf") as vocabulary:
        return vocabulary.windows(heldout, N_CTX)[3]


def logits_of(path: Path, window: list[int], **more: Any) -> np.ndarray:
    with LlamaModel(path, n_ctx=N_CTX, threads=1, exact=True, **more) as model:
        return model.logits(window)


def test_products_are_those_of_the_decoded_weights(files: Path, window: list[int]) -> None:
    reference, found = (logits_of(files / name, window) for name in ("fine-twin.gguf", "fine.gguf"))
    assert np.abs(found - reference).max() < 2e-3 * np.ptp(reference)


def test_with_quantised_weights_only_activations_are_rounded(files: Path, window: list[int]) -> None:
    reference, found = (logits_of(files / name, window) for name in ("quantised-twin.gguf", "quantised.gguf"))
    # What llama.cpp's rounding to 8 bits costs any file; the model itself is at 0.03 and more from this one.
    assert kld(reference, found) < 3e-3


def test_asking_for_a_gpu_changes_nothing_without_one(files: Path, window: list[int]) -> None:
    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this build of llama-cpp-python has a GPU")
    plain, asked = (logits_of(files / "quantised.gguf", window, gpu_layers=layers) for layers in (0, -1))
    assert np.array_equal(plain, asked)


def test_the_vocabulary_opens_alone(files: Path, heldout: str) -> None:
    with LlamaVocabulary(files / "fine.gguf") as ours, LlamaVocabulary(files / "fine-twin.gguf") as theirs:
        assert ours.tokenize(heldout) == theirs.tokenize(heldout)
        assert ours.bos == theirs.bos


def test_routers_are_watched(files: Path, window: list[int]) -> None:
    chosen = []
    for name in ("fine.gguf", "fine-twin.gguf"):
        with LlamaEngine(files / name, n_ctx=N_CTX, threads=1, exact=True) as engine:
            chosen.append(engine.run(window)[1])
            assert engine.notes == []
    ours, theirs = chosen
    assert set(ours) == set(theirs) == {0, 1}
    for bid, experts in theirs.items():
        agreed = np.mean(np.sort(ours[bid], axis=1) == np.sort(experts, axis=1))
        assert agreed > 0.99


def test_the_command_line_lets_such_a_file_talk(files: Path, cli) -> None:
    prompt = "import json\n\ndef main"
    said = []
    for name in ("fine.gguf", "fine-twin.gguf"):
        code, out, err = cli("run", files / name, prompt, "--raw", "--max-tokens", 8, "--temperature", 0, "-q")
        assert (code, err) == (0, "")
        said.append(out)
    assert said[0].strip()
    assert said[0] == said[1]


def test_compare_judges_such_a_file_in_every_engine(files: Path, trained: Path, cli, tmp_path: Path) -> None:
    given = ("--reference", trained, "--text", trained / "heldout.txt", "--max-windows", 4, "--ctx", 128, "--no-speed")
    where = ("--threads", 2, "--cache-dir", tmp_path, "--json")
    code, out, err = cli("compare", files / "quantised.gguf", *given, *where)
    assert code == 0, err
    result = json.loads(out)
    assert not result["failures"]
    found = {evaluation["engine"]: evaluation for evaluation in result["evaluations"]}
    llama, torch = (found[engine]["divergence"]["kld"]["value"] for engine in ("llama.cpp", "pytorch"))
    assert llama == pytest.approx(torch, rel=0.2)
    assert all(set(evaluation["routers"]) == {"0", "1"} for evaluation in found.values())
    # PyTorch reads the containers by itself and rounds no activations.
    assert 0 < result["cross"][0]["kld"]["value"] < 3e-3


def test_the_plugin_leaves_and_comes_back(files: Path, window: list[int]) -> None:
    library: Any = llama_cpp.llama_cpp._lib
    unload_plugin()
    before = library.ggml_backend_dev_count()
    first = logits_of(files / "quantised.gguf", window)
    assert library.ggml_backend_dev_count() == before + 2
    unload_plugin()
    assert library.ggml_backend_dev_count() == before
    assert np.array_equal(logits_of(files / "quantised.gguf", window), first)
    loaded = load_plugin(build_plugin(cache_dir(), Silent()))
    assert load_plugin(loaded.path) is loaded
    assert library.ggml_backend_dev_count() == before + 2


def split(file: Path, directory: Path) -> list[Path]:
    """The file in two, as llama-gguf-split would, metadata in the first."""
    header, tensors = read_header(file), GGUFReader(file).tensors
    middle = len(tensors) // 2
    uint16 = next(kind for kind in type(header.fields["general.architecture"].vtype) if kind.name == "UINT16")
    int32 = next(kind for kind in type(uint16) if kind.name == "INT32")
    paths = []
    for number, part in enumerate((tensors[:middle], tensors[middle:])):
        own = [
            make_field("split.no", uint16, number),
            make_field("split.count", uint16, 2),
            make_field("split.tensors.count", int32, len(tensors)),
        ]
        fields = [*(header.fields.values() if number == 0 else ()), *own]
        paths.append(directory / f"split-{number + 1:05d}-of-00002.gguf")
        write_file(paths[-1], fields, [header.tensors[t.name] for t in part], [t.data.tobytes() for t in part])
    return paths


def test_a_split_file_is_the_whole_file(files: Path, window: list[int], tmp_path: Path) -> None:
    first, second = split(files / "fine.gguf", tmp_path)
    assert np.array_equal(logits_of(first, window), logits_of(files / "fine.gguf", window))
    second.unlink()
    with pytest.raises(SourceError, match="00002-of-00002"):
        LlamaModel(first, n_ctx=N_CTX)


def damage(file: Path, out: Path, at: int, value: bytes, *, sealed: bool) -> None:
    """Change bytes of the first container's header, `sealed` with the checksum that then belongs to it."""
    shutil.copy(file, out)
    header = read_header(file)
    info = header.tensors[header.get("alphaq.container.tensors")[0]]
    position, length = header.data_offset + info.offset, 40 + 16 * info.shape[0]
    with out.open("r+b") as opened:
        opened.seek(position)
        head = bytearray(opened.read(length))
        head[at : at + len(value)] = value
        if sealed:
            head[32:36] = bytes(4)
            head[32:36] = struct.pack("<I", zlib.crc32(head))
        opened.seek(position)
        opened.write(head)


@pytest.mark.parametrize(
    ("at", "value", "sealed", "reason"),
    [
        (40, b"\2", False, "the checksum of its table does not match"),
        (8, b"\2", True, "container of version 2"),
        (40, b"\x1d", True, "expert 0 has type 29"),
    ],
    ids=["corrupt", "newer", "type"],
)
def test_damaged_containers_are_refused_before_llama_cpp_sees_them(
    files: Path, at: int, value: bytes, sealed: bool, reason: str, tmp_path: Path, cli
) -> None:
    file = tmp_path / "damaged.gguf"
    damage(files / "fine.gguf", file, at, value, sealed=sealed)
    for opener in (LlamaModel, LlamaVocabulary):
        with pytest.raises(AlphaQError, match=reason):
            opener(file)
    code, out, err = cli("run", file, "Hello", "-q")
    assert (code, out) == (1, "")
    assert reason in err
    assert len(err.strip().splitlines()) == 1


def in_a_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alphaq_gguf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


@pytest.fixture
def without_compiler(tmp_path: Path) -> Iterator[dict[str, str]]:
    yield {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def test_without_a_compiler_everything_else_works(files: Path, without_compiler: dict[str, str]) -> None:
    failed = in_a_process("run", files / "fine.gguf", "Hello", "-q", **without_compiler)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: no C++ compiler was found")
    assert len(failed.stderr.strip().splitlines()) == 1
    assert in_a_process("inspect", files / "fine.gguf", **without_compiler).returncode == 0
    talked = in_a_process("run", files / "fine-twin.gguf", "Hello", "-q", "-n", 4, **without_compiler)
    assert talked.returncode == 0, talked.stderr


def test_without_a_compiler_compare_has_figures_of_the_other_engine(
    files: Path, trained: Path, without_compiler: dict[str, str], tmp_path: Path
) -> None:
    given = ("--reference", trained, "--text", trained / "heldout.txt", "--max-windows", 2, "--ctx", 64, "--no-speed")
    where = ("--cache-dir", tmp_path / "figures", "--json")
    done = in_a_process("compare", files / "fine.gguf", *given, *where, **without_compiler)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [e["engine"] for e in result["evaluations"]] == ["pytorch"]
    assert list(result["failures"]) == ["fine.gguf in llama"]
    assert "no C++ compiler was found" in result["failures"]["fine.gguf in llama"]
