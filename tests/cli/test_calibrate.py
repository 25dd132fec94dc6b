"""Calibration on the command line: what is recorded, what strategies make of it, how it rounds, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import build_moe
from gguf import GGUFReader, GGUFWriter

from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.routing import read_routers, simulate

STACKS = [f"blk.{bid}.ffn_{proj}_exps.weight" for bid in range(2) for proj in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def texts(heldout: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two texts of about 1,500 and 800 tokens."""
    directory = tmp_path_factory.mktemp("texts")
    prose, code = directory / "prose.txt", directory / "code.txt"
    prose.write_text(heldout[:6000], encoding="utf-8")
    code.write_text(heldout[-3000:], encoding="utf-8")
    return prose, code


@pytest.fixture(scope="module")
def calibrated(trained: Path, texts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, calibrated on both texts."""
    from alphaq_gguf.cli import main

    out = tmp_path_factory.mktemp("calibrated") / "both.gguf"
    options = ["--ctx", "128", "--sample", "256", "--types", "Q2_K,Q3_K,Q4_K", "--cache-dir", str(out.parent / "cache")]
    given = [word for text in texts for word in ("--text", str(text))]
    assert main(["calibrate", str(trained), *given, *options, "-o", str(out), "-q"]) == 0
    return out


def entries(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}


def test_a_checkpoint_and_its_gguf_tell_the_same(
    trained: Path, texts: tuple[Path, Path], calibrated: Path, tmp_path: Path, cli
) -> None:
    floats, out = tmp_path / "f32.gguf", tmp_path / "llama.gguf"
    assert cli("convert", trained, "--bpw", 32, "--tensor-type", r"\.weight$=F32", "-o", floats)[0] == 0
    options = ("--ctx", 128, "--sample", 256, "--types", "Q2_K,Q3_K,Q4_K")
    code, _, err = cli("calibrate", floats, "--text", texts[0], "--text", texts[1], *options, "-o", out)
    assert code == 0, err
    ours, theirs = entries(calibrated), entries(out)
    assert ours.keys() == theirs.keys()
    assert {f"{name}.{what}" for name in STACKS for what in ("in_sum2", "counts")} <= ours.keys()
    for name, values in ours.items():
        if "block_error" not in name:
            np.testing.assert_allclose(values, theirs[name], rtol=2e-3, atol=1e-3 * np.abs(values).max(), err_msg=name)
    field = GGUFReader(calibrated).get_field("imatrix.datasets")
    assert field is not None
    assert field.contents() == ["prose.txt", "code.txt"]


def test_tokens_add_up(calibrated: Path) -> None:
    found = entries(calibrated)
    counts = {name: found[f"{name}.counts"].ravel() for name in STACKS}
    n_tokens = counts[STACKS[0]].sum() / 2
    assert n_tokens % 128 == 0
    for name in STACKS:
        assert counts[name].sum() == 2 * n_tokens
    usage = found["blk.0.alphaq.tokens"]
    np.testing.assert_array_equal(usage.sum(axis=0), counts[STACKS[0]])
    assert (usage.sum(axis=1) % 256 == 0).all()


@pytest.mark.parametrize("granularity", ["stack", "expert", "expert-shared"])
@pytest.mark.parametrize("strategy", ["moqa", "pmq"])
def test_strategies_spend_what_calibration_tells(
    strategy: str, granularity: str, trained: Path, calibrated: Path, cli
) -> None:
    arguments = ("--strategy", strategy, "--granularity", granularity, "--types", "Q2_K,Q3_K,Q4_K", "--bpw", 3.3)
    code, out, err = cli("allocate", trained, *arguments, "--calibration", calibrated, "--json")
    assert code == 0, err
    recipe = json.loads(out)
    assert 2.9 < recipe["result"]["expert_bpw"] <= 3.3
    assert recipe["settings"]["calibration"] == "both.gguf"
    assert recipe["result"]["stacking"]["per_stack"] >= recipe["result"]["stacking"]["per_expert"]


def test_true_routing_weighs_errors(trained: Path, calibrated: Path, cli) -> None:
    arguments = ("--strategy", "mse", "--granularity", "expert", "--bpw", 3.3, "--calibration", calibrated)
    code, out, err = cli("allocate", trained, *arguments, "--routing-mass", "true-count", "--json")
    assert code == 0, err
    units = json.loads(out)["units"]
    usage = entries(calibrated)["blk.1.alphaq.tokens"].sum(axis=0)
    weights = np.array([u["sensitivity"] for u in units if u["tensor"] == STACKS[3]])
    np.testing.assert_allclose(weights / weights.sum(), usage / usage.sum(), rtol=1e-5)


def test_all_strategies_compare_with_a_calibration(trained: Path, calibrated: Path, cli) -> None:
    arguments = (
        "allocate",
        trained,
        "--strategy",
        "all",
        "--granularity",
        "expert",
        "--bpw",
        3.3,
        "--types",
        "Q2_K,Q4_K",
    )
    code, out, err = cli(*arguments, "--json")
    assert code == 0, err
    without = {r["strategy"]: r["reason"] for r in json.loads(out)["strategies"]}
    assert {name for name, reason in without.items() if reason} == {"moqa", "pmq", "self"}
    assert all("calibrat" in without[name] for name in ("moqa", "pmq", "self"))
    code, out, err = cli(*arguments, "--calibration", calibrated, "--json")
    assert code == 0, err
    found = {r["strategy"]: r["reason"] for r in json.loads(out)["strategies"]}
    assert {name for name, reason in found.items() if reason} == {"self"}


def test_an_importance_matrix_rounds_better_where_it_matters(
    trained: Path, calibrated: Path, tmp_path: Path, cli
) -> None:
    plain, weighed, recipe = tmp_path / "plain.gguf", tmp_path / "weighed.gguf", tmp_path / "recipe.json"
    arguments = ("convert", trained, "--strategy", "uniform", "--bpw", 2.7)
    assert cli(*arguments, "-o", plain)[0] == 0
    code, _, err = cli(*arguments, "--imatrix", calibrated, "-o", weighed, "--save-recipe", recipe)
    assert code == 0, err
    source, moments = open_source(trained), entries(calibrated)
    for name in STACKS:
        importance = moments[f"{name}.in_sum2"] / np.maximum(moments[f"{name}.counts"], 1)
        original = source.read_rows(name).reshape(8, -1, 256)
        errors = []
        for path in (plain, weighed):
            decoded = open_source(path, allow_requantize=True).read_rows(name).reshape(original.shape)
            errors.append(((original - decoded) ** 2 * importance[:, None]).sum())
        assert errors[1] < errors[0], name
    code, _, err = cli("convert", trained, "--recipe", recipe, "-o", tmp_path / "again.gguf")
    assert code == 1
    assert "--imatrix" in err
    code, _, err = cli("convert", trained, "--recipe", recipe, "--imatrix", calibrated, "-o", tmp_path / "again.gguf")
    assert code == 0, err
    assert (tmp_path / "again.gguf").read_bytes() == weighed.read_bytes()


def test_a_model_can_write_the_text_itself(trained: Path, tmp_path: Path, cli) -> None:
    cache = tmp_path / "cache"
    arguments = ("--strategy", "self", "--granularity", "expert", "--bpw", 3.3, "--threads", 1, "--cache-dir", cache)
    arguments = (*arguments, "--json")
    code, out, err = cli("allocate", trained, *arguments)
    assert code == 0, err
    assert "Writing text" in err
    weights = [u["sensitivity"] for u in json.loads(out)["units"] if u["tensor"] == STACKS[0]]
    assert not list(cache.rglob("*temporary*"))
    code, again, err = cli("allocate", trained, *arguments)
    assert code == 0, err
    assert "Writing text" not in err
    assert again == out
    # The same text, sent through PyTorch.
    calibration = tmp_path / "self.gguf"
    code, _, err = cli(
        "calibrate", trained, "--text", "self", "--sample", 0, "--threads", 1, "-o", calibration, "--cache-dir", cache
    )
    assert code == 0, err
    assert "Writing text" not in err
    usage = entries(calibration)["blk.0.alphaq.tokens"][0]
    assert usage.sum() == 2 * 8192
    np.testing.assert_allclose(np.array(weights) / np.sum(weights), usage / usage.sum(), atol=0.005)
    # What it writes is not noise: it uses experts otherwise than random vectors do.
    count = simulate(read_routers(open_source(trained))[0]).count
    assert np.abs(usage / usage.sum() - count / count.sum()).max() > 0.01
    code, given, err = cli("allocate", trained, *arguments, "--calibration", calibration)
    assert code == 0, err
    assert json.loads(given)["result"]["cost"] == pytest.approx(json.loads(out)["result"]["cost"], rel=0.02)


def test_own_text_reads_like_what_the_model_learnt(trained: Path, tmp_path: Path, cli) -> None:
    cache = tmp_path / "cache"
    arguments = ("--text", "self", "--max-tokens", 1024, "--ctx", 256, "--sample", 0, "--cache-dir", cache)
    assert cli("calibrate", trained, *arguments, "-o", tmp_path / "own.gguf")[0] == 0
    (stored,) = cache.glob("own-text-*.jsonl")
    windows = [json.loads(line) for line in stored.read_text(encoding="utf-8").splitlines()]
    assert [len(window) for window in windows] == [256] * 4
    assert len({tuple(window) for window in windows}) == 4
    floats = tmp_path / "f32.gguf"
    assert cli("convert", trained, "--bpw", 32, "--tensor-type", r"\.weight$=F32", "-o", floats)[0] == 0
    with LlamaModel(floats, n_ctx=256, exact=True) as model:
        own = np.mean([model.score(window)[1].mean() for window in windows])
        rng = np.random.default_rng(0)
        noise = np.mean([model.score(rng.integers(0, 400, 256).tolist())[1].mean() for _ in range(4)])
    # Drawn from the model, a token costs as much as the model's own uncertainty.
    assert own < 0.75 * noise


def test_an_interrupted_calibration_goes_on(
    trained: Path, texts: tuple[Path, Path], calibrated: Path, tmp_path: Path
) -> None:
    out, cache = tmp_path / "resumed.gguf", tmp_path / "cache"
    options = [
        "--ctx",
        "128",
        "--sample",
        "256",
        "--types",
        "Q2_K,Q3_K,Q4_K",
        "--cache-dir",
        str(cache),
        "-o",
        str(out),
    ]
    given = [word for text in texts for word in ("--text", str(text))]
    command = [sys.executable, "-m", "alphaq_gguf", "calibrate", str(trained), *given, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(cache.glob("calibration-*/layer-0.npz")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode in (0, 130), err
    if process.returncode == 130:
        assert "interrupted" in err
        assert not out.exists()
        assert subprocess.run(command, capture_output=True).returncode == 0
    assert out.read_bytes() == calibrated.read_bytes()
    assert not list(cache.glob("calibration-*"))


def refused(cli, *arguments: object) -> str:
    """The one line that says why, of a command that must fail."""
    code, out, err = cli(*arguments)
    assert code in (1, 2), err
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty text"),
        (b"  \n\n", "an empty text"),
        (b"far too short", "too short: less than one window of 512 tokens"),
        (b"\xff\xfe\x00 not text", "no UTF-8 text"),
        (None, "cannot be read"),
    ],
)
def test_a_text_that_is_no_dataset_is_refused(content, message: str, trained: Path, tmp_path: Path, cli) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.gguf"
    if content is not None:
        text.write_bytes(content)
    error = refused(cli, "calibrate", trained, "--text", text, "-o", out)
    assert str(text) in error
    assert message in error
    assert not out.exists()


def test_what_is_there_is_not_replaced(trained: Path, texts: tuple[Path, Path], tmp_path: Path, cli) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    assert "exists" in refused(cli, "calibrate", trained, "--text", texts[0], "-o", out)
    assert "source itself" in refused(cli, "calibrate", trained, "--text", texts[0], "-o", texts[0], "--force")
    assert "two texts are called" in refused(
        cli, "calibrate", trained, "--text", texts[0], "--text", texts[0], "-o", tmp_path / "new.gguf"
    )
    assert out.read_bytes() == b"mine"


def test_a_calibration_of_another_model_is_refused(calibrated: Path, tmp_path: Path, cli) -> None:
    other = build_moe(tmp_path / "other", num_experts=6)
    for option, strategy in (("--calibration", "moqa"), ("--imatrix", "mse")):
        error = refused(cli, "convert", other, "--bpw", 4, "--strategy", strategy, option, calibrated)
        assert "both.gguf" in error
    assert not list(tmp_path.glob("*.gguf"))


def test_strategies_say_what_they_lack(trained: Path, calibrated: Path, tmp_path: Path, cli) -> None:
    for strategy in ("moqa", "pmq"):
        error = refused(cli, "allocate", trained, "--bpw", 3.5, "--strategy", strategy)
        assert "--calibration" in error
    # As llama-imatrix writes them: counts, and no more.
    plain = tmp_path / "imatrix.gguf"
    writer = GGUFWriter(plain, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in entries(calibrated).items():
        if name.endswith((".in_sum2", ".counts")):
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    error = refused(cli, "allocate", trained, "--bpw", 3.5, "--strategy", "moqa", "--imatrix", plain)
    assert "no significance" in error
    assert "alphaq-gguf calibrate" in error
    true_count = ("--strategy", "mse", "--routing-mass", "true-count")
    assert cli("allocate", trained, "--bpw", 3.5, *true_count, "--imatrix", plain)[0] == 0
    error = refused(cli, "allocate", trained, "--bpw", 3.5, *true_count)
    assert "--calibration" in error
    true_gate = ("--strategy", "mse", "--routing-mass", "true-gate2")
    assert "no squared gates" in refused(cli, "allocate", trained, "--bpw", 3.5, *true_gate, "--imatrix", plain)


def test_statistics_that_are_no_numbers_are_refused(trained: Path, calibrated: Path, tmp_path: Path, cli) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(calibrated.read_bytes())
    for name in ("blk.1.alphaq.significance", "blk.0.ffn_up_exps.weight.in_sum2"):
        reader = GGUFReader(damaged, "r+")
        (tensor,) = [tensor for tensor in reader.tensors if tensor.name == name]
        kept = tensor.data.flat[3]
        tensor.data.flat[3] = np.nan
        reader.data.flush()
        option = "--imatrix" if "in_sum2" in name else "--calibration"
        strategy = "mse" if "in_sum2" in name else "moqa"
        error = refused(
            cli, "convert", trained, "--bpw", 3.5, "--strategy", strategy, option, damaged, "-o", tmp_path / "o"
        )
        assert name.removesuffix(".in_sum2") in error
        tensor.data.flat[3] = kept
        reader.data.flush()
    assert not (tmp_path / "o").exists()


def test_options_that_make_no_sense_are_refused(trained: Path, calibrated: Path, cli) -> None:
    base = ("allocate", trained, "--bpw", 3.5, "--calibration", calibrated)
    assert "--pmq-exponents" in refused(cli, *base, "--strategy", "pmq", "--pmq-exponents", 1, -1, 2)
    assert "masses of its own" in refused(cli, *base, "--strategy", "self", "--routing-mass", "count")
    assert "masses of its own" in refused(cli, *base, "--strategy", "sim-routing", "--routing-mass", "true-count")
    assert "weighs no encoding errors" in refused(cli, *base, "--strategy", "moqa", "--routing-mass", "count")
