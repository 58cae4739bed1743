"""The card as a W&B run of its own: one run a project, under a fixed id."""

import contextlib
import io
from pathlib import Path
from typing import Any

from trainer.config import reference
from trainer.config.errors import UserError
from trainer.data import cache

CARD_ID = f"card-{reference.NAME}"


def log_card(target: str) -> str:
    """Log the card to PROJECT or ENTITY/PROJECT, online where logged in, else offline; what was done, in one line.

    It lies in the user's cache folder, one place for every folder that is worked in. A card that is there already,
    or on the server, is left as it is: `wandb sync` from two places would double its rows.
    """
    entity, _, project = target.rpartition("/")
    home = cache.root() / "card" / target.replace("/", "-")
    before = sorted((home / "wandb").glob(f"*run-*-{CARD_ID}"))
    if before:
        return f"the card is already logged for {target}: {before[0]}"
    from trainer.tracking.wandb_logger import prepare_environment, wandb_mode

    mode = wandb_mode(None)
    if mode == "disabled":
        raise UserError("--log-card: WANDB_MODE is disabled; unset it or set it to offline")
    home.mkdir(parents=True, exist_ok=True)
    prepare_environment(home, mode)
    import wandb

    if mode == "online" and _on_server(wandb, entity, project):
        return f"the card is already logged in {target}, under the id {CARD_ID}"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            sync_dir = _log(wandb, entity or None, project, home, mode)
    except Exception as problem:
        raise UserError(
            f"--log-card {target}: W&B did not take it ({' '.join(str(problem).split())[:200]})"
        ) from problem
    return (
        f"the card is logged in {target}"
        if mode == "online"
        else f"the card is logged offline, send it with `wandb sync {sync_dir}`"
    )


def _on_server(wandb: Any, entity: str, project: str) -> bool:
    """Whether the project has the card's run already."""
    try:
        wandb.Api(timeout=30).run("/".join(part for part in (entity, project, CARD_ID) if part))
    except Exception:  # the client says "not found" in several ways; what else is wrong shows when logging
        return False
    return True


def _log(wandb: Any, entity: str | None, project: str, home: Path, mode: str) -> str:
    from trainer.tracking.wandb_keys import AXES, METRICS, card_row

    run = wandb.init(
        entity=entity,
        project=project,
        id=CARD_ID,
        name=f"card {reference.NAME}",
        job_type="reference",
        tags=["card", "gpt2"],
        config=_config(),
        dir=str(home),
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
        run.log(card_row(row), step=row.step)
    place = str(run.settings.sync_dir)
    run.finish(exit_code=0)
    return place


def _config() -> dict[str, Any]:
    """What the card states, under the names that the config of a run has, and what it leaves unsaid."""
    stated = {name: value for name, value in reference.SETTINGS.items() if name != "mode"}
    return {
        "mode": "card",
        "source": f"model card {reference.NAME}",
        **stated,
        **reference.KNOWN_DATA,
        "steps_per_epoch": reference.STEPS_PER_EPOCH,
        "from_its_program": list(reference.FROM_THE_PROGRAM),
        "unknown": list(reference.UNKNOWN_DATA),
    }
