"""GGUF files with a type per expert: written byte by byte as documented, refused by stock llama.cpp, read by us."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from container_bytes import assert_holds, by_expert
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from alphaq_gguf.calibration.imatrix import ImportanceMatrix, open_importance
from alphaq_gguf.checkpoint import Source, open_source
from alphaq_gguf.checkpoint.gguf import GGUFSource
from alphaq_gguf.checkpoint.huggingface import HuggingFaceSource
from alphaq_gguf.compare.candidates import describe_candidate
from alphaq_gguf.describe import describe_file
from alphaq_gguf.encode import decode_rows, encode_rows
from alphaq_gguf.errors import AlphaQError, SourceError
from alphaq_gguf.gguf_file import build_header, make_field, read_header
from alphaq_gguf.pipeline import AllocationSettings, allocate, convert, plan_file
from alphaq_gguf.qtypes import QType
from alphaq_gguf.recipe import Recipe, save_recipe
from alphaq_gguf.reporter import Silent

Q = QType
GATE, UP, DOWN = (f"blk.0.ffn_{proj}_exps.weight" for proj in ("gate", "up", "down"))
LAST = "blk.1.ffn_down_exps.weight"
# Of eight experts each. The types of the third are equal: no container. Stacks not named have one type.
TYPES = {
    GATE: [Q.Q4_K, Q.Q2_K, Q.Q2_K, Q.Q4_K, Q.Q6_K, Q.Q2_K, Q.Q3_K, Q.Q2_K],
    UP: [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q5_0, Q.Q5_1, Q.IQ4_NL, Q.Q4_0],
    DOWN: [Q.Q5_K] * 8,
    LAST: [Q.Q8_0] * 7 + [Q.Q2_K],
}
CONTAINERS = (GATE, UP, LAST)
REFUSAL = "qwen2moe in alphaq containers: runs only with the ggml plug-in of alphaq-gguf"


@pytest.fixture(scope="module")
def source(trained: Path) -> HuggingFaceSource:
    return HuggingFaceSource(trained)


@pytest.fixture(scope="module")
def uniform(source: Source, cache_dir: Path) -> Recipe:
    return allocate(source, AllocationSettings(bpw=4.5, strategy="uniform"), cache_dir=cache_dir)


@pytest.fixture(scope="module")
def recipe(source: Source, uniform: Recipe) -> Recipe:
    return by_expert(uniform, source, TYPES)


@pytest.fixture(scope="module")
def file(source: Source, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("containers") / "mixed.gguf"
    assert convert(source, recipe, out).containers == CONTAINERS
    return out


def tensor_bytes(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in GGUFReader(path).tensors}


def test_each_expert_is_what_libggml_makes_of_it(file: Path, source: Source) -> None:
    stored = tensor_bytes(file)
    for name in CONTAINERS:
        blocks = [
            encode_rows(source.read_rows(name, 256 * xid, 256 * (xid + 1)), qtype).tobytes()
            for xid, qtype in enumerate(TYPES[name])
        ]
        assert_holds(stored[name], blocks)
    assert stored[DOWN] == encode_rows(source.read_rows(DOWN), Q.Q5_K).tobytes()


def test_the_gguf_package_sees_ordinary_tensors_and_what_they_need(file: Path, source: Source) -> None:
    reader = GGUFReader(file)
    assert {t.name: tuple(reversed(t.shape)) for t in reader.tensors} == {n: i.shape for n, i in source.tensors.items()}
    found = {key: reader.fields[key].contents() for key in reader.fields}
    assert found["general.architecture"] == REFUSAL
    assert found["alphaq.container.version"] == 1
    assert found["alphaq.container.architecture"] == "qwen2moe"
    assert found["alphaq.container.tensors"] == list(CONTAINERS)
    options = r"blk\.(0)\.ffn_gate_exps\.weight|blk\.(0)\.ffn_up_exps\.weight|blk\.(1)\.ffn_down_exps\.weight"
    assert (
        found["alphaq.container.options"] == f"-ot '{options}=ALPHAQ' --override-kv general.architecture=str:qwen2moe"
    )
    stacks = [t for t in reader.tensors if "_exps" in t.name]
    bits = sum(int(t.n_bytes) for t in stacks) * 8 / sum(int(t.n_elements) for t in stacks)
    assert found["alphaq.expert_bpw"] == pytest.approx(bits)
    units = {unit["tensor"]: unit for unit in json.loads(found["alphaq.recipe"])["units"]}
    assert units[GATE]["experts"] == {"Q4_K": [0, 3], "Q2_K": [1, 2, 5, 7], "Q6_K": [4], "Q3_K": [6]}
    assert units[DOWN]["experts"] == {"Q5_K": [0, 1, 2, 3, 4, 5, 6, 7]}
    assert units["blk.1.ffn_up_exps.weight"]["qtype"] == "Q4_K"


def test_experts_that_share_their_types_make_an_ordinary_file(source: Source, uniform: Recipe, tmp_path: Path) -> None:
    plain, by_stack = tmp_path / "plain.gguf", tmp_path / "by-stack.gguf"
    everything = {stack.name: [Q.Q4_K] * 8 for stack in source.stacks}
    assert convert(source, by_expert(uniform, source, everything), plain).containers == ()
    convert(source, uniform, by_stack)
    assert tensor_bytes(plain) == tensor_bytes(by_stack)
    fields = GGUFReader(plain).fields
    assert fields["general.architecture"].contents() == "qwen2moe"
    assert not [key for key in fields if key.startswith("alphaq.container.")]
    assert open_source(plain, allow_requantize=True).architecture == "qwen2moe"


_LOAD = """
import sys, llama_cpp
try:
    llama_cpp.Llama(sys.argv[1], vocab_only=sys.argv[2] == "vocabulary", verbose=True)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["model", "vocabulary"])
def test_stock_llama_cpp_says_why_it_refuses_the_file(kind: str, file: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _LOAD, file, kind], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"unknown model architecture: '{REFUSAL}'" in done.stderr
    assert "Failed to load model" in done.stdout


class Interrupting(Silent):
    """Stops the work, as Ctrl-C does, when so many bytes are written."""

    def __init__(self, n_bytes: int) -> None:
        self.left = n_bytes

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        def advance(amount: int) -> None:
            self.left -= amount
            if self.left < 0:
                raise KeyboardInterrupt

        yield advance


def test_an_interrupted_file_is_finished_to_the_same_bytes(
    file: Path, source: Source, recipe: Recipe, tmp_path: Path
) -> None:
    out, plan = tmp_path / "out.gguf", plan_file(source, recipe)
    places = {info.name: (info.offset, info.n_bytes) for info in plan.tensors}
    # Inside of each container: behind its header, among its experts, and before its zeros end.
    for name in CONTAINERS:
        for share in (0.001, 0.5, 0.999):
            with pytest.raises(KeyboardInterrupt):
                convert(source, recipe, out, reporter=Interrupting(int(places[name][0] + share * places[name][1])))
            assert not out.exists()
    assert convert(source, recipe, out).resumed_bytes > 0
    assert out.read_bytes() == file.read_bytes()


def open_imatrix(path: Path, source: Source, n_matrices: dict[str, int]) -> ImportanceMatrix:
    """An importance matrix of random moments, with so many vectors for each tensor."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "none")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["some.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, count in n_matrices.items():
        sums = rng.gamma(0.3, size=(count, source.tensors[name].n_cols)).astype(np.float32)
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", np.ones((count, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_importance(path, source)


def test_each_expert_is_rounded_with_its_own_importance(
    source: Source, recipe: Recipe, file: Path, tmp_path: Path
) -> None:
    imatrix = open_imatrix(tmp_path / "imatrix.gguf", source, {stack.name: 8 for stack in source.stacks})
    named = {"file": "imatrix.gguf", "digest": imatrix.digest}
    weighed = replace(recipe, settings={**recipe.settings, "imatrix": named})
    convert(source, weighed, tmp_path / "out.gguf", imatrix=imatrix)
    stored, plain = tensor_bytes(tmp_path / "out.gguf"), tensor_bytes(file)
    for name in CONTAINERS:
        vectors = imatrix.weights(name)
        assert vectors is not None
        blocks = [
            encode_rows(source.read_rows(name, 256 * xid, 256 * (xid + 1)), qtype, importance=vectors[xid]).tobytes()
            for xid, qtype in enumerate(TYPES[name])
        ]
        assert_holds(stored[name], blocks)
        assert stored[name] != plain[name]


def test_the_file_is_read_expert_by_expert(file: Path, source: Source, recipe: Recipe) -> None:
    found = GGUFSource(file, allow_requantize=True)
    assert found.architecture == "qwen2moe"
    assert tuple(found.containers) == CONTAINERS
    kept = {field.key: field.value for field in found.fields}
    assert kept["general.architecture"] == "qwen2moe"
    assert not [key for key in kept if key.startswith("alphaq.container.")]
    for name in (*CONTAINERS, DOWN):
        expected = np.concatenate(
            [
                decode_rows(encode_rows(source.read_rows(name, 256 * xid, 256 * (xid + 1)), qtype), qtype, 256)
                for xid, qtype in enumerate(TYPES[name])
            ]
        )
        np.testing.assert_array_equal(found.read_rows(name), expected)
        np.testing.assert_array_equal(found.read_rows(name, 200, 600), expected[200:600])
        np.testing.assert_array_equal(found.read_rows(name, 300, 310), expected[300:310])
        assert found.matrix_types[name] == TYPES[name]
    with pytest.raises(ValueError, match="are of several experts"):
        found.read_blocks(GATE, 255, 257)


def test_logits_of_the_file_are_those_of_its_recipe(file: Path, source: HuggingFaceSource, recipe: Recipe) -> None:
    from alphaq_gguf.evaluate.blocks import FileBlocks, RecipeBlocks
    from alphaq_gguf.evaluate.torch_model import TorchModel

    tokens = list(range(3, 40))
    of_file, of_recipe = TorchModel(FileBlocks(file)), TorchModel(RecipeBlocks(source, recipe))
    expected = of_recipe.logits(tokens)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(of_file.logits(tokens), expected)


def test_nothing_is_made_of_the_file_but_what_it_is(file: Path, tmp_path: Path, cli) -> None:
    for options in ((), ("--allow-requantize",)):
        code, _, err = cli("convert", file, "-o", tmp_path / "out.gguf", "--bpw", 4, "--granularity", "stack", *options)
        assert code == 1
        assert err.count("\n") == 1
        assert f"already quantised: each expert of {GATE} has a type of its own" in err
        assert "start from the F32, F16 or BF16 file" in err
    for command in (("alphas", file), ("allocate", file, "--bpw", 4), ("plan", file)):
        code, _, err = cli(*command)
        assert (code, "has a type of its own" in err) == (1, True)
    assert not (tmp_path / "out.gguf").exists()


def test_a_file_and_its_recipe_are_described_alike(file: Path, source: Source, recipe: Recipe, tmp_path: Path) -> None:
    save_recipe(recipe, tmp_path / "recipe.json")
    found, planned = describe_candidate(file), describe_candidate(tmp_path / "recipe.json", source)
    same = ("bpw", "expert_bpw", "types", "stacks", "stacking", "origin", "granularity", "budget_bpw")
    assert {name: getattr(found, name) for name in same} == {name: getattr(planned, name) for name in same}
    assert (found.granularity, found.origin, found.n_bytes) == ("expert", "uniform", file.stat().st_size)
    experts = {(stack.layer, stack.proj): stack.experts for stack in found.stacks}
    assert experts[0, "gate"] == {"Q2_K": 4, "Q3_K": 1, "Q4_K": 2, "Q6_K": 1}
    assert experts[0, "down"] == {"Q5_K": 8}
    embedded = next(f for f in GGUFReader(file).fields.values() if f.name == "alphaq.recipe").contents()
    assert len(embedded) < found.n_bytes - planned.n_bytes < len(embedded) + 1024
    stacks = [t for t in GGUFReader(file).tensors if "_exps" in t.name]
    bits = sum(int(t.n_bytes) for t in stacks) * 8 / sum(int(t.n_elements) for t in stacks)
    assert found.expert_bpw == pytest.approx(bits)


def test_inspect_counts_weights_by_the_types_of_experts(file: Path, source: Source) -> None:
    found = describe_file(file)
    weights: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        if tensor.name not in CONTAINERS:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
    for name in CONTAINERS:
        for qtype in TYPES[name]:
            weights[qtype.name] += 256 * 256
    assert {name: group["weights"] for name, group in found["types"].items()} == weights
    assert found["architecture"] == "qwen2moe"
    stored = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    unused = sum(
        stored[n] - sum(len(encode_rows(source.read_rows(n, 0, 256), q).tobytes()) for q in TYPES[n])
        for n in CONTAINERS
    )
    assert found["experts"]["unused_bytes"] == unused
    assert found["experts"]["containers"] == 3
    assert sum(group["bytes"] for group in found["types"].values()) + unused == found["tensor_bytes"]
    assert {s["tensor"]: s["types"] for s in found["stacks"]}[LAST] == {"Q8_0": 7, "Q2_K": 1}


def split(path: Path, out: Path) -> list[Path]:
    """The file cut by the gguf package into files of ten tensors, as llama.cpp cuts them."""
    reader = GGUFReader(path)
    writer = GGUFWriter(out, REFUSAL, split_max_tensors=10)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            items = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], items)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(out.parent.glob(f"{out.stem}-*-of-*.gguf"))


def test_containers_may_lie_in_files_of_a_split_one(file: Path, tmp_path: Path) -> None:
    whole, parts = GGUFSource(file, allow_requantize=True), split(file, tmp_path / "cut.gguf")
    assert len(parts) > 2
    cut = GGUFSource(parts[1], allow_requantize=True)
    assert cut.containers == whole.containers
    np.testing.assert_array_equal(cut.read_rows(LAST), whole.read_rows(LAST))
    assert cut.fingerprint == whole.fingerprint
    described = [describe_file(part) for part in parts]
    assert sum(found["experts"]["containers"] for found in described if found["experts"]) == 3


def rewrite(path: Path, out: Path, changes: dict[str, object], renamed: dict[str, str] | None = None) -> Path:
    """The file with other metadata: a value for a key, or None to leave it out."""
    header = read_header(path)
    fields = {key: field for key, field in header.fields.items() if changes.get(key, "") is not None}
    kinds = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32, list: GGUFValueType.ARRAY}
    for key, value in changes.items():
        if value is not None:
            fields[key] = make_field(key, kinds[type(value)], value)
    infos = [info.__class__((renamed or {}).get(n, n), info.shape, info.qtype) for n, info in header.tensors.items()]
    out.write_bytes(build_header(fields.values(), infos, header.alignment)[0] + path.read_bytes()[header.data_offset :])
    return out


PREFIX = "alphaq.container."
DISAGREEMENTS = {
    "no version": ({f"{PREFIX}version": None}, "has containers, but no alphaq.container.version"),
    "newer": ({f"{PREFIX}version": 2}, r"containers of version 2, this version reads 1 \(update alphaq-gguf\)"),
    "a word for version": ({f"{PREFIX}version": "1"}, "a damaged alphaq.container.version"),
    "no architecture": ({f"{PREFIX}architecture": None}, "no alphaq.container.architecture"),
    "a number for architecture": ({f"{PREFIX}architecture": 7}, "a damaged alphaq.container.architecture"),
    "no tensors": ({f"{PREFIX}tensors": None}, "no alphaq.container.tensors"),
    "not tensors": ({f"{PREFIX}tensors": [1, 2]}, "alphaq.container.tensors is damaged"),
    "no such tensor": ({f"{PREFIX}tensors": [*CONTAINERS, "blk.7.ffn_up_exps.weight"]}, "names blk.7.*does not exist"),
    "no stack": ({f"{PREFIX}tensors": [*CONTAINERS, "output.weight"]}, "output.weight, which is no expert stack"),
    "an ordinary stack": ({f"{PREFIX}tensors": [*CONTAINERS, DOWN]}, "does not start with a container's magic"),
    "one too few": ({f"{PREFIX}tensors": [GATE, UP]}, f"{LAST} is a container, but"),
    "only the architecture": (
        {f"{PREFIX}{key}": None for key in ("version", "architecture", "tensors", "options")},
        "lacks alphaq.container.version",
    ),
    "nothing at all": (
        {
            **{f"{PREFIX}{k}": None for k in ("version", "architecture", "tensors", "options")},
            "general.architecture": "qwen2moe",
        },
        f"{GATE} is a container, but",
    ),
}


@pytest.mark.parametrize("case", DISAGREEMENTS)
def test_metadata_that_does_not_agree_with_the_tensors_is_refused(case: str, file: Path, tmp_path: Path) -> None:
    changes, cause = DISAGREEMENTS[case]
    path = rewrite(file, tmp_path / "odd.gguf", changes)
    for read in (lambda: GGUFSource(path, allow_requantize=True), lambda: describe_file(path)):
        with pytest.raises(SourceError, match=f"odd.gguf: .*{cause}"):
            read()


def test_damage_in_the_tables_of_a_file_is_one_clear_line(file: Path, tmp_path: Path, cli) -> None:
    header, good = read_header(file), file.read_bytes()
    path = tmp_path / "damaged.gguf"
    for name in CONTAINERS:
        start = header.data_offset + header.tensors[name].offset
        for at in (0, 8, 12, 24, 32, 40, 48, 167):
            data = bytearray(good)
            data[start + at] ^= 0x10
            path.write_bytes(data)
            for command in (("inspect", path), ("convert", path, "--bpw", 4, "-o", tmp_path / "out.gguf")):
                code, _, err = cli(*command)
                assert (code, err.count("\n")) == (1, 1)
                assert name in err
    data = bytearray(good)
    struct.pack_into("<I", data, header.data_offset + header.tensors[GATE].offset + 8, 2)
    path.write_bytes(data)
    with pytest.raises(AlphaQError, match=f"{GATE}: container of version 2, this version reads 1"):
        GGUFSource(path, allow_requantize=True)
