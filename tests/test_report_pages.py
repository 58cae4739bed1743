"""What is written: the same numbers in every form, nothing from elsewhere, and nothing that a name could break."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import facts, like_the_card, make

from trainer.config import reference
from trainer.report import markdown, plot_axes, plots
from trainer.report.comparison import Comparison, as_json, compare, write
from trainer.report.load import gather
from trainer.report.tables import duration, size


def comparison(tmp_path: Path, *contents: dict[str, Any], with_card: bool = True, **how: Any) -> Comparison:
    folders = [
        make(tmp_path / f"run{n}", facts_of={**content, "run_id": f"id{n}"}, every=500, **how)
        for n, content in enumerate(contents)
    ]
    return compare(*gather([str(folder) for folder in folders]), with_card=with_card)


CARD_LIKE = {0: 4.0, 1: 1.3, 2: 1.1, 3: 1.0}


def test_the_table_by_epoch_has_card_full_and_lora_and_the_difference(tmp_path: Path) -> None:
    table = comparison(tmp_path, like_the_card("full"), like_the_card("lora"), losses=CARD_LIKE).by_epoch
    assert [(row[0].text, row[1].text) for row in table.rows] == [
        ("0", "full"),
        ("0", "LoRA"),
        *[(str(epoch), name) for epoch in (1, 2, 3) for name in ("card", "full", "LoRA")],
    ]
    rows = {(row["epoch"], row["run"]): row for row in table.records()}
    assert [rows[row.epoch, "card"]["val_loss"] for row in reference.CURVE] == [1.2262, 1.0048, 0.9414]
    assert rows[1.0, "full"]["step"] == 6_621
    assert rows[1.0, "full"]["examples"] == 13_242
    assert rows[2.0, "LoRA"]["to_card"] == pytest.approx(1.1 - 1.0048)
    assert rows[0.0, "LoRA"]["to_card"] is None


def test_no_number_is_taken_across_a_gap_in_any_file(tmp_path: Path) -> None:
    """Another data set on each side: no difference, share or ratio may show, in any form."""
    found = comparison(
        tmp_path, facts("full"), facts("lora", data__fingerprint="ff"), losses={0: 4.0, 1: 3.0, 2: 2.5, 3: 2.25}
    )
    files = {path.name: path for path in write(found, tmp_path / "out")}
    data = json.loads(files["comparison.json"].read_text())
    assert data["verdict"]["pairs"] == []
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


def test_the_same_numbers_are_in_every_form(tmp_path: Path) -> None:
    found = comparison(tmp_path, like_the_card("full"), like_the_card("lora"), losses=CARD_LIKE)
    files = {path.name: path for path in write(found, tmp_path / "out")}
    data = json.loads(files["comparison.json"].read_text())
    html, page = files["report.html"].read_text(), files["report.md"].read_text()
    for row in found.by_epoch.rows:
        for cell in row:
            assert f">{cell.text}<" in html
            assert f" {markdown.escape(cell.text)} " in page
    assert [row["val_loss"] for row in data["by_epoch"] if row["run"] == "LoRA"] == [4.0, 1.3, 1.1, 1.0]
    assert data["by_run"][1]["trainable"] == 124_439_808
    assert len(data["facts"]) == len(found.same.rows) + len(found.different.rows)
    assert list(files) == ["report.html", "report.md", "curves.png", "curves.svg", "comparison.json"]
    assert files["curves.png"].read_bytes().startswith(b"\x89PNG")


class Page(HTMLParser):
    """Notes what a page would fetch, its ids, and whether each element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [given["id"] or ""] if "id" in given else []
        if tag not in ("meta", "link", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    assert page.open == []
    return page


def test_the_html_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    found = comparison(tmp_path, facts("full"), facts("lora"))
    write(found, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    page = parsed(html)
    assert all(link.startswith(("#", "data:,")) for link in page.links)
    assert "script" not in page.tags
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert '<meta name="viewport" content="width=device-width' in html
    assert len(page.ids) == len(set(page.ids)), "an id twice: one plot would show another's marks"
    for colour in plots.VARIABLES:  # a colour that is no variable would not follow light and dark
        assert colour not in html.split("</style>", 1)[1]


def test_a_name_cannot_break_a_page(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>|$x_1$ `*a*` [b](c)"
    found = comparison(
        tmp_path, facts("full", name=name), facts("lora"), facts("lora", data__source=name, data__fingerprint="ff")
    )
    write(found, tmp_path / "out")
    html, page = ((tmp_path / "out" / file).read_text() for file in ("report.html", "report.md"))
    assert "script" not in parsed(html).tags
    assert "<script>" not in page
    lines = page.split("## By run")[1].split("##")[0].strip().splitlines()
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
    assert len(columns) == 1, "a name added a column"


def test_the_order_of_the_page_is_verdict_epochs_runs_settings_curves(tmp_path: Path) -> None:
    found = comparison(tmp_path, facts("full"), facts("lora"))
    write(found, tmp_path / "out")
    for text in ((tmp_path / "out" / file).read_text() for file in ("report.html", "report.md")):
        places = [
            text.index(part)
            for part in (
                "LoRA reached",
                "By epoch",
                "By run",
                "Same and different",
                "Different",
                "Same, where known",
                "Curves",
            )
        ]
        assert places == sorted(places)


def test_only_the_different_settings_are_open(tmp_path: Path) -> None:
    write(comparison(tmp_path, facts("full"), facts("lora")), tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert re.findall(r"<details( open)?><summary>([A-Za-z]+)", html) == [(" open", "Different"), ("", "Same")]


def test_on_a_phone_the_validation_loss_stands_beside_the_names(tmp_path: Path) -> None:
    """The style moves columns by their number, so each must be where the style thinks it is."""
    found = comparison(tmp_path, facts("full"), facts("lora"))
    write(found, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count('<table class="epochs">') == 1
    assert list(found.by_epoch.columns)[:6] == ["epoch", "run", "step", "examples", "train_loss", "val_loss"]
    moved = dict.fromkeys((3, 4), "2") | dict.fromkeys((5, "n+7"), "1")  # the sixth is left, right after the names
    for child, order in moved.items():
        assert re.search(rf"\.epochs tr > :nth-child\({re.escape(str(child))}\)[^{{}}]*{{ order: {order}; }}", html), (
            child
        )


def test_a_fingerprint_is_short_on_the_page_and_whole_in_the_json(tmp_path: Path) -> None:
    content = facts("full", data__fingerprint="0123456789ab" + "cdef" * 13)
    files = {path.name: path.read_text("latin-1") for path in write(comparison(tmp_path, content), tmp_path / "out")}
    assert "cdef" * 13 in files["comparison.json"]
    assert "0123456789ab" in files["report.md"]
    assert "0123456789ab" + "cdef" not in files["report.md"] + files["report.html"]


def test_what_was_wrong_is_on_the_page(tmp_path: Path) -> None:
    good, going = make(tmp_path / "good"), make(tmp_path / "going", "lora", finished=False)
    found = compare(*gather([str(good), str(going), str(tmp_path / "no where")]))
    write(found, tmp_path / "out")
    for text in ((tmp_path / "out" / file).read_text() for file in ("report.html", "report.md", "comparison.json")):
        assert "still going" in text
        assert "no such run folder" in text


def test_a_mode_has_one_colour_and_dash_everywhere(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    found = comparison(tmp_path, facts("full"), facts("lora"))
    for plot in plots.PLOTS:
        axis = Figure().subplots()
        plot_axes.draw(axis, plot, found.groups, with_card=True)
        drawn = [(line.get_color(), line.get_linestyle()) for line in axis.get_lines()]
        expected = [("#0072b2", "-"), ("#d55e00", "--")] + ([("#767676", "--")] if plot.card is not None else [])
        assert drawn == expected, plot.name
        assert "(" in axis.get_ylabel() or plot.name in ("lr", "grad_norm", "tokens_per_second")
        assert axis.get_xlabel() in ("epoch", "tokens seen")


def test_labels_never_overlap_and_stay_near_their_lines() -> None:
    places = plot_axes.spaced([0.5, 0.5, 0.51, 0.9], [0.1] * 4)
    assert all(b - a >= 0.1 - 1e-3 for a, b in itertools.pairwise(places))
    assert places[3] == pytest.approx(0.9, abs=0.01)
    assert max(abs(a - 0.5) for a in places[:3]) < 0.12
    low = plot_axes.spaced([0.0, 0.0], [0.1, 0.1])
    assert low[0] >= -1e-9
    assert low[1] - low[0] >= 0.1 - 1e-6
    high = plot_axes.spaced([0.99, 1.0, 1.0], [0.1, 0.2, 0.1])
    assert high == pytest.approx([0.65, 0.8, 0.95])  # the topmost ends at the top


def placed(comparison: Comparison, plot: plot_axes.Plot) -> list[Any]:
    """The labels of one plot as they are written, each with its box in pixels and the point it speaks of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text  # its own extent: an annotation's holds the stroke, too

    with plots._style():
        figure = Figure(figsize=plots.SIZE)
        axis = figure.subplots()
        plot_axes.finish(figure, [plot_axes.draw(axis, plot, comparison.groups, comparison.with_card)], columns=1)
        FigureCanvasAgg(figure).draw()
    boxes = [(text, Text.get_window_extent(text), axis.transAxes.transform(text.xy)) for text in axis.texts]
    return [figure.bbox, axis.yaxis.label.get_window_extent(), *boxes]


@pytest.mark.parametrize("runs", [2, 7])
def test_no_label_of_a_plot_is_cut_off_lies_on_another_or_far_from_its_point(tmp_path: Path, runs: int) -> None:
    """Also with the card's small learning rate, with ranks side by side, and with parameters that lie together."""
    ranks = [2**n for n in range(runs - 1)]
    loras = [
        facts("lora", settings__lora__rank=rank, resolved__lr=3e-5 * rank, model__trainable=20_000 + 900 * rank)
        for rank in ranks
    ]
    found = comparison(tmp_path, facts("full", resolved__lr=3e-5), *loras)
    for plot in (*plots.PLOTS, plots.SCATTER):
        page, axis_label, *labels = placed(found, plot)
        assert labels, plot.name
        assert axis_label.x0 >= page.x0, f"{plot.name}: the name of its axis is cut off"
        for text, box, point in labels:
            assert page.contains(*box.min), (plot.name, text.get_text())
            assert page.contains(*box.max), (plot.name, text.get_text())
            aside = abs(point[1] - (box.y0 + box.y1) / 2)
            assert aside < 0.05 * page.height or text.arrow_patch is not None, "far from its point, and no stroke to it"
        for (one, box, _), (other, beside, _) in itertools.combinations(labels, 2):
            assert not box.overlaps(beside), (plot.name, one.get_text(), other.get_text())


def test_the_validation_loss_says_its_last_value_at_the_end_of_its_line(tmp_path: Path) -> None:
    found = comparison(tmp_path, facts("full"), facts("lora"), losses={0: 4.0, 1: 3.0, 2: 2.5, 3: 2.25})
    texts = {text.get_text() for text, _, _ in placed(found, plots.PLOTS[0])[2:]}
    assert texts == {"full: 2.2500", "LoRA: 2.2500", "card: 0.9414,\nnot comparable"}


def test_thinning_keeps_the_mean_and_leaves_short_curves_alone() -> None:
    x = np.arange(20_000.0)
    few_x, few_y = plot_axes.thin(x, np.sin(x) + 1, 300)
    assert len(few_x) == 300
    assert few_y.mean() == pytest.approx((np.sin(x) + 1).mean(), abs=1e-2)
    assert np.all(np.diff(few_x) > 0)
    np.testing.assert_array_equal(plot_axes.thin(x[:200], x[:200], 300)[1], x[:200])
    assert len(plot_axes.thin(x[:3], np.array([1.0, np.nan, 2.0]), 300)[0]) == 2


def test_an_unevaluated_run_is_still_drawn_and_written(tmp_path: Path) -> None:
    found = comparison(tmp_path, facts("full"), facts("lora"), losses={})
    data = as_json(found)
    assert data["verdict"]["sentence"] == "No run is finished and evaluated, so there is nothing to compare yet."
    assert len(write(found, tmp_path / "out")) == 5


def test_no_card_means_no_card_anywhere(tmp_path: Path) -> None:
    write(comparison(tmp_path, facts("full"), facts("lora"), with_card=False), tmp_path / "out")
    for file in ("report.html", "report.md", "comparison.json", "curves.svg"):
        text = (tmp_path / "out" / file).read_text().split("</style>")[-1]
        assert "1.2262" not in text
        assert ">card<" not in text


def test_sizes_and_times_read_as_people_say_them() -> None:
    assert [size(value).text for value in (None, 8_000_000, 1_500_000_000)] == ["-", "8.0 MB", "1.50 GB"]
    assert [duration(value).text for value in (None, 4.25, 100, 600, 6_000)] == [
        "-",
        "4.2 s",
        "100 s",
        "10.0 min",
        "1 h 40 min",
    ]
