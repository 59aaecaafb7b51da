from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from bitsmith.report import plots
from bitsmith.report.data import FrontierPoint, Report, SiteRow, TrainingPoint

SVG = "{http://www.w3.org/2000/svg}"


def _marks(text: str, pattern: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(text)
    return [element for element in root.iter() if re.fullmatch(pattern, element.get("id", ""))]


def _titles(marks: list[ElementTree.Element]) -> list[str]:
    return [mark.findtext(f"{SVG}title") or "" for mark in marks]


def _all(report: Report) -> dict[str, str]:
    return {
        "pareto": plots.pareto(report.frontier),
        "time": plots.time_bars(report.sites),
        "loss": plots.sensitivity(report.sites, report.loss_name),
    }


def test_number_of_marks(report: Report) -> None:
    drawn = _all(report)
    points = _marks(drawn["pareto"], r"pareto-point-\d+")
    assert len(points) == len(report.frontier) == 9
    assert sum("chosen" in title for title in _titles(points)) == 1
    assert sum("predicted" in title for title in _titles(points)) == sum(not p.evaluated for p in report.frontier)
    assert len(_marks(drawn["time"], r"time-float-\d+")) == len(_marks(drawn["time"], r"time-plan-\d+")) == plots.TOP
    assert len(_marks(drawn["loss"], r"loss-dot-\d+")) == plots.TOP


def test_bar_lengths_are_proportional_to_times() -> None:
    sites = (
        SiteRow("a", "conv2d", "x", "int8", ms=1.0, float_ms=4.0),
        SiteRow("b", "conv2d", "x", "int8", ms=0.5, float_ms=2.0),
    )
    text = plots.time_bars(sites)

    def width(gid: str) -> float:
        (mark,) = _marks(text, gid)
        path = mark.find(f".//{SVG}path")
        assert path is not None
        xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+) ", path.get("d", ""))]
        return max(xs) - min(xs)

    whole = width("time-float-0")
    assert [width(f"time-{kind}-{i}") / whole for kind, i in (("plan", 0), ("float", 1), ("plan", 1))] == pytest.approx(
        [0.25, 0.5, 0.125], abs=1e-3
    )


def test_labelled_accessible_and_with_units(report: Report) -> None:
    units = {"pareto": "time, ms per batch", "time": "time, ms per batch", "loss": report.loss_name}
    for name, text in _all(report).items():
        root = ElementTree.fromstring(text)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert root[0].tag == f"{SVG}title"
        assert root.get("viewBox")
        words = " ".join("".join(element.itertext()) for element in root.iter(f"{SVG}text"))
        assert units[name] in words
        assert text.startswith("<svg")


def test_deterministic_and_untouched_by_the_users_style(report: Report) -> None:
    import matplotlib

    once = _all(report)
    with matplotlib.rc_context({"figure.dpi": 33, "font.size": 30, "axes.facecolor": "red"}):
        assert _all(report) == once
        assert matplotlib.rcParams["font.size"] == 30


def test_no_address_outside_and_ids_are_unique_on_the_page(report: Report) -> None:
    drawn = _all(report)
    for text in drawn.values():
        bare = re.sub(r'xmlns(:xlink)?="http://www\.w3\.org/[^"]+"', "", text)
        assert "http" not in bare
        for target in re.findall(r'(?:href="|url\()#([^")]+)', bare):
            assert f'id="{target}"' in bare
    ids = [found for text in drawn.values() for found in re.findall(r'\bid="([^"]+)"', text)]
    assert len(ids) == len(set(ids))


def test_colours_follow_the_page_and_text_is_left_alone() -> None:
    name = 'style="fill: #0072b2" id="x" 語'
    text = plots.time_bars([SiteRow(name, "conv2d", "x", "int8", ms=1.0, float_ms=2.0)])
    assert "var(--plan, #0072b2)" in text
    root = ElementTree.fromstring(text)
    assert name in ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


def test_names_are_escaped_and_never_mathematics(evil: Report) -> None:
    for text in _all(evil).values():
        ElementTree.fromstring(text)
        assert "<script" not in text
        assert "<img" not in text
    words = ElementTree.fromstring(plots.time_bars(evil.sites)).itertext()
    assert any(word.startswith("<script>") and "…" in word for word in words)


def test_nothing_to_draw_is_no_plot() -> None:
    bare = [SiteRow("a", "conv2d", "x", "int8"), SiteRow("b", "conv2d", "x", "int8", loss=math.nan)]
    assert plots.time_bars(bare) == plots.sensitivity(bare, "loss") == plots.pareto([]) == ""


def test_a_frontier_without_drops_is_drawn_by_loss() -> None:
    frontier = [FrontierPoint(f"p{i}", 1.0 + i, None, 0.5, 0.1 / (i + 1)) for i in range(3)]
    text = plots.pareto(frontier)
    assert "predicted loss" in text
    assert len(_marks(text, r"pareto-point-\d+")) == 3
    mixed = [dataclasses.replace(frontier[0], drop=0.01), *frontier[1:]]
    assert len(_marks(plots.pareto(mixed), r"pareto-point-\d+")) == 1


def test_one_plan_and_only_predicted_plans_are_drawn() -> None:
    one = FrontierPoint("p", 1.0, 0.0, 0.5, 0.0, evaluated=False, chosen=True)
    assert len(_marks(plots.pareto([one], minimize="mib"), r"pareto-point-\d+")) == 1


def test_plots_load_no_pyplot_and_only_when_drawn() -> None:
    code = (
        "import sys; from bitsmith.report import plots as p, html, terminal\n"
        "assert not {'matplotlib', 'jinja2', 'rich'} & set(sys.modules)\n"
        "from bitsmith.report.data import SiteRow\n"
        "assert p.time_bars([SiteRow('a', 'c', 'x', 'y', ms=1.0)])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def curve(count: int, every: int) -> tuple[TrainingPoint, ...]:
    return tuple(
        TrainingPoint(i, 2.0 / i, 0.1, i / count if i % every == 0 else None, kept=i == count)
        for i in range(1, count + 1)
    )


def test_curves_of_a_training() -> None:
    text = plots.training(curve(40, 10), "top-1")
    scores = _titles(_marks(text, r"training-score-\d+"))
    assert scores == ["step 10: 0.2500", "step 20: 0.5000", "step 30: 0.7500", "step 40: 1.000, came back"]
    words = " ".join(ElementTree.fromstring(text).itertext())
    assert all(label in words for label in ("training loss", "validation: top-1", "step"))
    bare = plots.training(curve(40, 99))
    assert "validation" not in " ".join(ElementTree.fromstring(bare).itertext())
    assert plots.training(()) == ""


def test_a_long_curve_is_drawn_by_means_of_equal_parts() -> None:
    steps = list(range(1, 3001))
    x, y = plots._binned(steps, [float(step) for step in steps])
    assert len(x) == plots.BINS
    assert x == y
    assert (x[0], x[-1]) == (5.5, 2995.5)
    assert len(plots.training(curve(3000, 5000))) < 40_000
