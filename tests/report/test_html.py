"""The HTML report: whole, self-contained, true to its figures and safe with any text."""

from __future__ import annotations

import builtins
import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report import made_up

from quant_experts.artifacts import Event
from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.comparison import FULL_PRECISION, AnswerExample, Comparison, MethodRow, Score
from quant_experts.report import page
from quant_experts.report.html import write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Checker(HTMLParser):
    """Follows the nesting and keeps what the tests ask for."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def parsed(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def visible(html: str) -> str:
    return " ".join(" ".join(parsed(html).text).split())


def row_of(html: str, method: str) -> str:
    """The first table row of a method, as visible text with marks."""
    match = re.search(rf'<tr>\s*<th scope="row">{method}</th>.*?</tr>', html, re.DOTALL)
    assert match
    return " ".join(re.sub(r"<(?!/?strong)[^>]+>", " ", match[0]).split())


@pytest.fixture(scope="module")
def full_page() -> str:
    return page.render(made_up.comparison(blocks=3))


def test_the_page_is_well_formed_and_its_ids_are_unique(full_page: str) -> None:
    ids = [attributes["id"] for _, attributes in parsed(full_page).tags if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_the_page_loads_nothing_from_elsewhere(full_page: str) -> None:
    assert "http:" not in full_page and "https:" not in full_page and "@import" not in full_page
    tags = parsed(full_page).tags
    assert not any(tag in ("script", "iframe", "object") for tag, _ in tags)
    for _, attributes in tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    local = {f"#{attributes['id']}" for _, attributes in tags if attributes.get("id")}
    used = {attributes["href"] for tag, attributes in tags if tag == "use"} | {
        match for match in re.findall(r"url\((#[^)]*)\)", full_page)
    }
    assert used <= local


def test_pictures_have_descriptions_and_tables_have_scopes(full_page: str) -> None:
    tags = parsed(full_page).tags
    pictures = [a for tag, a in tags if tag == "svg" and a.get("role") == "img"]
    accuracy, fronts, errors, by_kind_of_token, curves, maps, experts = 1, 4, 1, len(made_up.METHODS), 3, 3, 4 * 3
    clusters = 2
    assert len(pictures) == accuracy + fronts + errors + by_kind_of_token + curves + maps + clusters + experts
    assert all(a["aria-label"] for a in pictures)
    assert all(a.get("alt") for tag, a in tags if tag == "img")
    assert all(a.get("scope") for tag, a in tags if tag == "th")


def test_figures_of_the_table_are_those_of_the_rows(full_page: str) -> None:
    for row in made_up.rows():
        shown = row_of(full_page, row.method)
        average = row.accuracy["average"]
        assert f"{100 * average.mean:.1f}" in shown
        assert f"{100 * average.low:.1f}–{100 * average.high:.1f}" in shown
        assert f"{row.nll.mean:.4f}" in shown
        if row.kl and row.bits_per_weight:
            assert f"{row.kl.mean:.4f}" in shown and f"{row.bits_per_weight:.2f}" in shown
    kinds_part = full_page[full_page.index('id="kinds"') :]
    for row in made_up.rows():
        for kind in made_up.KINDS:
            assert f"{100 * row.accuracy[kind].mean:.1f}" in row_of(kinds_part, row.method)


def test_best_and_tied_values_are_marked(full_page: str) -> None:
    assert row_of(full_page, "quant-experts").startswith("quant-experts <strong>86.5</strong>")
    assert row_of(full_page, "gptq").startswith("gptq tie 84.3")
    assert row_of(full_page, "rtn").startswith("rtn 75.2")
    assert "<strong>" not in row_of(full_page, FULL_PRECISION)


def test_a_paired_difference_decides_on_ties_where_it_was_taken() -> None:
    base = made_up.comparison(blocks=1)
    clear = {"accuracy": Score(0.022, 0.011, 0.033)}
    rows = [dataclasses.replace(row, behind_best=clear) if row.method == "gptq" else row for row in base.rows]
    html = page.render(dataclasses.replace(base, rows=tuple(rows)))
    assert row_of(html, "gptq").startswith("gptq 84.3") and "tied with gptq" not in visible(html)


def test_costs_and_gains_have_tables_of_their_own(full_page: str) -> None:
    gains = full_page[full_page.index("Gain over plain rounding</h3>") :]
    assert row_of(gains, "quant-experts").startswith("quant-experts <strong>+11.4</strong>")
    costs = full_page[full_page.index("what a token costs</h3>") :]
    assert row_of(costs, "paper").startswith("paper 0.390 0.312 1.325 5.85 MB")
    assert FULL_PRECISION not in gains[: gains.index("</table>")]


def test_answers_are_marked_in_words(full_page: str) -> None:
    text = visible(full_page)
    assert "rtn W4A6 · ✗ wrong 7KQ2-ZX91-PLN4" in text
    assert "quant-experts W4A6 · ✓ right 7KQ2-ZX91-PLM4" in text
    assert "rtn W4A6 · ✗ wrong March." in text
    assert "(empty answer)" in text


def test_equal_events_are_listed_together(full_page: str) -> None:
    text = visible(full_page)
    assert "paper W4A6: 5 events" in text and "gptq W4A6: 1 event " in text
    assert text.count("NPMI was undefined") == 1


def test_hostile_text_stays_text() -> None:
    bad = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }} $x^2$ &amp;"
    row = MethodRow(bad, bad, {"average": Score(0.5, 0.4, 0.6), bad: Score(0.5, 0.4, 0.6)}, Score(1, 0.9, 1.1), None, 4)
    label = f"{bad} {bad}"
    record = dataclasses.replace(made_up.records(1.0, 1)[0], linears=(f"model.layers.0.{bad}",))
    image = Image.new("RGBA", (9, 9))
    html = page.render(
        Comparison(
            title=bad,
            model=bad,
            command=bad,
            questions=2,
            rows=(row,),
            layers={label: (record,)},
            answers=(AnswerExample(bad, bad, image, {bad: bad}),),
            events={label: (Event(bad, bad),)},
            versions={bad: bad, "machine": bad},
        )
    )
    tags = parsed(html).tags
    assert not any(tag == "script" or "onerror" in attributes for tag, attributes in tags)
    assert [a["src"][:10] for tag, a in tags if tag == "img" and a["src"]] == ["data:image"]
    assert visible(html).count("{{ 7 * 7 }}") > 5


def test_the_same_comparison_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = (
        write_report(made_up.comparison(blocks=2), tmp_path / name).read_bytes() for name in ("a.html", "b.html")
    )
    assert one == two


def test_missing_values_are_dashes_and_missing_parts_are_named() -> None:
    nan = math.nan
    empty = MethodRow("rtn", "W4A6", {"average": Score(nan, nan, nan)}, Score(nan, nan, nan), None, nan, None, None)
    text = visible(page.render(Comparison("t", "m", "", 0, (empty,))))
    assert "At W4A6, no accuracy was measured." in text
    assert "rtn - - - - -" in text
    assert "nan" not in text.lower()
    for sentence in (
        "no quantized row has both an accuracy and a size",
        "no layer errors were recorded",
        "no channel statistics were recorded",
        "no method of this comparison has routed experts",
        "No example answers were recorded",
        "Nothing was recorded",
        "The command was not recorded",
    ):
        assert sentence in text


def test_no_rows_at_all() -> None:
    text = visible(page.render(Comparison("t", "m", "c", 0, ())))
    assert "Nothing was measured." in text and "No method was measured." in text


def test_text_only_calibration_says_that_there_were_no_image_tokens() -> None:
    html = page.render(made_up.comparison(blocks=2, image=False))
    text = visible(html)
    assert "held no image tokens" in text
    assert "of their routing in common" not in text and "no image and text tokens to compare" in text


def test_a_hundred_blocks_and_errors_that_no_log_scale_can_show() -> None:
    records = made_up.records(0.5, 100)
    records[0].error["all"] = 0.0
    records[1].error["all"] = math.inf
    records[2].error["all"] = math.nan
    del records[3].error["all"]
    base = made_up.comparison(blocks=1)
    html = page.render(dataclasses.replace(base, layers={"gptq W4A6": records, "a label without a row": records[:8]}))
    text = visible(html)
    # Both labels hold the four bad records.
    assert "8 of the recorded errors are zero or no number" in text
    assert "plain rounding, for reference" in text and "a label without a row" in text


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(comparison: Comparison) -> str:
        raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(page, "render", fail)
        write_report(made_up.comparison(blocks=1), path)
    monkeypatch.setattr(page, "render", lambda comparison: "\ud800")
    with monkeypatch.context() as patch, pytest.raises(QuantExpertsError, match="cannot be written"):
        patch.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        write_report(made_up.comparison(blocks=1), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    assert write_report(made_up.comparison(blocks=1), path).read_bytes() == b"?"


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(QuantExpertsError, match="cannot be written"):
        write_report(Comparison("t", "m", "c", 0, ()), tmp_path / "file" / "report.html")


def test_a_missing_extra_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "quant_experts.report.page":
            raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(QuantExpertsError, match=r"install quant-experts\[report\]"):
        write_report(Comparison("t", "m", "c", 0, ()), tmp_path / "report.html")
