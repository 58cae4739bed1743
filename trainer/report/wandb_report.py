"""The comparison as a W&B Report: the same verdict and tables as Markdown, and live panels; needs wandb-workspaces."""

import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.errors import UserError
from trainer.report import markdown
from trainer.report.plot_axes import COLOURS
from trainer.report.wandb_reference import CARD_ID

if TYPE_CHECKING:
    from trainer.report.comparison import Comparison

NOTE = "wandb-report.json"  # in the output folder: which report this comparison was saved as
WIDE, HIGH = 12, 8  # of a panel; a page is 24 wide
MOST_RUNS = 100  # lines that a panel shows; W&B's own limit is 10


def spec(comparison: "Comparison") -> str:
    """The report as the JSON that W&B keeps of it, made without any network."""
    report = _build(comparison, "entity", "project", own_project=True)
    return (
        json.dumps(json.loads(report._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)), indent=1)
        + "\n"
    )


def save(comparison: "Comparison", entity: str, project: str, folder: Path) -> str:
    """Save the report and return its address; one saved before under the same project and title is updated.

    UserError where nobody is logged in, or W&B does not take it.
    """
    check_can_save()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    _workspaces()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # wandb's own voice; ours says where the report is
            _ensure_project(entity, project)
            report = _build(comparison, entity, project, own_project=False)
            report.id = _saved_before(entity, project, report.title, folder) or ""
            report.save()
    except Exception as problem:
        raise UserError(
            f"--wandb-report {entity}/{project}: W&B did not take it ({' '.join(str(problem).split())[:200]})"
        ) from problem
    (folder / NOTE).write_text(
        json.dumps({"entity": entity, "project": project, "title": report.title, "id": report.id}) + "\n",
        encoding="utf-8",
    )
    return str(report.url)


def check_can_save() -> None:
    """Refuse before any slow work where nothing could be sent: nobody is logged in, or W&B is switched off."""
    from trainer.tracking.wandb_logger import logged_in

    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        raise UserError(
            f"--wandb-report: WANDB_MODE is {os.environ['WANDB_MODE']}; unset it, or use --wandb-report-json FILE"
        )
    if not logged_in():
        raise UserError(
            "--wandb-report: not logged in; run `wandb login` or set WANDB_API_KEY, or use --wandb-report-json FILE"
        )


def _workspaces() -> Any:
    try:
        import wandb_workspaces.reports.v2 as workspaces
    except ImportError as problem:
        raise UserError(
            f"a W&B Report needs wandb-workspaces: pip install 'gpt2-full-vs-lora[report]' ({problem})"
        ) from problem
    return workspaces


def _ensure_project(entity: str, project: str) -> None:
    """Make the project where it is new: a run set asks the server for it."""
    import wandb

    api = wandb.Api()
    if project not in (known.name for known in api.projects(entity)):
        api.create_project(project, entity)


def _saved_before(entity: str, project: str, title: str, folder: Path) -> str | None:
    """The id of the report that this one replaces: noted in the output folder, else found by its title."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        if (note.get("entity"), note.get("project"), note.get("title")) == (entity, project, title):
            return str(note["id"])
    import wandb

    for report in wandb.Api().reports(f"{entity}/{project}"):
        if report.display_name == title:
            return str(report.id)
    return None


def title(comparison: "Comparison") -> str:
    """The title, which is the same each time the same data are compared."""
    from trainer.tracking.wandb_keys import data_name

    sources = {data_name(str(run.fact("data.source"))) for run in comparison.runs}
    return ("Full against LoRA" + (f", {sources.pop()}" if len(sources) == 1 else ""))[:128]


def _build(comparison: "Comparison", entity: str, project: str, *, own_project: bool) -> Any:
    """The report; with `own_project` its run set names no project, so that no server is asked."""
    wr = _workspaces()
    modes = ["full", "lora", "card"] if comparison.with_card else ["full", "lora"]
    colours = {run.run_id: COLOURS[run.mode] for run in comparison.runs}
    if comparison.with_card:
        colours[CARD_ID] = COLOURS["card"]
    runs = wr.Runset(
        **({} if own_project else {"entity": entity, "project": project}),
        name=" / ".join(modes),
        filters=f"Config('mode') in {modes}",
        run_settings={run_id: wr.RunSettings(color=colour) for run_id, colour in colours.items()},
    )
    tables = [
        ("By epoch", markdown.table(comparison.by_epoch)),
        (comparison.by_run.title, markdown.runs_table(comparison)),
        (
            "Same and different",
            "\n".join(f"- {markdown.escape(line)}" for line in comparison.comparable)
            + "\n\n"
            + markdown.table(comparison.different),
        ),
    ]
    blocks = [wr.H1("Verdict"), wr.MarkdownBlock(markdown.verdict(comparison))]
    if comparison.problems:
        blocks.append(
            wr.MarkdownBlock("\n".join(f"- {markdown.escape(str(problem))}" for problem in comparison.problems))
        )
    for heading, text in tables:
        blocks += [wr.H1(heading), wr.MarkdownBlock(text)]
    blocks += [wr.H1("Curves"), wr.PanelGrid(runsets=[runs], panels=_panels(wr, comparison))]
    return wr.Report(
        entity=entity,
        project=project,
        title=title(comparison),
        width="fluid",
        description=comparison.verdict.sentence[:500],
        blocks=blocks,
    )


def _panels(wr: Any, comparison: "Comparison") -> list[Any]:
    """The panels two abreast, the comparison of configs below them."""
    lora = [run.run_id for run in comparison.runs if run.mode == "lora"]
    card = [CARD_ID] if comparison.with_card else []

    def line(name: str, x: str, metrics: Sequence[str], x_title: str, y_title: str, log_y: bool = False) -> Any:
        marks = {f"{run}:{metric}": "dashed" for run in lora for metric in metrics}
        marks |= {f"{run}:{metric}": "dashed" for run in card for metric in metrics}
        colours = {f"{run}:{metric}": COLOURS["card"] for run in card for metric in metrics}
        return wr.LinePlot(
            title=name,
            x=x if x.startswith("_") else wr.Metric(x),
            y=[wr.Metric(metric) for metric in metrics],
            title_x=x_title,
            title_y=y_title,
            log_y=log_y,
            smoothing_type="none",
            smoothing_factor=0,
            max_runs_to_show=MOST_RUNS,
            line_marks=marks,
            line_colors=colours,
        )

    loss = "loss (nats per token)"
    panels = [
        line("Validation loss by epoch", "epoch", ["val/loss"], "epoch", loss),
        line("Train loss by epoch", "epoch", ["train/loss"], "epoch", loss),
        line("Train loss by epoch, mean of each", "epoch", ["train/loss_epoch"], "epoch", loss),
        line("Train loss by tokens", "tokens", ["train/loss"], "tokens", loss),
        line("Validation loss by time", "_runtime", ["val/loss"], "seconds", loss),
        line("Learning rate", "epoch", ["train/lr"], "epoch", "learning rate"),
        line("Gradient norm before clipping", "epoch", ["train/grad_norm"], "epoch", "L2 norm", True),
        line("Speed", "epoch", ["train/tokens_per_second"], "epoch", "tokens per second"),
        wr.BarPlot(
            title="Peak memory (bytes)", metrics=[wr.SummaryMetric("peak_memory_bytes")], max_runs_to_show=MOST_RUNS
        ),
        wr.BarPlot(
            title="Best validation loss", metrics=[wr.SummaryMetric("val/loss.min")], max_runs_to_show=MOST_RUNS
        ),
        wr.ScatterPlot(
            title="Best validation loss by trainable parameters",
            x=wr.Config("trainable_parameters"),
            y=wr.SummaryMetric("val/loss.min"),
            log_x=True,
        ),
    ]
    for i, panel in enumerate(panels):
        panel.layout = wr.Layout(x=WIDE * (i % 2), y=HIGH * (i // 2), w=WIDE, h=HIGH)
    below = HIGH * ((len(panels) + 1) // 2)
    return [*panels, wr.RunComparer(diff_only="split", layout=wr.Layout(x=0, y=below, w=2 * WIDE, h=12))]
