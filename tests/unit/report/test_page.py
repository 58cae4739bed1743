"""What is written: the same numbers in every form, nothing from elsewhere, and nothing that a name could break."""

import base64
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_runs import make_metadata, make_reference_like_metadata, make_run_folder
from helpers.fake_studies import MakeRun, make_study
from matplotlib.figure import Figure

from trainer.config import reference
from trainer.config.text import escape_markdown
from trainer.report import plots
from trainer.report.answer_file import to_answer
from trainer.report.load import load_runs
from trainer.report.page import Comparison, compare, markdown_sections, render_html, write_report
from trainer.report.run_data import read_folder
from trainer.tracking.records import EventRecord, to_line

Plain = tuple[Comparison, dict[str, str]]
CARD_LIKE = {0: 4.0, 1: 1.3, 2: 1.1, 3: 1.0}


def make_comparison(tmp_path: Path, *contents: dict[str, Any], with_card: bool = True, **options: Any) -> Comparison:
    folders = [
        make_run_folder(tmp_path / f"run{n}", metadata={**content, "run_id": f"id{n}"}, every=500, **options)
        for n, content in enumerate(contents)
    ]
    return compare(*load_runs([str(folder) for folder in folders]), with_reference=with_card)


def write_texts(comparison: Comparison, folder: Path) -> dict[str, str]:
    paths = write_report(comparison, folder)
    return {path.name: path.read_text() for path in paths}


def to_markdown(comparison: Comparison) -> str:
    """What a W&B Report holds."""
    return "\n".join(text for _, text in markdown_sections(comparison))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """Full and LoRA of the demo, and the text of each file of their report."""
    folder = tmp_path_factory.mktemp("plain")
    comparison = make_comparison(folder, make_metadata("full"), make_metadata("lora"))
    return comparison, write_texts(comparison, folder / "out")


@pytest.fixture(scope="module")
def card_like(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Full and LoRA that may be held against the card."""
    contents = [make_reference_like_metadata(mode) for mode in ("full", "lora")]
    return make_comparison(tmp_path_factory.mktemp("card"), *contents, losses=CARD_LIKE)


@pytest.fixture
def few_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them all is most of a report's time."""
    monkeypatch.setattr(plots, "PLOTS", plots.PLOTS[:2])


@pytest.mark.usefixtures("few_plots")
def test_every_report_format_has_the_card_full_lora_and_their_difference(card_like: Comparison, tmp_path: Path) -> None:
    table, files = card_like.by_epoch, write_texts(card_like, tmp_path / "out")
    markdown = to_markdown(card_like)
    columns = dict(zip(table.headings, zip(*table.rows, strict=True), strict=True))
    assert list(columns)[:6] == ["epoch", "step", "card", "full", "LoRA", "LoRA − full"]
    assert columns["epoch"] == ("0", "1", "2", "3"), "one row an epoch"
    assert columns["card"] == ("", *(f"{row.val_loss:.4f}" for row in reference.CURVE))
    assert columns["step"][1] == "6,621"
    assert columns["LoRA − card"][:3] == ("-", "+0.0738", "+0.0952")  # 1.3 - 1.2262, 1.1 - 1.0048
    assert columns["LoRA"] == ("4.0000", "1.3000", "1.1000", "1.0000")
    assert columns["LoRA − full"] == ("+0.0000",) * 4
    for text in itertools.chain(*table.rows):
        assert f">{text}<" in files["report.html"]
        assert f" {escape_markdown(text)} " in markdown
    assert "The same in all: state finished, validation loss before training 4.0000, " in files["report.html"]
    costs = dict(zip(card_like.by_run[1].headings, zip(*card_like.by_run[1].rows, strict=True), strict=True))
    assert costs["trainable parameters"] == ("124,439,808", "1,179,648")


@pytest.mark.usefixtures("few_plots")
def test_no_report_file_compares_numbers_of_incomparable_runs(tmp_path: Path) -> None:
    """Another data set on each side: no difference, share or ratio may show, in any form."""
    contents = make_metadata("full"), make_metadata("lora", data__fingerprint="0123456789ab" + "cdef" * 13)
    comparison = make_comparison(tmp_path, *contents, losses={0: 4.0, 1: 3.0, 2: 2.5, 3: 2.25})
    files = write_texts(comparison, tmp_path / "out")
    answer = json.loads(files["answer.json"])
    assert (answer["answer"], answer["comparisons"]) == ("not ranked", [])
    assert not any("−" in heading for heading in comparison.by_epoch.headings), "no difference"
    differences = {f"{abs(a - b):.4f}" for a in (4.0, 3.0, 2.5, 2.25) for b in (1.2262, 1.0048, 0.9414)}
    for name in ("answer.json", "report.html"):
        assert not differences & set(re.findall(r"(?<!\d)\d\.\d{4}", files[name])), name
    page = files["report.html"]
    assert "not comparable with one another (other data)" in page
    assert "Repeat one of them on the other&#39;s data" in page
    assert "unknown of the card" in page.lower()
    assert "0123456789ab…" in page
    assert "0123456789abc" not in page, "a fingerprint is short"


def check_page(html: str) -> None:
    """Every element is closed by its own tag, and none is a script."""
    open_tags: list[str] = []
    for closes, tag, is_empty in re.findall(r"<(/?)([a-z][\w:]*)[^>]*?(/?)>", html):
        assert tag != "script"
        if closes:
            assert open_tags.pop() == tag
        elif not is_empty and tag not in ("meta", "link"):
            open_tags.append(tag)
    assert open_tags == []


def test_the_html_report_fetches_nothing_and_runs_nothing(plain: Plain) -> None:
    html = plain[1]["report.html"]
    check_page(html)
    links = re.findall(r'\b(?:src|href|action)="([^"]*)"', html)
    assert len(links) > 10
    assert all(link.startswith(("#", "data:,", "data:application/json;base64,")) for link in links)
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert '<meta name="viewport" content="width=device-width' in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids)), "an id twice: one plot would show another's marks"
    for colour in plots.CSS_VARIABLES:  # a colour that is no variable would not follow light and dark
        assert colour not in html.split("</style>", 1)[1]


@pytest.mark.usefixtures("few_plots")
def test_a_run_name_cannot_break_the_report_pages(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>|$x_1$ `*a*` [b](c)\x1b[31m\u202e"
    other_data = make_metadata("lora", data__source=name, data__fingerprint="ff")
    comparison = make_comparison(tmp_path, make_metadata("full", name=name), make_metadata("lora"), other_data)
    files = write_texts(comparison, tmp_path / "out")
    check_page(files["report.html"])
    markdown = to_markdown(comparison)
    assert not re.search("(?<!\\\\)<script", markdown), "not escaped"
    assert not any(re.search("[\x1b\u202e]", files[file]) for file in files)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, "a name added a column"


def test_the_first_screen_has_question_verdict_losses_next_step_and_pictures_and_the_rest_is_folded(
    make_run: MakeRun,
) -> None:
    runs = make_study(make_run, num_seeds=3, excess=0.2)
    comparison = compare(runs, with_reference=False)
    html, pair = render_html(comparison).replace("\u00a0", " "), comparison.verdict.primary
    first = html.split('<section class="first">')[1].split("</section>")[0]
    assert "<h1>Was LoRA good enough for acled-demo on demo-base?</h1>" in first
    assert re.search('<p class="badge bad"><span aria-hidden="true">✗</span> LoRA was not good enough</p>', first)
    assert f">{pair.base_loss:.4f} → {pair.full_loss:.4f} (full), {pair.lora_loss:.4f} (LoRA)<" in first
    assert "<b>Next:</b> Search LoRA" in first
    titles = re.findall("<figcaption>(.*?)</figcaption>", html)
    assert titles[:2] == [f"LoRA − full, nats per token: {pair.excess}", "Validation loss by epoch"]
    assert len(titles) == len(set(titles)), "the same picture twice"
    assert comparison.verdict.statement.claim[1:] in first
    assert html.count(comparison.verdict.statement.claim[1:]) == 1, "said once"
    assert len(re.findall("<dt>(.*?)</dt>", html)) == len(re.findall(r"<dd>[^<]*\d[^<]*</dd><dd>", html)), "no number"
    packed = re.search(r'download="answer.json" href="data:application/json;base64,([^"]+)"', html)
    assert json.loads(base64.b64decode(packed[1])) == json.loads(json.dumps(to_answer(comparison.verdict)))
    summaries = re.findall(r"<details[^>]*?( open)?><summary>([A-Za-z]+ \w+)", html)
    assert [text for is_open, text in summaries if not is_open] == ["What it", "The runs", "What may", "The same"]
    assert "<title>full, n = 3: " in html, "the value of a point under the pointer"
    assert len(html.encode()) < 300_000
    markdown = to_markdown(comparison)
    assert not re.search(r"1\.2262|\bcard\b", markdown + html.split("</style>")[1]), "nobody asked for the card"
    phone = html.split("@media (max-width: 40rem)")[1].split("@media")[0]
    assert ".epochs tr > :nth-child(2) { display: none; }" in phone
    assert comparison.by_epoch.headings[1] == "step", "the column that a phone leaves out"
    assert comparison.verdict.next_step.split("launch")[0] in markdown


def test_samples_are_cards_with_their_line_breaks_and_settings_hold_no_dict_and_no_path_of_the_machine(
    make_run: MakeRun,
) -> None:
    sources = {"data__source": "x.csv=0.7 /home/me/z.csv=0.3", "settings__data__val_data": ["/home/me/v.csv"]}
    metadata = sources | {"execution": [{"step": 0, "reason": "as planned", "path": "eager"}]}
    metadata["model__name"] = "/home/me/demo-base"
    runs = [make_run(mode, [4.0, 2.0], **metadata) for mode in ("full", "lora")]
    text = {"prompt": "Name\n<two>", "reference": "one\n  two", "completion": "o\x1bne", "base": ""}
    for run in runs:
        path = Path(run.source) / "metrics.jsonl"
        facts = {"texts": [text | {"completion": run.mode}], "epoch": 1.0}
        event = EventRecord(event="samples", step=30, message="", time=1.0, facts=facts)
        path.write_text(path.read_text() + to_line(event) + "\n")
    comparison = compare([read_folder(Path(run.source)) for run in runs], with_reference=False)
    html = render_html(comparison)
    assert '<pre class="prompt">Name\n&lt;two&gt;</pre>' in html
    names = re.findall(r"<dt class=.*?>(.*?)</dt><dd><pre>([^<]*)</pre>", html)
    base = ("base (demo-base)", "(nothing)")
    assert names == [("reference", "one\n  two"), base, ("full", "full"), ("LoRA", "lora")]
    assert to_answer(comparison.verdict)["model"]["name"] == "demo-base"
    assert "/home/me" not in html
    assert "&#39;step&#39;" not in html
    assert "for x.csv=0.7 z.csv=0.3 on demo-base?" in html


# --- plots ---


def test_a_mode_has_one_colour_and_dash_and_the_card_is_drawn_only_where_it_is_comparable(
    card_like: Comparison, plain: Plain
) -> None:
    """Else the card's epochs and losses would squeeze the curves that the page is about."""
    for plot, comparison in itertools.product(plots.PLOTS, (card_like, plain[0])):
        axis = Figure().subplots()
        plots.draw_plot(axis, plot, comparison.groups, with_reference=True)
        line_styles = [(line.get_color(), line.get_linestyle()) for line in axis.get_lines()]
        card = [("#767676", "--")] if plot.reference_column and comparison is card_like else []
        assert line_styles == [("#0072b2", "-"), ("#d55e00", "--"), *card], plot.title
        assert "(" in axis.get_ylabel() or plot.y in ("lr", "grad_norm", "tokens_per_second")
        assert axis.get_xlabel() == "epoch"
        names = [line.get_label() for line in axis.get_lines()]
        if plot is plots.LOSS_PLOT and comparison is card_like:
            assert names == ["full: 1.0000", "LoRA: 1.0000", "card: 0.9414"], "a loss says its last value"


def test_several_rates_are_drawn_as_loss_against_rate_with_the_chosen_points_and_larger_losses_above(tmp_path) -> None:
    contents = [make_metadata(mode, resolved__lr=lr) for mode in ("full", "lora") for lr in (1e-3, 5e-3)]
    comparison = make_comparison(tmp_path, *contents, losses={0: 1.0, 3: 9.0})  # none improved on its base
    assert plots.render_pictures(comparison.groups, comparison.verdict, False)[0][-1][0] == "Loss by learning rate"
    axis, pair = Figure().subplots(), comparison.verdict.primary
    plots.draw_rates(axis, plots.rate_curves(comparison.groups), pair)
    rings = [line for line in axis.get_lines() if line.get_fillstyle() == "none"]
    assert [float(line.get_xdata()[0]) for line in rings] == [pair.full.lr, pair.lora.lr]
    assert axis.get_ylim()[0] < 9 < axis.get_ylim()[1]
