"""What the commands promise when all is well: outputs, reuse, resumption, and what they print."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import build_moe
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from alphaq_gguf.ledger import read_ledger
from alphaq_gguf.recipe import load_recipe

COMMAND = [sys.executable, "-m", "alphaq_gguf"]


def types_of(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}


def expert_bpw(path: Path) -> float:
    stacks = [t for t in GGUFReader(path).tensors if "_exps" in t.name]
    return sum(t.n_bytes for t in stacks) * 8 / sum(t.n_elements for t in stacks)


@pytest.mark.parametrize("strategy", ["alphaq", "mse", "uniform", "random", "inverse-alpha"])
@pytest.mark.parametrize("bpw", [2.625, 3.0, 4.5, 7.0])
def test_bpw_budget_is_kept_and_used(strategy: str, bpw: float, tiny: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "out.gguf"
    code, stdout, err = cli("convert", tiny, "-o", out, "--bpw", bpw, "--strategy", strategy)
    assert code == 0, err
    found = expert_bpw(out)
    assert found <= bpw + 1e-9
    if strategy != "uniform":
        # Six equal stacks: one step of one stack is at most 2 bits of a sixth of the weights.
        assert found > bpw - 2 / 6 or bpw > 6.5
    else:
        assert len({t for name, t in types_of(out).items() if "_exps" in name}) == 1
    assert f"{found:.4g} bits per expert weight" in stdout


@pytest.mark.parametrize("extra", [0, 12_345, 100_000, 400_000])
def test_size_budget_counts_the_whole_file(extra: int, tiny: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "smallest.gguf"
    assert cli("convert", tiny, "-o", out, "--bpw", 2.625)[0] == 0
    # Metadata is budgeted before it is measured, with 1 KiB to spare.
    budget = out.stat().st_size + 2000 + extra
    code, _, err = cli("convert", tiny, "-o", tmp_path / "out.gguf", "--size", budget)
    assert code == 0, err
    size = (tmp_path / "out.gguf").stat().st_size
    assert size <= budget
    # The smallest step from one type to the next of one stack (Q2_K to Q3_K of 256 KiB weights) is 26,624 bytes.
    assert size > budget - 40_000


@pytest.mark.parametrize("asked", ["1", "1KiB", "123456", "1500000"])
def test_the_smallest_size_named_as_feasible_is(asked: str, tiny: Path, tmp_path: Path, cli) -> None:
    code, _, err = cli("convert", tiny, "-o", tmp_path / "out.gguf", "--size", asked)
    assert code == 1
    least = int(re.findall(r"feasible are ([\d,]+)", err)[0].replace(",", ""))
    code, _, err = cli("convert", tiny, "-o", tmp_path / "out.gguf", "--size", least)
    assert code == 0, err
    assert least - 2000 < (tmp_path / "out.gguf").stat().st_size <= least
    assert {t for n, t in types_of(tmp_path / "out.gguf").items() if "_exps" in n} == {"Q2_K"}


def test_default_types_of_other_tensors(tiny: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "out.gguf"
    assert cli("convert", tiny, "-o", out, "--bpw", 4)[0] == 0
    types = types_of(out)
    assert types["token_embd.weight"] == "Q6_K"
    assert types["output.weight"] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == types["blk.1.ffn_up_shexp.weight"] == "Q8_0"
    assert {t for n, t in types.items() if "norm" in n or "gate_inp" in n or "bias" in n} == {"F32"}


def test_tensor_type_overrides(tiny: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "out.gguf"
    overrides = ["--tensor-type", "attn_=Q6_K", "--tensor-type", r"attn_v\.weight=F16"]
    overrides += ["--tensor-type", "blk.0.ffn_down_exps=Q6_K"]
    code, _, err = cli("convert", tiny, "-o", out, "--bpw", 4, *overrides)
    assert code == 0, err
    types = types_of(out)
    assert types["blk.0.attn_q.weight"] == "Q6_K"
    assert types["blk.1.attn_v.weight"] == "F16"
    assert types["blk.0.ffn_down_exps.weight"] == "Q6_K"
    assert types["blk.0.attn_q.bias"] == types["blk.0.attn_norm.weight"] == "F32"
    assert expert_bpw(out) <= 4


def test_types_restrict_the_stacks(tiny: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "out.gguf"
    assert cli("convert", tiny, "-o", out, "--bpw", 4, "--types", "Q3_K,q6_k")[0] == 0
    assert {t for n, t in types_of(out).items() if "_exps" in n} == {"Q3_K", "Q6_K"}


def test_odd_rows_get_legacy_types_priced_as_they_are(tmp_path: Path, cli) -> None:
    model = build_moe(tmp_path / "model", moe_intermediate_size=352)
    out = tmp_path / "out.gguf"
    code, _, err = cli("convert", model, "-o", out, "--bpw", 4.2)
    assert code == 0, err
    types = types_of(out)
    assert {types[f"blk.{b}.ffn_down_exps.weight"] for b in (0, 1)} <= {"Q4_0", "Q5_0", "Q5_1", "Q8_0"}
    assert {types[f"blk.{b}.ffn_up_exps.weight"] for b in (0, 1)} <= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    assert expert_bpw(out) <= 4.2


def test_alphas_file_is_complete_and_printed_per_layer_and_projection(tiny: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "alphas.csv"
    code, stdout, _ = cli("alphas", tiny, "-o", out)
    assert code == 0
    header, rows = read_ledger(out)
    assert header["spectrum"] == "farms"
    assert header["max_tiles"] is None
    assert len(rows) == 2 * 4 * 3
    assert len({(r["stack"], r["expert"], r["proj"]) for r in rows}) == len(rows)
    assert len(re.findall(r"^[01] +(gate|up|down) +4 ", stdout, re.MULTILINE)) == 6


def test_alphas_equal_a_naive_float64_svd(tiny: Path, tmp_path: Path, cli) -> None:
    from safetensors.numpy import load_file

    out = tmp_path / "alphas.csv"
    assert cli("alphas", tiny, "-o", out)[0] == 0
    tensors = load_file(tiny / "model.safetensors")
    for row in read_ledger(out)[1]:
        name = f"model.layers.{row['layer']}.mlp.experts.{row['expert']}.{row['proj']}_proj.weight"
        weight = tensors[name].astype(np.float64)
        tiles = [weight[i : i + 128, j : j + 128] for i in (0, 128) for j in (0, 128)]
        esd = np.sort(np.concatenate([np.linalg.svd(t, compute_uv=False) ** 2 for t in tiles]))
        k = len(esd) // 10
        alpha = 1 + k / np.log(esd[-k:] / esd[-k - 1]).sum()
        assert float(row["alpha"]) == pytest.approx(alpha, rel=1e-4)
        assert float(row["variance"]) == pytest.approx(weight.var(), rel=1e-6)


def test_convert_uses_given_alphas_and_gamma_changes_with_them(tiny: Path, tmp_path: Path, cli) -> None:
    alphas = tmp_path / "alphas.csv"
    assert cli("alphas", tiny, "-o", alphas, "--estimator", "median")[0] == 0
    code, out, err = cli("allocate", tiny, "--bpw", 4, "--alphas", alphas, "--json")
    assert code == 0, err
    used = json.loads(out)
    assert used["settings"]["alphas"]["estimator"] == "median"
    plain = json.loads(cli("allocate", tiny, "--bpw", 4, "--json")[1])
    assert used["result"]["gamma"] != plain["result"]["gamma"]


def test_fused_and_separate_experts_have_the_same_alphas(tmp_path: Path, tiny: Path, cli) -> None:
    separate = tmp_path / "f32.gguf"
    assert cli("convert", tiny, "-o", separate, "--bpw", 32, "--tensor-type", r"\.weight$=F32")[0] == 0
    fused = fuse_gate_up(separate, tmp_path / "fused.gguf")
    for path, name in ((separate, "a.csv"), (fused, "b.csv")):
        assert cli("alphas", path, "-o", tmp_path / name)[0] == 0
    one, other = (
        {(r["layer"], r["expert"], r["proj"]): r["alpha"] for r in read_ledger(tmp_path / n)[1]}
        for n in ("a.csv", "b.csv")
    )
    assert one == other
    assert len(one) == 24
    code, _, err = cli("convert", fused, "-o", tmp_path / "out.gguf", "--bpw", 4)
    assert code == 0, err
    assert expert_bpw(tmp_path / "out.gguf") <= 4


def fuse_gate_up(source: Path, out: Path) -> Path:
    """The same model with gate and up in one `ffn_gate_up_exps`, under an architecture nobody knows."""
    reader = GGUFReader(source)
    tensors = {t.name: t.data for t in reader.tensors}
    writer = GGUFWriter(out, "unheard-of")
    for name in list(tensors):
        if "gate_exps" in name:
            gate, up = tensors.pop(name), tensors.pop(name.replace("gate_exps", "up_exps"))
            tensors[name.replace("gate_exps", "gate_up_exps")] = np.concatenate([gate, up], axis=1)
    for name, data in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_gguf_of_an_unknown_architecture_keeps_all_metadata_and_other_tensors(tmp_path: Path, cli) -> None:
    rng = np.random.default_rng(0)
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    writer = GGUFWriter(source, "zebra-moe")
    writer.add_custom_alignment(64)
    writer.add_uint64("zebra-moe.big", 2**63 + 5)
    writer.add_float64("zebra-moe.pi", 3.141592653589793)
    writer.add_bool("zebra-moe.flag", True)
    writer.add_array("zebra-moe.words", ["a", "", "größe", "\U0001f993"])
    writer.add_array("zebra-moe.numbers", [1, -2, 3])
    writer.add_key_value("zebra-moe.bytes", [1, 2, 255], GGUFValueType.ARRAY, GGUFValueType.UINT8)
    kept = {
        "strange.stripes": rng.standard_normal((3, 7)).astype(np.float16),
        "blk.0.ssm_conv1d.weight": rng.standard_normal((64, 4)).astype(np.float32),
        "blk.0.ffn_norm.weight": rng.standard_normal(256).astype(np.float32),
    }
    for name, data in kept.items():
        writer.add_tensor(name, data)
    for proj in ("gate", "up", "down"):
        writer.add_tensor(f"blk.0.ffn_{proj}_exps.weight", rng.standard_normal((3, 256, 256)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, _, err = cli("convert", source, "-o", out, "--bpw", 4)
    assert code == 0, err
    before, after = GGUFReader(source), GGUFReader(out)
    assert after.alignment == 64
    for key, field in before.fields.items():
        if not key.startswith("GGUF."):
            assert [p.tobytes() for p in after.fields[key].parts] == [p.tobytes() for p in field.parts], key
    tensors = {t.name: t for t in after.tensors}
    assert [t.name for t in after.tensors] == [t.name for t in before.tensors]
    for name, data in kept.items():
        assert tensors[name].data.tobytes() == data.tobytes(), name
    assert all(t.data_offset % 64 == 0 for t in after.tensors)


def split_gguf(source: Path, out: Path, per_file: int) -> list[Path]:
    """`source` cut into files of `per_file` tensors by the gguf package, named as llama.cpp names them."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents(), split_max_tensors=per_file)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            items = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], items)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(out.parent.glob(f"{out.stem}-*-of-*.gguf"))


def test_split_gguf_converts_like_the_whole_one_from_any_of_its_files(tiny: Path, tmp_path: Path, cli) -> None:
    whole, direct = tmp_path / "f32.gguf", tmp_path / "direct.gguf"
    assert cli("convert", tiny, "-o", whole, "--bpw", 32, "--tensor-type", r"\.weight$=F32")[0] == 0
    assert cli("convert", whole, "-o", direct, "--bpw", 4)[0] == 0
    parts = split_gguf(whole, tmp_path / "cut.gguf", 10)
    assert len(parts) > 3
    for i, part in enumerate(parts[:2]):
        out = tmp_path / f"out{i}.gguf"
        code, _, err = cli("convert", part, "-o", out, "--bpw", 4)
        assert code == 0, err
        assert out.read_bytes() == direct.read_bytes()


def test_split_gguf_with_a_part_missing_or_renamed(tiny: Path, tmp_path: Path, cli) -> None:
    whole = tmp_path / "f32.gguf"
    assert cli("convert", tiny, "-o", whole, "--bpw", 32, "--tensor-type", r"\.weight$=F32")[0] == 0
    parts = split_gguf(whole, tmp_path / "cut.gguf", 10)
    hidden = parts[1].rename(tmp_path / "hidden.gguf")
    code, _, err = cli("convert", parts[0], "-o", tmp_path / "out.gguf", "--bpw", 4, "-q")
    assert (code, err.count("\n")) == (1, 1)
    assert f"{parts[1].name} is missing" in err
    code, _, err = cli("convert", hidden, "-o", tmp_path / "out.gguf", "--bpw", 4, "-q")
    assert (code, err.count("\n")) == (1, 1)
    assert "not named NAME-00001-of" in err
    parts[1].write_bytes(parts[2].read_bytes())
    code, _, err = cli("convert", parts[0], "-o", tmp_path / "out.gguf", "--bpw", 4, "-q")
    assert (code, err.count("\n")) == (1, 1)
    assert "says it is part 2" in err
    assert not (tmp_path / "out.gguf").exists()


def test_recipe_reproduces_the_file_and_can_be_edited(tiny: Path, tmp_path: Path, cli) -> None:
    direct, again, recipe = tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "r.json"
    assert cli("convert", tiny, "-o", direct, "--bpw", 3.7, "--save-recipe", recipe)[0] == 0
    assert cli("convert", tiny, "-o", again, "--recipe", recipe)[0] == 0
    assert direct.read_bytes() == again.read_bytes()
    data = json.loads(recipe.read_text())
    assert data["schema"] == 1
    unit = data["units"][0]
    assert {"tensor", "qtype", "n_bytes", "cost", "alpha_median", "sensitivity"} <= unit.keys()
    unit.update(qtype="Q8_0", n_bytes=unit["n_weights"] // 32 * 34)
    recipe.write_text(json.dumps(data))
    assert cli("convert", tiny, "-o", again, "--recipe", recipe, "--force")[0] == 0
    assert types_of(again)[unit["tensor"]] == "Q8_0"
    assert load_recipe(recipe).units[0].qtype.name == "Q8_0"


def test_tensor_type_file_matches_each_tensor_exactly_once(tiny: Path, tmp_path: Path, cli) -> None:
    recipe, listing = tmp_path / "r.json", tmp_path / "types.txt"
    code, _, err = cli("allocate", tiny, "-o", recipe, "--tensor-type-file", listing, "--bpw", 3.4)
    assert code == 0, err
    types = {n: q.name.lower() for n, q in load_recipe(recipe).types.items()}
    lines = [line.split("=") for line in listing.read_text().split()]
    matched = {}
    for pattern, qtype in lines:
        # llama-quantize lower-cases the pattern and searches (not matches) it in every name.
        hits = [name for name in types if re.search(pattern.lower(), name)]
        assert len(hits) == 1, pattern
        matched[hits[0]] = qtype
    assert matched == {n: q for n, q in types.items() if q != "f32"}


def test_dry_run_writes_nothing(tiny: Path, tmp_path: Path, cli, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli("convert", tiny, "--bpw", 4, "--dry-run", "--modelfile")
    assert code == 0
    assert "Experts: " in out
    assert list(tmp_path.iterdir()) == []


def test_predicted_file_size_is_the_real_one(tiny: Path, tmp_path: Path, cli) -> None:
    predicted = json.loads(cli("convert", tiny, "--bpw", 4, "--dry-run", "--json")[1])["recipe"]["result"]["file_bytes"]
    assert cli("convert", tiny, "-o", tmp_path / "out.gguf", "--bpw", 4)[0] == 0
    assert (tmp_path / "out.gguf").stat().st_size == predicted


def test_json_is_the_only_thing_on_stdout_and_quiet_says_nothing(tiny: Path, tmp_path: Path, cli) -> None:
    code, out, _ = cli("convert", tiny, "-o", tmp_path / "a.gguf", "--bpw", 4, "--json")
    data = json.loads(out)
    assert code == 0
    assert data["size_bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert any(command.startswith("llama-cli -m") for command in data["commands"])
    assert cli("convert", tiny, "-o", tmp_path / "b.gguf", "--bpw", 4, "--quiet") == (0, "", "")


def test_default_output_name(tiny: Path, tmp_path: Path, cli, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("convert", tiny, "--bpw", 3.5)[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-moe-alphaq-3.5bpw.gguf"]


def test_inspect_shows_types_sizes_and_our_recipe(tiny: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "out.gguf"
    assert cli("convert", tiny, "-o", out, "--bpw", 4)[0] == 0
    code, text, _ = cli("inspect", out)
    assert code == 0
    assert "alphaq.strategy: alphaq" in text
    info = json.loads(cli("inspect", out, "--json")[1])
    reader = GGUFReader(out)
    assert info["tensor_bytes"] == sum(t.n_bytes for t in reader.tensors)
    assert info["experts"]["bpw"] == pytest.approx(expert_bpw(out))
    assert {s["tensor"]: s["qtype"] for s in info["stacks"]} == {n: t for n, t in types_of(out).items() if "exps" in n}
    assert [u["qtype"] for u in info["recipe"]["units"]] == [s["qtype"] for s in info["stacks"]]


@pytest.mark.parametrize("granularity", ["expert", "expert-shared"])
def test_a_type_per_expert_makes_a_file_that_says_how_it_runs(granularity: str, trained: Path, tmp_path: Path, cli):
    out, again = tmp_path / "it's.gguf", tmp_path / "again.gguf"
    recipe, asked = tmp_path / "r.json", ("--bpw", 3.2, "--strategy", "mse", "--granularity", granularity)
    code, stdout, err = cli("convert", trained, "-o", out, *asked, "--save-recipe", recipe)
    assert code == 0, err
    reader = GGUFReader(out)
    containers = reader.fields["alphaq.container.tensors"].contents()
    assert set(containers) <= {t.name for t in reader.tensors}
    assert f"{expert_bpw(out):.4g} bits per expert weight" in stdout
    assert expert_bpw(out) <= 3.2
    assert "Ollama and other programs that load no plug-ins cannot run it" in err
    assert "ollama" not in stdout
    plugin = 'GGML_BACKEND_PATH="$(alphaq-gguf plugin path)" '
    quoted = f"'{str(out).replace(chr(39), chr(39) + chr(34) + chr(39) + chr(34) + chr(39))}'"
    lines = [line.strip() for line in stdout.splitlines()]
    assert f'alphaq-gguf run {quoted} "Hello"' in lines
    assert f"alphaq-gguf serve {quoted}" in lines
    for program in ("llama-server", "llama-cli"):
        (line,) = [line for line in lines if line.startswith(f"{plugin}{program} ")]
        words = shlex.split(line.removeprefix(plugin))
        assert words[:4] == [program, "-m", str(out), "-ot"]
        pattern, _, device = words[4].rpartition("=")
        assert device == "ALPHAQ"
        # As llama.cpp looks for it in the names of tensors.
        assert {t.name for t in reader.tensors if re.search(pattern, t.name)} >= set(containers)
        stacks = {t.name for t in reader.tensors if "_exps" in t.name}
        assert {name for name in stacks if re.search(pattern, name)} == set(containers)
        assert words[5:7] == ["--override-kv", "general.architecture=str:qwen2moe"]
    assert cli("convert", trained, "-o", again, "--recipe", recipe)[0] == 0
    assert again.read_bytes() == out.read_bytes()
    data = json.loads(cli("convert", trained, "-o", out, "--recipe", recipe, "--force", "--json")[1])
    assert data["commands"] == [line for line in lines if line in data["commands"]]
    assert len(data["commands"]) == 4
    assert json.loads(cli("inspect", out, "--json")[1])["commands"] == data["commands"]


def test_inspect_tells_the_types_of_a_stacks_experts(trained: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "out.gguf"
    arguments = ("--bpw", 3.2, "--strategy", "mse", "--granularity", "expert")
    assert cli("convert", trained, "-o", out, *arguments)[0] == 0
    units = json.loads(GGUFReader(out).fields["alphaq.recipe"].contents())["units"]
    types = {unit["tensor"]: {name: len(xids) for name, xids in unit["experts"].items()} for unit in units}
    info = json.loads(cli("inspect", out, "--json")[1])
    assert {stack["tensor"]: stack["types"] for stack in info["stacks"]} == types
    assert info["architecture"] == "qwen2moe"
    text = cli("inspect", out)[1]
    stored, mixed = types_of(out), [stack for stack in info["stacks"] if len(stack["types"]) > 1]
    assert mixed
    for stack in mixed:
        counts = ", ".join(f"{name} x{n}" for name, n in stack["types"].items())
        row = rf"^{stack['layer']} {stack['proj']} +{counts} +{stored[stack['tensor']]} +[\d.]+ (KiB|B)$"
        assert re.search(row, text, re.MULTILINE)
    assert text.count("by expert") == len(mixed)
    assert "It runs with the ggml plug-in of alphaq-gguf:" in text
    assert "alphaq.container." not in text


def test_a_modelfile_for_experts_of_several_types_is_refused_at_once(trained: Path, tmp_path: Path, cli) -> None:
    asked = ("--bpw", 3.2, "--strategy", "mse", "--granularity", "expert")
    recipe, out = tmp_path / "r.json", tmp_path / "out.gguf"
    assert cli("allocate", trained, *asked, "-o", recipe)[0] == 0
    for arguments in (asked, ("--recipe", recipe)):
        code, _, err = cli("convert", trained, "-o", out, "--modelfile", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert "--modelfile: " in err
        assert "Ollama and other programs that load no plug-ins" in err
        assert "--granularity stack" in err
    assert list(tmp_path.iterdir()) == [recipe]


def test_modelfile_beside_the_gguf(tiny: Path, tmp_path: Path, cli) -> None:
    out = tmp_path / "out.gguf"
    assert cli("convert", tiny, "-o", out, "--bpw", 4, "--modelfile")[0] == 0
    text = (tmp_path / "out.Modelfile").read_text()
    assert text.startswith("FROM ./out.gguf\n")
    assert "<|im_start|>user\n{{ .Prompt }}<|im_end|>" in text
    assert 'PARAMETER stop "<|im_end|>"' in text


def test_second_run_reuses_measurements(tiny: Path, tmp_path: Path, cli) -> None:
    cache = tmp_path / "cache"
    first = cli("convert", tiny, "-o", tmp_path / "a.gguf", "--bpw", 4, "--cache-dir", cache)
    second = cli("convert", tiny, "-o", tmp_path / "b.gguf", "--bpw", 3, "--cache-dir", cache)
    assert "Measuring" in first[2]
    assert "Measuring" not in second[2]
    other = cli("convert", tiny, "-o", tmp_path / "c.gguf", "--bpw", 3, "--cache-dir", cache, "--estimator", "median")
    assert "Measuring" in other[2]


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """A random model big enough to interrupt."""
    return build_moe(tmp_path_factory.mktemp("larger") / "larger", num_experts=16, num_hidden_layers=6)


def interrupt_when(process: subprocess.Popen, ready) -> None:
    for _ in range(3000):
        if ready() or process.poll() is not None:
            break
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)


def test_ctrl_c_while_writing_keeps_the_partial_file_and_the_next_run_goes_on(
    larger: Path, tmp_path: Path, cli
) -> None:
    out, whole, cache = tmp_path / "out.gguf", tmp_path / "whole.gguf", tmp_path / "cache"
    arguments = ["--bpw", "4", "--threads", "1", "--cache-dir", str(cache)]
    assert cli("convert", larger, "-o", whole, *arguments)[0] == 0
    process = subprocess.Popen(
        [*COMMAND, "convert", str(larger), "-o", str(out), *arguments], stderr=subprocess.PIPE, text=True
    )
    partial = tmp_path / "out.gguf.partial"
    interrupt_when(process, lambda: partial.exists() and partial.stat().st_size > whole.stat().st_size // 3)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in err
    assert not out.exists()
    assert json.loads((tmp_path / "out.gguf.partial.json").read_text())["tensors"] > 10
    assert partial.exists()
    code, _, err = cli("convert", larger, "-o", out, *arguments)
    assert code == 0
    assert "Continued an interrupted run" in err
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out.gguf", "whole.gguf"]


def test_ctrl_c_while_measuring_keeps_what_was_measured(larger: Path, tmp_path: Path, cli) -> None:
    cache = tmp_path / "cache"
    arguments = ["alphas", str(larger), "--threads", "1", "--cache-dir", str(cache)]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def some_rows() -> bool:
        return any(p.read_text().count("\n") > 10 for p in cache.glob("alphas-*.partial")) if cache.exists() else False

    interrupt_when(process, some_rows)
    _, err = process.communicate()
    assert process.returncode == 130, err
    (partial,) = cache.glob("alphas-*.partial")
    kept = read_ledger(partial)[1]
    assert 5 < len(kept) < 6 * 16 * 3
    assert cli(*arguments)[0] == 0
    (finished,) = cache.glob("alphas-*")
    rows = read_ledger(finished)[1]
    assert rows[: len(kept)] == kept
    assert len(rows) == 6 * 16 * 3


def test_version_help_and_no_arguments(cli) -> None:
    assert cli("--version")[:2] == (0, "alphaq-gguf 0.1.0\n")
    for command in ("convert", "alphas", "allocate", "inspect", "run"):
        code, out, _ = cli(command, "--help")
        assert code == 0
        assert command in out


def test_import_needs_no_triton_and_no_transformers() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['transformers'] = None\n"
        "import alphaq_gguf.cli, alphaq_kernels"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_matrices_without_an_alpha_are_named_and_still_converted(tiny_copy: Path, tmp_path: Path, cli) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tiny_copy / "model.safetensors")
    name = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    rng = np.random.default_rng(0)
    tensors[name.format(0, 1, "gate")] = np.zeros((256, 256), np.float32)
    tensors[name.format(0, 2, "up")] = np.full((256, 256), 0.5, np.float32)
    thin = rng.standard_normal((256, 2)) @ rng.standard_normal((2, 256))
    tensors[name.format(1, 3, "down")] = thin.astype(np.float32)
    save_file(tensors, tiny_copy / "model.safetensors", metadata={"format": "pt"})
    code, _, err = cli("alphas", tiny_copy, "-o", tmp_path / "alphas.csv")
    assert code == 0
    for problem, label in (
        ("all-zero matrix", "blk.0.ffn_gate_exps.weight expert 1 (gate)"),
        ("constant matrix", "blk.0.ffn_up_exps.weight expert 2 (up)"),
        ("rank-deficient", "blk.1.ffn_down_exps.weight expert 3 (down)"),
    ):
        (line,) = [line for line in err.splitlines() if problem in line]
        assert line.startswith("warning: ")
        assert label in line
    empty = [row for row in read_ledger(tmp_path / "alphas.csv")[1] if not row["alpha"]]
    assert len(empty) == 3
    assert all(row["problem"] for row in empty)
    code, _, err = cli("convert", tiny_copy, "-o", tmp_path / "out.gguf", "--bpw", 4)
    assert code == 0
    assert err.count("warning: ") == 3


def test_matrices_too_thin_for_tiles_get_a_full_spectrum_and_a_warning(tmp_path: Path, cli) -> None:
    model = build_moe(tmp_path / "model", moe_intermediate_size=96)
    code, _, err = cli("alphas", model, "-o", tmp_path / "alphas.csv")
    assert code == 0
    assert {row["spectrum"] for row in read_ledger(tmp_path / "alphas.csv")[1]} == {"full"}
    assert "Traceback" not in err


def test_iq4_nl_is_used_only_when_asked_for(tmp_path: Path, cli) -> None:
    model = build_moe(tmp_path / "model", moe_intermediate_size=352)
    out = tmp_path / "out.gguf"
    assert cli("convert", model, "-o", out, "--bpw", 5, "--types", "Q4_K,IQ4_NL")[0] == 0
    types = types_of(out)
    assert types["blk.0.ffn_down_exps.weight"] == "IQ4_NL"
    assert types["blk.0.ffn_up_exps.weight"] in ("Q4_K", "IQ4_NL")


def test_sampling_rows_states_its_error(tiny: Path, cli) -> None:
    exact = json.loads(cli("allocate", tiny, "--bpw", 4, "--json")[1])["result"]
    code, text, _ = cli("allocate", tiny, "--bpw", 4, "--distortion-rows", 32)
    assert code == 0
    assert "Sampling error of the predicted error" in text
    sampled = json.loads(cli("allocate", tiny, "--bpw", 4, "--distortion-rows", 32, "--json")[1])["result"]
    assert exact["distortion_standard_error"] == 0
    assert 0 < sampled["distortion_standard_error"] < 0.05
    assert sampled["cost"] == pytest.approx(exact["cost"], rel=6 * sampled["distortion_standard_error"])


def test_analytic_distortion_is_the_papers_formula(tiny: Path, tmp_path: Path, cli) -> None:
    assert cli("alphas", tiny, "-o", tmp_path / "alphas.csv")[0] == 0
    variance: dict[str, float] = {}
    for row in read_ledger(tmp_path / "alphas.csv")[1]:
        variance[row["stack"]] = variance.get(row["stack"], 0.0) + float(row["variance"])
    out = json.loads(cli("allocate", tiny, "--bpw", 4, "--distortion", "analytic", "--gamma", 0, "--json")[1])
    bits = {"Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6, "Q8_0": 8}
    for unit in out["units"]:
        expected = 256 * 256 * variance[unit["tensor"]] * 4.0 ** -bits[unit["qtype"]]
        assert unit["cost"] == pytest.approx(expected, rel=1e-9)
