from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bitsmith.report.data import Measure, Report, TrainingPoint
from bitsmith.report.html import page

CHROMIUM = shutil.which("chromium")


class Parsed(HTMLParser):
    """Tags with attributes, text by tag, in document order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside: list[str] = []
        self.scripts: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_data(self, data: str) -> None:
        (self.scripts if self.inside and self.inside[-1] == "script" else self.text).append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass

    def rows(self) -> list[dict[str, str | None]]:
        """Attributes of the site names' cells."""
        return [
            attrs for tag, attrs in self.tags if tag == "th" and attrs.get("scope") == "row" and "data-key" in attrs
        ]


def test_loads_nothing(report: Report, evil: Report) -> None:
    for source in (page(report), page(evil)):
        parsed = Parsed(source)
        for tag, attrs in parsed.tags:
            assert tag not in ("iframe", "img", "object", "embed", "base", "audio", "video")
            for name, value in attrs.items():
                if name in ("src", "href", "xlink:href", "action", "srcset", "poster"):
                    assert value is not None
                    assert value.startswith("#") or value == "data:,"
        assert "@import" not in source
        assert not re.search(r"url\(\s*['\"]?(?!#)", source)
        policy = next(attrs["content"] for tag, attrs in parsed.tags if tag == "meta" and "http-equiv" in attrs)
        assert policy is not None
        assert policy.startswith("default-src 'none'")


def test_only_the_pages_own_scripts_stand_in_it(evil: Report) -> None:
    parsed = Parsed(page(evil))
    scripts = [attrs for tag, attrs in parsed.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "report-json"}, {}]
    assert all(not name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert any(attrs["data-key"] == evil.sites[1].site for attrs in parsed.rows())
    assert evil.title in parsed.text


def test_embedded_json_is_the_report(report: Report, evil: Report) -> None:
    for each in (report, evil):
        assert Report.from_json(json.loads(Parsed(page(each)).scripts[0])) == each


def test_says_what_was_asked_got_and_why(report: Report) -> None:
    parsed = Parsed(page(report))
    said = " ".join(" ".join(parsed.text).split()).replace("\u00a0", " ")
    assert "2.1x faster, top-1 97.8 % → 97.5 % (n=359), 1.13 MiB → 286 KiB on onnxruntime" in said
    for words in (
        "test (never used for selection)",
        "95 % interval 95.3 % to 98.7 %",
        "4.21 ± 0.050 ms (measured, n=30)",
        "Missed: file size by 0.0794 MiB.",
        "4 of 40 sites are not what was asked for",
        "no int8 kernel: its output is not quantized",
        "The parts add up to 4.03 ms",
        "4 sites ran in float32 although int8 was asked",
        "AMD EPYC",
        "arXiv:1712.05877",
    ):
        assert words in said
    assert len(parsed.rows()) == 40
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 3


def test_slower_is_said_first(report: Report) -> None:
    slow = dataclasses.replace(report, plan_ms=Measure(15.0, spread=0.1, n=30))
    assert '<p class="headline slow">1.68x SLOWER than float' in page(slow)


def test_a_bare_report_is_a_page() -> None:
    parsed = Parsed(page(Report("Bare", "t", "m")))
    assert "Nothing was measured on t" in parsed.text
    assert not any(tag in ("svg", "table") for tag, _ in parsed.tags)


def test_same_report_same_bytes(report: Report) -> None:
    assert page(report) == page(report)


def _dom(path: Path, profile: Path) -> str:
    """The DOM after scripts ran in a real browser."""
    assert CHROMIUM is not None
    quiet = ["quic", "background-networking", "component-update", "sync"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    command += [f"--disable-{what}" for what in quiet]
    run = subprocess.run(
        [*command, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    return run.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
def test_opens_in_a_browser(evil: Report, tmp_path: Path) -> None:
    dom = Parsed(_dom(evil.save(tmp_path / "report.html"), tmp_path / "profile"))
    root = dict(dom.tags)["html"]
    assert root.get("data-ready") == "yes"  # the script ran to its end under the page's own policy
    assert "data-error" not in root
    assert [attrs["data-key"] for attrs in dom.rows()] == [row.site for row in evil.sites]
    assert "40 of 40 sites" in dom.text
    tools = next(attrs for tag, attrs in dom.tags if attrs.get("class") == "tools")
    assert "hidden" not in tools
    assert sum(tag == "svg" for tag, _ in dom.tags) == 3
    assert not any(tag == "img" for tag, _ in dom.tags)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
def test_sorting_and_filtering_in_a_browser(report: Report, tmp_path: Path) -> None:
    driver = """<script>
      const all = (selector) => Array.from(document.querySelectorAll(selector));
      const button = (name) => all(".sites button").find((b) => b.textContent === name);
      const names = () => all(".sites tbody tr:not([hidden]) th").map((cell) => cell.dataset.key);
      const seen = {};
      for (const name of ["Loss", "SQNR", "Weights", "Site"]) { button(name).click(); seen[name] = names(); }
      button("Loss").click(); button("Loss").click(); seen.ascending = names();
      button("Weights").click(); button("Weights").click(); seen.blanks = names();
      document.querySelector("#only").click(); seen.only = names();
      const out = document.createElement("output"); out.textContent = JSON.stringify(seen); document.body.append(out);
    </script></body>"""
    source = page(report)
    loosened = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source).replace("</body>", driver)
    path = tmp_path / "driven.html"
    path.write_text(loosened, encoding="utf-8")
    dom = _dom(path, tmp_path / "profile")
    assert "data-error" not in dict(Parsed(dom).tags)["html"]
    found = re.search(r"<output>(.*?)</output>", dom)
    assert found is not None
    seen = json.loads(found.group(1))

    def ordered(field: str, sign: int) -> list[str]:
        def key(row: object) -> tuple[bool, float]:
            value = getattr(row, field)
            return (value is None, sign * (value or 0.0))

        return [row.site for row in sorted(report.sites, key=key)]

    assert seen["Loss"] == ordered("loss", -1)
    assert seen["SQNR"] == ordered("sqnr_db", -1)  # the infinite one first
    assert seen["Weights"] == ordered("bytes", -1)  # blanks last
    assert seen["blanks"] == ordered("bytes", 1)  # blanks last this way round too
    assert seen["ascending"] == ordered("loss", 1)
    assert seen["Site"] != ordered("loss", -1)
    assert sorted(seen["Site"]) == sorted(row.site for row in report.sites)
    assert sorted(seen["only"]) == sorted(row.site for row in report.sites if row.why)


def test_a_training_is_drawn_and_told(report: Report) -> None:
    points = tuple(TrainingPoint(i, 4.0 / i, 0.1, 0.5 if i % 2 == 0 else None, kept=i == 4) for i in range(1, 5))
    text = page(dataclasses.replace(report, training=points, training_metric="top-1"))
    parsed = Parsed(text)
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 4
    assert "4 steps: loss 4.00 → 1.00 (means of the first and the last 1); top-1 0.5000 after step 4" in text
