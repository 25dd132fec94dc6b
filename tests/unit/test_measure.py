"""Measured alphas and distortions against an SVD and the `gguf` package, and what a second run reuses."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from small_sources import expert_tensors, gaussian, stack_name, write_gguf, write_source

from alphaq_gguf.calibration.imatrix import ImportanceMatrix, open_importance
from alphaq_gguf.checkpoint import ExpertMatrix, ExpertStack, Source
from alphaq_gguf.encode import encode_rows
from alphaq_gguf.errors import AlphaQError, WeightError
from alphaq_gguf.measure import alphas_header_text, load_alphas, measure
from alphaq_gguf.measurements import AlphaSettings, DistortionSettings, key_of, tile_seconds
from alphaq_gguf.meters import measure_alpha, measure_distortion
from alphaq_gguf.qtypes import QType

TYPES = (QType.Q2_K, QType.Q4_K, QType.Q8_0)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return expert_tensors(n_experts=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tensors) -> Source:
    return write_source(tmp_path_factory.mktemp("measure") / "m.gguf", tensors)


def run(source: Source, cache_dir: Path, types: tuple[QType, ...] = TYPES, **changes):
    settings = {"alphas": AlphaSettings(), "distortion": DistortionSettings(), **changes}
    return measure(source, qtypes={s.name: types for s in source.stacks}, cache_dir=cache_dir, **settings)


class Counting:
    """A source that counts the matrices read from it, and may be interrupted at one."""

    def __init__(self, source: Source, stop_at: int | None = None) -> None:
        self.source = source
        self.stop_at = stop_at
        self.n_read = 0

    def __getattr__(self, name: str):
        return getattr(self.source, name)

    def read_matrix(self, matrix: ExpertMatrix) -> np.ndarray:
        if self.n_read == self.stop_at:
            raise KeyboardInterrupt
        self.n_read += 1
        return self.source.read_matrix(matrix)


def squared_error(weight: np.ndarray, qtype: QType, importance: np.ndarray | None = None) -> float:
    """Sum of squared differences in float64, decoded by the `gguf` package."""
    decoded = gguf.dequantize(encode_rows(weight, qtype, importance=importance), qtype)
    return float(np.square(weight.astype(np.float64) - decoded).sum())


def squared_singular_values(weight: np.ndarray) -> np.ndarray:
    """sigma^2 by an SVD in float64, ascending."""
    return np.sort(torch.linalg.svdvals(torch.from_numpy(weight).double()).numpy() ** 2)


def tile_alpha(weight: np.ndarray) -> float:
    """AlphaQ's exponent from the SVD of 128 x 128 tiles: Hill over a tenth of the squared singular values."""
    tiles = [weight[i : i + 128, j : j + 128] for i in (0, 128) for j in (0, 128)]
    esd = np.sort(np.concatenate([squared_singular_values(tile) for tile in tiles]))
    return 1 + 51 / float(np.log(esd[-51:] / esd[-52]).sum())


def test_every_matrix_gets_its_alpha_variance_and_distortions(source, tensors, tmp_path):
    found = run(source, tmp_path)
    matrices = [m for s in source.stacks for m in s.matrices]
    assert set(found.alphas) == {key_of(m) for m in matrices}
    assert set(found.distortions) == {(key_of(m), q) for m in matrices for q in TYPES}
    for matrix in matrices:
        weight = tensors[matrix.stack][matrix.xid]
        alpha = found.alphas[key_of(matrix)]
        if matrix.xid == 1:
            assert alpha.alpha == pytest.approx(tile_alpha(weight), rel=1e-8)
        assert alpha.variance == pytest.approx(weight.astype(np.float64).var(), rel=1e-12)
        assert (alpha.k, alpha.n, alpha.spectrum, alpha.problem) == (51, 512, "farms", "")
        for qtype in TYPES:
            distortion = found.distortions[key_of(matrix), qtype]
            assert distortion.squared_error == pytest.approx(squared_error(weight, qtype), rel=1e-6)
            assert distortion.standard_error == 0


def test_a_fused_stack_is_measured_gate_and_up_apart(tmp_path):
    fused = gaussian(2, 512, 256) * np.repeat([1, 3], 256)[None, :, None].astype(np.float32)
    name = stack_name("gate_up")
    found = run(write_source(tmp_path / "m.gguf", {name: fused}), tmp_path, (QType.Q4_K,)).distortions
    for xid in range(2):
        for proj, half in (("gate", fused[xid, :256]), ("up", fused[xid, 256:])):
            expected = squared_error(np.ascontiguousarray(half), QType.Q4_K)
            assert found[(name, xid, proj), QType.Q4_K].squared_error == pytest.approx(expected, rel=1e-6)


def test_a_side_under_128_gets_a_full_spectrum_and_says_so(tmp_path):
    weight = gaussian(1, 100, 256)
    found = run(write_source(tmp_path / "m.gguf", {stack_name("up"): weight}), tmp_path, distortion=None)
    alpha = found.alphas[stack_name("up"), 0, "up"]
    esd = squared_singular_values(weight[0])
    assert alpha.spectrum == "full"
    assert alpha.alpha == pytest.approx(1 + 10 / np.log(esd[-10:] / esd[-11]).sum(), rel=1e-8)


DEGENERATE = {
    "all-zero matrix": np.zeros((256, 256), np.float32),
    "constant matrix": np.full((256, 256), 0.3, np.float32),
    "rank-deficient": gaussian(256, 2) @ gaussian(2, 256, seed=1),
    "no spread": np.eye(256, dtype=np.float32),
}


def test_degenerate_matrices_are_named_and_still_have_a_distortion(tmp_path):
    name = stack_name("down")
    found = run(write_source(tmp_path / "m.gguf", {name: np.stack(list(DEGENERATE.values()))}), tmp_path)
    for xid, (problem, weight) in enumerate(DEGENERATE.items()):
        alpha = found.alphas[name, xid, "down"]
        assert alpha.alpha is None
        assert alpha.problem.startswith(problem)
        assert alpha.variance == pytest.approx(weight.astype(np.float64).var(), abs=1e-12)
        for qtype in TYPES:
            error = found.distortions[(name, xid, "down"), qtype].squared_error
            assert error == pytest.approx(squared_error(weight, qtype), rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 2)])
def test_tiny_matrices_have_a_problem_or_a_finite_alpha(shape):
    matrix = ExpertMatrix("s", 0, 0, "up", 0, *shape)
    row = measure_alpha(matrix, gaussian(*shape), AlphaSettings(), None, "cpu", 1)
    assert bool(row["problem"]) == (row["alpha"] is None)
    assert row["alpha"] is None or math.isfinite(row["alpha"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name_and_place(tmp_path, bad):
    weight = gaussian(2, 256, 256)
    weight[1, 3, 5] = bad
    source = write_source(tmp_path / "m.gguf", {stack_name("up"): weight})
    with pytest.raises(WeightError, match=r"blk\.0\.ffn_up_exps\.weight .* expert 1, row 3, column 5"):
        run(source, tmp_path)


def test_sampled_rows_estimate_the_whole_error_within_five_standard_errors():
    # Rows of different scale, so that the sample matters.
    weight = gaussian(256, 256) * np.random.default_rng(1).uniform(0.5, 1.5, (256, 1)).astype(np.float32)
    whole = measure_distortion(weight, QType.Q3_K, None, 0, 1)
    assert whole.standard_error == 0
    samples = [measure_distortion(weight, QType.Q3_K, 64, seed, 1) for seed in range(200)]
    errors = np.array([s.squared_error for s in samples])
    standard_errors = np.array([s.standard_error for s in samples])
    assert (np.abs(errors - whole.squared_error) < 5 * standard_errors).all()
    # Honest: no bias, and the claimed variance is the one that 200 samples show (whose own error is 10 %).
    assert errors.mean() == pytest.approx(whole.squared_error, abs=4 * errors.std() / math.sqrt(200))
    assert np.square(standard_errors).mean() == pytest.approx(errors.var(), rel=0.3)


def test_a_sample_follows_its_seed_and_covers_all_rows_at_most():
    weight = gaussian(40, 256)
    whole = measure_distortion(weight, QType.Q4_K, None, 0, 1)
    assert measure_distortion(weight, QType.Q4_K, 40, 3, 1) == whole
    assert measure_distortion(weight, QType.Q4_K, 1000, 3, 1) == whole
    first = measure_distortion(weight, QType.Q4_K, 10, 3, 1)
    assert first == measure_distortion(weight, QType.Q4_K, 10, 3, 1)
    assert first != measure_distortion(weight, QType.Q4_K, 10, 4, 1)


def test_a_sample_of_one_row_does_not_claim_to_be_exact():
    assert measure_distortion(gaussian(40, 256), QType.Q4_K, 1, 0, 1).standard_error > 0


def test_a_second_run_reads_no_weights_and_finds_the_same(source, tmp_path):
    first = run(source, tmp_path)
    counting = Counting(source)
    assert run(counting, tmp_path) == first
    assert counting.n_read == 0


def test_more_types_measure_only_what_is_missing(source, tmp_path):
    run(source, tmp_path, (QType.Q2_K,))
    counting = Counting(source)
    wider = run(counting, tmp_path, (QType.Q2_K, QType.Q4_K))
    assert counting.n_read == 9
    assert wider.distortions == run(source, tmp_path / "fresh", (QType.Q2_K, QType.Q4_K)).distortions
    assert len(next(tmp_path.glob("distortion-*.csv")).read_text().splitlines()) == 2 + 2 * 9


@pytest.mark.parametrize("stop_at", [0, 1, 8])
def test_an_interrupted_run_continues_where_it_stopped(source, tmp_path, stop_at):
    with pytest.raises(KeyboardInterrupt):
        run(Counting(source, stop_at), tmp_path)
    counting = Counting(source)
    resumed = run(counting, tmp_path)
    assert counting.n_read == 9 - stop_at
    assert resumed == run(source, tmp_path / "fresh")
    assert not list(tmp_path.glob("*.partial"))


def test_interrupted_while_measuring_more_types_it_continues_there_too(source, tmp_path):
    run(source, tmp_path, (QType.Q2_K,))
    with pytest.raises(KeyboardInterrupt):
        run(Counting(source, 5), tmp_path, (QType.Q2_K, QType.Q4_K))
    counting = Counting(source)
    run(counting, tmp_path, (QType.Q2_K, QType.Q4_K))
    assert counting.n_read == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"alphas": AlphaSettings(spectrum="full")},
        {"alphas": AlphaSettings(estimator="median")},
        {"alphas": AlphaSettings(tiles="2")},
        {"alphas": AlphaSettings(seed=1)},
        {"distortion": DistortionSettings(rows="16")},
        {"distortion": DistortionSettings(seed=1)},
    ],
    ids=["spectrum", "estimator", "tiles", "alpha-seed", "rows", "distortion-seed"],
)
def test_other_settings_never_reuse_a_measurement(source, tmp_path, settings):
    run(source, tmp_path)
    counting = Counting(source)
    run(counting, tmp_path, **settings)
    assert counting.n_read == 9


def test_other_weights_never_reuse_a_measurement(source, tensors, tmp_path):
    run(source, tmp_path)
    changed = {name: tensor.copy() for name, tensor in tensors.items()}
    changed[stack_name("down")][2, 100, 200] += 1
    counting = Counting(write_source(tmp_path / "changed.gguf", changed))
    run(counting, tmp_path)
    assert counting.n_read == 9


def test_threads_change_nothing(source, tmp_path):
    assert run(source, tmp_path / "one", threads=1) == run(source, tmp_path / "two", threads=2)


def test_sampled_tiles_depend_on_the_seed_and_not_on_the_order_of_measuring(source, tmp_path):
    sampled = AlphaSettings(tiles="2", seed=5)
    first = run(source, tmp_path / "a", alphas=sampled, distortion=None).alphas
    with pytest.raises(KeyboardInterrupt):
        run(Counting(source, 4), tmp_path / "b", alphas=sampled, distortion=None)
    assert run(source, tmp_path / "b", alphas=sampled, distortion=None).alphas == first
    other = run(source, tmp_path / "c", alphas=AlphaSettings(tiles="2", seed=6), distortion=None).alphas
    assert other != first
    assert all(alpha.n == 256 for alpha in first.values())


def test_analytic_distortion_measures_nothing_but_alphas(source, tmp_path):
    found = run(source, tmp_path, distortion=DistortionSettings(kind="analytic"))
    assert found.distortions == {}
    assert [p.name.split("-")[0] for p in tmp_path.iterdir()] == ["alphas"]


def alphas_file(directory: Path) -> Path:
    (path,) = directory.glob("alphas-*.csv")
    return path


def test_an_alphas_file_is_used_instead_of_measuring(source, tmp_path):
    first = run(source, tmp_path, distortion=None)
    given = alphas_file(tmp_path).rename(tmp_path / "given.csv")
    counting = Counting(source)
    again = run(counting, tmp_path / "empty", distortion=None, given_alphas=given)
    assert again.alphas == first.alphas
    assert again.alpha_header == first.alpha_header
    assert counting.n_read == 0


def test_an_alphas_file_is_a_csv_that_others_can_read(source, tmp_path):
    found = run(source, tmp_path, distortion=None).alphas
    _, *lines = alphas_file(tmp_path).read_text().splitlines()
    for row in csv.DictReader(lines):
        alpha = found[row["stack"], int(row["expert"]), row["proj"]]
        assert float(row["alpha"]) == alpha.alpha
        assert (row["layer"], row["n_rows"], row["n_cols"]) == ("0", "256", "256")


def test_an_alphas_file_of_another_model_is_refused(source, tmp_path):
    run(source, tmp_path, distortion=None)
    other = write_source(tmp_path / "other.gguf", expert_tensors(n_experts=3, seed=9))
    with pytest.raises(AlphaQError, match="another model"):
        load_alphas(alphas_file(tmp_path), other)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        pytest.param(lambda text: text.replace('"alphas"', '"distortion"'), "not an alphas file", id="other-kind"),
        pytest.param(lambda text: text.replace('"schema": 1', '"schema": 2'), "of schema 1", id="other-schema"),
        pytest.param(
            lambda text: "\n".join(text.split("\n")[:-2]) + "\n", "no alpha for .* expert 2", id="row-missing"
        ),
        pytest.param(lambda text: text.replace(",512,farms", ",many,farms"), "damaged row", id="damaged"),
        pytest.param(lambda text: text.replace("variance", "wariance"), "damaged row", id="column-renamed"),
        pytest.param(lambda text: "# 5\n" + text.split("\n", 1)[1], "not a", id="header-no-object"),
    ],
)
def test_a_damaged_alphas_file_is_refused_with_its_cause(source, tmp_path, change, cause):
    run(source, tmp_path, distortion=None)
    path = alphas_file(tmp_path)
    path.write_text(change(path.read_text()))
    with pytest.raises(AlphaQError, match=cause):
        load_alphas(path, source)


def test_damaged_rows_of_a_cached_file_are_measured_again(source, tmp_path):
    first = run(source, tmp_path, distortion=None)
    path = alphas_file(tmp_path)
    head, columns, *rows = path.read_text().splitlines()
    rows[4] = rows[4].replace(",farms,", ",farms").replace("gate", "gate,")
    rows[7] = rows[7].replace(rows[7].split(",")[6], "not-a-number")
    path.write_text("\n".join([head, columns, *rows]) + "\n")
    counting = Counting(source)
    assert run(counting, tmp_path, distortion=None) == first
    assert counting.n_read == 2


def test_auto_tiles_are_all_up_to_a_core_hour_and_256_beyond(source):
    assert tile_seconds(source.stacks) == pytest.approx(9 * 4 * 1e-3)
    assert AlphaSettings(tiles="9").max_tiles(source.stacks) == 9
    # 1897^2 tiles of a millisecond are 3599 s, 1898^2 are 3602 s.
    most, more = ([ExpertStack("s", 0, "up", 1, 128 * n, 128 * n)] for n in (1897, 1898))
    assert AlphaSettings().max_tiles(most) is None
    assert AlphaSettings().max_tiles(more) == 256
    assert AlphaSettings(tiles="all").max_tiles(more) is None


def test_auto_rows_are_all_until_200_million_weights_and_64_beyond(source):
    n_weights = sum(s.n_weights for s in source.stacks)
    most = source.stacks * (200_000_000 // n_weights)
    assert DistortionSettings().sample_rows(most) is None
    assert DistortionSettings().sample_rows(most + source.stacks) == 64
    assert DistortionSettings(rows="all").sample_rows(most + source.stacks) is None
    assert DistortionSettings(rows="7").sample_rows(source.stacks) == 7


def test_the_settings_of_an_alphas_file_read_as_words(source, tmp_path):
    words = alphas_header_text(run(source, tmp_path, alphas=AlphaSettings(tiles="2", seed=3)).alpha_header)
    assert words == "hill estimator, farms spectrum, 2 tiles a matrix, seed 3"
    assert "all tiles" in alphas_header_text(run(source, tmp_path).alpha_header)


def test_half_precision_sources_measure_what_they_store(tmp_path):
    weight = gaussian(1, 256, 256).astype(np.float16)
    found = run(write_source(tmp_path / "half.gguf", {stack_name("up"): weight}), tmp_path, (QType.Q4_K,))
    expected = squared_error(weight[0].astype(np.float32), QType.Q4_K)
    assert found.distortions[(stack_name("up"), 0, "up"), QType.Q4_K].squared_error == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("projs", [("gate", "up", "down"), ("up", "down")])
def test_row_variances_are_those_of_each_expert_s_first_matrix(projs: tuple[str, ...], tmp_path: Path) -> None:
    tensors = {name: t for name, t in expert_tensors().items() if any(f"ffn_{p}_exps" in name for p in projs)}
    source = write_source(tmp_path / "m.gguf", tensors)
    arguments = {"alphas": None, "distortion": None, "qtypes": {}, "cache_dir": tmp_path / "cache"}
    found = measure(source, row_variances=True, **arguments).row_variances
    stack = stack_name(projs[0])
    expected = tensors[stack].astype(np.float64).var(axis=2).max(axis=1)
    assert found == {(stack, xid, projs[0]): pytest.approx(expected[xid]) for xid in range(2)}
    # The second time they come from the cache, to the last digit.
    assert measure(source, row_variances=True, **arguments).row_variances == found
    (ledger,) = (tmp_path / "cache").glob("row-variances-*.csv")
    assert "row_variance" in ledger.read_text()


def write_imatrix(path: Path, source: Source, seed: int = 0) -> tuple[ImportanceMatrix, dict[str, np.ndarray]]:
    """An importance matrix of all stacks and the mean squares it was written from, 1 for the last expert: no tokens."""
    rng = np.random.default_rng(seed)
    means = {s.name: rng.gamma(0.3, size=(s.n_experts, s.n_cols)).astype(np.float32) for s in source.stacks}
    tensors = {}
    for name, values in means.items():
        counts = np.full((len(values), 1), 64, np.float32)
        values[-1], counts[-1] = 1, 0
        tensors |= {f"{name}.in_sum2": values * counts, f"{name}.counts": counts}
    return open_importance(write_gguf(path, tensors, general__type="imatrix"), source), means


def test_distortions_are_those_of_the_rounding_that_an_imatrix_weighs(source, tensors, tmp_path):
    imatrix, means = write_imatrix(tmp_path / "imatrix.gguf", source)
    found = run(source, tmp_path, alphas=None, imatrix=imatrix).distortions
    plain = run(source, tmp_path, alphas=None).distortions
    for matrix in [m for s in source.stacks for m in s.matrices]:
        weight = tensors[matrix.stack][matrix.xid]
        for qtype in TYPES:
            expected = squared_error(weight, qtype, means[matrix.stack][matrix.xid])
            error = found[key_of(matrix), qtype].squared_error
            assert error == pytest.approx(expected, rel=1e-6)
            assert (error != plain[key_of(matrix), qtype].squared_error) == (qtype != QType.Q8_0)


def test_gate_and_up_of_a_fused_stack_share_the_importance_of_their_expert(tmp_path):
    name = stack_name("gate_up")
    fused = gaussian(3, 512, 256)
    source = write_source(tmp_path / "m.gguf", {name: fused})
    imatrix, means = write_imatrix(tmp_path / "imatrix.gguf", source)
    found = run(source, tmp_path, (QType.Q4_K,), alphas=None, imatrix=imatrix).distortions
    for xid in range(3):
        for proj, half in (("gate", fused[xid, :256]), ("up", fused[xid, 256:])):
            expected = squared_error(np.ascontiguousarray(half), QType.Q4_K, means[name][xid])
            assert found[(name, xid, proj), QType.Q4_K].squared_error == pytest.approx(expected, rel=1e-6)


def test_a_stack_the_imatrix_does_not_know_is_rounded_without_weights(source, tensors, tmp_path):
    name = stack_name("down")
    tensors = {f"{name}.in_sum2": np.full((3, 256), 2, np.float32), f"{name}.counts": np.ones((3, 1), np.float32)}
    imatrix = open_importance(write_gguf(tmp_path / "i.gguf", tensors, general__type="imatrix"), source)
    found = run(source, tmp_path, (QType.Q4_K,), alphas=None, imatrix=imatrix).distortions
    plain = run(source, tmp_path, (QType.Q4_K,), alphas=None).distortions
    assert {key[0] for (key, qtype), error in found.items() if error != plain[key, qtype]} == {name}


def test_errors_under_another_imatrix_or_none_are_measured_apart(source, tmp_path):
    first = run(source, tmp_path)
    assert "imatrix" not in first.distortion_header
    weighed = []
    for seed in range(2):
        imatrix, _ = write_imatrix(tmp_path / f"{seed}.gguf", source, seed)
        for n_read in (9, 0):
            counting = Counting(source)
            weighed.append(run(counting, tmp_path, imatrix=imatrix))
            assert counting.n_read == n_read
        assert weighed[-1].distortion_header == {**first.distortion_header, "imatrix": imatrix.digest}
        assert weighed[-1] == weighed[-2]
    assert first.distortions != weighed[0].distortions != weighed[2].distortions
    assert {first.alphas == found.alphas for found in weighed} == {True}
    counting = Counting(source)
    assert run(counting, tmp_path) == first
    assert counting.n_read == 0


def test_sampled_rows_estimate_the_error_of_weighed_rounding():
    weight, importance = gaussian(256, 256), np.random.default_rng(1).gamma(0.3, size=256).astype(np.float32)
    whole = measure_distortion(weight, QType.Q3_K, None, 0, 1, importance)
    plain = measure_distortion(weight, QType.Q3_K, None, 0, 1)
    samples = [measure_distortion(weight, QType.Q3_K, 64, seed, 1, importance) for seed in range(20)]
    errors = np.array([s.squared_error for s in samples])
    assert (np.abs(errors - whole.squared_error) < 5 * np.array([s.standard_error for s in samples])).all()
    assert errors.min() > plain.squared_error
