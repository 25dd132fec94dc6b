"""Numbers and names as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..evaluate.metrics import Estimate

ENGINES = {"llama.cpp": "llama.cpp", "pytorch": "PyTorch", "triton": "Triton"}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
# Names up to here stay whole.
_LONG = 20


def byte_unit(n_bytes: float) -> tuple[str, int]:
    """The largest unit that `n_bytes` has one of, and its bytes."""
    power = 0
    while n_bytes >= 1024 ** (power + 1) and power < len(_UNITS) - 1:
        power += 1
    return _UNITS[power], 1024**power


def in_bytes(n_bytes: float) -> str:
    """`12.3 GiB`."""
    unit, scale = byte_unit(n_bytes)
    return f"{n_bytes:.0f} B" if scale == 1 else f"{number(n_bytes / scale)} {unit}"


def number(value: float, digits: int = 3) -> str:
    """`digits` significant digits: `0.0123`, `412`, `1.2e-6`."""
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(power)}"


def estimate(found: Estimate, scale: float = 1.0) -> str:
    """`0.0123 ± 0.0004`, both to two significant digits of the error."""
    value, error = found.value * scale, found.standard_error * scale
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return number(value)
    decimals = 1 - math.floor(math.log10(error))
    if decimals > 7:
        return f"{number(value)} ± {number(error, 2)}"
    return f"{value:.{max(0, decimals)}f} ± {error:.{max(0, decimals)}f}"


def percent(share: float) -> str:
    """`2.1 %`, with more digits close to 0 and to 100 %."""
    near = min(abs(share), abs(1 - share)) * 100
    return f"{share * 100:.{1 if near >= 1 or near == 0 else 2}f} %"


def quoted(name: str) -> str:
    """A name in a sentence, where it could be taken for one of its words."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{name}\N{RIGHT DOUBLE QUOTATION MARK}"


def count(n: int, noun: str, plural: str = "") -> str:
    """`1 file`, `2 files`."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def listed(parts: Sequence[str], most: int | None = None) -> str:
    """`a, b and c`; no more than `most` of them by name."""
    if most is not None and len(parts) > most:
        return f"{', '.join(parts[:most])} and {len(parts) - most} more"
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def shortened(text: str, width: int) -> str:
    """At most `width` characters, the middle left out; what tells files apart is mostly at the end of their names."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 3 // 5
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def short_names(names: Sequence[str], width: int = 40) -> list[str]:
    """Names without `.gguf`, control characters, and the words that all of several long ones begin with.

    No longer than `width`, unless that makes two the same.
    """
    plain = ["".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name) for name in names]
    short = [name.removesuffix(".gguf") for name in plain]
    if len(short) > 1 and max(map(len, short)) > _LONG:
        first, last = min(short), max(short)
        common = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
        start = max(common.rfind(mark) for mark in "-_./ ") + 1
        short = [name[start:] or name for name in short]
    short = [shortened(name, width) for name in short]
    return short if len(set(short)) == len(short) else plain
