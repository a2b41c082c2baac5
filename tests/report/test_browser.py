"""The report in a real browser: nothing is complained about, every picture is seen, nothing runs off a small screen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report import made_up

from quant_experts.report.html import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
PROBE = """<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(entry => { entry.open = true; });
  const boxes = [...document.querySelectorAll("svg, img")].map(element => {
    const { width, height, right } = element.getBoundingClientRect();
    const name = element.getAttribute("aria-label") || element.getAttribute("alt") || "legend";
    return { name, width, height, right, broken: element.tagName === "IMG" && !element.naturalWidth };
  });
  const texts = [...document.querySelectorAll("figure svg")].map(figure => {
    const frame = figure.getBoundingClientRect();
    return [...figure.querySelectorAll("text")].filter(text => {
      const box = text.getBoundingClientRect();
      return box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1;
    }).map(text => text.textContent);
  }).flat();
  const found = { boxes, texts, wide: document.documentElement.scrollWidth, shown: innerWidth };
  document.body.setAttribute("data-found", encodeURIComponent(JSON.stringify(found)));
});
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


def browse(page: Path, width: int, profile: Path, *more: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    sizes = (f"--window-size={width},900", f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0")
    return subprocess.run(
        [BROWSER, *FLAGS, *sizes, *more, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )


def measured(page: Path, width: int, profile: Path) -> tuple[dict[str, Any], list[str]]:
    """What the probe found, and the console's messages."""
    from urllib.parse import unquote

    done = browse(page, width, profile, "--virtual-time-budget=5000", "--dump-dom")
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, "the page's load event did not come"
    return json.loads(unquote(found[1])), re.findall(r".*CONSOLE.*", done.stderr)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_report(made_up.comparison(blocks=3), tmp_path_factory.mktemp("browser") / "report.html")
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1280, 500])
def test_every_picture_is_seen(page: Path, tmp_path: Path, width: int) -> None:
    found, messages = measured(page, width, tmp_path)
    assert messages == []
    assert len(found["boxes"]) > 30
    for box in found["boxes"]:
        least = 8 if box["name"] == "legend" else 100
        assert box["width"] >= least and box["height"] >= least and not box["broken"], box
        assert box["right"] <= found["shown"] + 1, box
    assert found["wide"] <= found["shown"], "the page scrolls sideways"
    assert found["texts"] == [], "labels leave their figure"


def test_the_probe_sees_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(f'<svg width="3" height="0"></svg><img src="x.png"><script>nothing.here</script>{PROBE}')
    found, messages = measured(page, 500, tmp_path / "profile")
    assert [box["broken"] for box in found["boxes"]] == [False, True] and found["boxes"][0]["height"] == 0
    assert any("nothing is not defined" in message for message in messages)


def test_it_prints_a_picture(page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    browse(page, 1280, tmp_path / "profile", f"--screenshot={shot}")
    assert shot.stat().st_size > 20_000
