"""`--find-lr`: raise the learning rate from step to step on a copy of the state, and say where to put it."""

import json
import math
from pathlib import Path

from trainer.config.cli import LrRange
from trainer.config.errors import UserError
from trainer.data.dataset import Prepared
from trainer.data.sampler import epoch_order, step_batches, step_counts
from trainer.distributed.engine import Engine
from trainer.distributed.steppers import NotFinite
from trainer.report.lr_range_plot import draw_range_test
from trainer.tools.finders.lr_curve import Verdict, diverged, judge, rates, smooth, smoothing
from trainer.training.checkpoint import write_text
from trainer.training.loop import PAD_ID, Course
from trainer.training.run_plan import Plan

SHOWN = 10  # lines while it runs


def find_lr(wanted: LrRange, plan: Plan, data: Prepared, engine: Engine) -> int:
    """Sweep, restore, say, and leave find-lr.json and find-lr.png in the run folder. 0, also without a suggestion."""
    restore = engine.state.remember()
    tried = rates(wanted.start, wanted.end, wanted.steps)
    try:
        losses = sweep(engine, data, plan.course, tried)
    finally:
        restore()
    plan.world.once(lambda: _tell(wanted, plan, tried[: len(losses)], losses))
    return 0


def sweep(engine: Engine, data: Prepared, course: Course, tried: list[float]) -> list[float]:
    """The loss of each step, the token mean over its global batch *before* its update; ends where it diverges.

    The steps are those of a run: same order, same batches, same dropout; only the rates are others. Every rank sees the
    same numbers, so all end at the same step.
    """
    settings, losses = course.settings, []
    order, order_epoch = None, -1
    for step, rate in enumerate(tried):
        epoch, place = divmod(step, course.steps_per_epoch)
        if order is None or order_epoch != epoch:
            order, order_epoch = (
                epoch_order(
                    data.train, seed=settings.train.seed, epoch=epoch, global_batch=course.batch.global_batch,
                    shuffle=settings.data.shuffle, by_length=settings.data.objective == "completion",
                ),
                epoch,
            )  # fmt: skip
        micros = step_batches(data.train, order, place, course.batch, engine.world.rank, PAD_ID)
        _, _, counted = step_counts(data.train, order, place, course.batch.global_batch)
        sums = [engine.accumulate(micro, step=step, counted=counted) for micro in micros]
        try:
            losses.append(engine.step(rate, sums).nll / counted)
        except NotFinite:
            losses.append(math.nan)
            engine.drop()
        if diverged(losses, len(tried)):
            break
        if engine.world.rank == 0 and (step + 1) % max(1, len(tried) // SHOWN) == 0:
            print(f"step {step + 1}/{len(tried)}  lr {rate:.1e}  loss {losses[-1]:.4f}", flush=True)
    return losses


def _tell(wanted: LrRange, plan: Plan, tried: list[float], losses: list[float]) -> None:
    """On one rank: the verdict in words, as JSON and as a picture."""
    settings = plan.settings
    verdict = judge(tried, losses, wanted.steps)
    folder = Path(settings.run_folder)
    finite = [loss for loss in losses if math.isfinite(loss)]
    content = {
        "format": 1, "mode": settings.mode, "range": [wanted.start, wanted.end], "steps": wanted.steps, "lr": tried,
        "loss": [loss if math.isfinite(loss) else None for loss in losses],
        "smoothed": smooth(finite, smoothing(wanted.steps)),
        "suggestion": verdict.suggestion, "lowest": verdict.lowest, "steepest": verdict.steepest,
        "warning": verdict.warning, "settings": settings.as_dict(), "resolved": plan.resolved(),
        "data": plan.data["fingerprint"],
    }  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "find-lr.json", json.dumps(content, indent=1) + "\n")
        draw_range_test(
            folder / "find-lr.png", mode=settings.mode, rates=tried[: len(finite)], losses=finite,
            smoothed=content["smoothed"], suggestion=verdict.suggestion, name=settings.run_name,
        )  # fmt: skip
    except OSError as problem:
        raise UserError(
            f"{folder}: cannot write there: {problem.strerror}; name another folder with --out"
        ) from problem
    for line in lines(verdict, settings.mode, settings.train.lr):
        print(line, flush=True)
    print(f"plot           {folder / 'find-lr.png'}, numbers in find-lr.json; nothing was trained", flush=True)


def lines(verdict: Verdict, mode: str, lr: float) -> list[str]:
    """The verdict for people."""
    told = []
    if verdict.suggestion is not None:
        told.append(
            f"suggestion     --lr {verdict.suggestion:g} for --mode {mode} (a tenth of {verdict.lowest:.1e}, where the "
            f"loss is lowest; it falls fastest at {verdict.steepest:.1e}; these settings have {lr:g})"
        )
    else:
        told.append("suggestion     none")
    if verdict.warning:
        told.append(f"range          {verdict.warning}: --find-lr START:END")
    return told
