"""The comparison as a W&B Report (needs wandb-workspaces), and the card as a W&B run of its own, under a fixed id."""

import contextlib
import io
import os
import tempfile
from typing import Any

from trainer.config import reference
from trainer.config.errors import UserError
from trainer.config.files import data_name
from trainer.config.text import shorten
from trainer.report.page import Comparison, markdown_sections
from trainer.report.plots import COLOURS, LOSS_LABEL
from trainer.tracking.wandb_keys import reference_row
from trainer.tracking.wandb_logger import define_metrics, is_logged_in

REFERENCE_RUN_ID = f"reference-{reference.NAME}"
PANEL_WIDTH, PANEL_HEIGHT = 12, 8  # of a panel; a page is 24 wide
MAX_RUNS_PER_PANEL = 100  # lines that a panel shows; W&B's own limit is 10
#: title, x, metric, label of y
LINE_PANELS = (
    ("Validation loss by epoch", "train/epoch", "eval/loss", LOSS_LABEL),
    ("Train loss by epoch", "train/epoch", "train/loss", LOSS_LABEL),
    ("Train loss by tokens", "tokens", "train/loss", LOSS_LABEL),
    ("Validation loss by time", "_runtime", "eval/loss", LOSS_LABEL),
    ("Learning rate", "train/epoch", "train/learning_rate", "learning rate"),
    ("Gradient norm before clipping", "train/epoch", "train/grad_norm", "L2 norm"),
    ("Speed", "train/epoch", "train/tokens_per_second", "tokens per second"),
)


def parse_target(text: str) -> tuple[str, str]:
    """(entity, project) of --wandb-report; UserError where it is none, or nothing could be sent, before slow work."""
    entity, _, project = text.strip("/").partition("/")
    if not entity or not project or "/" in project:
        raise UserError(f"--wandb-report {text}: expected ENTITY/PROJECT")
    problem = "" if is_logged_in() else "not logged in; run `wandb login` or set WANDB_API_KEY"
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "disabled", "dryrun"):
        problem = f"WANDB_MODE is {mode}; unset it"
    if problem:
        raise UserError(f"--wandb-report: {problem}")
    return entity, project


def save_report(comparison: Comparison, entity: str, project: str) -> str:
    """Save the report and return its address; one saved before under the same project and title is updated. The card is
    logged there first, where it is shown. UserError where W&B does not take it."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # wandb's own voice; ours says where the report is
            api = wandb.Api()
            if project not in (existing_project.name for existing_project in api.projects(entity)):
                api.create_project(project, entity)  # a run set asks the server for it
            if comparison.with_reference:
                _log_reference(api, entity, project)
            report = _build_report(comparison, {"entity": entity, "project": project})
            reports = api.reports(f"{entity}/{project}")
            report.id = next((str(other.id) for other in reports if other.display_name == report.title), "")
            report.save()
    except Exception as error:
        reason = shorten(str(error), 200)
        raise UserError(f"--wandb-report {entity}/{project}: W&B did not take it ({reason})") from error
    return str(report.url)


def _build_report(comparison: Comparison, place: dict[str, str]) -> Any:
    """Verdict and tables, and the curves of the runs as W&B knows them; `place`: entity and project. The panels show
    both modes of the project, new runs too; of a study those that it answers from. The title is the same each time the
    same data are compared."""
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise UserError(
            f"a W&B Report needs wandb-workspaces: pip install 'gpt2-full-vs-lora[report]' ({error})"
        ) from error
    verdict, with_reference = comparison.verdict, comparison.with_reference
    sources = {data_name(str(run.get("data.source"))) for run in comparison.runs}
    title = "Full against LoRA" if verdict.study is None else "Study of full against LoRA"
    title += f", {sources.pop()}" if len(sources) == 1 else ""
    filters = f"Config('mode') in {['full', 'lora'] + ['reference'] * with_reference}"
    if verdict.study is not None:
        filters = f"Metric('ID') in {[run.run_id for run in comparison.runs]}"
    modes = {run.run_id: run.mode for run in comparison.runs}
    if with_reference:
        modes[REFERENCE_RUN_ID] = "card"
    runset = wr.Runset(
        **place,
        name="full / lora" + " / card" * with_reference,
        filters=filters,
        run_settings={run_id: wr.RunSettings(color=COLOURS[mode]) for run_id, mode in modes.items()},
    )
    panels = [
        wr.LinePlot(
            title=panel_title,
            x=x if x.startswith("_") else wr.Metric(x),
            y=[wr.Metric(metric)],
            title_x="seconds" if x == "_runtime" else x.removeprefix("train/"),
            title_y=y_label,
            log_y=metric == "train/grad_norm",
            smoothing_type="none",
            smoothing_factor=0,
            max_runs_to_show=MAX_RUNS_PER_PANEL,
            line_marks={f"{run_id}:{metric}": "dashed" for run_id, mode in modes.items() if mode != "full"},
            layout=wr.Layout(x=PANEL_WIDTH * (i % 2), y=PANEL_HEIGHT * (i // 2), w=PANEL_WIDTH, h=PANEL_HEIGHT),
        )
        for i, (panel_title, x, metric, y_label) in enumerate(LINE_PANELS)
    ]
    bottom = wr.Layout(x=0, y=PANEL_HEIGHT * ((len(panels) + 1) // 2), w=2 * PANEL_WIDTH, h=12)
    panels.append(wr.RunComparer(diff_only="split", layout=bottom))
    blocks = []
    for heading, text in markdown_sections(comparison):
        blocks += [wr.H1(heading), wr.MarkdownBlock(text)]
    return wr.Report(
        **place,
        title=title[:128],
        width="fluid",
        description=verdict.sentence[:500],
        blocks=[*blocks, wr.H1("Curves"), wr.PanelGrid(runsets=[runset], panels=panels)],
    )


def _log_reference(api: Any, entity: str, project: str) -> None:
    """Log the card as a run of this project: those of its rows that are not there."""
    import wandb

    with contextlib.suppress(Exception):  # the client says "not found" in several ways; logging shows what else
        if api.run(f"{entity}/{project}/{REFERENCE_RUN_ID}").lastHistoryStep >= reference.CURVE[-1].step:
            return
    quiet = dict.fromkeys(("silent", "x_disable_stats", "x_disable_meta", "disable_git", "disable_code"), True)
    config = {
        **reference.SETTINGS,
        **reference.KNOWN_DATA,
        "mode": "reference",
        "source": f"model card {reference.NAME}",
        "steps_per_epoch": reference.STEPS_PER_EPOCH,
        "from_its_program": list(reference.PROGRAM_DEFAULTS),
        "unknown": list(reference.UNKNOWN_DATA),
    }
    with tempfile.TemporaryDirectory(prefix="card-") as folder:
        run = wandb.init(
            entity=entity,
            project=project,
            dir=folder,
            mode="online",
            id=REFERENCE_RUN_ID,
            resume="allow",
            name=f"card {reference.NAME}",
            job_type="reference",
            tags=["card", "gpt2"],
            config=config,
            reinit="create_new",
            settings=wandb.Settings(
                console="off", x_save_requirements=False, init_timeout=20, finish_timeout=60, **quiet
            ),
        )
        define_metrics(run)
        for row in reference.CURVE:
            if row.step >= run.starting_step:
                run.log(reference_row(row), step=row.step)
        run.finish(exit_code=0)
