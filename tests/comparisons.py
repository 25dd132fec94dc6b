"""Comparisons of known contents, as `compare` and `sweep` make them, without any model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from alphaq_gguf.compare.data import (
    Candidate,
    Comparison,
    CrossEngine,
    Evaluation,
    ProjectionAlphas,
    ReferenceInfo,
    StackTypes,
    TaskScore,
    TextInfo,
)
from alphaq_gguf.evaluate.metrics import HISTOGRAM_EDGES, Divergence, Estimate
from alphaq_gguf.evaluate.speed import Rate, Speed

PROJECTIONS = ("gate", "up", "down")
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


def candidate(name: str, n_bytes: int, **known: Any) -> Candidate:
    """A file of which only name and size matter."""
    return Candidate(name, f"fingerprint of {name}", n_bytes, **{"bpw": 4.5, "expert_bpw": 4.0, **known})


def evaluation(file: str, kld: float, error: float = 0.001, engine: str = "llama.cpp", **known: Any) -> Evaluation:
    """One of which only the KLD matters; everything else follows from it."""
    rng = np.random.default_rng(round(abs(kld) * 1e6) if math.isfinite(kld) else 0)
    logs = rng.normal(math.log10(max(kld, 1e-6)) - 0.4 if math.isfinite(kld) else 0, 0.8, 4000)
    counts = np.histogram(np.clip(logs, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]), HISTOGRAM_EDGES)[0]
    divergence = Divergence(
        kld=Estimate(kld, error),
        kld_median=kld * 0.4,
        kld_p999=kld * 25,
        kld_max=kld * 60,
        top1=Estimate(1 - min(0.9, 0.3 * max(kld, 0) ** 0.5), 0.002),
        rms_dp=Estimate(0.1 * max(kld, 0) ** 0.5, 0.001),
        histogram=tuple(int(n) for n in counts),
    )
    perplexity = Estimate(5.1234 * math.exp(kld * 0.7), 0.05)
    return Evaluation(file, engine, "cpu", perplexity, divergence, **{"routers": {}, "load_s": 1.25, **known})


def speed(median: float, least: float, most: float) -> Speed:
    """Of runs that all read ten times as fast as they write."""
    prefill = Rate(10 * median, 10 * least, 10 * most, 5, 512)
    return Speed(prefill=prefill, decode=Rate(median, least, most, 5, 64), threads=8, setting="")


def comparison(candidates: list[Candidate], evaluations: list[Evaluation], **known: Any) -> Comparison:
    """Of files on a text of 4000 scored tokens."""
    return Comparison(
        command="alphaq-gguf compare a.gguf --reference model --text 'some text.txt' -o out.html",
        date="2026-01-02",
        machine="Linux x86_64, 8 cores",
        versions={"alphaq-gguf": "0.1.0", "llama-cpp-python": "0.3.36", "torch": "2.13.0"},
        reference=ReferenceInfo("Some-MoE-8x1B", "0123456789abcdef" * 4, "pytorch", Estimate(5.1234, 0.05)),
        text=TextInfo(("some text.txt",), "fedcba9876543210" * 4, 512, 16, 4080),
        candidates=tuple(candidates),
        evaluations=tuple(evaluations),
        **known,
    )


def rich(
    n_files: int, *, n_layers: int = 4, n_experts: int = 8, engines: tuple[str, ...] = ("llama.cpp",)
) -> Comparison:
    """A sweep of several strategies and presets with everything that a report can show, the last file per expert."""
    rng = np.random.default_rng(n_files)
    origins = ["alphaq", "mse", "uniform", "inverse-alpha", "preset"]
    candidates, evaluations, cross, tasks = [], [], [], []
    for i in range(n_files):
        origin, level = origins[i % 5], i // 5
        budget = 2.6 + 0.45 * level
        preset = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K")[level % 6]
        name = f"Some-MoE-8x1B-{preset}.gguf" if origin == "preset" else f"Some-MoE-8x1B-{origin}-{budget:.2f}bpw.gguf"
        is_last = i == n_files - 1 and n_files > 1
        candidates.append(
            Candidate(
                name=name,
                fingerprint=f"{i:064x}",
                n_bytes=int(budget * 1.1e9 * (1 + 0.03 * (i % 5 == 4))),
                bpw=budget + 0.6,
                expert_bpw=budget - 0.01 * (i % 3),
                granularity="expert" if is_last else "stack",
                origin=f"preset {preset}" if origin == "preset" else origin,
                budget_bpw=None if origin == "preset" else budget,
                types={"Q8_0": 12, "F32": 9},
                stacks=_stacks(rng, n_layers, n_experts, per_expert=is_last),
                stacking=None if origin == "preset" else _stacking(rng, n_layers),
            )
        )
        kld = 2.0 * math.exp(-1.1 * budget) * (1.0, 0.93, 1.25, 1.7, 1.1)[i % 5]
        for engine in engines:
            routers = {layer: 0.98 - 0.25 * kld - 0.1 * rng.random() * kld for layer in range(1, n_layers + 1)}
            evaluations.append(
                evaluation(
                    name,
                    kld * (1 if engine == "llama.cpp" else 1.01),
                    kld * 0.02,
                    engine,
                    routers=routers,
                    speed=_speed(rng, budget) if engine == "llama.cpp" else None,
                    peak_bytes=int(budget * 1.2e9),
                    notes=() if engine == "llama.cpp" else ("experts dequantised on the fly",),
                )
            )
        if len(engines) > 1:
            cross.append(CrossEngine(name, "pytorch", "llama.cpp", Estimate(0.0004, 0.00002), Estimate(0.995, 0.001)))
        tasks += [
            TaskScore(name, "llama.cpp", task, metric, Estimate(0.7 - 0.3 * kld, 0.011), 1838)
            for task, metric in (("piqa", "acc_norm"), ("boolq", "acc"))
        ]
    alphas = tuple(
        ProjectionAlphas(layer, proj, tuple(float(a) for a in rng.normal(4 + 0.03 * layer, 0.5, n_experts)))
        for proj in PROJECTIONS
        for layer in range(1, n_layers + 1)
    )
    return comparison(
        candidates,
        evaluations,
        cross=tuple(cross),
        alphas=alphas,
        tasks=tuple(tasks),
        notes=("no GPU: no Triton column",),
    )


def bare(full: Comparison) -> Comparison:
    """What is left of `full` where nothing but the KLD was measured."""
    known = {"stacks": (), "stacking": None, "types": None}
    return replace(
        full,
        candidates=tuple(replace(c, **known) for c in full.candidates),
        evaluations=tuple(replace(e, routers={}, speed=None, peak_bytes=None) for e in full.evaluations),
        cross=(),
        alphas=(),
        tasks=(),
    )


def _stacks(rng: np.random.Generator, n_layers: int, n_experts: int, *, per_expert: bool) -> tuple[StackTypes, ...]:
    stacks = []
    for layer in range(1, n_layers + 1):
        for proj in PROJECTIONS:
            if per_expert:
                names, counts = np.unique(rng.choice(TYPES, n_experts), return_counts=True)
                experts = {str(name): int(n) for name, n in zip(names, counts, strict=True)}
            else:
                experts = {str(rng.choice(TYPES[:4])): n_experts}
            stacks.append(StackTypes(layer, proj, experts))
    return tuple(stacks)


def _stacking(rng: np.random.Generator, n_layers: int) -> dict[str, Any]:
    def losses() -> dict[str, float]:
        per_expert = float(rng.uniform(1, 2))
        per_stack = per_expert * float(rng.uniform(1, 1.15))
        uniform = per_stack * float(rng.uniform(1, 1.2))
        kept = (uniform - per_stack) / (uniform - per_expert)
        return {"per_expert": per_expert, "per_stack": per_stack, "uniform": uniform, "kept": kept}

    return {**losses(), "layers": {str(layer): losses() for layer in range(1, n_layers + 1)}}


def _speed(rng: np.random.Generator, budget: float) -> Speed:
    decode, prefill = 80 / budget * float(rng.uniform(0.9, 1.1)), 600 / budget
    return Speed(
        prefill=Rate(prefill, prefill * 0.97, prefill * 1.02, 5, 512),
        decode=Rate(decode, decode * 0.93, decode * 1.04, 5, 64),
        threads=8,
        setting="8 threads",
    )
