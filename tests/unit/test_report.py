"""The report's words, tables and files, against comparisons of known contents."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from xml.etree import ElementTree

import pytest
from comparisons import bare, candidate, comparison, evaluation, rich, speed
from hypothesis import given
from hypothesis import strategies as st

from alphaq_gguf.compare.data import CrossEngine, StackTypes, load_comparison
from alphaq_gguf.errors import AlphaQError, OutputError, UsageError
from alphaq_gguf.evaluate.metrics import Estimate
from alphaq_gguf.report import verdict, write_report
from alphaq_gguf.report.canvas import BITS, PALETTE, SERIES
from alphaq_gguf.report.figure_data import size_kld
from alphaq_gguf.report.figures import draw
from alphaq_gguf.report.ranking import chosen, pareto, with_short_names
from alphaq_gguf.report.sections import memory, sections
from alphaq_gguf.report.summary import summarise
from alphaq_gguf.report.tables import cost_table, engines_table, quality_table, tasks_table
from alphaq_gguf.report.wording import estimate, in_bytes, number, percent, short_names

MIB = 1 << 20


def of_files(*files: tuple[str, int, float], **known):
    """Files by name, size in MiB and KLD; `origins` by name."""
    origins = known.pop("origins", {})
    candidates = [candidate(name, size * MIB, origin=origins.get(name, "")) for name, size, _ in files]
    return comparison(candidates, [evaluation(name, kld) for name, _, kld in files], **known)


def finding(of, title: str) -> str:
    (text,) = [found.text for found in summarise(of) if found.title == title]
    return text


def scored_on(of, n_scored: int):
    """The same from another number of tokens."""
    return replace(of, text=replace(of.text, n_scored=n_scored))


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=9))
def test_the_front_is_what_a_sweep_from_the_smallest_finds(places):
    files = [(f"{i}.gguf", size, kld / 10) for i, (size, kld) in enumerate(places)]
    least, expected = math.inf, set()
    for size in sorted({size for size, _ in places}):
        lowest = min(kld for s, kld in places if s == size)
        if lowest < least:
            expected |= {f"{i}.gguf" for i, place in enumerate(places) if place == (size, lowest)}
            least = lowest
    assert set(pareto(of_files(*files))) == expected


NAMES = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=120)


@given(st.lists(NAMES, min_size=1, max_size=5, unique=True), st.sampled_from([1, 2]), st.sampled_from([5, 5000]))
def test_the_verdict_is_one_line_of_160_characters_however_long_the_names(names, n_tied, n_scored):
    files = [(name, 100 + i // n_tied, 0.5 / (i // n_tied + 1)) for i, name in enumerate(names)]
    line = verdict(scored_on(of_files(*files), n_scored))
    assert len(line) <= 160
    assert "KLD" in line


def test_the_verdict_names_the_nearest_and_the_smallest_or_one_as_near():
    apart = of_files(("small.gguf", 1024, 0.5), ("big.gguf", 2048, 0.04))
    assert verdict(apart) == (
        "big.gguf is nearest of 2: KLD 0.0400 (top token changes in 6.0 % of places) at 2.00 GiB; "
        "small.gguf is smallest: 1.00 GiB, KLD 0.500"
    )
    # 0.001 apart, with a standard error of 0.001 each.
    alike = of_files(("small.gguf", 1024, 0.041), ("big.gguf", 2048, 0.04))
    assert verdict(alike).endswith("; small.gguf is as near within the error at 1.00 GiB")
    alone = of_files(("only.gguf", 1024, 0.04))
    assert verdict(alone) == "only.gguf: KLD 0.0400 (top token changes in 6.0 % of places) at 1.00 GiB"


def test_files_of_equal_figures_tie():
    three = of_files(("a", 1024, 0.04), ("b", 1024, 0.04), ("c", 2048, 0.5))
    nearest = "KLD 0.0400 (top token changes in 6.0 % of places) at 1.00 GiB"
    assert verdict(three) == f"a and b tie as nearest of 3: {nearest}"
    assert finding(three, "Which file").startswith(
        "Of 3 files, none is smaller and none nearer to the reference than the best 2, which tie. They are “a” (1.00"
    )
    all_equal = of_files(*((name, 1024, 0.04) for name in "abc"))
    assert verdict(all_equal) == f"a and 2 more tie: {nearest}"
    assert finding(all_equal, "Which file").startswith("All 3 files tie: they have the same size and the same KLD.")
    assert "Not told apart" not in finding(all_equal, "How certain")
    small = of_files(("a", 512, 0.5), ("b", 512, 0.5), ("c", 1024, 0.04))
    assert verdict(small) == f"c is nearest of 3: {nearest}; a and b tie as smallest: 512 MiB, KLD 0.500"
    assert finding(small, "Which file").endswith(" Of the same size and KLD, so that they tie: “a” and “b”.")
    near = of_files(("a", 512, 0.0405), ("b", 512, 0.0405), ("c", 1024, 0.04))
    assert verdict(near).endswith("; a and b are as near within the error at 512 MiB")


def test_nothing_is_certain_from_ten_tokens():
    origins = {"small": "alphaq", "big": "mse", "level": "mse"}
    of = of_files(("small", 1024, 0.5), ("big", 2048, 0.04), ("level", 1024, 0.1), origins=origins)
    few, enough = scored_on(of, 10), scored_on(of, 11)
    assert verdict(few).endswith("; 10 scored tokens: too few to tell files apart")
    assert finding(few, "How certain") == "Nothing is: from 10 scored tokens a standard error means nothing."
    assert finding(few, "AlphaQ against the others") == "Too few tokens were scored to say."
    assert verdict(enough).endswith("; level is smallest: 1.00 GiB, KLD 0.100")
    assert "from 11 scored tokens. " in finding(enough, "How certain")
    assert "loses 1" in finding(enough, "AlphaQ against the others")


def test_words_say_how_many_ranges_of_speeds_overlap():
    def told(*rates: float) -> str:
        """Files that write so many tokens per second, give or take 1."""
        runs = [evaluation(f"{i}", 0.1, speed=speed(rate, rate - 1, rate + 1)) for i, rate in enumerate(rates)]
        text = finding(comparison([candidate(f"{i}", 10) for i in range(len(rates))], runs), "Speed")
        return text[text.index(")") + 3 :]

    assert told(20, 10) == "The range of the other measurement does not overlap with that."
    assert told(20, 19) == "The range of the other measurement overlaps with that."
    assert told(20, 10, 10) == "The ranges of none of the 2 other measurements overlap with that."
    assert told(20, 19, 19) == "The ranges of all of the 2 other measurements overlap with that."
    assert told(20, 19, 10) == "Of the ranges of the 2 other measurements, 1 overlaps with that."
    assert told(20, 19, 19, 10) == "Of the ranges of the 3 other measurements, 2 overlap with that."


def test_memory_says_which_process_it_is_of():
    def caption(*runs) -> str:
        (figure,) = memory(comparison([candidate("a", 10)], list(runs)))
        return figure.caption

    timed = evaluation("a", 0.1, speed=speed(20, 19, 21), peak_bytes=MIB)
    judged = evaluation("a", 0.1, peak_bytes=MIB)
    # PyTorch times a file in the process that judged it.
    other = replace(timed, engine="pytorch")
    assert caption(timed).startswith("Peak of a process that only ran the file, to time it. ")
    assert caption(judged) == caption(other) == caption(judged, other)
    assert caption(judged).startswith("Peak of the process that judged the file. ")
    assert caption(timed, other).startswith("Peak, in llama.cpp where speed was measured, of a process that only ran")


def test_files_that_give_no_number_are_named_and_left_out():
    of = of_files(("good.gguf", 10, 0.1), ("broken.gguf", 5, math.nan), failures={"gone.gguf": "no such file"})
    assert pareto(of) == ["good.gguf"]
    assert finding(of, "What failed") == (
        "Could not be judged: gone.gguf. Gives no numbers (not finite): “broken.gguf” in llama.cpp."
    )
    nothing = of_files(("broken.gguf", 5, math.nan))
    assert verdict(nothing) == "no file could be judged"
    assert [found.title for found in summarise(nothing)] == ["Nothing to compare"]


def test_words_say_which_file_is_beaten_and_by_which():
    of = of_files(("a", 10, 0.4), ("b", 20, 0.2), ("c", 30, 0.1), ("worse", 25, 0.3))
    assert finding(of, "Which file") == (
        "3 of 4 files are worth choosing from: no other is both smaller and nearer. From the smallest: “a” (10.0 MiB, "
        "KLD 0.400), “b” (20.0 MiB, KLD 0.200) and “c” (30.0 MiB, KLD 0.100). Beaten in both: “worse” by “b”."
    )


def test_words_say_where_a_difference_is_within_the_error():
    of = of_files(("a", 10, 0.1010), ("b", 20, 0.1), ("late", 30, 0.1005))
    text = finding(of, "How certain")
    assert "Not told apart by KLD, so that the smaller is the better choice: “a” and “b” (0.1010 ± 0.0010" in text
    assert "not measurably further from the reference: “late”" in text
    clear = of_files(("a", 10, 0.4), ("b", 20, 0.2), ("late", 30, 0.3))
    assert (
        "Of the files that no other beats, each is nearer than the next smaller one by more than that. "
        "Every file that is beaten is beaten by more"
    ) in finding(clear, "How certain")


def test_words_say_plainly_where_alphaq_loses():
    origins = {"a1": "alphaq", "a2": "alphaq", "m1": "mse", "m2": "mse", "p": "preset Q4_K_M", "far": "mse"}
    of = of_files(
        ("a1", 1000, 0.30),
        ("m1", 1005, 0.20),  # of equal size and nearer: a loss
        ("a2", 2000, 0.10),
        ("m2", 1999, 0.1005),  # within the error: a tie
        ("p", 3000, 0.15),  # larger and further: a win over a2, incomparable with a1
        ("far", 4000, 0.01),  # larger and nearer: cannot be held against either
        origins=origins,
    )
    text = finding(of, "AlphaQ against the others")
    assert "of 2 pairs with mse it loses 1 and ties 1; of 1 pair with llama.cpp's presets it wins 1." in text
    assert "The worst loss: “a1” has KLD 0.300, “m1” 0.200 (1000 MiB and 1005 MiB)." in text
    wins = of_files(("a", 10, 0.1), ("u", 10, 0.2), origins={"a": "alphaq", "u": "uniform"})
    assert finding(wins, "AlphaQ against the others").endswith("AlphaQ loses nowhere in this comparison.")
    apart = of_files(("a", 10, 0.2), ("u", 20, 0.1), origins={"a": "alphaq", "u": "uniform"})
    assert "cannot be held against each other" in finding(apart, "AlphaQ against the others")
    assert "AlphaQ against the others" not in [found.title for found in summarise(of_files(("a", 1, 0.1)))]


def per_expert(of, *names: str):
    """The same with a type per expert in the files `names`."""
    changed = [replace(c, granularity="expert") if c.name in names else c for c in of.candidates]
    return replace(of, candidates=tuple(changed))


def test_words_hold_like_against_like_where_experts_have_types_of_their_own():
    origins = {"a": "alphaq", "m": "mse", "ae": "alphaq", "me": "mse", "p": "preset Q4_K_M"}
    files = [("a", 1000, 0.3), ("m", 1000, 0.2), ("ae", 1000, 0.1), ("me", 1001, 0.15), ("p", 1009, 0.12)]
    of = per_expert(of_files(*files, origins=origins), "ae", "me")
    text = finding(of, "AlphaQ against the others")
    assert (
        "With one type per stack, of 1 pair with mse it loses 1; of 1 pair with llama.cpp's presets it loses 1. "
        "With a type per expert, of 1 pair with mse it wins 1; of 1 pair with llama.cpp's presets it wins 1. "
        "The worst loss: “a” has KLD 0.300, “p” 0.120 (1000 MiB and 1009 MiB)."
    ) in text
    text = finding(of, "A type per expert")
    assert text.endswith(
        ": of 1 pair of alphaq it wins 1; of 1 pair of mse it wins 1. "
        "The largest gain: “ae” has KLD 0.100, “a” 0.300 (1000 MiB and 1000 MiB)."
    )
    titles = [found.title for found in summarise(per_expert(of_files(("a", 10, 0.1), ("b", 10, 0.2)), "a", "b"))]
    assert "A type per expert" not in titles


def test_series_with_a_type_per_expert_have_their_strategys_colour_and_a_look_of_their_own():
    files = [(f"{origin}{i}", 10 + i, 0.1 / i) for origin in ("mse", "alphaq") for i in (1, 2, 3, 4)]
    of = of_files(*files, origins={name: name[:-1] for name, _, _ in files})
    of = per_expert(of, "mse3", "mse4", "alphaq3", "alphaq4")
    figure = size_kld(of)[0]
    assert figure.data["joined"] == ["mse", "mse, per expert", "alphaq", "alphaq, per expert"]
    assert "plug-in" not in figure.caption
    svg = draw(figure).svg
    assert all(f">{series}<" in svg for series in figure.data["joined"])
    looks = []
    for first in (1, 3, 5, 7):
        point = svg[svg.index(f'id="size-kld-point-{first}"') :]
        colour, shape = re.findall("fill: (#......)", point)[0], re.findall('xlink:href="#([^"]*)"', point)[0]
        looks.append((colour, shape))
    colours, shapes = zip(*looks, strict=True)
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert len(set(shapes)) == 4
    mixed = replace(of.candidates[2], stacks=(StackTypes(0, "up", {"Q2_K": 3, "Q4_K": 5}),))
    of = replace(of, candidates=(*of.candidates[:2], mixed, *of.candidates[3:]))
    assert "run in llama.cpp with the plug-in only." in size_kld(of)[0].caption


def test_words_say_how_routers_and_engines_agree():
    files = [candidate("a", 10), candidate("b", 20)]
    runs = [evaluation("a", 0.5, routers={1: 0.5, 7: 0.7}), evaluation("b", 0.1, routers={1: 0.95, 7: 0.85})]
    near = CrossEngine("b", "pytorch", "llama.cpp", Estimate(0.009, 0.001), Estimate(0.99, 0.01))
    text = finding(comparison(files, runs, cross=(near,)), "Routers")
    assert text.startswith("In “b” routers choose the same experts as the reference for 90.0 % of tokens on average")
    assert "for 85.0 % in layer 7, the worst. In “a” routers" in text
    assert "for 60.0 % of tokens on average over layers, for 50.0 % in layer 1" in text
    assert "less than a tenth" in finding(comparison(files, runs, cross=(near,)), "Engines")
    far = replace(near, kld=Estimate(0.011, 0.001))
    assert "the engine matters to the result: “b”." in finding(comparison(files, runs, cross=(far,)), "Engines")


def test_llama_cpp_is_the_engine_to_go_by_where_it_ran_the_file():
    runs = [evaluation("a", 0.3, engine="pytorch"), evaluation("a", 0.2), evaluation("b", 0.1, engine="triton")]
    of = comparison([candidate("a", 10), candidate("b", 20)], runs)
    assert {name: found.engine for name, found in chosen(of).items()} == {"a": "llama.cpp", "b": "triton"}
    # An engine that has run all files comes before one that has not, whatever it is.
    both = replace(of, evaluations=(*of.evaluations, evaluation("a", 0.02, engine="triton")))
    assert {name: found.engine for name, found in chosen(both).items()} == {"a": "triton", "b": "triton"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0.012345), "0.0123"),
        (number(412.4), "412"),
        (number(1.2345e-6), "1.23e-6"),
        (number(0), "0"),
        (number(math.nan), "nan"),
        (estimate(Estimate(0.012345, 0.00042)), "0.01235 ± 0.00042"),
        (estimate(Estimate(98.765, 1.23)), "98.8 ± 1.2"),
        (estimate(Estimate(5.5, 0)), "5.50"),
        (estimate(Estimate(0.9876, 0.0012), 100), "98.76 ± 0.12"),
        (percent(0.0213), "2.1 %"),
        (percent(0.99912), "99.91 %"),
        (in_bytes(13207024435), "12.3 GiB"),
        (in_bytes(1000 * MIB), "1000 MiB"),
        (in_bytes(12), "12 B"),
    ],
)
def test_numbers_are_shown_with_the_digits_that_mean_something(text, expected):
    assert text == expected


def test_short_names_tell_files_apart():
    names = ["Some-MoE-8x1B-alphaq-3.5.gguf", "Some-MoE-8x1B-alphaq-4.gguf", "Some-MoE-8x1B-Q4_K_M.gguf"]
    assert short_names(names) == ["alphaq-3.5", "alphaq-4", "Q4_K_M"]
    assert short_names(["model.gguf"]) == ["model"]
    assert short_names(["a.gguf", "b.gguf"]) == ["a", "b"]
    # What the ellipsis would make equal stays whole.
    alike = ["x" * 40 + letter + "y" * 40 + ".gguf" for letter in "ab"]
    assert short_names(alike) == alike
    assert short_names(["evil\nname"]) == ["evil\N{REPLACEMENT CHARACTER}name"]


def test_the_best_of_each_column_is_marked_and_unmeasured_columns_are_left_out():
    of = comparison(
        [candidate("a", 10 * MIB), candidate("b", 20 * MIB)],
        [evaluation("a", 0.3), evaluation("b", 0.1), evaluation("b", 0.11, engine="pytorch")],
    )
    table = quality_table(of)
    titles = [column.title for column in table.columns]
    assert "Routers" not in titles
    assert [[cell.text for cell in row][:5] for row in table.rows] == [
        ["1", "a", "0.3000 ± 0.0010", "llama.cpp, cpu", "10.0 MiB"],
        ["2", "b", "0.1000 ± 0.0010", "llama.cpp, cpu", "20.0 MiB"],
        ["2", "b", "0.1100 ± 0.0010", "PyTorch, cpu", "20.0 MiB"],
    ]
    best = {title: [row[i].best for row in table.rows] for i, title in enumerate(titles)}
    assert best["Size"] == [True, False, False]
    assert best["Mean KLD"] == best["PPL"] == best["Top-1, %"] == [False, True, False]
    assert best["bpw"] == [False] * 3
    assert [column.title for column in cost_table(of).columns] == ["#", "File", "Engine", "Load"]
    assert engines_table(of) is None
    assert tasks_table(of) is None


def test_tasks_of_other_sizes_have_columns_of_their_own():
    full = rich(2)
    other = replace(full.tasks[0], n=100)
    table = tasks_table(replace(full, tasks=(*full.tasks[1:], other)))
    assert table
    assert [(column.title, column.hint) for column in table.columns[3:]] == [
        ("boolq", "acc, %, n = 1,838"),
        ("piqa", "acc_norm, %, n = 1,838"),
        ("piqa", "acc_norm, %, n = 100"),
    ]
    first = next(row for row in table.rows if row[1].text == full.tasks[0].file)
    assert first[4].text == "\N{EN DASH}"


def test_sections_without_data_say_why():
    empty = {section.name for section in sections(bare(rich(3))) if not section.figures}
    assert empty == {"routers", "speed", "memory", "alphas", "bits", "stacking"}
    assert all(section.missing for section in sections(bare(rich(3))))


def contrast(one: str, other: str) -> float:
    """By WCAG 2.2's definition of relative luminance."""

    def luminance(colour: str) -> float:
        return dot((0.2126, 0.7152, 0.0722), linear(colour))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_digits_can_be_read_on_the_colours_of_bits():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert min(contrast(ink, fill) for fill, ink in BITS.values()) >= 4.5


def test_colours_of_the_page_have_one_role_each():
    light = [colours[0] for colours in PALETTE.values()]
    fixed = [colour for pair in BITS.values() for colour in pair]
    assert len(set(light)) == len(light)
    assert not set(light) & set(fixed)


def dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def linear(colour: str) -> list[float]:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


# What full dichromats see, from linear RGB (Machado, Oliveira and Fernandes, 2009).
SEEN = {
    "all colours": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "no blue": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def oklab(rgb: list[float]) -> tuple[float, ...]:
    """Of linear RGB, by the definition of Oklab."""
    to_cones = (
        (0.4122214708, 0.5363325363, 0.0514459929),
        (0.2119034982, 0.6806995451, 0.1073969566),
        (0.0883024619, 0.2817188376, 0.6299787005),
    )
    to_lab = (
        (0.2104542553, 0.7936177850, -0.0040720468),
        (1.9779984951, -2.4285922050, 0.4505937099),
        (0.0259040371, 0.7827717662, -0.8086757660),
    )
    cones = [math.cbrt(dot(row, rgb)) for row in to_cones]
    return tuple(dot(row, cones) for row in to_lab)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_eight_series_are_told_apart_from_each_other_and_from_the_page(scheme, seen):
    colours = [both[scheme] for name, both in PALETTE.items() if name.startswith("series-")]
    assert len(colours) == 8
    assert min(contrast(colour, PALETTE["surface"][scheme]) for colour in colours) >= 3
    labs = [oklab([min(1, max(0, dot(row, linear(colour)))) for row in SEEN[seen]]) for colour in colours]
    # Black and white are 1 apart.
    assert min(math.dist(a, b) for a, b in combinations(labs, 2)) > 0.095


def test_eight_origins_have_eight_colours():
    origins = ["preset Q4_K", "alphaq", "mse", "uniform", "random", "inverse-alpha", "self", "sim-routing"]
    of = of_files(*((f"{i}", 10 + i, 0.1 + i) for i in range(8)), origins={f"{i}": o for i, o in enumerate(origins)})
    svg = draw(size_kld(of)[0]).svg
    points = [svg[svg.index(f'id="size-kld-point-{i}"') :] for i in range(1, 9)]
    assert {next(iter(re.findall("fill: (#......)", point))) for point in points} == set(SERIES)


class Elements(HTMLParser):
    """Elements by name, ids, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_data(self, data):
        self.text += data


EVIL = "<script>alert(1)</script>&\"' onload=x $a_b$ \N{CJK UNIFIED IDEOGRAPH-65E5}.gguf"


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A report of files with names that would break a careless page, and the folder it is in."""
    folder = tmp_path_factory.mktemp("evil")
    files = [candidate(EVIL, 10 * MIB), candidate("_hidden.gguf", 20 * MIB, expert_bpw=5.0)]
    of = comparison(files, [evaluation(EVIL, 0.0), evaluation("_hidden.gguf", 0.1)], notes=(EVIL,))
    write_report(folder / "out.html", of)
    return folder, of


def test_names_of_files_are_text_and_nothing_else(evil):
    folder, _ = evil
    page = Elements((folder / "out.html").read_text(encoding="utf-8"))
    assert "script" not in page.names
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert EVIL in page.text
    # matplotlib hides legend labels that begin with an underscore, and reads formulas between dollars.
    shown = " ".join((folder / "out-figures/histogram.svg").read_text(encoding="utf-8").split())
    assert "2 _hidden<" in shown
    assert "$a_b$" in shown


def test_the_page_says_where_its_command_is_run_and_what_the_text_is(evil, tmp_path):
    folder, of = evil
    own = replace(of, text=replace(of.text, names=("self", "a.txt"), is_own=True))
    write_report(tmp_path / "own.html", own)
    page = Elements((tmp_path / "own.html").read_text(encoding="utf-8")).text
    assert "text that the reference wrote itself, a.txt" in page
    assert "in the directory that it was first run in; --force lets it replace this report" in page
    assert "some text.txt" in Elements((folder / "out.html").read_text(encoding="utf-8")).text


def test_ids_are_unique_and_every_reference_has_one(evil):
    text = (evil[0] / "out.html").read_text(encoding="utf-8")
    page = Elements(text)
    assert len(page.ids) == len(set(page.ids))
    referred = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert referred
    assert {a or b for a, b in referred} <= set(page.ids)


def test_the_page_asks_the_network_for_nothing(evil):
    page = Elements((evil[0] / "out.html").read_text(encoding="utf-8"))
    links = {value or "" for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")}
    inside = {value for value in links if value.startswith(("#", "data:", "out-figures/", "out.json"))}
    assert links == inside


def test_figures_beside_the_page_are_whole(evil):
    folder, of = evil
    assert load_comparison(folder / "out.json") == of
    names = {figure.name for section in sections(with_short_names(of)) for figure in section.figures}
    assert names == {"size-kld", "bpw-kld", "histogram"}
    assert {path.name for path in (folder / "out-figures").iterdir()} == {
        f"{n}{s}" for n in names for s in (".svg", ".png")
    }
    for name in names:
        root = ElementTree.fromstring((folder / f"out-figures/{name}.svg").read_text(encoding="utf-8"))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert (folder / f"out-figures/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_comparison_makes_the_same_bytes(evil, tmp_path):
    folder, of = evil
    write_report(tmp_path / "out.html", of)
    for path in [folder / "out.html", folder / "out.json", *(folder / "out-figures").iterdir()]:
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()


@pytest.fixture
def small():
    return of_files(("a.gguf", 10, 0.1))


def test_nothing_is_overwritten_without_force(tmp_path, small):
    out = tmp_path / "out.html"
    assert write_report(out, small) == [out, tmp_path / "out.json", tmp_path / "out-figures"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(OutputError, match=r"out\.html exists"):
        write_report(out, small)
    out.unlink()
    with pytest.raises(OutputError, match=r"out\.json exists"):
        write_report(out, small)
    (tmp_path / "out.json").unlink()
    with pytest.raises(OutputError, match="out-figures exists"):
        write_report(out, small)
    stale = tmp_path / "out-figures/bits-9.svg"
    stale.write_text("of an earlier comparison")
    write_report(out, small, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before
    (tmp_path / "out-figures/thesis.txt").write_text("not ours")
    with pytest.raises(OutputError, match="more than a report's figures"):
        write_report(out, small, force=True)
    assert (tmp_path / "out-figures/thesis.txt").read_text() == "not ours"


def test_a_report_has_a_name_that_ends_in_html(tmp_path, small):
    with pytest.raises(UsageError, match=r"ends in \.html"):
        write_report(tmp_path / "out.json", small)


def test_without_matplotlib_the_extra_is_named_and_nothing_is_written(tmp_path, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AlphaQError) as raised:
        write_report(tmp_path / "out.html", small)
    assert raised.value.hint == "pip install 'alphaq-gguf[report]'"
    assert list(tmp_path.iterdir()) == []


def test_importing_the_report_loads_no_matplotlib():
    code = "import sys, alphaq_gguf.report; print({'matplotlib', 'torch', 'llama_cpp'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
