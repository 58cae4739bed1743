"""The card as a W&B run of its own: one run a project, under a fixed id."""

import contextlib
import io
from pathlib import Path
from typing import Any

from trainer.config import reference
from trainer.config.errors import UserError
from trainer.data import cache

REFERENCE_RUN_ID = f"card-{reference.NAME}"


def log_reference(target: str) -> str:
    """Log the card to PROJECT or ENTITY/PROJECT, online where logged in, else offline; what was done, in one line.

    It lies in the user's cache folder, one place for every folder that is worked in. A card that is there already,
    or on the server, is left as it is: `wandb sync` from two places would double its rows.
    """
    entity, _, project = target.rpartition("/")
    log_dir = cache.resolve_cache_dir() / "card" / target.replace("/", "-")
    existing_runs = sorted((log_dir / "wandb").glob(f"*run-*-{REFERENCE_RUN_ID}"))
    if existing_runs:
        return f"the card is already logged for {target}: {existing_runs[0]}"
    from trainer.tracking.wandb_environment import wandb_mode
    from trainer.tracking.wandb_logger import prepare_environment

    mode = wandb_mode(None)
    if mode == "disabled":
        raise UserError("--log-card: WANDB_MODE is disabled; unset it or set it to offline")
    log_dir.mkdir(parents=True, exist_ok=True)
    prepare_environment(log_dir, mode)
    import wandb

    if mode == "online" and _exists_on_server(wandb, entity, project):
        return f"the card is already logged in {target}, under the id {REFERENCE_RUN_ID}"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            sync_dir = _log_run(wandb, entity or None, project, log_dir, mode)
    except Exception as error:
        raise UserError(f"--log-card {target}: W&B did not take it ({' '.join(str(error).split())[:200]})") from error
    return (
        f"the card is logged in {target}"
        if mode == "online"
        else f"the card is logged offline, send it with `wandb sync {sync_dir}`"
    )


def _exists_on_server(wandb: Any, entity: str, project: str) -> bool:
    """Whether the project has the card's run already."""
    try:
        wandb.Api(timeout=30).run("/".join(part for part in (entity, project, REFERENCE_RUN_ID) if part))
    except Exception:  # the client says "not found" in several ways; what else is wrong shows when logging
        return False
    return True


def _log_run(wandb: Any, entity: str | None, project: str, log_dir: Path, mode: str) -> str:
    from trainer.tracking.wandb_keys import AXES, METRICS, reference_row

    run = wandb.init(
        entity=entity,
        project=project,
        id=REFERENCE_RUN_ID,
        name=f"card {reference.NAME}",
        job_type="reference",
        tags=["card", "gpt2"],
        config=_build_config(),
        dir=str(log_dir),
        mode=mode,
        reinit="create_new",
        settings=wandb.Settings(
            console="off",
            silent=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
            disable_git=True,
            disable_code=True,
            init_timeout=20,
            finish_timeout=60,
        ),
    )
    for axis in AXES:
        run.define_metric(axis, hidden=True)
    for pattern, axis, summary in METRICS:
        run.define_metric(pattern, step_metric=axis, summary=summary)
    for row in reference.CURVE:
        run.log(reference_row(row), step=row.step)
    sync_dir = str(run.settings.sync_dir)
    run.finish(exit_code=0)
    return sync_dir


def _build_config() -> dict[str, Any]:
    """What the card states, under the names that the config of a run has, and what it leaves unsaid."""
    return {
        **reference.SETTINGS,
        **reference.KNOWN_DATA,
        "mode": "card",
        "source": f"model card {reference.NAME}",
        "steps_per_epoch": reference.STEPS_PER_EPOCH,
        "from_its_program": list(reference.PROGRAM_DEFAULTS),
        "unknown": list(reference.UNKNOWN_DATA),
    }
