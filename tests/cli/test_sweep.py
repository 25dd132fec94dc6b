"""A sweep makes, judges and forgets files, goes on where it stopped, and holds budgets to presets' sizes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.compare.data import Comparison, load_comparison
from alphaq_gguf.compare.reference import make_reference
from alphaq_gguf.compare.run import Judge
from alphaq_gguf.compare.settings import JudgeSettings
from alphaq_gguf.compare.sweep import sweep
from alphaq_gguf.compare.sweep_files import SweepSettings
from alphaq_gguf.errors import AlphaQError, OutputError
from alphaq_gguf.evaluate.llama import LlamaModel
from alphaq_gguf.pipeline import AllocationSettings
from alphaq_gguf.qtypes import K_TYPES, QType, row_bytes

N_CTX, N_WINDOWS = 128, 2
# So that experts are the only difference, and the smallest preset leaves room for what a file of ours says of itself.
OTHERS = "^(?!.*_exps)=Q8_0"
COMMON = AllocationSettings(overrides=(("^(?!.*_exps)", QType.Q8_0),))
PRESETS = SweepSettings(presets=("Q3_K_M", "Q4_K_M"), allocation=COMMON)
WHOLE = replace(PRESETS, strategies=("mse",), bpws=(1.0, 3.0), sizes_of_presets=True)
NAMES = ["preset-Q3_K_M", "preset-Q4_K_M", "mse-3bpw", "mse-as-Q3_K_M", "mse-as-Q4_K_M"]


@dataclass
class Recorder:
    """A reporter that notes what is done; at `stop` it interrupts the run, at `kill` it kills the process at work."""

    stop: str = ""
    kill: str = ""
    tasks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        self.tasks.append(label)
        if label == self.stop:
            raise KeyboardInterrupt
        if label == self.kill:
            for children in Path("/proc/self/task").glob("*/children"):
                for child in children.read_text(encoding="ascii").split():
                    os.kill(int(child), signal.SIGKILL)
        yield lambda amount: None

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        pass

    @property
    def made(self) -> list[str]:
        return [label for label in self.tasks if label.startswith(("Writing", "Quantising", "Measuring"))]

    @property
    def judged(self) -> list[str]:
        return [label.split(".gguf")[0] for label in self.tasks if label.endswith("in llama.cpp")]


@dataclass(frozen=True)
class Place:
    """Where sweeps of the bundled model run, in one engine and without timing."""

    model: Path
    cache: Path
    keep: Path

    def sweep(self, settings: SweepSettings, *engines: str, **options: Any) -> tuple[Comparison, Recorder]:
        recorder = options.pop("recorder", None) or Recorder()
        source = open_source(self.model)
        windows = options.pop("windows", N_WINDOWS)
        reference = make_reference(
            source, [self.model / "heldout.txt"], n_ctx=N_CTX, max_windows=windows, cache_dir=self.cache
        )
        judging = JudgeSettings(engines=engines or ("llama",), threads=1, speed_runs=0)
        judge = Judge(reference, source, judging, cache_dir=self.cache, reporter=recorder)
        found = sweep(source, judge, settings, command="sweep", cache_dir=self.cache, reporter=recorder, **options)
        return found, recorder

    @property
    def arguments(self) -> list[object]:
        """The same as a command."""
        judged = ["--text", self.model / "heldout.txt", "--ctx", N_CTX, "--max-windows", N_WINDOWS]
        return [self.model, *judged, "--engine", "llama", "--no-speed", "--threads", 1, "--cache-dir", self.cache]


@pytest.fixture(scope="module")
def place(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(trained, tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("keep") / "files")


@pytest.fixture(scope="module")
def swept(place: Place) -> Comparison:
    found, recorder = place.sweep(WHOLE, keep=place.keep)
    assert recorder.judged == NAMES
    return found


@pytest.fixture
def fresh(place: Place, swept: Comparison, tmp_path: Path) -> Place:
    """A cache that knows the reference and the model, but no file."""
    cache = shutil.copytree(place.cache, tmp_path / "cache", ignore=shutil.ignore_patterns("judged-*", "sweep-*"))
    return Place(place.model, Path(cache), tmp_path / "keep")


def remains(place: Place) -> set[str]:
    """What lies around besides what is to stay."""
    found = [*place.cache.glob("sweep-*/*"), *place.keep.glob("sweep-*")]
    return {path.name for path in found} - {"judged.jsonl"}


def test_each_file_has_its_name_its_origin_and_what_was_asked_of_it(swept: Comparison) -> None:
    assert [candidate.name for candidate in swept.candidates] == NAMES
    assert [evaluation.file for evaluation in swept.evaluations] == NAMES
    origins = [candidate.origin for candidate in swept.candidates]
    assert origins == ["preset Q3_K_M", "preset Q4_K_M", "mse", "mse", "mse"]
    assert [candidate.budget_bpw for candidate in swept.candidates] == [None, None, 3.0, None, None]
    assert swept.candidate("mse-3bpw").expert_bpw <= 3
    # More bits, less divergence, in each way of spending them.
    kld = {evaluation.file: evaluation.divergence.kld.value for evaluation in swept.evaluations}
    assert kld["preset-Q4_K_M"] < kld["preset-Q3_K_M"]
    assert kld["mse-as-Q4_K_M"] < kld["mse-as-Q3_K_M"] < kld["mse-3bpw"]


def test_a_budget_that_is_infeasible_is_told_and_stops_nothing(swept: Comparison) -> None:
    assert swept.failures == {
        "mse-1bpw": "1 bits per expert weight is impossible: feasible are 2.625 to 8.5",
    }


@pytest.mark.parametrize("preset", PRESETS.presets)
def test_a_strategy_spends_the_bytes_of_a_preset_to_the_last_step(preset: str, swept: Comparison, place: Place) -> None:
    limit = (place.keep / f"preset-{preset}.gguf").stat().st_size
    path = place.keep / f"mse-as-{preset}.gguf"
    assert swept.candidate(path.stem).n_bytes == path.stat().st_size <= limit
    steps = []
    for tensor in GGUFReader(path).tensors:
        if "_exps" in tensor.name and tensor.tensor_type != K_TYPES[-1]:
            following = K_TYPES[K_TYPES.index(QType(tensor.tensor_type)) + 1]
            n_cols = int(tensor.shape[0])
            steps.append(int(tensor.n_elements) // n_cols * row_bytes(following, n_cols) - int(tensor.n_bytes))
    # Beside the experts, room is left for a recipe with numbers as long as they can be.
    assert limit - path.stat().st_size < min(steps) + 4096


def test_kept_files_are_those_that_were_judged_and_nothing_else_stays(
    swept: Comparison, place: Place, heldout: str
) -> None:
    assert sorted(path.name for path in place.keep.iterdir()) == sorted(f"{name}.gguf" for name in NAMES)
    assert remains(place) == set()
    name = "mse-as-Q3_K_M"
    evaluation = next(evaluation for evaluation in swept.evaluations if evaluation.file == name)
    with LlamaModel(place.keep / f"{name}.gguf", n_ctx=N_CTX, threads=1, exact=True) as model:
        found = model.perplexity(heldout, n_ctx=N_CTX, max_windows=N_WINDOWS)
    # The engine may compute with another precision of keys and values; other files are 2 % away.
    assert evaluation.perplexity.value == pytest.approx(found.value, rel=5e-3)


def test_a_rerun_makes_and_judges_nothing(swept: Comparison, place: Place) -> None:
    again, recorder = place.sweep(WHOLE, keep=place.keep)
    assert (recorder.made, recorder.judged) == ([], [])
    assert (again.candidates, again.evaluations, again.failures) == (
        swept.candidates,
        swept.evaluations,
        swept.failures,
    )


def test_a_file_that_is_gone_is_made_again_and_not_judged(swept: Comparison, place: Place) -> None:
    path = place.keep / "mse-3bpw.gguf"
    before = path.read_bytes()
    path.unlink()
    again, recorder = place.sweep(WHOLE, keep=place.keep)
    assert (recorder.made, recorder.judged) == (["Writing"], [])
    assert path.read_bytes() == before
    assert again.candidates == swept.candidates


def test_other_settings_are_other_results(swept: Comparison, place: Place) -> None:
    found, recorder = place.sweep(SweepSettings(strategies=("mse",), bpws=(3.0,)))
    assert (recorder.made, recorder.judged) == (["Writing"], ["mse-3bpw"])
    assert found.candidates[0].expert_bpw == swept.candidate("mse-3bpw").expert_bpw
    assert found.candidates[0].n_bytes != swept.candidate("mse-3bpw").n_bytes


def test_an_interrupted_run_goes_on_where_it_stopped(swept: Comparison, fresh: Place) -> None:
    settings = replace(WHOLE, presets=(), bpws=(3.0, 4.5), sizes_of_presets=False)
    stop = Recorder(stop="mse-4.5bpw.gguf in llama.cpp")
    with pytest.raises(KeyboardInterrupt):
        fresh.sweep(settings, recorder=stop)
    assert stop.judged == ["mse-3bpw", "mse-4.5bpw"]
    whole, recorder = fresh.sweep(settings)
    # The second file was whole, it only had not been judged.
    assert (recorder.made, recorder.judged) == ([], ["mse-4.5bpw"])
    assert whole.candidates[0] == swept.candidate("mse-3bpw")
    assert whole.evaluations[0].divergence == swept.evaluations[2].divergence
    assert remains(fresh) == set()
    # A process that is killed may leave a line cut short.
    state = next(fresh.cache.glob("sweep-*/judged.jsonl"))
    state.write_bytes(state.read_bytes()[:-100])
    again, recorder = fresh.sweep(settings)
    assert recorder.made == ["Writing"]
    assert again.evaluations == whole.evaluations
    assert fresh.sweep(settings)[1].made == []


def test_a_float_model_is_not_written_again_after_an_interruption(swept: Comparison, fresh: Place) -> None:
    stop = Recorder(stop="preset-Q3_K_M.gguf in llama.cpp")
    with pytest.raises(KeyboardInterrupt):
        fresh.sweep(PRESETS, recorder=stop)
    assert stop.made == ["Writing", "Quantising to Q3_K_M"]
    assert len([name for name in remains(fresh) if name.startswith("floats-")]) == 1
    whole, recorder = fresh.sweep(PRESETS)
    assert recorder.made == ["Quantising to Q4_K_M"]
    assert whole.candidates == swept.candidates[:2]
    assert remains(fresh) == set()


FIRST = """
import sys, time
from pathlib import Path
from alphaq_gguf.alone import alone
from alphaq_gguf.reporter import Silent
with alone(Path(sys.argv[1]), Silent()):
    print("held", flush=True)
    time.sleep(1)
    Path(sys.argv[1], "judged.jsonl").write_bytes(Path(sys.argv[2]).read_bytes())
"""


def test_a_second_sweep_waits_and_knows_what_the_first_found(swept: Comparison, place: Place, fresh: Place) -> None:
    (found,) = place.cache.glob("sweep-*/judged.jsonl")
    home = fresh.cache / found.parent.name
    with subprocess.Popen([sys.executable, "-c", FIRST, home, found], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        whole, recorder = fresh.sweep(PRESETS)
    assert any(f"Waiting for another run, which is at work in {home}" in note for note in recorder.notes)
    assert (recorder.made, recorder.judged) == ([], [])
    assert whole.evaluations == swept.evaluations[:2]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process as Linux shows it")
def test_what_an_engine_failed_at_is_tried_again(swept: Comparison, fresh: Place) -> None:
    settings = SweepSettings(strategies=("mse",), bpws=(3.0,), allocation=COMMON)
    kill = Recorder(kill="mse-3bpw.gguf in pytorch")
    half, _ = fresh.sweep(settings, "llama", "torch", keep=fresh.keep, recorder=kill)
    assert list(half.failures or {}) == ["mse-3bpw in torch"]
    assert [evaluation.engine for evaluation in half.evaluations] == ["llama.cpp"]
    whole, _ = fresh.sweep(settings, "llama", "torch", keep=fresh.keep)
    assert whole.failures is None
    assert [evaluation.engine for evaluation in whole.evaluations] == ["llama.cpp", "pytorch"]
    assert whole.candidates == half.candidates
    assert fresh.sweep(settings, "llama", "torch", keep=fresh.keep)[1].made == []


def test_a_file_in_the_way_is_found_before_the_work(fresh: Place) -> None:
    fresh.keep.mkdir()
    mine = fresh.keep / "preset-Q4_K_M.gguf"
    mine.write_text("mine", encoding="utf-8")
    recorder = Recorder()
    with pytest.raises(OutputError, match=r"preset-Q4_K_M\.gguf exists"):
        fresh.sweep(PRESETS, keep=fresh.keep, recorder=recorder)
    assert recorder.made == []
    assert mine.read_text(encoding="utf-8") == "mine"


def test_kept_files_are_judged_on_another_text_without_force(fresh: Place) -> None:
    settings = replace(PRESETS, presets=("Q4_K_M",))
    first, _ = fresh.sweep(settings, keep=fresh.keep)
    other, recorder = fresh.sweep(settings, keep=fresh.keep, windows=N_WINDOWS - 1)
    assert recorder.judged == ["preset-Q4_K_M"]
    assert other.candidates == first.candidates
    assert other.text.n_windows == N_WINDOWS - 1
    assert [path.name for path in fresh.keep.iterdir()] == ["preset-Q4_K_M.gguf"]


def test_types_per_stack_and_per_expert_are_made_and_judged_side_by_side(fresh: Place) -> None:
    settings = replace(WHOLE, granularities=("stack", "expert"), bpws=(3.2,), presets=("Q3_K_M",), allocation=COMMON)
    names = ["mse-3.2bpw", "mse-expert-3.2bpw", "mse-as-Q3_K_M", "mse-expert-as-Q3_K_M"]
    found, _ = fresh.sweep(settings, "llama", "torch", keep=fresh.keep)
    assert found.failures is None
    assert [candidate.name for candidate in found.candidates] == ["preset-Q3_K_M", *names]
    assert [candidate.granularity for candidate in found.candidates[1:]] == ["stack", "expert"] * 2
    kld: dict[str, dict[str, float]] = {"llama.cpp": {}, "pytorch": {}}
    for evaluation in found.evaluations:
        kld[evaluation.engine][evaluation.file] = evaluation.divergence.kld.value
    assert list(kld["llama.cpp"]) == list(kld["pytorch"]) == ["preset-Q3_K_M", *names]
    for engine in kld.values():
        assert engine["mse-expert-3.2bpw"] < engine["mse-3.2bpw"]
    # Sums of products in two engines, not two models: a file is some 0.03 from the model.
    assert max(cross.kld.value for cross in found.cross) < 3e-3

    limit = (fresh.keep / "preset-Q3_K_M.gguf").stat().st_size
    for name in names:
        path = fresh.keep / f"{name}.gguf"
        reader = GGUFReader(path)
        assert ("alphaq.container.tensors" in reader.fields) == ("expert" in name)
        stacks = [tensor for tensor in reader.tensors if "_exps" in tensor.name]
        bits = sum(int(t.n_bytes) for t in stacks) * 8 / sum(int(t.n_elements) for t in stacks)
        assert found.candidate(name).expert_bpw == pytest.approx(bits)
        assert found.candidate(name).n_bytes == path.stat().st_size
        if "bpw" in name:
            assert bits <= 3.2
        else:
            assert path.stat().st_size <= limit
    # Within one step of one stack, Q6_K to the next that a file can hold.
    assert limit - (fresh.keep / "mse-expert-as-Q3_K_M.gguf").stat().st_size < 8 * 256 * (272 - 210)

    again, recorder = fresh.sweep(settings, "llama", "torch", keep=fresh.keep)
    assert (recorder.made, recorder.judged) == ([], [])
    assert (again.candidates, again.evaluations) == (found.candidates, found.evaluations)


def test_an_allocation_per_expert_is_named_so_where_experts_get_the_same_types(fresh: Place) -> None:
    # The least there is, and the most.
    settings = SweepSettings(strategies=("uniform",), granularities=("expert",), bpws=(2.625, 8.5))
    found, _ = fresh.sweep(settings)
    assert [candidate.name for candidate in found.candidates] == ["uniform-expert-2.625bpw", "uniform-expert-8.5bpw"]
    assert [candidate.granularity for candidate in found.candidates] == ["expert"] * 2
    for candidate, qtype in zip(found.candidates, ("Q2_K", "Q8_0"), strict=True):
        assert {name for stack in candidate.stacks for name in stack.experts} == {qtype}


def test_when_nothing_can_be_made_the_first_reason_is_told(fresh: Place) -> None:
    with pytest.raises(AlphaQError, match="nothing could be judged: 1 bits per expert weight is impossible"):
        fresh.sweep(SweepSettings(bpws=(1, 1.5)))
    assert remains(fresh) == set()


def test_the_command_shows_all_by_size_and_marks_the_front(
    swept: Comparison, place: Place, tmp_path: Path, cli
) -> None:
    report = tmp_path / "report.html"
    asked = ["--bpw", "1,3", "--strategy", "mse", "--presets", "q3_k_m,Q4_K_M", "--sizes-of-presets"]
    arguments = ["sweep", *place.arguments, *asked, "--tensor-type", OTHERS]
    code, out, err = cli(*arguments, "-o", report)
    assert code == 1, err
    reason = "mse-1bpw: 1 bits per expert weight is impossible: feasible are 2.625 to 8.5"
    assert reason in err
    assert reason in out.splitlines()
    assert err.splitlines()[-1] == "error: 1 of 6 files could not be made or judged -> see the reasons above"
    # All of it is known.
    assert "Writing" not in err
    size = {candidate.name: candidate.n_bytes for candidate in swept.candidates}
    kld = {evaluation.file: evaluation.divergence.kld.value for evaluation in swept.evaluations}
    table = [line for line in out.splitlines() if line.startswith(("mse-", "preset-"))][: len(NAMES)]
    assert max(map(len, table)) <= 80
    rows = [line.split() for line in table]
    assert [row[0] for row in rows] == sorted(NAMES, key=size.__getitem__)
    for row in rows:
        beaten = any(size[n] <= size[row[0]] and kld[n] < kld[row[0]] for n in NAMES)
        assert (row[1] == "*") != beaten, row
        assert f"{kld[row[0]]:.5f}" in row
    written = load_comparison(report.with_suffix(".json"))
    assert (written.candidates, written.evaluations) == (swept.candidates, swept.evaluations)
    assert all(name in report.read_text(encoding="utf-8") for name in NAMES)
    code, out, err = cli(*arguments, "--json")
    assert code == 1, err
    assert [candidate["name"] for candidate in json.loads(out)["candidates"]] == NAMES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bpw", "3,x"], "--bpw 'x' is not a number"),
        (["--bpw", "3,-1"], "a budget of -1 bits per expert weight makes no sense"),
        (["--bpw", "nan"], "a budget of nan bits per expert weight makes no sense"),
        (["--bpw", "3", "--strategy", "alphaq,best"], "strategy 'best': unknown -> one of alphaq, sim-routing"),
        (["--presets", "Q4_K_M,Q9"], "preset 'Q9': unknown -> one of Q2_K, Q2_K_S"),
        ([], "nothing to compare -> give budgets"),
        (["--bpw", "3", "--sizes-of-presets"], "there are no presets to take sizes from"),
        (["--presets", "Q4_0", "--strategy", "mse"], "--strategy: there is no budget to spend"),
        (["--presets", "Q4_0", "--tensor-type", "nothing=Q8_0"], "--tensor-type nothing=Q8_0 matches no tensor"),
        (["--presets", "Q4_0", "-o", "report.txt"], "a report's name ends in .html"),
        (["--presets", "Q4_0", "--engine", "vllm"], "--engine vllm: unknown"),
        (["--bpw", "3", "--granularity", "stack,experts"], "--granularity 'experts': unknown -> one of stack, expert,"),
        (["--bpw", "3", "--granularity", ","], "--granularity names none -> some of stack, expert, expert-shared"),
    ],
)
def test_bad_requests_take_one_line(options: list[str], message: str, place: Place, cli) -> None:
    arguments = [argument for argument in place.arguments if not options or argument not in ("--engine", "llama")]
    engine = [] if "--engine" in options or not options else ["--engine", "llama"]
    code, out, err = cli("sweep", *arguments, *engine, *options)
    assert (code, out) == (2, "")
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_text_is_needed(place: Place, cli) -> None:
    code, _, err = cli("sweep", place.model, "--bpw", "3", "--cache-dir", place.cache)
    assert code == 2
    assert "no text to judge on -> --text FILE" in err


def test_types_per_expert_are_made_from_a_gguf_too(swept: Comparison, place: Place, cli) -> None:
    file = place.keep / "mse-as-Q4_K_M.gguf"
    arguments = [file, "--allow-requantize", *place.arguments[1:], "--bpw", "3.5", "--strategy", "random"]
    code, out, err = cli("sweep", *arguments, "--granularity", "expert", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [(e["file"], e["engine"]) for e in found["evaluations"]] == [("random-expert-3.5bpw", "llama.cpp")]
    (candidate,) = found["candidates"]
    assert candidate["expert_bpw"] <= 3.5
    assert any(len(stack["experts"]) > 1 for stack in candidate["stacks"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bpw", "3", "--strategy", "mse,pmq"], "strategy 'pmq': how text uses the experts is not known"),
        (["--bpw", "3", "--strategy", "mse,moqa", "--granularity", "expert"], "strategy 'moqa': how text uses"),
        (["--bpw", "3", "--strategy", "router-norm"], "router-norm orders the experts of a layer, but a stack has one"),
        (["--bpw", "3", "--strategy", "router-norm", "--granularity", "expert,stack"], "but a stack has one"),
        (["--presets", "Q4_0", "--keep", "FILE"], "file.txt: cannot be made: File exists -> choose another directory"),
        (["--presets", "Q4_0", "--keep", "IN_THE_WAY"], "preset-Q4_0.gguf exists"),
        (["--bpw", "8.5,20", "--keep", "FILE"], "20 bits per expert weight: the types allow no more than 8.5\n"),
    ],
)
def test_what_is_wrong_shows_before_the_reference_runs(
    options: list[str], message: str, trained: Path, tmp_path: Path, cli
) -> None:
    in_the_way = tmp_path / "keep" / "preset-Q4_0.gguf"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    file = tmp_path / "file.txt"
    file.touch()
    places = {"FILE": str(file), "IN_THE_WAY": str(in_the_way.parent)}
    fresh = Place(trained, tmp_path / "cache", tmp_path)
    code, _, err = cli("sweep", *fresh.arguments, *(places.get(option, option) for option in options))
    assert code in (1, 2)
    assert message in err
    assert not list(fresh.cache.glob("reference-*"))
