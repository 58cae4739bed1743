"""The comparison as a W&B Report: the same verdict and tables as Markdown, and live panels; needs wandb-workspaces."""

import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.report import markdown
from trainer.report.comparison import Comparison
from trainer.report.options import RateCurve
from trainer.report.plot_axes import COLOURS
from trainer.report.wandb_reference import REFERENCE_RUN_ID

SAVED_REPORT_FILE = "wandb-report.json"  # in the output folder: which report this comparison was saved as
PANEL_WIDTH, PANEL_HEIGHT = 12, 8  # of a panel; a page is 24 wide
MAX_RUNS_PER_PANEL = 100  # lines that a panel shows; W&B's own limit is 10


def to_spec_json(comparison: Comparison) -> str:
    """The report as the JSON that W&B keeps of it, made without any network."""
    spec = _build_report(comparison, "entity", "project", own_project=True)._to_model().spec
    return str(spec.model_dump_json(by_alias=True, exclude_none=True, indent=1)) + "\n"


def save_report(comparison: Comparison, entity: str, project: str, output_dir: Path) -> str:
    """Save the report and return its address; one saved before under the same project and title is updated.

    UserError where W&B does not take it.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    _import_workspaces()
    import wandb

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # wandb's own voice; ours says where the report is
            api = wandb.Api()
            if project not in (existing_project.name for existing_project in api.projects(entity)):
                api.create_project(project, entity)  # a run set asks the server for it
            report = _build_report(comparison, entity, project, own_project=False)
            report.id = _find_saved_report_id(api, entity, project, report.title, output_dir)
            report.save()
    except Exception as error:
        raise UserError(
            f"--wandb-report {entity}/{project}: W&B did not take it ({' '.join(str(error).split())[:200]})"
        ) from error
    saved = {"entity": entity, "project": project, "title": report.title, "id": report.id}
    (output_dir / SAVED_REPORT_FILE).write_text(json.dumps(saved) + "\n", encoding="utf-8")
    return str(report.url)


def parse_target(text: str) -> tuple[str, str]:
    """(entity, project) of --wandb-report; UserError where it is none, or nothing could be sent, before slow work."""
    from trainer.tracking.wandb_environment import is_logged_in

    entity, _, project = text.strip("/").partition("/")
    if not entity or not project or "/" in project:
        raise UserError(f"--wandb-report {text}: expected ENTITY/PROJECT")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        raise UserError(
            f"--wandb-report: WANDB_MODE is {os.environ['WANDB_MODE']}; unset it, or use --wandb-report-json FILE"
        )
    if not is_logged_in():
        raise UserError(
            "--wandb-report: not logged in; run `wandb login` or set WANDB_API_KEY, or use --wandb-report-json FILE"
        )
    return entity, project


def _import_workspaces() -> Any:
    try:
        import wandb_workspaces.reports.v2 as workspaces
    except ImportError as error:
        raise UserError(
            f"a W&B Report needs wandb-workspaces: pip install 'gpt2-full-vs-lora[report]' ({error})"
        ) from error
    return workspaces


def _find_saved_report_id(api: Any, entity: str, project: str, title: str, output_dir: Path) -> str:
    """The id of the report that this one replaces: noted in the output folder, else found by its title; "" if none."""
    target = {"entity": entity, "project": project, "title": title}
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError):
        saved = json.loads((output_dir / SAVED_REPORT_FILE).read_text(encoding="utf-8"))
        if saved.items() >= target.items():
            return str(saved["id"])
    reports = api.reports(f"{entity}/{project}")
    return next((str(report.id) for report in reports if report.display_name == title), "")


def report_title(comparison: Comparison) -> str:
    """The title, which is the same each time the same data are compared."""
    from trainer.tracking.wandb_keys import data_name

    sources = {data_name(str(run.get("data.source"))) for run in comparison.runs}
    kind = "Full against LoRA" if comparison.verdict.study is None else "Study of full against LoRA"
    return (kind + (f", {sources.pop()}" if len(sources) == 1 else ""))[:128]


def _modes(comparison: Comparison) -> list[str]:
    return ["full", "lora", "card"] if comparison.with_reference else ["full", "lora"]


def run_filter(comparison: Comparison) -> str:
    """Which runs of the project the panels show: both modes, new ones too; of a study, those that it answers from."""
    if comparison.verdict.study is None:
        return f"Config('mode') in {_modes(comparison)}"
    return f"Metric('ID') in {[run.run_id for run in comparison.runs]}"


def _build_report(comparison: Comparison, entity: str, project: str, *, own_project: bool) -> Any:
    """The report; with `own_project` its run set names no project, so that no server is asked."""
    wr = _import_workspaces()
    colours = {run.run_id: COLOURS[run.mode] for run in comparison.runs}
    if comparison.with_reference:
        colours[REFERENCE_RUN_ID] = COLOURS["card"]
    where = {} if own_project else {"entity": entity, "project": project}
    runset = wr.Runset(
        **where,
        name=" / ".join(_modes(comparison)),
        filters=run_filter(comparison),
        run_settings={run_id: wr.RunSettings(color=colour) for run_id, colour in colours.items()},
    )
    notes = markdown.render_list(comparison.comparability_notes)
    sections = {table.title: markdown.render_table(table) for table in (comparison.by_epoch, comparison.by_run)}
    sections["Same and different"] = f"{notes}\n\n{markdown.render_table(comparison.differing_settings)}"
    sections |= {table.title: markdown.render_table(table) for table in comparison.optional_tables}
    blocks = [wr.H1("Verdict"), wr.MarkdownBlock(markdown.render_verdict(comparison))]
    if comparison.verdict.study is not None:
        blocks.append(_rate_grid(wr, comparison.verdict.study.rate_curves, where))
    if comparison.problems:
        blocks.append(wr.MarkdownBlock(markdown.render_list(map(str, comparison.problems))))
    for heading, text in sections.items():
        blocks += [wr.H1(heading), wr.MarkdownBlock(text)]
    blocks += [wr.H1("Curves"), wr.PanelGrid(runsets=[runset], panels=_panels(wr, comparison))]
    return wr.Report(
        entity=entity,
        project=project,
        title=report_title(comparison),
        width="fluid",
        description=comparison.verdict.sentence[:500],
        blocks=blocks,
    )


LOSS_LABEL = "loss (nats per token)"
#: title, x, metric, label of x, label of y
LINE_PANELS = (
    ("Validation loss by epoch", "epoch", "val/loss", "epoch", LOSS_LABEL),
    ("Train loss by epoch", "epoch", "train/loss", "epoch", LOSS_LABEL),
    ("Train loss by epoch, mean of each", "epoch", "train/loss_epoch", "epoch", LOSS_LABEL),
    ("Train loss by tokens", "tokens", "train/loss", "tokens", LOSS_LABEL),
    ("Validation loss by time", "_runtime", "val/loss", "seconds", LOSS_LABEL),
    ("Learning rate", "epoch", "train/lr", "epoch", "learning rate"),
    ("Gradient norm before clipping", "epoch", "train/grad_norm", "epoch", "L2 norm"),
    ("Speed", "epoch", "train/tokens_per_second", "epoch", "tokens per second"),
)
BAR_PANELS = (("Peak memory (bytes)", "peak_memory_bytes"), ("Best validation loss", "val/loss.min"))


def _rate_grid(wr: Any, curves: Sequence[RateCurve], where: dict[str, str]) -> Any:
    """Loss against rate of each mode's searches: of their whole runs, whatever else the project holds."""
    num_steps = max(curve.num_steps for curve in curves)
    whole = [curve for curve in curves if curve.num_steps == num_steps]
    runsets = [
        wr.Runset(
            **where,
            name=f"{curve.mode}, whole runs of the search",
            filters=f"Metric('ID') in {list(curve.run_ids)}",
            run_settings={run_id: wr.RunSettings(color=COLOURS[curve.mode]) for run_id in curve.run_ids},
        )
        for curve in whole
    ]
    panel = wr.ScatterPlot(
        title=f"Validation loss against learning rate, runs of {num_steps:,} steps",
        x=wr.Config("lr"),
        y=wr.SummaryMetric("val/loss.last"),
        log_x=True,
        layout=wr.Layout(x=0, y=0, w=2 * PANEL_WIDTH, h=PANEL_HEIGHT),
    )
    return wr.PanelGrid(runsets=runsets, panels=[panel])


def _panels(wr: Any, comparison: Comparison) -> list[Any]:
    """The panels two abreast, the comparison of configs below them; LoRA and the card are dashed."""
    reference_ids = [REFERENCE_RUN_ID] if comparison.with_reference else []
    dashed_ids = [run.run_id for run in comparison.runs if run.mode == "lora"] + reference_ids
    panels = [
        wr.LinePlot(
            title=title,
            x=x if x.startswith("_") else wr.Metric(x),
            y=[wr.Metric(metric)],
            title_x=x_label,
            title_y=y_label,
            log_y=metric == "train/grad_norm",
            smoothing_type="none",
            smoothing_factor=0,
            max_runs_to_show=MAX_RUNS_PER_PANEL,
            line_marks={f"{run_id}:{metric}": "dashed" for run_id in dashed_ids},
            line_colors={f"{run_id}:{metric}": COLOURS["card"] for run_id in reference_ids},
        )
        for title, x, metric, x_label, y_label in LINE_PANELS
    ]
    panels += [
        wr.BarPlot(title=title, metrics=[wr.SummaryMetric(metric)], max_runs_to_show=MAX_RUNS_PER_PANEL)
        for title, metric in BAR_PANELS
    ]
    panels.append(
        wr.ScatterPlot(
            title="Best validation loss by trainable parameters",
            x=wr.Config("trainable_parameters"),
            y=wr.SummaryMetric("val/loss.min"),
            log_x=True,
        )
    )
    for i, panel in enumerate(panels):
        panel.layout = wr.Layout(x=PANEL_WIDTH * (i % 2), y=PANEL_HEIGHT * (i // 2), w=PANEL_WIDTH, h=PANEL_HEIGHT)
    bottom_row = PANEL_HEIGHT * ((len(panels) + 1) // 2)
    return [*panels, wr.RunComparer(diff_only="split", layout=wr.Layout(x=0, y=bottom_row, w=2 * PANEL_WIDTH, h=12))]
