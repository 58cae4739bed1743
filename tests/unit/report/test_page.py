"""What is written: the same numbers in every form, nothing from elsewhere, and nothing that a name could break.

Long: the page, part by part.
"""

import base64
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fake_runs import make_metadata, make_reference_like_metadata, make_run_folder

from trainer.config import reference
from trainer.config.text import escape_markdown
from trainer.report import plots
from trainer.report.load import load_runs
from trainer.report.page import render_html, render_markdown, to_json, write_report
from trainer.report.tables import Comparison, compare

Plain = tuple[Comparison, dict[str, str]]


def make_comparison(tmp_path: Path, *contents: dict[str, Any], with_card: bool = True, **options: Any) -> Comparison:
    folders = [
        make_run_folder(tmp_path / f"run{n}", metadata={**content, "run_id": f"id{n}"}, every=500, **options)
        for n, content in enumerate(contents)
    ]
    return compare(*load_runs([str(folder) for folder in folders]), with_reference=with_card)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """Full and LoRA of the demo, and the text of each file of their report."""
    folder = tmp_path_factory.mktemp("plain")
    comparison = make_comparison(folder, make_metadata("full"), make_metadata("lora"))
    return comparison, {path.name: path.read_text("latin-1") for path in write_report(comparison, folder / "out")}


@pytest.fixture
def few_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them all is most of a report's time."""
    monkeypatch.setattr(plots, "PLOTS", plots.PLOTS[:2])


CARD_LIKE = {0: 4.0, 1: 1.3, 2: 1.1, 3: 1.0}


@pytest.fixture
def card_like(tmp_path: Path) -> Comparison:
    """Full and LoRA that may be held against the card."""
    contents = [make_reference_like_metadata(mode) for mode in ("full", "lora")]
    return make_comparison(tmp_path, *contents, losses=CARD_LIKE)


def test_the_epoch_table_has_reference_full_lora_and_their_difference(card_like: Comparison) -> None:
    table = card_like.by_epoch
    assert list(table.to_text().iloc[:, :2].itertuples(index=False, name=None)) == [
        ("0", "full"),
        ("0", "LoRA"),
        *[(str(epoch), name) for epoch in (1, 2, 3) for name in ("card", "full", "LoRA")],
    ]
    rows = {(row["epoch"], row["run"]): row for row in table.to_records()}
    assert [rows[row.epoch, "card"]["val_loss"] for row in reference.CURVE] == [1.2262, 1.0048, 0.9414]
    assert rows[1.0, "full"]["step"] == 6_621
    assert rows[1.0, "full"]["examples"] == 13_242
    assert rows[2.0, "LoRA"]["to_card"] == pytest.approx(1.1 - 1.0048)
    assert rows[0.0, "LoRA"]["to_card"] is None


@pytest.mark.usefixtures("few_plots")
def test_no_report_file_compares_numbers_of_incomparable_runs(tmp_path: Path) -> None:
    """Another data set on each side: no difference, share or ratio may show, in any form."""
    contents = make_metadata("full"), make_metadata("lora", data__fingerprint="ff")
    comparison = make_comparison(tmp_path, *contents, losses={0: 4.0, 1: 3.0, 2: 2.5, 3: 2.25})
    files = {path.name: path for path in write_report(comparison, tmp_path / "out")}
    data = json.loads(files["comparison.json"].read_text())
    assert data["verdict"]["comparisons"] == []
    assert all(row["to_card"] is None for row in data["by_epoch"])
    differences = {f"{abs(a - b):.4f}" for a in (4.0, 3.0, 2.5, 2.25) for b in (1.2262, 1.0048, 0.9414)}
    for name in ("comparison.json", "report.md", "report.html", "curves.svg"):
        text = files[name].read_text()
        assert not differences & set(re.findall(r"(?<!\d)\d\.\d{4}", text)), name
        assert not re.search(r"of (full|its|the)[^<]{0,20} improvement", text), name
        assert "x its time" not in text, name
    text = files["report.md"].read_text()
    assert "not comparable with one another (other data)" in text
    assert "unknown of the card" in text.lower()


@pytest.mark.usefixtures("few_plots")
def test_every_report_format_has_the_same_numbers(card_like: Comparison, tmp_path: Path) -> None:
    files = {path.name: path for path in write_report(card_like, tmp_path / "out")}
    data = json.loads(files["comparison.json"].read_text())
    html, page = files["report.html"].read_text(), files["report.md"].read_text()
    for text in card_like.by_epoch.to_text().to_numpy().ravel():
        assert f">{text}<" in html
        assert f" {escape_markdown(text)} " in page
    assert [row["val_loss"] for row in data["by_epoch"] if row["run"] == "LoRA"] == [4.0, 1.3, 1.1, 1.0]
    assert data["by_run"][1]["trainable"] == 124_439_808
    assert len(data["facts"]) == len(card_like.shared_settings) + len(card_like.differing_settings)
    assert list(files) == ["report.html", "report.md", "curves.png", "curves.svg", "answer.json", "comparison.json"]
    assert files["curves.png"].read_bytes().startswith(b"\x89PNG")


class PageParser(HTMLParser):
    """Notes what a page would fetch, its ids, and whether each element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.open_tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        attributes = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [attributes["id"] or ""] if "id" in attributes else []
        if tag not in ("meta", "link", "wbr"):
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open_tags and self.open_tags[-1] == tag:
            self.open_tags.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag


def parse_page(html: str) -> PageParser:
    page = PageParser()
    page.feed(html)
    assert page.open_tags == []
    return page


def test_the_html_report_fetches_nothing_and_runs_nothing(plain: Plain) -> None:
    html = plain[1]["report.html"]
    page = parse_page(html)
    assert all(link.startswith(("#", "data:,", "data:application/json;base64,")) for link in page.links)
    assert "script" not in page.tags
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert '<meta name="viewport" content="width=device-width' in html
    assert len(page.ids) == len(set(page.ids)), "an id twice: one plot would show another's marks"
    for colour in plots.CSS_VARIABLES:  # a colour that is no variable would not follow light and dark
        assert colour not in html.split("</style>", 1)[1]


@pytest.mark.usefixtures("few_plots")
def test_a_run_name_cannot_break_the_report_pages(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>|$x_1$ `*a*` [b](c)\x1b[31m\u202e"
    other_data = make_metadata("lora", data__source=name, data__fingerprint="ff")
    comparison = make_comparison(tmp_path, make_metadata("full", name=name), make_metadata("lora"), other_data)
    write_report(comparison, tmp_path / "out")
    html, page = ((tmp_path / "out" / file).read_text() for file in ("report.html", "report.md"))
    assert "script" not in parse_page(html).tags
    assert "<script>" not in page
    svg, answer = ((tmp_path / "out" / file).read_text() for file in ("curves.svg", "answer.json"))
    assert not re.search("[\x1b\u202e]", html + page + svg + answer)
    assert "<script" not in svg
    lines = page.split("## By run")[1].split("##")[0].strip().splitlines()
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
    assert len(columns) == 1, "a name added a column"


def test_report_pages_are_ordered_verdict_epochs_runs_settings(plain: Plain) -> None:
    for text in (plain[1][file] for file in ("report.html", "report.md")):
        parts = ("Cannot tell", "Loss", "By epoch", "By run", "Same and different", "Different", "Same, where known")
        places = [text.index(part) for part in parts]
        assert places == sorted(places)


def test_the_first_screen_is_the_sentence_three_numbers_and_one_picture(
    plain: Plain,
) -> None:
    actual, files = plain
    html = files["report.html"]
    first = html.split('<section class="first">')[1].split("</section>")[0]
    assert actual.verdict.sentence in first
    assert re.findall(r"<dt>(\w+)</dt>", first) == ["Loss", "Time", "Memory"]
    assert first.count("<svg") == 1
    assert "Validation loss by epoch" in first
    assert "<table" not in html.split('<section class="first">')[0]
    packed = re.search(r'download="answer.json" href="data:application/json;base64,([^"]+)"', first)
    assert base64.b64decode(packed[1]).decode("latin-1") == files["answer.json"]
    for anchor in re.findall(r'href="#(rule|runs)"', first):
        assert f'id="{anchor}"' in html


def test_several_rates_are_drawn_as_loss_against_rate_with_the_chosen_points(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    loras = [make_metadata("lora", resolved__lr=lr) for lr in (1e-3, 5e-3, 2e-2)]
    comparison = make_comparison(tmp_path, make_metadata("full"), *loras)
    assert plots.render_picture(comparison.groups, comparison.verdict, True)[0] == "Loss by learning rate"
    pair = comparison.verdict.primary
    axis = Figure().subplots()
    plots.draw_rates(axis, plots.rate_curves(comparison.groups), pair)
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert list(lines["LoRA"].get_xdata()) == [1e-3, 5e-3, 2e-2]
    rings = [line for line in axis.get_lines() if line.get_fillstyle() == "none"]
    assert [float(line.get_xdata()[0]) for line in rings] == [pair.full.lr, pair.lora.lr]


def test_only_the_different_settings_are_expanded_and_no_column_is_all_unknown(
    plain: Plain,
) -> None:
    actual, files = plain
    html = files["report.html"]
    for table in (actual.by_run, actual.differing_settings, actual.shared_settings):
        text = table.to_text()
        assert all(set(text.iloc[:, i]) - {"", "-", "unknown"} for i in range(text.shape[1]))
    assert "learning rate" in actual.by_run.headings.values()
    assert re.findall(r"<details( open)?><summary>([A-Za-z]+)", html) == [(" open", "Different"), ("", "Same")]


def test_the_html_report_on_a_phone_shows_the_validation_loss_beside_the_names(
    plain: Plain,
) -> None:
    """The style moves columns by their number, so each must be where the style thinks it is."""
    actual, files = plain
    html = files["report.html"]
    assert html.count('<table class="epochs">') == 1
    assert list(actual.by_epoch.headings)[:6] == ["epoch", "run", "step", "examples", "train_loss", "val_loss"]
    moved = dict.fromkeys((3, 4), "2") | dict.fromkeys((5, "n+7"), "1")  # the sixth is left, right after the names
    for child, order in moved.items():
        assert re.search(rf"\.epochs tr > :nth-child\({re.escape(str(child))}\)[^{{}}]*{{ order: {order}; }}", html)


def test_a_fingerprint_is_short_in_the_report_pages_and_whole_in_the_json(tmp_path: Path) -> None:
    content = make_metadata("full", data__fingerprint="0123456789ab" + "cdef" * 13)
    comparison = make_comparison(tmp_path, content)
    page = render_markdown(comparison)
    assert "cdef" * 13 in json.dumps(to_json(comparison))
    assert "0123456789ab" in page
    assert "0123456789ab" + "cdef" not in page


@pytest.mark.usefixtures("few_plots")
def test_unfinished_and_unreadable_runs_are_listed_in_every_report_format(tmp_path: Path) -> None:
    good, going = make_run_folder(tmp_path / "good"), make_run_folder(tmp_path / "going", "lora", finished=False)
    comparison = compare(*load_runs([str(good), str(going), str(tmp_path / "no where")]))
    for text in (render_html(comparison), render_markdown(comparison), json.dumps(to_json(comparison))):
        assert "still going" in text
        assert "no such run folder" in text


def test_a_mode_has_one_colour_and_dash_everywhere(card_like: Comparison) -> None:
    from matplotlib.figure import Figure

    for plot in plots.PLOTS:
        axis = Figure().subplots()
        plots.draw_plot(axis, plot, card_like.groups, with_reference=True)
        line_styles = [(line.get_color(), line.get_linestyle()) for line in axis.get_lines()]
        dashes = ["None", "None"] if not plot.series else ["-", "--"]
        card = [("#767676", "--")] if plot.reference_column else []
        assert line_styles == [*zip(("#0072b2", "#d55e00"), dashes, strict=True), *card], plot.name
        assert "(" in axis.get_ylabel() or plot.name in ("lr", "grad_norm", "tokens_per_second")
        assert axis.get_xlabel() in ("epoch", "tokens seen", "trainable parameters")


def draw_with_legend(comparison: Comparison, plot: plots.PlotSpec) -> tuple[Any, Any, Any]:
    """(figure, axis, legend) of one plot as the page has it, drawn."""
    with plots.styled_figure(plots.PLOT_SIZE_INCHES) as figure:
        axis = figure.subplots()
        plots.draw_plot(axis, plot, comparison.groups, comparison.with_reference)
        plots.add_legend(figure, [axis])
        figure.draw_without_rendering()
    return figure, axis, figure.legends[0]


@pytest.mark.parametrize("runs", [2, 7])
def test_no_name_of_a_line_is_cut_off_lies_on_another_or_on_the_axes(tmp_path: Path, runs: int) -> None:
    """Also with small learning rates, with ranks side by side, and with parameters that lie together."""
    ranks = [2**n for n in range(runs - 1)]
    loras = [
        make_metadata("lora", settings__lora__rank=rank, resolved__lr=3e-5 * rank, model__trainable=20_000 + 900 * rank)
        for rank in ranks
    ]
    comparison = make_comparison(tmp_path, make_metadata("full", resolved__lr=3e-5), *loras)
    for plot in plots.PLOTS:
        figure, axis, legend = draw_with_legend(comparison, plot)
        page, texts = figure.bbox, legend.get_texts()
        assert texts, plot.name
        boxes = [text.get_window_extent() for text in texts]
        for box in [*boxes, axis.yaxis.label.get_window_extent(), axis.xaxis.label.get_window_extent()]:
            assert page.contains(*box.min), plot.name
            assert page.contains(*box.max), plot.name
        assert axis.get_window_extent().height > 0.35 * page.height, f"{plot.name}: squeezed"
        for actual, other in itertools.combinations([axis.get_tightbbox(), *boxes], 2):
            assert not actual.overlaps(other), plot.name


@pytest.mark.parametrize(
    ("make_content", "legend"),
    [
        (make_metadata, ["full: 1.0000", "LoRA: 1.0000"]),
        (make_reference_like_metadata, ["full: 1.0000", "LoRA: 1.0000", "card: 0.9414"]),
    ],
)
def test_the_validation_loss_says_its_last_value_and_has_the_card_only_where_it_is_comparable(
    tmp_path: Path, make_content: Any, legend: list[str]
) -> None:
    """Else the card's epochs and losses would squeeze the curves that the page is about."""
    comparison = make_comparison(tmp_path, make_content("full"), make_content("lora"), losses=CARD_LIKE)
    assert [text.get_text() for text in draw_with_legend(comparison, plots.LOSS_PLOT)[2].get_texts()] == legend


def test_thinning_a_curve_keeps_the_mean_and_leaves_short_curves_alone() -> None:
    x = np.arange(20_000.0)
    few_x, few_y = plots.downsample(x, np.sin(x) + 1, 300)
    assert len(few_x) == 300
    assert few_y.mean() == pytest.approx((np.sin(x) + 1).mean(), abs=1e-2)
    assert np.all(np.diff(few_x) > 0)
    np.testing.assert_array_equal(plots.downsample(x[:200], x[:200], 300)[1], x[:200])
    assert len(plots.downsample(x[:3], np.array([1.0, np.nan, 2.0]), 300)[0]) == 2


def test_a_run_without_evaluations_is_still_in_the_report(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path, make_metadata("full"), make_metadata("lora"), losses={})
    data = to_json(comparison)
    assert data["verdict"]["sentence"] == "No run is finished and evaluated, so there is nothing to compare yet."
    assert "nothing to compare yet" in render_html(comparison)


@pytest.mark.usefixtures("few_plots")
def test_without_the_reference_no_report_format_mentions_it(tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path, make_metadata("full"), make_metadata("lora"), with_card=False)
    write_report(comparison, tmp_path / "out")
    for file in ("report.html", "report.md", "comparison.json", "curves.svg"):
        text = (tmp_path / "out" / file).read_text().split("</style>")[-1]
        assert "1.2262" not in text
        assert ">card<" not in text
