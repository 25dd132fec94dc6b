"""Bad input: one line on stderr that says what, where and what to do; a non-zero exit; nothing changed on disk."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import build_moe
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.numpy import load_file, save_file

WEIGHTS = "model.safetensors"


def snapshot(directory: Path) -> dict[str, str]:
    """Every file under `directory` with its hash."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def refused(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command that must fail in `tmp_path`; returns its one line of stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, code: int = 1) -> str:
        before = snapshot(tmp_path)
        found, out, err = cli(*arguments, "--quiet")
        lines = err.strip().splitlines()
        assert found == code, err
        assert out == ""
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in err
        assert snapshot(tmp_path) == before
        return lines[0]

    return run


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key)
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def change_weights(directory: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def write_gguf(path: Path, tensors: dict[str, np.ndarray], qtype: GGMLQuantizationType | None = None) -> Path:
    writer = GGUFWriter(path, "qwen2moe")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_missing_source(refused) -> None:
    assert "nowhere does not exist" in refused("convert", "nowhere", "--bpw", 4)


def test_empty_directory(refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused("convert", "empty", "--bpw", 4)


def test_directory_that_is_no_model(refused, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"\xff\xd8")
    assert "holds no config.json" in refused("convert", "photos", "--bpw", 4)


def test_file_that_is_no_gguf(refused, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("just some notes, long enough for a header")
    assert "does not start with the GGUF magic" in refused("convert", "notes.txt", "--bpw", 4)


def test_empty_file(refused, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert "too few for a header" in refused("convert", "model.gguf", "--bpw", 4)


def test_config_that_is_not_json(refused, tiny_copy: Path) -> None:
    (tiny_copy / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refused("convert", tiny_copy, "--bpw", 4)


@pytest.mark.parametrize("field", ["num_experts", "hidden_size", "num_hidden_layers", "rms_norm_eps", "vocab_size"])
def test_config_without_a_field_the_family_needs(refused, tiny_copy: Path, field: str) -> None:
    change_config(tiny_copy, **{field: None})
    line = refused("convert", tiny_copy, "--bpw", 4)
    assert "config.json" in line
    assert field in line


def test_dense_checkpoint(refused, tiny_copy: Path) -> None:
    config = {"model_type": "qwen2", "hidden_size": 256, "architectures": ["Qwen2ForCausalLM"]}
    (tiny_copy / "config.json").write_text(json.dumps(config))
    assert "dense model" in refused("convert", tiny_copy, "--bpw", 4)


def test_dense_gguf(refused, tmp_path: Path) -> None:
    write_gguf(tmp_path / "dense.gguf", {"blk.0.ffn_up.weight": np.zeros((256, 256), np.float32)})
    assert "dense model" in refused("convert", "dense.gguf", "--bpw", 4)


def test_gguf_with_one_tensor_per_expert(refused, tmp_path: Path) -> None:
    experts = {f"blk.0.ffn_{p}.{x}.weight": np.zeros((256, 256), np.float32) for p in ("gate", "up") for x in (0, 1)}
    write_gguf(tmp_path / "old.gguf", experts)
    assert "one tensor per expert" in refused("convert", "old.gguf", "--bpw", 4)


def test_unsupported_family_lists_the_supported_ones_and_the_gguf_route(refused, tiny_copy: Path) -> None:
    change_config(tiny_copy, model_type="hypermoe", architectures=["HyperMoeForCausalLM"])
    line = refused("convert", tiny_copy, "--bpw", 4)
    assert "hypermoe" in line
    assert "qwen2_moe" in line
    assert "convert_hf_to_gguf.py" in line


def test_a_family_that_llama_cpp_computes_otherwise_is_refused_with_the_reason(refused, tiny_copy: Path) -> None:
    change_config(tiny_copy, model_type="phimoe")
    assert "llama.cpp computes another model: RMS norms" in refused("convert", tiny_copy, "--bpw", 4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_topk_prob", True),
        ("hidden_act", "gelu"),
        ("decoder_sparse_step", 2),
        ("mlp_only_layers", [0]),
        ("use_sliding_window", True),
        ("head_dim", 128),
    ],
)
def test_variants_llama_cpp_lacks(refused, tiny_copy: Path, key: str, value: object) -> None:
    change_config(tiny_copy, **{key: value})
    assert key in refused("convert", tiny_copy, "--bpw", 4)


def test_unknown_rope_scaling(refused, tiny_copy: Path) -> None:
    change_config(tiny_copy, rope_parameters={"rope_type": "spiral", "factor": 2.0})
    assert "spiral" in refused("convert", tiny_copy, "--bpw", 4)


def test_quantised_checkpoint(refused, tiny_copy: Path) -> None:
    change_config(tiny_copy, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "already quantised (gptq)" in refused("convert", tiny_copy, "--bpw", 4)


def test_quantised_gguf_needs_the_flag(refused, tiny: Path, tmp_path: Path, cli) -> None:
    assert cli("convert", tiny, "-o", tmp_path / "q.gguf", "--bpw", 4)[0] == 0
    assert "--allow-requantize" in refused("convert", "q.gguf", "-o", "again.gguf", "--bpw", 3)
    assert cli("convert", tmp_path / "q.gguf", "-o", tmp_path / "again.gguf", "--bpw", 3, "--allow-requantize")[0] == 0


@pytest.mark.parametrize("keep", [5, 300, 100_000, -1])
def test_truncated_safetensors(refused, tiny_copy: Path, keep: int) -> None:
    data = (tiny_copy / WEIGHTS).read_bytes()
    (tiny_copy / WEIGHTS).write_bytes(data[:keep])
    line = refused("convert", tiny_copy, "--bpw", 4)
    assert WEIGHTS in line
    assert "truncated or corrupt" in line


def test_corrupt_safetensors_header(refused, tiny_copy: Path) -> None:
    data = bytearray((tiny_copy / WEIGHTS).read_bytes())
    data[20:60] = b"\xfe" * 40
    (tiny_copy / WEIGHTS).write_bytes(data)
    assert "truncated or corrupt" in refused("convert", tiny_copy, "--bpw", 4)


@pytest.mark.parametrize("keep", [40, 5000, 100_000, -1])
def test_truncated_gguf(refused, tiny: Path, tmp_path: Path, cli, keep: int) -> None:
    assert cli("convert", tiny, "-o", tmp_path / "f.gguf", "--bpw", 32, "--tensor-type", r"\.weight$=F32")[0] == 0
    data = (tmp_path / "f.gguf").read_bytes()
    (tmp_path / "f.gguf").write_bytes(data[:keep])
    line = refused("convert", "f.gguf", "-o", "out.gguf", "--bpw", 4)
    assert "f.gguf" in line
    assert "truncated" in line or "too early" in line


def test_missing_shard(refused, tmp_path: Path) -> None:
    model = build_moe(tmp_path / "model", shards=True)
    shards = sorted(model.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    line = refused("convert", model, "--bpw", 4)
    assert shards[1].name in line
    assert "missing" in line


def test_index_that_promises_a_tensor_the_shard_lacks(refused, tmp_path: Path) -> None:
    model = build_moe(tmp_path / "model", shards=True)
    index = model / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.extra.weight"] = sorted(data["weight_map"].values())[0]
    index.write_text(json.dumps(data))
    assert "promises tensor model.extra.weight" in refused("convert", model, "--bpw", 4)


def test_missing_tensor(refused, tiny_copy: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    change_weights(tiny_copy, lambda tensors: tensors.pop(name))
    assert f"tensor {name} is missing" in refused("convert", tiny_copy, "--bpw", 4)


def test_left_over_tensor(refused, tiny_copy: Path) -> None:
    extra = {"model.layers.0.mlp.experts.9.up_proj.weight": np.zeros((256, 256), np.float32)}
    change_weights(tiny_copy, lambda tensors: tensors.update(extra))
    assert "experts.9.up_proj.weight" in refused("convert", tiny_copy, "--bpw", 4)


def test_wrong_shape(refused, tiny_copy: Path) -> None:
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    change_weights(tiny_copy, lambda tensors: tensors.update({name: np.zeros((256, 128), np.float32)}))
    line = refused("convert", tiny_copy, "--bpw", 4)
    assert f"{name} has shape [256, 128], config.json calls for [256, 256]" in line


def test_integer_weights(refused, tiny_copy: Path) -> None:
    name = "model.norm.weight"
    change_weights(tiny_copy, lambda tensors: tensors.update({name: np.ones(256, np.int64)}))
    assert "dtype I64" in refused("convert", tiny_copy, "--bpw", 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("command", ["convert", "alphas", "allocate"])
def test_nan_and_infinite_expert_weights_are_named(refused, tiny_copy: Path, value: float, command: str) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"

    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][7, 9] = value

    change_weights(tiny_copy, damage)
    line = refused(command, tiny_copy, *([] if command == "alphas" else ["--bpw", 4]))
    assert "blk.1.ffn_up_exps.weight has 1 NaN or infinite weights, first at expert 2, row 7, column 9" in line


def test_nan_outside_experts_is_found_while_writing(refused, tiny_copy: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].copy()
        tensors["model.norm.weight"][3] = np.nan

    change_weights(tiny_copy, damage)
    assert "output_norm.weight" in refused("convert", tiny_copy, "--bpw", 4)


def test_missing_tokenizer(refused, tiny_copy: Path) -> None:
    (tiny_copy / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refused("convert", tiny_copy, "--bpw", 4)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json_that_is_no_object(refused, tiny_copy: Path, name: str) -> None:
    (tiny_copy / name).write_text("[1, 2]")
    assert f"{name}: expected a JSON object, found list" in refused("convert", tiny_copy, "--bpw", 4)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_damaged_shard_index(refused, tmp_path: Path, text: str) -> None:
    model = build_moe(tmp_path / "model", shards=True)
    (model / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused("convert", model, "--bpw", 4)


def test_tokenizer_larger_than_the_vocabulary(refused, tiny_copy: Path) -> None:
    path = tiny_copy / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 999, "content": "<|late|>"})
    path.write_text(json.dumps(data))
    assert "token id 999" in refused("convert", tiny_copy, "--bpw", 4)


def test_unknown_pre_tokenizer_names_the_option(refused, tiny_copy: Path, cli, tmp_path: Path) -> None:
    path = tiny_copy / "tokenizer.json"
    data = json.loads(path.read_text())
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w+|\s+"}
    path.write_text(json.dumps(data))
    assert "--pre-tokenizer" in refused("convert", tiny_copy, "--bpw", 4)
    code, _, err = cli("convert", tiny_copy, "-o", tmp_path / "o.gguf", "--bpw", 4, "--pre-tokenizer", "qwen2")
    assert code == 0, err


def test_pickle_only_checkpoint(refused, tiny_copy: Path) -> None:
    (tiny_copy / WEIGHTS).rename(tiny_copy / "pytorch_model.bin")
    assert "only a pickle checkpoint" in refused("convert", tiny_copy, "--bpw", 4)


def test_pickle_file(refused, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"\x80\x02")
    assert "pickle" in refused("convert", "model.pth", "--bpw", 4)


def test_single_weight_file(refused, tiny_copy: Path) -> None:
    assert "give its directory" in refused("convert", tiny_copy / WEIGHTS, "--bpw", 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--types", "Q2_K,Q9_Z"], "unknown type 'Q9_Z'"),
        (["--tensor-type", "attn_q=Q9_Z"], "unknown type 'Q9_Z'"),
        (["--tensor-type", "attn_q"], "expected REGEX=TYPE"),
        (["--tensor-type", "attn_[=Q8_0"], "--tensor-type"),
        (["--tensor-type", "no_such_tensor=Q8_0"], "matches no tensor"),
        (["--tensor-type", "attn_norm=Q8_0"], "which stay float"),
        (["--gamma", "-3"], "--gamma"),
        (["--tiles", "none"], "--tiles"),
        (["--distortion-rows", "0"], "--distortion-rows"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "toaster"], "--device toaster"),
        (["--strategy", "magic"], "magic"),
        (["--no-such-option"], "--no-such-option"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_options_that_make_no_sense(refused, tiny: Path, arguments: list[str], words: str) -> None:
    assert words in refused("convert", tiny, "--bpw", 4, *arguments, code=2)


def test_type_that_does_not_fit_the_row(refused, tmp_path: Path) -> None:
    model = build_moe(tmp_path / "model", moe_intermediate_size=352)
    assert "rows of 352" in refused("convert", model, "--bpw", 5, "--types", "Q2_K,Q4_K", code=2)
    assert "rows of 352" in refused("convert", model, "--bpw", 5, "--tensor-type", "down_exps=Q2_K", code=2)


@pytest.mark.parametrize("arguments", [[], ["--bpw", "4", "--size", "8MiB"]])
def test_no_budget_or_two(refused, tiny: Path, arguments: list[str]) -> None:
    assert "exactly one budget" in refused("convert", tiny, *arguments, code=2)


@pytest.mark.parametrize("size", ["huge", "8XB", "-1", "1.2.3G"])
def test_size_that_is_none(refused, tiny: Path, size: str) -> None:
    assert "is not a size" in refused("convert", tiny, f"--size={size}", code=2)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (["--bpw", "2.5"], "feasible are 2.625 to 8.5"),
        (["--bpw", "0"], "feasible are 2.625 to 8.5"),
        (["--bpw", "nan"], "feasible are 2.625 to 8.5"),
        (["--size", "100KiB"], "feasible are"),
    ],
)
@pytest.mark.parametrize("command", ["convert", "allocate"])
def test_impossible_budget_fails_before_any_work_and_names_the_range(
    refused, tiny: Path, tmp_path_factory, budget: list[str], words: str, command: str
) -> None:
    cache = tmp_path_factory.mktemp("unused")
    assert words in refused(command, tiny, *budget, "--cache-dir", cache)
    assert list(cache.iterdir()) == []


def test_uniform_below_the_smallest_type(refused, tiny: Path) -> None:
    assert "impossible" in refused("convert", tiny, "--bpw", 2, "--strategy", "uniform")


def test_output_exists(refused, tiny: Path, tmp_path: Path, cli) -> None:
    (tmp_path / "out.gguf").write_text("precious")
    assert "out.gguf exists" in refused("convert", tiny, "-o", "out.gguf", "--bpw", 4)
    assert cli("convert", tiny, "-o", tmp_path / "out.gguf", "--bpw", 4, "--force")[0] == 0
    assert (tmp_path / "out.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("command", ["alphas", "allocate"])
def test_other_outputs_exist(refused, tiny: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "out").write_text("precious")
    assert "out exists" in refused(command, tiny, "-o", "out", *([] if command == "alphas" else ["--bpw", 4]))


def test_source_equals_output_even_with_force(refused, tiny: Path, tmp_path: Path, cli) -> None:
    assert cli("convert", tiny, "-o", tmp_path / "f.gguf", "--bpw", 32, "--tensor-type", r"\.weight$=F32")[0] == 0
    assert "is the source" in refused("convert", "f.gguf", "-o", "f.gguf", "--bpw", 4, "--force")
    (tmp_path / "link.gguf").symlink_to("f.gguf")
    assert "is the source" in refused("convert", "f.gguf", "-o", "link.gguf", "--bpw", 4, "--force")


def test_output_inside_the_checkpoint_may_not_replace_its_files(refused, tiny_copy: Path) -> None:
    assert "is the source" in refused("convert", tiny_copy, "-o", tiny_copy / "config.json", "--bpw", 4, "--force")


def test_output_directory_missing_or_output_a_directory(refused, tiny: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused("convert", tiny, "-o", "a/b.gguf", "--bpw", 4)
    (tmp_path / "dir").mkdir()
    assert "is a directory" in refused("convert", tiny, "-o", "dir", "--bpw", 4)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory nobody may write: one without permission, or for root (whom permissions do not stop) /proc."""
    if os.getuid() == 0:
        yield Path("/proc")
        return
    directory = tmp_path / "locked"
    directory.mkdir(mode=0o500)
    yield directory
    directory.chmod(0o700)


def test_read_only_output_directory(refused, tiny: Path, read_only: Path) -> None:
    assert "cannot write here" in refused("convert", tiny, "-o", read_only / "out.gguf", "--bpw", 4)


def run_process(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alphaq_gguf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_disk_that_fills_up_while_writing(tiny: Path, tmp_path: Path, cache_dir: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

    arguments = ("convert", tiny, "-o", tmp_path / "out.gguf", "--bpw", 4, "--quiet", "--cache-dir", cache_dir)
    done = run_process(*arguments, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "out.gguf: cannot be written: File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_disk_without_enough_space(tiny: Path, tmp_path: Path, cache_dir: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a small disk needs root")
    try:
        arguments = ("convert", tiny, "-o", disk / "out.gguf", "--bpw", 4, "--quiet", "--cache-dir", cache_dir)
        done = run_process(*arguments)
        assert done.returncode == 1
        assert "disk full: the file needs" in done.stderr
        assert done.stderr.count("\n") == 1
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="module")
def recipe(tiny: Path, tmp_path_factory, cache_dir: Path) -> dict:
    from alphaq_gguf.cli import main

    path = tmp_path_factory.mktemp("recipe") / "r.json"
    assert main(["allocate", str(tiny), "-o", str(path), "--bpw", "4", "-q", "--cache-dir", str(cache_dir)]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(source="0" * 64), "made for another model"),
        (lambda r: r.update(format="cake"), "not a recipe"),
        (lambda r: r.update(schema=99), "schema 99"),
        (lambda r: r.update(granularity="matrix"), "'matrix'"),
        (lambda r: r["units"].pop(), "does not cover"),
        (lambda r: r["units"][0].pop("qtype"), "damaged recipe"),
        (lambda r: r["units"][0].update(qtype="Q9_Z"), "unknown type 'Q9_Z'"),
        (lambda r: r["units"][0].update(qtype="Q8_0", n_bytes=1), "the recipe says 1"),
        (lambda r: r["tensors"].update({"blk.7.ghost.weight": "F32"}), "blk.7.ghost.weight"),
    ],
)
def test_recipe_that_does_not_belong(refused, tiny: Path, tmp_path: Path, recipe: dict, change, words: str) -> None:
    changed = json.loads(json.dumps(recipe))
    change(changed)
    (tmp_path / "r.json").write_text(json.dumps(changed))
    assert words in refused("convert", tiny, "-o", "out.gguf", "--recipe", "r.json")


def test_recipe_missing_or_not_json(refused, tiny: Path, tmp_path: Path) -> None:
    assert "cannot be read" in refused("convert", tiny, "--recipe", "none.json")
    (tmp_path / "bad.json").write_text("{")
    assert "not valid JSON" in refused("convert", tiny, "--recipe", "bad.json")


def test_recipe_and_budget_together(refused, tiny: Path, tmp_path: Path, recipe: dict) -> None:
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    assert "--recipe already holds" in refused("convert", tiny, "--recipe", "r.json", "--bpw", 4, code=2)


def test_alphas_file_of_another_model_or_damaged(refused, tiny: Path, tmp_path: Path, cli) -> None:
    other = build_moe(tmp_path / "other", num_experts=5)
    assert cli("alphas", other, "-o", tmp_path / "alphas.csv")[0] == 0
    line = refused("convert", tiny, "--bpw", 4, "--alphas", "alphas.csv")
    assert "measured on another model" in line
    assert cli("alphas", tiny, "-o", tmp_path / "mine.csv")[0] == 0
    whole = (tmp_path / "mine.csv").read_text()
    (tmp_path / "short.csv").write_text(whole[: len(whole) // 2])
    assert "no alpha for" in refused("convert", tiny, "--bpw", 4, "--alphas", "short.csv")
    (tmp_path / "words.csv").write_text(whole.replace(",farms,", ",farms,x,"))
    assert "error" in refused("convert", tiny, "--bpw", 4, "--alphas", "words.csv")
    (tmp_path / "none.csv").write_text("a,b\n1,2\n")
    assert "not a measurement file" in refused("convert", tiny, "--bpw", 4, "--alphas", "none.csv")


def test_inspect_and_run_refuse_what_is_no_gguf(tmp_path: Path, cli) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\x00" * 40)
    for arguments in (("inspect", tmp_path / "x.gguf"), ("run", tmp_path / "x.gguf", "Hi")):
        code, out, err = cli(*arguments)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
    code, _, err = cli("inspect", tmp_path)
    assert code == 1
    assert "is not a file" in err


def test_run_gives_llama_cpps_own_reason_in_one_line(tmp_path: Path, cli) -> None:
    path = write_gguf(tmp_path / "half.gguf", {"blk.0.ffn_up_exps.weight": np.zeros((2, 256, 256), np.float32)})
    code, out, err = cli("run", path, "Hi")
    assert (code, out) == (1, "")
    assert "llama.cpp cannot load it" in err
    assert err.count("\n") == 1
