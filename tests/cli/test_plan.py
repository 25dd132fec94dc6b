"""`plan` and `--fit`: what they promise is what converting gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from checkpoints import build_moe

from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.forecast import GIB
from alphaq_gguf.memory import ContextSettings, memory_need


def plan(cli, *arguments: object) -> dict:
    code, out, err = cli("plan", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def allocated(cli, *arguments: object) -> dict:
    code, out, err = cli("allocate", *arguments, "--strategy", "mse", "--json")
    assert code == 0, err
    return json.loads(out)["result"]


def test_the_feasible_range_is_that_of_real_files(tiny: Path, cli) -> None:
    found = plan(cli, tiny)
    least, most = allocated(cli, tiny, "--bpw", found["least_bpw"]), allocated(cli, tiny, "--bpw", found["most_bpw"])
    assert (least["expert_bpw"], most["expert_bpw"]) == (2.625, 8.5) == (found["least_bpw"], found["most_bpw"])
    # A forecast leaves room for the longest recipe that the file's metadata may hold.
    assert least["file_bytes"] <= found["least_bytes"] <= least["file_bytes"] + 4096
    assert most["file_bytes"] <= found["most_bytes"] <= most["file_bytes"] + 4096
    assert found["groups"] == [
        {
            "first_layer": 0,
            "last_layer": 1,
            "projs": ["gate", "up", "down"],
            "n_experts": 4,
            "n_rows": 256,
            "n_cols": 256,
            "types": ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"],
        }
    ]


def test_rows_that_no_k_quant_fits_are_named(tmp_path: Path, cli) -> None:
    source = build_moe(tmp_path / "odd", moe_intermediate_size=352)
    found = plan(cli, source)
    assert [(g["projs"], g["n_cols"], g["types"][0]) for g in found["groups"]] == [
        (["down"], 352, "Q4_0"),
        (["gate", "up"], 256, "Q2_K"),
    ]
    assert found["least_bpw"] == pytest.approx((4.5 + 2 * 2.625) / 3)
    code, out, _ = cli("plan", source)
    assert code == 0
    assert "down: rows of 352 are no multiple of 256: no Q2_K to Q6_K, at least Q4_0 (4.5 bits)" in out


def test_a_file_that_fits_leaves_room_for_what_running_it_takes(tiny: Path, tmp_path: Path, cli) -> None:
    source = open_source(tiny)
    beside = memory_need(source.fields, source.tensors, ContextSettings(4096)).beside_weights
    smallest = plan(cli, tiny, "--ctx", 4096)["least_bytes"]
    fit = beside + smallest + 200_000
    result = allocated(cli, tiny, "--fit", fit, "--ctx", 4096)
    assert result["memory_bytes"] == result["file_bytes"] + beside <= fit
    assert result["expert_bpw"] > 2.625
    # The same file by its size: nothing but the name of the budget differs in its metadata.
    by_size = allocated(cli, tiny, "--size", fit - beside)
    assert by_size["expert_bytes"] == result["expert_bytes"]
    out = tmp_path / "out.gguf"
    assert cli("convert", tiny, "-o", out, "--fit", fit, "--ctx", 4096, "--strategy", "mse")[0] == 0
    assert out.stat().st_size == result["file_bytes"]


def test_each_memory_size_of_the_plan_is_what_fit_gives(tmp_path: Path, cli, monkeypatch) -> None:
    source = build_moe(tmp_path / "wide", num_experts=8)
    opened = open_source(source)
    beside = memory_need(opened.fields, opened.tensors, ContextSettings(8192)).beside_weights
    sizes = tuple(beside + room for room in (100_000, 3_000_000, 4_000_000, 2 * GIB))
    monkeypatch.setattr("alphaq_gguf.pipeline.MEMORY_SIZES", sizes)
    fits = plan(cli, source)["fits"]
    assert [fit["memory"] for fit in fits] == list(sizes)
    assert fits[0]["bpw"] is None
    assert fits[3]["bpw"] == 8.5
    for fit in fits[1:]:
        result = allocated(cli, source, "--fit", fit["memory"])
        assert result["file_bytes"] <= fit["file_bytes"]
        # Whole stacks change type, so that a part of the budget may stay unspent.
        assert fit["bpw"] - 1 < result["expert_bpw"] <= fit["bpw"]


def test_the_table_names_the_option_and_what_is_lacking(tiny: Path, cli, monkeypatch) -> None:
    monkeypatch.setattr("alphaq_gguf.pipeline.MEMORY_SIZES", (GIB // 4, GIB))
    code, out, _ = cli("plan", tiny, "--ctx", 1024)
    assert code == 0
    assert "--fit 1GiB --ctx 1024" in out
    assert "lacks 2" in out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--fit", "100MiB"], 1, "bytes of memory are too few at a context of 8192"),
        (["--fit", "100MiB"], 1, "allow at least --fit"),
        (["--fit", "much"], 2, "--fit 'much' is not a size"),
        (["--fit", "12GiB", "--bpw", "4"], 2, "give exactly one budget"),
        (["--bpw", "4", "--ctx", "4096"], 2, "--ctx belongs to --fit"),
        (["--fit", "12GiB", "--ctx", "0"], 2, "--ctx"),
    ],
)
def test_budgets_that_make_no_sense(options: list[str], code: int, message: str, tiny: Path, cli) -> None:
    found, _, err = cli("allocate", tiny, *options)
    assert found == code
    assert message in err


def test_a_plan_of_what_is_no_model(tmp_path: Path, cli) -> None:
    code, _, err = cli("plan", tmp_path / "nothing here")
    assert code == 1
    assert "does not exist" in err


@pytest.mark.parametrize("asked", ["1MiB", "500MiB"])
def test_the_least_memory_that_is_named_is_enough(asked: str, tiny: Path, cli) -> None:
    code, _, err = cli("allocate", tiny, "--fit", asked, "--strategy", "mse")
    assert code == 1
    least = int(re.findall(r"allow at least --fit (\d+)", err)[0])
    result = allocated(cli, tiny, "--fit", least)
    assert result["expert_bpw"] == 2.625
    assert least - 2000 < result["memory_bytes"] <= least
