"""Decoded blocks against gguf-py's numpy decoders, bit by bit, for the Triton kernels and their torch twins."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution

import gguf
import numpy as np
import pytest
import torch
from alphaq_kernels import FORMATS, BlockFormat, dequantize, find_format

QType = gguf.GGMLQuantizationType

# Where the halves lie in each block, from the structs of ggml-common.h.
HALVES = {
    "Q4_0": (0,),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
}

# +-0, the smallest and largest subnormals, the smallest normal, 1, the largest, infinity, NaN quiet and signalling.
SPECIAL_HALVES = [0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x7C01, 0x7DFF]
SPECIAL_HALVES += [0x8000 | h for h in SPECIAL_HALVES]

# Root-mean-square error over standard deviation that a type may lose on Gaussian weights.
RELATIVE_ERROR = {
    "Q8_0": 0.01,
    "Q6_K": 0.03,
    "Q5_1": 0.06,
    "Q5_0": 0.06,
    "Q5_K": 0.06,
    "Q4_0": 0.12,
    "IQ4_NL": 0.1,
    "Q4_K": 0.1,
    "Q3_K": 0.2,
    "Q2_K": 0.4,
}

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
every_backend = pytest.mark.parametrize("backend", ["triton", "torch"])


@pytest.fixture(autouse=True)
def quiet_numpy():
    """Infinite and NaN scales are meant here: neither gguf nor the interpreter shall warn of them."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def triton_present(request: pytest.FixtureRequest) -> None:
    """Skip what needs triton where there is none."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "triton":
        pytest.importorskip("triton")


def random_blocks(fmt: BlockFormat, n_rows: int, blocks_per_row: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([fmt.type_id, n_rows, blocks_per_row, seed])
    return rng.integers(0, 256, (n_rows, blocks_per_row * fmt.type_size), dtype=np.uint8)


def decode_with_gguf(raw: np.ndarray, fmt: BlockFormat) -> np.ndarray:
    return gguf.dequantize(raw, QType(fmt.type_id))


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal as bits, the sign of zero too; NaN stands for every NaN."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    got, want = got.cpu(), want.cpu()
    integer = torch.int32 if got.dtype == torch.float32 else torch.int16
    wrong = (got.view(integer) != want.view(integer)) & ~(got.isnan() & want.isnan())
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} differ, first at {wrong.nonzero()[0].tolist()}"


def library() -> ctypes.CDLL:
    try:
        path = distribution("llama-cpp-python").locate_file("llama_cpp/lib/libggml-base.so")
        lib = ctypes.CDLL(str(path))
    except (PackageNotFoundError, OSError):
        pytest.skip("libggml is not installed: pip install llama-cpp-python")
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return lib


def encode(rows: np.ndarray, fmt: BlockFormat) -> np.ndarray:
    """Float rows to blocks: by gguf-py for the types it can write, else by libggml."""
    try:
        return gguf.quantize(rows, QType(fmt.type_id))
    except NotImplementedError:
        pass
    n_rows, n_cols = rows.shape
    raw = np.zeros((n_rows, n_cols // fmt.block_size * fmt.type_size), dtype=np.uint8)
    written = library().ggml_quantize_chunk(fmt.type_id, rows.ctypes.data, raw.ctypes.data, 0, n_rows, n_cols, None)
    assert written == raw.nbytes
    return raw


def test_formats_are_those_of_gguf():
    for fmt in FORMATS:
        qtype = QType[fmt.name]
        assert (fmt.type_id, (fmt.block_size, fmt.type_size)) == (qtype.value, gguf.GGML_QUANT_SIZES[qtype])


@every_format
def test_a_type_goes_by_id_name_or_gguf_enum(fmt: BlockFormat):
    assert find_format(fmt.type_id) is find_format(fmt.name) is find_format(QType[fmt.name]) is fmt


@pytest.mark.parametrize(("n_rows", "blocks_per_row"), [(1, 1), (1, 9), (3, 2), (17, 3), (65, 5)])
@every_backend
@every_format
def test_random_bytes(fmt: BlockFormat, backend: str, n_rows: int, blocks_per_row: int, device: torch.device):
    raw = random_blocks(fmt, n_rows, blocks_per_row)
    got = dequantize(torch.from_numpy(raw).to(device), fmt.type_id, backend=backend)
    assert got.device.type == device.type
    assert_same_bits(got, torch.from_numpy(decode_with_gguf(raw, fmt)))


@every_backend
@every_format
def test_special_scales(fmt: BlockFormat, backend: str, device: torch.device):
    halves = HALVES[fmt.name]
    combinations = list(itertools.product(SPECIAL_HALVES, repeat=len(halves)))
    raw = random_blocks(fmt, len(combinations), 1)
    for at, column in zip(halves, np.array(combinations, dtype="<u2").T, strict=True):
        raw[:, at : at + 2] = np.ascontiguousarray(column)[:, None].view(np.uint8)
    want = torch.from_numpy(decode_with_gguf(raw, fmt))
    assert want.isnan().any()
    assert want.isinf().any()
    assert (want.signbit() & (want == 0)).any()
    assert_same_bits(dequantize(torch.from_numpy(raw).to(device), fmt.type_id, backend=backend), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@every_backend
@every_format
def test_half_precision_is_the_rounded_float32(
    fmt: BlockFormat, backend: str, dtype: torch.dtype, device: torch.device
):
    raw = random_blocks(fmt, 9, 4096 // fmt.block_size)
    want = torch.from_numpy(decode_with_gguf(raw, fmt))
    if dtype == torch.bfloat16:
        ties = (want.view(torch.int32) & 0xFFFF) == 0x8000
        assert ties.sum() > 20, "no value lies half-way between two of bfloat16: the data test no rounding to even"
    got = dequantize(torch.from_numpy(raw).to(device), fmt.type_id, dtype, backend=backend)
    assert_same_bits(got, want.to(dtype))


@every_backend
@every_format
def test_encoded_weights_come_back(fmt: BlockFormat, backend: str, device: torch.device):
    rows = np.random.default_rng(fmt.type_id).standard_normal((5, 768)).astype(np.float32) * np.float32(0.02)
    raw = encode(rows, fmt)
    got = dequantize(torch.from_numpy(raw).to(device), fmt.type_id, backend=backend)
    assert_same_bits(got, torch.from_numpy(decode_with_gguf(raw, fmt)))
    error = np.sqrt(np.mean((got.cpu().numpy() - rows) ** 2)) / np.std(rows)
    assert error < RELATIVE_ERROR[fmt.name]


@every_backend
@every_format
def test_blocks_may_start_at_an_odd_address(fmt: BlockFormat, backend: str, device: torch.device):
    raw = random_blocks(fmt, 1, 3)
    buffer = torch.zeros(raw.size + 1, dtype=torch.uint8, device=device)
    blocks = buffer[1:].view(raw.shape)
    blocks.copy_(torch.from_numpy(raw))
    assert_same_bits(dequantize(blocks, fmt.type_id, backend=backend), torch.from_numpy(decode_with_gguf(raw, fmt)))


@pytest.mark.parametrize("n_rows", [1, 3, 17, 65])
@every_format
def test_kernel_writes_every_weight_and_nothing_else(fmt: BlockFormat, n_rows: int, device: torch.device):
    pytest.importorskip("triton")
    from alphaq_kernels.dequantize.triton_kernels import launch

    raw = random_blocks(fmt, n_rows, 1)
    # Small finite halves, so that a NaN left in the output is one the kernel did not write.
    for at in HALVES[fmt.name]:
        raw[:, at + 1] &= 0x3B
    margin = 4096
    buffer = torch.full((n_rows * fmt.block_size + 2 * margin,), float("nan"), device=device)
    out = buffer[margin:-margin].view(n_rows, fmt.block_size)
    launch(torch.from_numpy(raw).to(device), fmt, out)
    assert_same_bits(out, torch.from_numpy(decode_with_gguf(raw, fmt)))
    assert not out.isnan().any()
    assert buffer[:margin].isnan().all()
    assert buffer[-margin:].isnan().all()


def test_offsets_past_2_to_the_31(device: torch.device):
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs a GPU with 8 GiB of free memory")
    fmt = find_format("Q8_0")
    tail = random_blocks(fmt, 5, 1)
    blocks = torch.zeros((2**26 + 5, fmt.type_size), dtype=torch.uint8, device=device)
    blocks[-5:] = torch.from_numpy(tail).to(device)
    got = dequantize(blocks, fmt.type_id, torch.float16, backend="triton")
    assert got.numel() > 2**31
    assert blocks.numel() > 2**31
    assert not got[:-5].any()
    assert_same_bits(got[-5:], torch.from_numpy(decode_with_gguf(tail, fmt)).to(torch.float16))


@every_backend
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_empty(shape: tuple[int, int], backend: str, device: torch.device):
    fmt = find_format("Q4_K")
    blocks = torch.empty((shape[0], shape[1] * fmt.type_size), dtype=torch.uint8, device=device)
    got = dequantize(blocks, fmt.type_id, torch.bfloat16, backend=backend)
    assert got.shape == (shape[0], shape[1] * fmt.block_size)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
@every_format
def test_auto_decodes_like_both_backends(fmt: BlockFormat, dtype: torch.dtype, device: torch.device):
    pytest.importorskip("triton")
    blocks = torch.from_numpy(random_blocks(fmt, 3, 3)).to(device)
    auto = dequantize(blocks, fmt.type_id, dtype)
    for backend in ("triton", "torch"):
        assert_same_bits(auto, dequantize(blocks, fmt.type_id, dtype, backend=backend))


@pytest.mark.parametrize(
    ("blocks", "options", "message"),
    [
        (np.zeros((2, 144), np.uint8), {}, "blocks must be a torch.Tensor, not ndarray"),
        (torch.zeros(2, 144, dtype=torch.int8), {}, "blocks must be torch.uint8, not torch.int8"),
        (torch.zeros(144, dtype=torch.uint8), {}, r"blocks must be \[n_rows, row_bytes\], not of shape \[144\]"),
        (torch.zeros(1, 2, 144, dtype=torch.uint8), {}, r"not of shape \[1, 2, 144\]"),
        (torch.zeros(2, 145, dtype=torch.uint8), {}, "rows of 145 bytes are not whole Q4_K blocks of 144 bytes"),
        (torch.zeros(144, 144, dtype=torch.uint8).T, {}, r"blocks must be contiguous, not of strides \[1, 144\]"),
        (torch.zeros(2, 288, dtype=torch.uint8)[:, :144], {}, "blocks must be contiguous"),
        (torch.zeros(2, 144, dtype=torch.uint8), {"dtype": torch.float64}, "not torch.float64"),
        (torch.zeros(2, 144, dtype=torch.uint8), {"backend": "cuda"}, "not 'cuda'"),
        (torch.zeros(2, 144, dtype=torch.uint8), {"qtype": QType.F32}, "unknown block type .*F32"),
        (torch.zeros(2, 144, dtype=torch.uint8), {"qtype": "Q9_K"}, "unknown block type 'Q9_K'.*IQ4_NL"),
        (torch.zeros(2, 144, dtype=torch.uint8), {"qtype": True}, "unknown block type True"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_bad_arguments_are_refused(blocks: torch.Tensor, options: dict, message: str, backend: str):
    with pytest.raises(ValueError, match=message):
        dequantize(blocks, **{"qtype": "Q4_K", "backend": backend, **options})


@pytest.mark.parametrize("shape", [(2, 144), (0, 144)])
def test_triton_refuses_other_devices(shape: tuple[int, int]):
    pytest.importorskip("triton")
    blocks = torch.empty(shape, dtype=torch.uint8, device="meta")
    with pytest.raises(ValueError, match="backend 'triton' cannot run on device 'meta': expected a CUDA tensor"):
        dequantize(blocks, "Q4_K", backend="triton")
    assert dequantize(blocks, "Q4_K").shape == (shape[0], 256)


_FRESH = """
import sys
import torch
import alphaq_kernels

blocks = torch.zeros(1, 144, dtype=torch.uint8)

def refusal():
    try:
        alphaq_kernels.dequantize(blocks, "Q4_K", backend="triton")
    except ValueError as error:
        return str(error)

assert alphaq_kernels.dequantize(blocks, "Q4_K").shape == (1, 256)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"triton", "gguf", "alphaq_gguf"}, loaded
print(refusal())
sys.modules["triton"] = None
print(refusal())
"""


def test_without_interpreter_or_triton():
    """A fresh process: nothing heavy is imported early, and CPU tensors get a sentence instead of a crash."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _FRESH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    uninterpreted, absent = done.stdout.splitlines()
    assert "cannot run on device 'cpu'" in uninterpreted
    assert "TRITON_INTERPRET=1" in uninterpreted
    assert "triton, which is not installed" in absent
