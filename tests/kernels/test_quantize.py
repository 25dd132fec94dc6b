"""The error of encoded rows, decoded by gguf-py, against that of libggml's encoders on the same rows.

Tests that name no backend check the kernels where there is a GPU, and their twin elsewhere.
"""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from alphaq_kernels import FORMATS, BlockFormat, dequantize
from alphaq_kernels.quantize import quantize

from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.encode import encode_rows

QType = gguf.GGMLQuantizationType

N_COLS = 512
# What the rounding of a scale to a half leaves of a row's sum of squares, however well its codes fit: (2^-11)^2.
HALF_ROUNDING = 2.0**-22

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)


@pytest.fixture(autouse=True)
def quiet_numpy():
    """Huge weights overflow halves in libggml: gguf shall not warn of that."""
    with np.errstate(all="ignore"):
        yield


def gaussian(n_rows: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((n_rows, N_COLS)).astype(np.float32)


@pytest.fixture(scope="module")
def rows(trained) -> dict[str, np.ndarray]:
    """float32 [n, N_COLS] by kind."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((32, N_COLS))
    outliers = normal.copy()
    outliers[np.arange(32), rng.integers(0, N_COLS, 32)] *= 50
    source = open_source(trained)
    (stack,) = [s for s in source.stacks if s.bid == 0 and s.proj == "gate"]
    kinds = {
        "gaussian": normal,
        "student-3": rng.standard_t(3, (32, N_COLS)),
        "student-1.5": rng.standard_t(1.5, (32, N_COLS)),
        "trained": np.asarray(source.read_rows(stack.name, 0, 64)).reshape(-1, N_COLS),
        "outliers": outliers,
        "uniform": rng.random((32, N_COLS)),
        "shifted": normal + 1,
        "scaled by group": normal * np.repeat(np.exp(rng.standard_normal((32, N_COLS // 32))), 32, axis=1),
        "ties": rng.integers(-8, 9, (32, N_COLS)),
        "sparse": normal * (rng.standard_normal(normal.shape) > 2),
        "constant": np.repeat([[-0.37], [0.811]], N_COLS, axis=1),
        "one": np.eye(N_COLS)[::7] * 3.3,
        "zero": np.zeros((2, N_COLS)),
        "subnormal": normal[:4] * 1e-39,
        "tiny": normal[:4] * 1e-30,
        "halves without digits": normal * 3e-7,
        "halves with few digits": normal * 1e-5,
        "large": normal * 1e4,
        "huge": normal[:4] * 1e30,
    }
    return {kind: np.ascontiguousarray(values, dtype=np.float32) for kind, values in kinds.items()}


KINDS = [
    *("gaussian", "student-3", "student-1.5", "trained", "outliers", "uniform", "shifted", "scaled by group", "ties"),
    *("sparse", "constant", "one", "zero", "subnormal", "tiny", "halves without digits", "halves with few digits"),
    *("large", "huge"),
]


def importance(*shape: int, seed: int = 0) -> np.ndarray:
    """As unequal as that of real layers: most of it on few columns."""
    return np.random.default_rng(seed).gamma(0.3, size=shape).astype(np.float32)


def encode(
    rows: np.ndarray, fmt: BlockFormat, device: torch.device, weights: np.ndarray | None = None, **options
) -> np.ndarray:
    known = None if weights is None else torch.from_numpy(weights).to(device)
    return quantize(torch.from_numpy(rows).to(device), fmt.name, known, **options).cpu().numpy()


def error(rows: np.ndarray, blocks: np.ndarray, fmt: BlockFormat, weights: np.ndarray | float = 1.0) -> float:
    """The weighed squared error of all rows, in float64."""
    decoded = gguf.dequantize(blocks, QType(fmt.type_id)).astype(np.float64)
    return float((weights * np.square(rows - decoded)).sum())


def test_every_kind_of_row_is_tried(rows):
    assert list(rows) == KINDS


@every_format
@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "weighed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_never_above_that_of_libggml(rows, kind: str, weighed: bool, fmt: BlockFormat, device):
    x, w = rows[kind], importance(N_COLS) if weighed else None
    weights = 1.0 if w is None else w
    mine = error(x, encode(x, fmt, device, w), fmt, weights)
    theirs = error(x, encode_rows(x, QType(fmt.type_id), importance=w), fmt, weights)
    energy = float((weights * np.square(x, dtype=np.float64)).sum())
    # What overflows a half is NaN or infinite in libggml and clamped here.
    assert mine <= 1.001 * theirs + HALF_ROUNDING * energy or (not np.isfinite(theirs) and mine < 1.01 * energy)


@every_format
def test_weights_that_no_half_scales_are_clamped_and_rows_beside_them_kept(fmt: BlockFormat, device):
    x = gaussian(4)
    x[0] *= 1e9
    decoded = gguf.dequantize(encode(x, fmt, device), QType(fmt.type_id))
    assert np.isfinite(decoded).all()
    assert np.abs(decoded[0]).max() > 60000
    np.testing.assert_array_equal(decoded[1:], gguf.dequantize(encode(x[1:], fmt, device), QType(fmt.type_id)))


@every_format
@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "weighed"])
def test_a_block_is_encoded_the_same_in_any_company(fmt: BlockFormat, weighed: bool, device):
    x, w = gaussian(4), importance(N_COLS) if weighed else None
    together = encode(x, fmt, device, w)
    np.testing.assert_array_equal(encode(x, fmt, device, w), together)
    for n_weights in (fmt.block_size * 3, N_COLS * 3):
        np.testing.assert_array_equal(encode(x, fmt, device, w, chunk_weights=n_weights), together)
    np.testing.assert_array_equal(encode(x[2:3], fmt, device, w), together[2:3])
    block = np.ascontiguousarray(x[1:2, : fmt.block_size])
    alone = encode(block, fmt, device, None if w is None else w[: fmt.block_size])
    np.testing.assert_array_equal(alone, together[1:2, : fmt.type_size])
    first = x[:, :256].copy()
    alone = encode(first, fmt, device, None if w is None else w[:256].copy())
    np.testing.assert_array_equal(alone, together[:, : alone.shape[1]])


@every_format
def test_each_matrix_has_importance_of_its_own(fmt: BlockFormat, device):
    x, w = gaussian(6), importance(3, N_COLS)
    expected = [encode(x[2 * i : 2 * i + 2], fmt, device, w[i]) for i in range(3)]
    # Chunks of one block and a half row, so that they end within matrices.
    for n_weights in (None, 256, 3 * N_COLS):
        found = encode(x, fmt, device, w, chunk_weights=n_weights)
        np.testing.assert_array_equal(found, np.concatenate(expected))


@every_format
def test_the_scale_of_importance_does_not_matter_and_none_at_all_is_the_same_for_all(fmt: BlockFormat, device):
    x, w = gaussian(4), importance(N_COLS)
    np.testing.assert_array_equal(encode(x, fmt, device, w * 2.0**66), encode(x, fmt, device, w * 2.0**-66))
    w[:256] = 0
    n_bytes = fmt.type_size * 256 // fmt.block_size
    np.testing.assert_array_equal(encode(x, fmt, device, w)[:, :n_bytes], encode(x, fmt, device)[:, :n_bytes])


@every_format
def test_importance_of_any_ratio_keeps_what_is_important(fmt: BlockFormat, device):
    x, w = gaussian(8), np.where(np.arange(N_COLS) % 2, np.float32(1e20), np.float32(1e-20))
    blocks = encode(x, fmt, device, w)
    assert error(x, blocks, fmt, w > 1) <= 1.001 * error(
        x, encode_rows(x, QType(fmt.type_id), importance=w), fmt, w > 1
    )


@every_format
def test_the_kernel_does_as_well_as_its_twin(fmt: BlockFormat, device):
    pytest.importorskip("triton")
    # 9 blocks of 32 are no whole number of programs.
    x = np.ascontiguousarray(gaussian(3)[:, : 256 if fmt.block_size == 256 else 96])
    w = importance(x.shape[1]) if fmt.name in ("Q3_K", "Q4_K", "Q5_0") else None
    kernel, twin = (encode(x, fmt, device, w, backend=backend) for backend in ("triton", "torch"))
    weights = 1.0 if w is None else w
    assert error(x, kernel, fmt, weights) == pytest.approx(error(x, twin, fmt, weights), rel=0.02)
    # Near ties may be decided otherwise.
    same = (kernel.reshape(-1, fmt.type_size) == twin.reshape(-1, fmt.type_size)).all(axis=1)
    assert same.mean() > 0.5


@every_format
@pytest.mark.parametrize("shape", [(0, 256), (3, 0)])
def test_nothing_is_encoded_as_nothing(shape: tuple[int, int], fmt: BlockFormat, device):
    for w in (None, np.ones((3, shape[1]), np.float32)):
        blocks = encode(np.empty(shape, np.float32), fmt, device, w)
        assert blocks.shape == (shape[0], shape[1] // fmt.block_size * fmt.type_size)


@every_format
def test_its_blocks_decode_as_gguf_decodes_them(fmt: BlockFormat, device):
    blocks = encode(gaussian(4), fmt, device)
    decoded = dequantize(torch.from_numpy(blocks), fmt.name).numpy()
    np.testing.assert_array_equal(decoded, gguf.dequantize(blocks, QType(fmt.type_id)))


def test_rows_are_left_alone(device):
    x, w = torch.from_numpy(gaussian(2)).to(device), torch.from_numpy(importance(N_COLS)).to(device)
    before = x.clone(), w.clone()
    for fmt in FORMATS:
        quantize(x, fmt.type_id, w)
    assert torch.equal(x, before[0]) and torch.equal(w, before[1])


ROWS = torch.zeros((4, 512))


@pytest.mark.parametrize(
    ("arguments", "options", "cause"),
    [
        pytest.param((ROWS, "Q4_1"), {}, "unknown block type 'Q4_1'", id="type"),
        pytest.param((ROWS.numpy(), "Q4_K"), {}, "torch.Tensor, not ndarray", id="array"),
        pytest.param((ROWS.double(), "Q4_K"), {}, r"float32 .* not torch.float64 \[4, 512\]", id="float64"),
        pytest.param((ROWS[0], "Q4_K"), {}, r"\[512\]", id="one-dimensional"),
        pytest.param(
            (ROWS[:, :96].contiguous(), "Q4_K"), {}, "96 weights are not whole Q4_K blocks of 256", id="broken"
        ),
        pytest.param((ROWS[:, ::2], "Q4_K"), {}, "contiguous", id="strided"),
        pytest.param((ROWS, "Q4_K"), {"backend": "cuda"}, "auto, triton, torch, not 'cuda'", id="backend"),
        pytest.param((ROWS, "Q4_K", np.ones(512)), {}, "importance must be a torch.Tensor", id="importance-array"),
        pytest.param((ROWS, "Q4_K", torch.ones(256)), {}, r"\[512\], not torch.float32 \[256\]", id="columns"),
        pytest.param((ROWS, "Q4_K", torch.ones(512).half()), {}, "not torch.float16", id="half"),
        pytest.param((ROWS, "Q4_K", torch.ones(3, 512)), {}, "4 rows are no 3 matrices", id="left-over"),
        pytest.param((ROWS, "Q4_K", torch.ones(0, 512)), {}, "4 rows are no 0 matrices", id="no-matrices"),
        pytest.param((ROWS, "Q4_K", -torch.ones(512)), {}, "at least 0", id="negative"),
        pytest.param((ROWS, "Q4_K", torch.full((512,), torch.nan)), {}, "finite", id="nan"),
        pytest.param(
            (ROWS, "Q4_K", torch.ones(512, device="meta")), {}, "on cpu like the rows, not on meta", id="device"
        ),
        pytest.param((ROWS.to("meta"), "Q4_K"), {"backend": "triton"}, "cannot run on device 'meta'", id="no-gpu"),
    ],
)
def test_what_cannot_be_encoded_is_a_value_error(arguments, options, cause):
    with pytest.raises(ValueError, match=cause):
        quantize(*arguments, **options)
