"""Types of the tensors that are not expert stacks: sensible defaults, and the user's overrides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .checkpoint import Source
from .errors import UsageError
from .gguf_file import TensorInfo
from .qtypes import FLOAT_TYPES, QType, fits, parse_qtype

Override = tuple[str, QType]
"""(regular expression searched in tensor names, type)."""

# 2-D weights that llama.cpp multiplies with quantised blocks; everything else (router, norms,
# biases, convolutions, scalars) stays float, because it is small and its error is not.
_MATRICES = re.compile(
    r"(blk\.\d+\.(attn_(q|k|v|qkv|output|gate|q_a|q_b|kv_a_mqa|kv_b|k_b|v_b)"
    r"|ffn_(gate|up|down)(_shexp)?|ssm_(in|out)|nextn\.(eh_proj|shared_head_head))|output)\.weight$"
)
_EMBEDDING = re.compile(r"(token_embd|blk\.\d+\.nextn\.embed_tokens)\.weight$")
_ALWAYS_F32 = re.compile(r"(_norm|ffn_gate_inp|ffn_gate_inp_shexp|conv1d)\.weight$|\.bias$")


def default_type(info: TensorInfo, *, tied: bool) -> QType:
    """The type a tensor that holds no experts gets when the user says nothing.

    Attention, shared experts, dense feed-forward layers and the output: Q8_0. Token embedding: Q6_K,
    or Q8_0 when it also serves as output (`tied`). Router, norms, biases and vectors: F32. Tensors we
    do not know keep their source type. Rows no block fits: F16.
    """
    if info.qtype not in FLOAT_TYPES:
        return info.qtype
    if _stays_float(info):
        return QType.F32
    if _EMBEDDING.match(info.name):
        wanted = QType.Q8_0 if tied else QType.Q6_K
    elif _MATRICES.match(info.name):
        wanted = QType.Q8_0
    else:
        return info.qtype
    for qtype in (wanted, QType.Q8_0):
        if fits(qtype, info.n_cols):
            return qtype
    return QType.F16


def _stays_float(info: TensorInfo) -> bool:
    return len(info.shape) < 2 or _ALWAYS_F32.search(info.name) is not None


def parse_overrides(texts: Iterable[str]) -> list[Override]:
    """`REGEX=TYPE` arguments; UsageError names what is wrong with one."""
    overrides = []
    for text in texts:
        pattern, separator, name = text.rpartition("=")
        try:
            if not separator or not pattern:
                raise ValueError("expected REGEX=TYPE")
            re.compile(pattern)
            overrides.append((pattern, parse_qtype(name)))
        except (ValueError, re.error) as error:
            raise UsageError(f"--tensor-type {text!r}: {error}", "for example --tensor-type 'attn_=Q6_K'") from None
    return overrides


def choose_types(source: Source, overrides: Sequence[Override]) -> tuple[dict[str, QType], dict[str, QType]]:
    """(types of all tensors that are not expert stacks, types fixed by the user for expert stacks).

    Later overrides win; quantised types pass over routers, norms, biases and vectors, which llama.cpp
    needs as floats. UsageError for a pattern that matches nothing to change or a type that does not fit.
    """
    stacks = {stack.name for stack in source.stacks}
    tied = "output.weight" not in source.tensors
    types = {info.name: default_type(info, tied=tied) for info in source.tensors.values() if info.name not in stacks}
    fixed: dict[str, QType] = {}
    for pattern, qtype in overrides:
        option = f"--tensor-type {pattern}={qtype.name}"
        matched = [info for info in source.tensors.values() if re.search(pattern, info.name)]
        if not matched:
            raise UsageError(f"{option} matches no tensor", "`alphaq-gguf inspect` lists tensor names")
        if qtype not in FLOAT_TYPES:
            # So that `attn_=Q6_K` can be said without naming every norm and bias it also finds.
            matched = [info for info in matched if not _stays_float(info)]
            if not matched:
                raise UsageError(f"{option} matches only routers, norms, biases or vectors, which stay float")
        for info in matched:
            if not fits(qtype, info.n_cols):
                raise UsageError(
                    f"{option}: {info.name} has rows of {info.n_cols}, which {qtype.name} blocks do not divide",
                    "choose another type or make the expression narrower",
                )
            (fixed if info.name in stacks else types)[info.name] = qtype
    return types, fixed
