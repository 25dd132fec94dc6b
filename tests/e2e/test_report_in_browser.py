"""The report in a real Chromium: what it shows, read back through the axes' ticks, equals the JSON beside it."""

from __future__ import annotations

import base64
import io
import json
import math
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparisons import rich

from alphaq_gguf.evaluate.metrics import HISTOGRAM_EDGES
from alphaq_gguf.report import write_report

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

GIB = 1 << 30
N_FEW, N_MANY = 5, 8
# On the screen, in CSS pixels.
CLOSE = 0.6

# Ticks of each axis of each plot of a figure, [label, place], by their marks or, where there are none, their labels;
# and a function for the box of what has an id.
LIBRARY = """
window.place = element => {
  const b = element.getBoundingClientRect();
  return {x: b.x + b.width / 2, y: b.y + b.height / 2, left: b.left, right: b.right, top: b.top, bottom: b.bottom};
};
window.box = id => {const element = document.getElementById(id); return element && place(element)};
window.axes = figure => [...document.querySelectorAll(`#figure-${figure} svg g`)]
  .filter(g => /-axes_[0-9]+$/.test(g.id))
  .map(g => ['x', 'y'].map(way => [...g.querySelectorAll(`[id*="-${way}tick_"]`)].map(tick => {
    const text = tick.querySelector('text');
    return text && [text.textContent, place(tick.querySelector('use') || text)[way]];
  }).filter(tick => tick)));
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Reports of few files (lines) and of many (maps)."""
    folder = tmp_path_factory.mktemp("reports")
    write_report(folder / "few.html", rich(N_FEW, engines=("llama.cpp", "pytorch")))
    write_report(folder / "many.html", rich(N_MANY, n_layers=3, n_experts=5))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser: Any, path: Path, *, scheme: str = "light", width: int = 1280) -> None:
    """Open the page and unfold what is folded."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    colours = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", colours)
    browser.get(path.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(e => e.open = true);" + LIBRARY)


@pytest.fixture
def few(browser, folder) -> tuple[Any, dict[str, Any]]:
    show(browser, folder / "few.html")
    return browser, json.loads((folder / "few.json").read_text())


@pytest.fixture
def many(browser, folder) -> tuple[Any, dict[str, Any]]:
    show(browser, folder / "many.html")
    return browser, json.loads((folder / "many.json").read_text())


def axes(browser: Any, figure: str) -> list[list[list[tuple[str, float]]]]:
    return browser.execute_script("return axes(arguments[0])", figure)


def box(browser: Any, name: str) -> dict[str, float]:
    found = browser.execute_script("return box(arguments[0])", name)
    assert found, name
    return found


def scale(ticks: list[tuple[str, float]]):
    """From values to pixels, by the ticks: a straight line through the values or through their logarithms."""
    values, places = np.array([float(label) for label, _ in ticks]), np.array([place for _, place in ticks])
    assert len(values) >= 2
    fits = []
    for transform in (lambda v: v, np.log10) if (values > 0).all() else (lambda v: v,):
        slope, start = np.polyfit(transform(values), places, 1)
        error = np.abs(slope * transform(values) + start - places).max()
        fits.append((error, lambda v, f=transform, a=slope, b=start: a * f(np.asarray(v, dtype=float)) + b))
    error, best = min(fits, key=lambda fit: fit[0])
    assert error < CLOSE
    return best


def test_the_console_is_silent_and_nothing_is_fetched(browser, folder):
    for name in ("few.html", "many.html"):
        show(browser, folder / name)
        assert browser.get_log("browser") == []
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_every_figure_is_there_and_has_a_size(browser, folder):
    for name in ("few", "many"):
        show(browser, folder / f"{name}.html")
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('figure')].map(f => {const b = f.querySelector('svg')"
            ".getBoundingClientRect(); return [f.id.replace('figure-', ''), b.width, b.height]})"
        )
        kept = {path.stem for path in (folder / f"{name}-figures").glob("*.svg")}
        assert {figure for figure, _, _ in sizes} == kept
        assert len(kept) >= 10
        assert all(width > 500 and height > 80 for _, width, height in sizes)


def test_sizes_and_klds_are_where_the_json_says(few):
    browser, data = few
    assert len(data["candidates"]) == N_FEW
    kld = {e["file"]: e["divergence"]["kld"] for e in data["evaluations"] if e["engine"] == "llama.cpp"}
    for figure, value in (("size-kld", lambda c: c["n_bytes"] / GIB), ("bpw-kld", lambda c: c["expert_bpw"])):
        x, y = map(scale, axes(browser, figure)[0])
        for i, candidate in enumerate(data["candidates"], 1):
            mean = kld[candidate["name"]]
            point, error = box(browser, f"{figure}-point-{i}"), box(browser, f"{figure}-error-{i}")
            assert point["x"] == pytest.approx(x(value(candidate)), abs=CLOSE)
            assert point["y"] == pytest.approx(y(mean["value"]), abs=CLOSE)
            # The stroke's own width is part of the box in some versions.
            assert error["bottom"] == pytest.approx(y(mean["value"] - mean["standard_error"]), abs=1.5)
            assert error["top"] == pytest.approx(y(mean["value"] + mean["standard_error"]), abs=1.5)


def test_router_agreement_is_where_the_json_says(few):
    browser, data = few
    x, y = map(scale, axes(browser, "routers")[0])
    for i, candidate in enumerate(data["candidates"], 1):
        (found,) = [e for e in data["evaluations"] if (e["file"], e["engine"]) == (candidate["name"], "llama.cpp")]
        marks = browser.execute_script(
            "return [...document.querySelectorAll(`#routers-series-${arguments[0]} use`)].map(u => {"
            "const b = u.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]})",
            i,
        )
        expected = [(x(int(layer)), y(share * 100)) for layer, share in found["routers"].items()]
        assert np.abs(np.array(marks) - np.array(expected)).max() < CLOSE


def test_the_histogram_has_the_steps_of_the_json(few):
    browser, data = few
    x, y = map(scale, axes(browser, "histogram")[0])
    for i, candidate in enumerate(data["candidates"], 1):
        found = next(e for e in data["evaluations"] if e["file"] == candidate["name"])
        counts = np.array(found["divergence"]["histogram"])
        corners = browser.execute_script(
            "const p = document.querySelector(`#histogram-series-${arguments[0]} path`), m = p.getScreenCTM();"
            "const n = p.getAttribute('d').match(/-?[0-9.]+/g).map(Number), out = [];"
            "for (let i = 0; i < n.length; i += 2) {const q = new DOMPoint(n[i], n[i + 1]).matrixTransform(m);"
            "out.push([q.x, q.y])} return out",
            i,
        )
        edges = x(10.0 ** np.array(HISTOGRAM_EDGES))
        tops = y(counts / counts.sum() * 100)
        flat = [(a, b) for a, b in pairwise(corners) if abs(a[1] - b[1]) < 0.01]
        for k in np.nonzero(counts)[0]:
            middle = (edges[k] + edges[k + 1]) / 2
            assert tops[k] == pytest.approx(next(a[1] for a, b in flat if a[0] < middle < b[0]), abs=CLOSE)


def test_bars_are_as_long_as_the_json_says(few):
    browser, data = few
    number = {candidate["name"]: i for i, candidate in enumerate(data["candidates"], 1)}
    plots = dict(zip(("decode", "prefill"), axes(browser, "speed"), strict=True))
    timed = [e for e in data["evaluations"] if e["speed"]]
    assert len(timed) == N_FEW
    for e in timed:
        name = f"{number[e['file']]}-{e['engine']}"
        for kind, plot in plots.items():
            x, rate = scale(plot[0]), e["speed"][kind]
            bar, spread = (box(browser, f"speed-{part}-{kind}-{name}") for part in ("bar", "range"))
            assert (bar["left"], bar["right"]) == pytest.approx((x(0), x(rate["median"])), abs=CLOSE)
            assert (spread["left"], spread["right"]) == pytest.approx((x(rate["least"]), x(rate["most"])), abs=1.5)
    (plot,) = axes(browser, "memory")
    for e in data["evaluations"]:
        bar = box(browser, f"memory-bar-peak-{number[e['file']]}-{e['engine']}")
        assert bar["right"] == pytest.approx(scale(plot[0])(e["peak_bytes"] / GIB), abs=CLOSE)
    # Nothing is shown of what was not measured.
    pages = browser.execute_script("return document.querySelectorAll('[id^=\"speed-bar\"]').length")
    assert pages == 2 * N_FEW


def test_boxes_are_the_quartiles_of_the_json(few):
    browser, data = few
    plots = axes(browser, "alphas")
    projections = list(dict.fromkeys(entry["proj"] for entry in data["alphas"]))
    assert len(plots) == len(projections) == 3
    for entry in data["alphas"]:
        y = scale(plots[projections.index(entry["proj"])][1])
        name = f"{entry['proj']}-{entry['layer']}"
        ordered = sorted(entry["alphas"])
        middle = (ordered[3] + ordered[4]) / 2  # of 8 experts
        median, body, whisker = (box(browser, f"alphas-{part}-{name}") for part in ("median", "box", "whisker"))
        assert median["y"] == pytest.approx(y(middle), abs=CLOSE)
        # Quartiles of 8 lie three quarters of the way between the 2nd and 3rd, and mirrored.
        assert body["bottom"] == pytest.approx(y(ordered[1] + 0.75 * (ordered[2] - ordered[1])), abs=CLOSE)
        assert body["top"] == pytest.approx(y(ordered[5] + 0.25 * (ordered[6] - ordered[5])), abs=CLOSE)
        assert (whisker["bottom"], whisker["top"]) == pytest.approx((y(ordered[0]), y(ordered[-1])), abs=1.5)


def test_cells_of_bits_are_the_shares_of_the_json(few):
    browser, data = few
    for i, candidate in enumerate(data["candidates"], 1):
        (plot,) = axes(browser, f"bits-{i}")
        x = scale(plot[0])
        rows = dict(plot[1])
        for stack in candidate["stacks"]:
            n_experts = sum(stack["experts"].values())
            cells = {
                t: box(browser, f"bits-{i}-cell-{stack['proj']}-{stack['layer']}-{t[1]}") for t in stack["experts"]
            }
            heights = {t: cell["bottom"] - cell["top"] for t, cell in cells.items()}
            total = sum(heights.values())
            for name, n in stack["experts"].items():
                assert heights[name] / total == pytest.approx(n / n_experts, abs=0.03)
                assert cells[name]["x"] == pytest.approx(x(stack["layer"]), abs=1)
            middle = (min(c["top"] for c in cells.values()) + max(c["bottom"] for c in cells.values())) / 2
            assert middle == pytest.approx(rows[stack["proj"]], abs=1)


def test_stacking_losses_are_where_the_json_says(few):
    browser, data = few
    x = scale(axes(browser, "stacking")[0][0])
    known = [(i, c["stacking"]) for i, c in enumerate(data["candidates"], 1) if c["stacking"]]
    assert len(known) == 4
    for i, found in known:
        for part, key in (("stack", "per_stack"), ("uniform", "uniform")):
            expected = x(found[key] / found["per_expert"])
            assert box(browser, f"stacking-{part}-{i}")["x"] == pytest.approx(expected, abs=CLOSE)


def pixels_of(browser: Any, image: Any) -> np.ndarray:
    """Of an image inside a figure, as it is shown: [rows, columns, RGB]."""
    from PIL import Image

    source = image.get_attribute("xlink:href") or image.get_attribute("href")
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).convert("RGB"), dtype=int)
    is_mirrored = browser.execute_script("return arguments[0].getScreenCTM().d < 0", image)
    return pixels[::-1] if is_mirrored else pixels


def values_of_map(browser: Any, figure: str, name: str) -> tuple[np.ndarray, float]:
    """What the picture `name` of a figure shows, by the ticks of its colour bar, and how far off that may be."""
    bar = browser.find_elements("css selector", f'#figure-{figure} svg g[id*="-axes_"]')[-1].find_element(
        "tag name", "image"
    )
    colours = pixels_of(browser, bar)[:, 3]
    steps = len(colours)
    assert steps > 100
    place = browser.execute_script("return place(arguments[0])", bar)
    to_pixels = scale(axes(browser, figure)[-1][1])
    zero, one = to_pixels(0.0), to_pixels(1.0)
    places = place["top"] + (np.arange(steps) + 0.5) / steps * (place["bottom"] - place["top"])
    values = (places - zero) / (one - zero)
    shown = pixels_of(browser, browser.find_element("id", f"{figure}-{name}"))
    nearest = np.abs(shown[:, :, None] - colours).sum(-1).argmin(-1)
    return values[nearest], 0.02 * np.ptp(values)


def test_maps_have_the_colours_of_the_json(many):
    browser, data = many
    evaluations = {e["file"]: e for e in data["evaluations"]}
    files = [candidate["name"] for candidate in data["candidates"]]
    assert len(files) == N_MANY
    shown, off = values_of_map(browser, "routers", "map")
    expected = [[share * 100 for share in evaluations[name]["routers"].values()] for name in files]
    assert np.abs(shown - expected).max() <= off
    shown, off = values_of_map(browser, "histogram", "map")
    counts = np.array([evaluations[name]["divergence"]["histogram"] for name in files])
    filled = np.nonzero(counts.any(axis=0))[0]
    # From one whole power of ten to another.
    first, last = filled[0] // 4 * 4, -(-(filled[-1] + 1) // 4) * 4
    expected = (counts / counts.sum(axis=1, keepdims=True) * 100)[:, first:last]
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).max() <= off
    for proj in ("gate", "up", "down"):
        shown, off = values_of_map(browser, "alpha-map", f"map-{proj}")
        expected = [entry["alphas"] for entry in data["alphas"] if entry["proj"] == proj]
        assert np.abs(shown - expected).max() <= off


def test_the_table_says_what_the_json_says(few):
    browser, data = few
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#table-quality tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    titles = [title.split("\n")[0] for title in rows[0]]
    assert len(rows) == 1 + len(data["evaluations"])
    for row, e in zip(rows[1:], data["evaluations"], strict=True):
        cells = dict(zip(titles, row, strict=True))
        assert cells["File"].startswith(e["file"])
        for title, found in (("Mean KLD", e["divergence"]["kld"]), ("PPL", e["perplexity"])):
            value, error = (float(part) for part in cells[title].split("★")[0].split("(")[0].split("±"))
            assert value == pytest.approx(found["value"], abs=10 ** math.floor(math.log10(found["standard_error"])))
            assert error == pytest.approx(found["standard_error"], rel=0.05)


def luminance(colour: str) -> float:
    channels = [float(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def colours(browser: Any) -> dict[str, set[str]]:
    """Colours on the page by use; text of figures without the digits on coloured cells."""
    return {
        kind: set(found)
        for kind, found in browser.execute_script(
            """
            const style = (e, key) => getComputedStyle(e)[key];
            const text = [...document.querySelectorAll('body *')].filter(e => !e.closest('svg') &&
              [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()) && !e.closest('pre'));
            const labels = [...document.querySelectorAll('svg text')].filter(t => !t.closest('[id*="figure-bits"]') &&
              !t.closest('[id^="bits-"]'));
            const points = [...document.querySelectorAll(
              '[id*="-point-"] use, [id*="-series-"] use, [id*="-bar-"] path, [id*="-box-"] path')];
            return {
              page: [style(document.body, 'backgroundColor')],
              text: text.map(e => style(e, 'color')),
              labels: labels.map(e => style(e, 'fill')),
              points: points.map(e => style(e, 'fill')),
            }
            """
        ).items()
    }


def test_light_and_dark_pages_can_be_read(browser, folder):
    seen = {}
    for scheme in ("light", "dark"):
        show(browser, folder / "few.html", scheme=scheme)
        found = seen[scheme] = colours(browser)
        (page,) = found["page"]
        assert all(len(found[kind]) >= least for kind, least in (("text", 2), ("labels", 1), ("points", 5)))
        assert min(contrast(colour, page) for colour in found["text"] | found["labels"]) >= 4.5
        assert min(contrast(colour, page) for colour in found["points"]) >= 3
    assert luminance(*seen["light"]["page"]) > 0.9
    assert luminance(*seen["dark"]["page"]) < 0.05
    assert not seen["light"]["points"] & seen["dark"]["points"]
    assert not seen["light"]["labels"] & seen["dark"]["labels"]


@pytest.mark.parametrize("name", ["few", "many"])
def test_a_phone_scrolls_tables_and_figures_but_not_the_page(browser, folder, name):
    show(browser, folder / f"{name}.html", width=360)
    root = "document.documentElement"
    width, seen, needed = browser.execute_script(f"return [innerWidth, {root}.clientWidth, {root}.scrollWidth]")
    assert width == 360
    assert needed == seen
    inside = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].map(e => [e.clientWidth, e.scrollWidth])"
    )
    assert all(client <= 360 for client, _ in inside)
    assert sum(client < scroll for client, scroll in inside) > 5


@pytest.mark.parametrize("width", [360, 390])
def test_a_phone_shows_the_klds_and_says_that_figures_scroll(browser, folder, width):
    show(browser, folder / "few.html", width=width)
    edges = browser.execute_script(
        """
        const table = document.querySelector('#table-quality'), titles = [...table.tHead.rows[0].cells];
        const column = titles.findIndex(t => t.firstChild.data == 'Mean KLD');
        const right = [...table.rows].map(r => {
          const range = document.createRange();
          range.selectNodeContents(r.cells[column]);
          return [range.getBoundingClientRect().left, r.cells[column].getBoundingClientRect().right];
        });
        return [right, table.rows[1].cells[1].getBoundingClientRect().right];
        """
    )
    assert len(edges[0]) == 11
    assert all(edges[1] <= left and right <= width for left, right in edges[0])
    assert set(hints(browser)) == {(True, True)}


def test_a_page_that_is_wide_enough_says_nothing_of_scrolling(browser, folder):
    show(browser, folder / "few.html")
    assert set(hints(browser)) == {(False, False)}


def hints(browser: Any) -> list[tuple[bool, bool]]:
    """Of each figure, whether it scrolls, and whether it says so."""
    found = browser.execute_script(
        "return [...document.querySelectorAll('figure .scroll')].map(e => "
        "[e.scrollWidth > e.clientWidth, getComputedStyle(e, '::before').content.includes('Scroll sideways')])"
    )
    assert len(found) > 5
    return [(scrolls, told) for scrolls, told in found]


def test_on_paper_the_page_is_light_and_whole(browser, folder):
    show(browser, folder / "many.html", scheme="dark", width=1000)
    browser.execute_script("document.querySelectorAll('details').forEach(e => e.open = false)")
    folded = "return [...document.querySelectorAll('details figure')].filter(f => f.checkVisibility()).length"
    assert browser.execute_script(folded) == 0
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert browser.execute_script(folded) == N_MANY - 4
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 1000
        (page,) = colours(browser)["page"]
        assert luminance(page) > 0.9
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_tab_key_reaches_every_table_and_shows_where_it_is(browser, folder):
    from selenium.webdriver.common.keys import Keys

    show(browser, folder / "few.html")
    body = browser.find_element("tag name", "body")
    reached: list[str] = []
    for _ in range(200):
        (body if not reached else browser.switch_to.active_element).send_keys(Keys.TAB)
        name, outline = browser.execute_script(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.getAttribute('aria-label') || e.textContent.trim(), s.outlineStyle + s.outlineWidth]"
        )
        if reached and name == reached[0]:
            break
        reached.append(name)
        assert outline == "solid3px", name
        if name == "Command":
            break
    assert reached[0] == "Skip to the summary"
    tables = browser.execute_script(
        "return [...document.querySelectorAll('table')].map(t => 'Table: ' + t.caption.innerText)"
    )
    assert len(tables) == 4
    assert [name for name in reached if name.startswith("Table:")] == tables


def test_without_javascript_everything_is_there(folder):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        # That it is off indeed: this page would write over its text.
        probe = folder / "probe.html"
        probe.write_text("<p id=p>off</p><script>document.getElementById('p').textContent = 'on'</script>")
        driver.get(probe.as_uri())
        assert driver.find_element("id", "p").text == "off"
        driver.get((folder / "few.html").as_uri())
        assert "is nearest of 5" in driver.find_element("class name", "verdict").text
        assert [t.is_displayed() for t in driver.find_elements("tag name", "table")] == [True] * 4
        figures = driver.find_elements("css selector", "figure svg")
        assert len(figures) == len(list((folder / "few-figures").glob("*.svg")))
        assert all(figure.size["width"] > 500 and figure.size["height"] > 80 for figure in figures)
    finally:
        driver.quit()
