"""`alphaq-gguf compare`: figures against plain arithmetic on llama.cpp's logits, bounds, and what cannot be judged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import ROOT, build_moe
from gguf import GGUFReader
from scipy.special import log_softmax

from alphaq_gguf.cli.show_files import shorten
from alphaq_gguf.compare.data import Comparison, from_plain
from alphaq_gguf.compare.run import distinct_names
from alphaq_gguf.errors import UsageError
from alphaq_gguf.evaluate.blocks import FileBlocks
from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.evaluate.torch_model import TorchModel
from alphaq_gguf.gguf_file import build_header, read_header

N_CTX, N_WINDOWS = 64, 3
QUICK = ("--ctx", N_CTX, "--max-windows", N_WINDOWS, "--threads", 1, "--no-speed", "--exact")


@pytest.fixture(scope="module")
def text(trained: Path) -> Path:
    return trained / "heldout.txt"


@pytest.fixture(scope="module")
def files(trained: Path, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> dict[str, Path]:
    """The bundled model in floats, with experts of two types, and of one by expert as a recipe."""
    from alphaq_gguf.cli import main

    directory = tmp_path_factory.mktemp("files")

    def run(*words: object) -> None:
        assert main([str(w) for w in (*words, "-q", "--cache-dir", cache_dir)]) == 0

    found = {}
    for name, types in (("f32", r"\.weight$=F32"), ("q2", "_exps=Q2_K"), ("q6", "_exps=Q6_K")):
        found[name] = directory / f"{name}.gguf"
        run("convert", trained, "-o", found[name], "--bpw", 32, "--tensor-type", types)
    found["recipe"] = directory / "experts.json"
    run("allocate", trained, "-o", found["recipe"], "--bpw", 3.4, "--strategy", "mse", "--granularity", "expert")
    return found


@pytest.fixture
def compare(cli) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        return cli("compare", *words, *QUICK)

    return run


def figures(path: Path, windows: list[list[int]], engine: str = "llama.cpp") -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities after the tokens of the second halves, and the losses of the true tokens."""
    logp, targets = [], []
    model = TorchModel(FileBlocks(path))
    if engine == "llama.cpp":
        model = LlamaModel(path, n_ctx=N_CTX, threads=1, exact=True)
    with model:
        for window in windows:
            rows = log_softmax(model.logits(window).astype(np.float64), axis=1)
            logp.append(rows[N_CTX // 2 : -1])
            targets += window[N_CTX // 2 + 1 :]
    rows = np.concatenate(logp)
    return rows, -rows[np.arange(len(rows)), targets]


def test_figures_are_those_of_plain_arithmetic(files: dict[str, Path], compare, trained: Path, text: Path) -> None:
    code, out, err = compare(files["q2"], files["q6"], "--reference", trained, "--text", text, "--json")
    assert code == 0, err
    found: Comparison = from_plain(Comparison, json.loads(out))
    with LlamaModel(files["f32"], n_ctx=N_CTX, threads=1) as model:
        windows = model.windows(text.read_text(encoding="utf-8"), N_CTX)[:N_WINDOWS]
    base, base_loss = figures(files["f32"], windows)
    assert found.text.n_scored == len(base) == N_WINDOWS * (N_CTX - 1 - N_CTX // 2)
    assert found.reference.engine == "pytorch"
    np.testing.assert_allclose(found.reference.perplexity.value, np.exp(base_loss.mean()), rtol=1e-4)
    for name in ("q2", "q6"):
        for engine in ("llama.cpp", "pytorch"):
            one = next(e for e in found.evaluations if (e.file, e.engine) == (f"{name}.gguf", engine))
            logp, loss = figures(files[name], windows, engine)
            kld = (np.exp(base) * (base - logp)).sum(axis=1)
            rms = np.sqrt(((np.exp(-loss) - np.exp(-base_loss)) ** 2).mean())
            np.testing.assert_allclose(one.perplexity.value, np.exp(loss.mean()), rtol=1e-4)
            # The reference's log-probabilities are kept in 16 bits, without their tails.
            np.testing.assert_allclose(one.divergence.kld.value, kld.mean(), rtol=0.01, atol=5e-6)
            np.testing.assert_allclose(one.divergence.kld_median, np.median(kld), rtol=0.05, atol=5e-6)
            np.testing.assert_allclose(one.divergence.rms_dp.value, rms, rtol=0.01)
            np.testing.assert_allclose(one.divergence.top1.value, (logp.argmax(1) == base.argmax(1)).mean())
            assert one.peak_bytes is not None and one.peak_bytes > files[name].stat().st_size
            assert set(one.routers) == {0, 1}
            assert all(0.3 < share <= 1 for share in one.routers.values())
    worse, better = (next(e for e in found.evaluations if e.file == f"{n}.gguf") for n in ("q2", "q6"))
    assert np.mean(list(worse.routers.values())) < np.mean(list(better.routers.values()))
    assert [(c.file, c.engine, c.other) for c in found.cross] == [
        ("q2.gguf", "pytorch", "llama.cpp"),
        ("q6.gguf", "pytorch", "llama.cpp"),
    ]
    assert all(0 < c.kld.value < 5e-3 for c in found.cross)


def test_the_reference_itself_has_no_divergence(files: dict[str, Path], compare, text: Path) -> None:
    code, out, err = compare(files["f32"], "--reference", files["f32"], "--text", text, "--json", "--engine", "llama")
    assert code == 0, err
    (one,) = from_plain(Comparison, json.loads(out)).evaluations
    assert abs(one.divergence.kld.value) < 1e-5
    assert one.divergence.top1.value == 1
    assert one.routers == {0: 1.0, 1: 1.0}


def test_a_recipe_with_types_by_expert_runs_in_pytorch_alone(
    files: dict[str, Path], compare, trained: Path, text: Path
) -> None:
    code, out, err = compare(files["recipe"], files["q6"], "--reference", trained, "--text", text, "--json")
    assert code == 0, err
    found: Comparison = from_plain(Comparison, json.loads(out))
    engines = {e.engine for e in found.evaluations if e.file == "experts.json"}
    assert engines == {"pytorch"}
    recipe = found.candidate("experts.json")
    assert recipe.granularity == "expert"
    assert recipe.expert_bpw <= 3.4
    assert any(len(stack.experts) > 1 for stack in recipe.stacks)
    kld = {e.file: e.divergence.kld.value for e in found.evaluations if e.engine == "pytorch"}
    assert 0 < kld["q6.gguf"] < kld["experts.json"]


def test_a_base_file_stands_for_the_reference(
    files: dict[str, Path], compare, trained: Path, text: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base.kld"
    asked = (files["q2"], "--json", "--engine", "llama")
    code, direct, err = compare(*asked, "--reference", trained, "--text", text, "--save-base", base)
    assert code == 0, err
    code, again, err = compare(*asked, "--base", base)
    assert code == 0, err
    one, other = (from_plain(Comparison, json.loads(out)).evaluations[0] for out in (direct, again))
    assert other.divergence == one.divergence
    assert other.perplexity == one.perplexity
    assert (set(one.routers), other.routers) == ({0, 1}, {})


def test_text_may_be_the_models_own(files: dict[str, Path], compare, trained: Path) -> None:
    code, out, err = compare(files["q2"], "--reference", trained, "--text", "self", "--engine", "llama")
    assert code == 0, err
    assert "text that it wrote itself" in out
    # The model is surer of what it wrote than of what others did.
    lines = [line for line in out.splitlines() if line.startswith("Reference")]
    assert float(lines[0].split("PPL ")[1].split()[0]) < 20


def test_the_table_fits_80_columns_and_marks_the_best(
    files: dict[str, Path], compare, trained: Path, text: Path, tmp_path: Path
) -> None:
    long = Path(shutil.copy(files["q2"], tmp_path / "a-model-with-a-name-far-too-long-for-any-table-Q2.gguf"))
    code, out, err = compare(long, files["q6"], "--reference", trained, "--text", text)
    assert code == 0, err
    table = out[out.index("llama.cpp on cpu") :].splitlines()[:4]
    assert max(map(len, table)) <= 80
    small, good = table[2:4]
    assert small.startswith("a-model")
    assert small.split()[1].endswith("*") and not good.split()[1].endswith("*")
    assert good.split()[4].endswith("*") and not small.split()[4].endswith("*")
    assert out.strip().splitlines()[-1].startswith("q6 is nearest of 2"), "no verdict"


def test_a_second_run_computes_nothing(files: dict[str, Path], compare, trained: Path, text: Path) -> None:
    asked = (files["q6"], "--reference", trained, "--text", text)
    code, first, err = compare(*asked)
    assert code == 0, err
    code, second, err = compare(*asked)
    assert (code, second) == (0, first)
    assert "figures of" in err and "windows" not in err
    code, _, err = compare(*asked, "--again", "--engine", "llama")
    assert code == 0
    assert "windows" in err


def test_what_a_reference_cannot_tell_is_said(files: dict[str, Path], compare, cli, text: Path, trained: Path) -> None:
    code, out, err = compare(files["q2"], "--reference", files["q6"], "--text", text, "--engine", "llama", "--json")
    assert code == 0
    said = "is quantised itself (Q6_K, Q8_0)"
    assert said in " ".join(err.split())
    assert any(said in note for note in json.loads(out)["notes"])
    assert (json.loads(out)["format"], json.loads(out)["schema"]) == ("alphaq-comparison", 1)
    asked = ("--reference", trained, "--text", text, "--ctx", 1024, "--max-windows", 1, *QUICK[4:], "--engine", "llama")
    code, out, err = cli("compare", files["q2"], *asked)
    assert code == 0, err
    assert "windows of 1024 tokens are longer than the 512 that stdlib-qwen2moe-4m was trained for" in err


def test_an_engine_that_was_asked_for_may_not_fail(
    files: dict[str, Path], compare, trained: Path, text: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.gguf"
    header = read_header(files["q2"])
    fields = [field for key, field in header.fields.items() if key != "alphaq.config"]
    new, placed, size = build_header(fields, list(header.tensors.values()))
    content = bytearray(size)
    content[: len(new)] = new
    for info, tensor in zip(placed, GGUFReader(files["q2"]).tensors, strict=True):
        start = len(new) + info.offset
        content[start : start + info.n_bytes] = tensor.data.tobytes()
    bare.write_bytes(content)
    asked = (bare, "--reference", files["f32"], "--text", text)
    code, out, err = compare(*asked)
    assert code == 0, err
    assert "no figures of bare.gguf in torch" in err and "llama.cpp on cpu" in out
    code, out, err = compare(*asked, "--engine", "llama,torch")
    assert code == 1
    assert "llama.cpp on cpu" in out
    assert err.strip().splitlines()[-1].startswith("error: bare.gguf in torch: could not be judged")


def test_bounds_set_the_exit_code(files: dict[str, Path], compare, trained: Path, text: Path) -> None:
    asked = (files["q2"], "--reference", trained, "--text", text, "--engine", "llama")
    assert compare(*asked, "--max-kld", 10, "--min-top1", 0.1)[0] == 0
    code, out, err = compare(*asked, "--max-kld", 1e-6)
    assert code == 3
    assert "mean KLD" in err and "allowed 1e-06" in err
    assert "q2.gguf" in out, "figures are shown all the same"
    code, _, err = compare(*asked, "--min-top1", 1)
    assert code == 3
    assert "top-1 agreement" in err


def test_a_file_that_cannot_be_judged_does_not_stop_the_others(
    files: dict[str, Path], compare, trained: Path, text: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(files["q2"].read_bytes()[:5000])
    asked = ("--reference", trained, "--text", text, "--engine", "llama", "--json")
    code, out, err = compare(broken, files["q6"], *asked)
    found: Comparison = from_plain(Comparison, json.loads(out))
    assert [e.file for e in found.evaluations] == ["q6.gguf"]
    assert list(found.failures or {}) == ["broken.gguf"]
    assert code == 1, err
    code, _, err = compare(broken, *asked)
    assert code == 1
    assert err.strip().splitlines()[-1].startswith("error:")


def test_tasks_are_scored_in_every_engine(
    files: dict[str, Path], compare, trained: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the harness is absent: pip install '.[eval]'")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = ("--reference", trained, "--text", text, "--task-dir", "tests/tasks", "--task-limit", 8, "--json")
    code, out, err = compare(files["q6"], *asked, "--tasks", "code_choice, code_word")
    assert code == 0, err
    scores = from_plain(Comparison, json.loads(out)).tasks
    assert {(s.engine, s.task, s.metric, s.n) for s in scores} == {
        (engine, task, metric, 8)
        for engine in ("llama.cpp", "pytorch")
        for task, metric in (("code_choice", "acc_norm"), ("code_word", "acc"))
    }
    # Choices lie further apart than what engines differ by.
    assert len({s.score for s in scores if s.task == "code_choice"}) == 1
    assert "requests" in err
    code, again, err = compare(files["q6"], *asked, "--tasks", "code_choice, code_word")
    assert (code, json.loads(again)["tasks"]) == (0, json.loads(out)["tasks"])
    assert "requests" not in err, "asked again"
    code, _, err = compare(files["q6"], *asked, "--tasks", "riddles")
    assert code == 1
    assert "riddles" in err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A model with another vocabulary."""
    from alphaq_gguf.cli import main

    directory = tmp_path_factory.mktemp("stranger")
    out = directory / "stranger.gguf"
    source = build_moe(directory / "model")
    words = ("convert", source, "-o", out, "-q", "--cache-dir", cache_dir, "--bpw", 32, "--tensor-type", "_exps=Q4_K")
    assert main([str(w) for w in words]) == 0
    return out


def bad_inputs(files: dict[str, Path], trained: Path, text: Path, stranger: Path, tmp: Path) -> dict[str, Any]:
    short, empty, binary = tmp / "short.txt", tmp / "empty.txt", tmp / "binary.txt"
    short.write_text("too short")
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    q2, ok = files["q2"], ("--reference", trained, "--text", text)
    return {
        "no reference": ((q2, "--text", text), 2, "--reference SOURCE, or --base FILE"),
        "both references": ((q2, "--base", q2, *ok), 2, "--reference SOURCE, or --base FILE"),
        "no text": ((q2, "--reference", trained), 2, "--text self"),
        "a missing text": ((q2, "--reference", trained, "--text", tmp / "no.txt"), 1, "no.txt"),
        "a short text": ((q2, "--reference", trained, "--text", short), 1, "one window"),
        "an empty text": ((q2, "--reference", trained, "--text", empty), 1, "empty"),
        "no UTF-8": ((q2, "--reference", trained, "--text", binary), 1, "UTF-8"),
        "a missing file": ((tmp / "no.gguf", *ok), 1, "no.gguf"),
        "no GGUF": ((text, *ok), 1, "heldout.txt"),
        "another vocabulary": ((stranger, *ok), 1, "vocabular"),
        "a file twice": ((q2, q2, *ok), 2, "named twice"),
        "no such engine": ((q2, *ok, "--engine", "llama,jax"), 2, "llama, torch, triton"),
        "no such device": ((q2, *ok, "--device", "cuda:99"), 2, "cuda:99"),
        "a report of another kind": ((q2, *ok, "-o", tmp / "report.pdf"), 2, ".html"),
        "a report over a file": ((q2, *ok, "-o", tmp / "there.html"), 1, "--force"),
        "an unusable cache": ((q2, *ok, "--cache-dir", text), 2, "--cache-dir"),
        "a text twice": ((q2, *ok, "--text", text), 2, "named twice"),
        "a base over the text": ((q2, *ok, "--save-base", text, "--force"), 1, "heldout.txt"),
        "no base file": ((q2, "--base", text), 1, "heldout.txt"),
        "a base file and a text": ((q2, "--base", text, "--text", text), 2, "leave out --text"),
    }


@pytest.mark.parametrize("case", range(20))
def test_bad_input_gets_one_line(
    case: int, files: dict[str, Path], compare, trained: Path, text: Path, stranger: Path, tmp_path: Path
) -> None:
    (tmp_path / "there.html").write_text("mine")
    cases = bad_inputs(files, trained, text, stranger, tmp_path)
    assert len(cases) == 20
    words, expected, message = [*cases.values()][case]
    code, _, err = compare(*words)
    assert code == expected, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error:")
    assert message in last
    assert "Traceback" not in err
    assert (tmp_path / "there.html").read_text() == "mine"


def test_files_of_one_name_are_told_apart_by_their_directories(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "m.gguf", tmp_path / "b" / "m.gguf", tmp_path / "b" / "other.gguf"]
    assert distinct_names(paths) == ["a/m.gguf", "b/m.gguf", "other.gguf"]
    with pytest.raises(UsageError, match="named twice"):
        distinct_names([paths[0], tmp_path / "b" / ".." / "a" / "m.gguf"])


def test_long_names_keep_both_ends() -> None:
    assert shorten("short.gguf", 20) == "short.gguf"
    cut = shorten("an-extremely-long-name-of-a-model-Q4_K_M.gguf", 20)
    assert len(cut) == 20
    assert cut.startswith("an-") and cut.endswith("Q4_K_M.gguf") and "…" in cut
