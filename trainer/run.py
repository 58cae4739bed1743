"""One run, wired: the only file that knows all the others."""

import json
import secrets
import string
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.cli import Request
from trainer.config.errors import RunFailed, UserError
from trainer.config.schema import Settings, merge, scientific
from trainer.data.dataset import Prepared, load, prepare
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import World, leave_world, lost_peer, peak_memory, start_world
from trainer.distributed.watchdog import LOST, Stop
from trainer.export.export_cli import model_at
from trainer.export.folder import base_of, export, gathered
from trainer.export.model_card import card_text
from trainer.export.verify import Check, Expected, check_logits, fixed_rows
from trainer.model.build import Model, build, load_config, save_base
from trainer.tools.finders.batch_finder import find_batch
from trainer.tools.finders.files import LEFT
from trainer.tools.finders.lr_finder import find_lr
from trainer.tracking import records
from trainer.tracking.console import Progress as ProgressBar
from trainer.tracking.extra_loggers import start_also
from trainer.tracking.jsonl import JsonlSink, rewind
from trainer.tracking.loggers import Sink, check
from trainer.tracking.profiler import ProfileSink
from trainer.tracking.records import EventRecord, Record
from trainer.tracking.summary import show_end, show_plan
from trainer.tracking.wandb_keys import run_group
from trainer.tracking.wandb_logger import start_wandb, wandb_mode
from trainer.training import checkpoint
from trainer.training.callbacks import Observer
from trainer.training.checkpoint import Checkpoint, Checkpoints, Progress
from trainer.training.diagnostics.types import Facts
from trainer.training.generation import Sampler, check_data
from trainer.training.loop import position, train
from trainer.training.run_plan import Plan, check_early, make_plan

ABOUT_TMP = ".run.json.tmp"


def run(request: Request) -> int:
    """Do what was asked; returns the exit code. Where one rank fails all do, and one of them says why."""
    stop = Stop()
    world = start_world()
    try:
        return _run(request, world, stop)
    except Exception as problem:
        failed = RunFailed(LOST) if lost_peer(problem) else problem
        speaks = world.board.last_word()
        if isinstance(failed, (UserError, RunFailed)):  # anything else is a mistake of ours, with its traceback
            failed.told = not speaks
        world.board.close(failed=True)
        raise failed from problem.__cause__
    finally:
        world.board.close()
        leave_world()


def _run(request: Request, world: World, stop: Stop) -> int:
    settings, before = world.once(lambda: open_folder(request))
    world.once(lambda: check_early(settings, world))
    world.once(lambda: check(settings.output))
    folder = Path(settings.run_folder)
    data = _data(settings, world)
    check_data(settings, data)
    on_meta = request.dry_run or request.find_batch
    model = build(settings, on_meta=on_meta, hashed=world.rank == 0, device=world.device)
    plan = make_plan(settings, world, data, model.facts, load_config(settings.model))
    if request.dry_run:
        if world.rank == 0:
            show_plan(plan.lines())
        return 0
    if request.finds:
        return _find(request, plan, data, model)
    point = world.once(lambda: _checkpoint(folder, request.resume, model)) if before else None
    about = world.once(lambda: _begin(folder, plan, before, request))
    engine, progress = _engine(plan, model, point)
    return _train(plan, data, model, engine, progress, about, point, stop, request)


def _find(request: Request, plan: Plan, data: Prepared, model: Model) -> int:
    """Trials instead of the run; the exit code."""
    if plan.world.rank == 0:
        show_plan(plan.lines())
    with plan.world.board.watched(plan.settings.engine.hang_timeout):
        if request.find_lr is not None:
            return find_lr(request.find_lr, plan, data, _engine(plan, model, None)[0])
        return find_batch(plan, data)


def open_folder(request: Request) -> tuple[Settings, dict[str, Any] | None]:
    """The settings of the run and, where one is resumed, its run.json; UserError where the folder is not as asked."""
    settings = request.settings
    folder = Path(settings.run_folder)
    if request.resume is None:
        if request.allow_change:
            raise UserError(f"--allow-change {request.allow_change[0]}: goes with --resume; a new run may have any")
        if request.finds:  # they only put their own files beside whatever is there
            return settings, None
        if folder.is_dir() and any(path.name not in (ABOUT_TMP, *LEFT) for path in folder.iterdir()):
            raise UserError(f"{folder} is not empty: pass --resume to go on with that run, or another --out")
        return settings, None
    try:
        before = json.loads((folder / "run.json").read_text())
    except FileNotFoundError as problem:
        raise UserError(f"--resume: no run in {folder} (no run.json there); name its folder with --out") from problem
    except (OSError, ValueError) as problem:
        raise UserError(f"--resume: cannot read {folder / 'run.json'}: {problem}") from problem
    stored = Settings.from_dict(before.get("resumed", before)["settings"])
    if stored.mode != settings.mode:
        raise UserError(
            f"--mode {settings.mode}: the run in {folder} is --mode {stored.mode}; a mode cannot change on resume"
        )
    given = {**request.given, "output": {**request.given["output"], "out": settings.run_folder}}
    return merge(stored, given, settings.overridden), before


def _data(settings: Settings, world: World) -> Prepared:
    """Tokenised once by one rank of each node, then mapped by all."""

    def say(line: str) -> None:
        if world.rank == 0:
            print(line, flush=True)

    def make() -> Path:
        return prepare(
            settings.data, model=settings.model.model, global_batch=settings.train.global_batch, say=say
        ).folder

    return load(world.once(make, per_node=True))


def _checkpoint(folder: Path, which: str | None, model: Model) -> Checkpoint | None:
    """The checkpoint to go on from; None where the run ended before its first one and may begin again."""
    if which == "latest" and not any((folder / "checkpoints").glob("step-*")):
        return None
    point = checkpoint.choose(folder / "checkpoints", which or "latest")
    if point.about["base"] != model.facts["fingerprint"]:
        raise UserError(
            f"checkpoint {point.folder} is of a run on another base model ({point.about['base']}, "
            f"here {model.facts['fingerprint']})"
        )
    return point


def _begin(folder: Path, plan: Plan, before: Mapping[str, Any] | None, request: Request) -> dict[str, Any]:
    """Check what a resume may not change, and write run.json; returns the run's description."""
    if before is not None:
        changed = refuse_changes(before, plan, request.allow_change)
        resumed = {"settings": plan.settings.as_dict(), "changed": changed}
        about = {**before, "resumed": resumed}  # `settings` stay those it began with; the next resume takes these
        _write_about(folder, about, plan.settings)
        return about
    run_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    output = plan.settings.output
    wandb = {
        "id": run_id,
        "project": output.wandb_project,
        "group": run_group(plan.data["source"]),
        "mode": wandb_mode(output.wandb),
    }
    about = plan.as_json(run_id=run_id, wandb=wandb)
    _write_about(folder, about, plan.settings)
    return about


def _write_about(folder: Path, about: Mapping[str, Any], settings: Settings) -> None:
    """Put run.json there, whole or not at all, and what an adapter stands on where nobody else has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ABOUT_TMP
        checkpoint.write_text(temporary, json.dumps(about, indent=1) + "\n")
        temporary.replace(folder / "run.json")
        if settings.mode == "lora" and settings.model.init == "random":
            save_base(settings, folder / "base")  # again on resume: a kill may have cut it off
    except OSError as problem:
        raise UserError(
            f"{folder}: cannot write there: {problem.strerror}; name another folder with --out"
        ) from problem


def refuse_changes(before: Mapping[str, Any], plan: Plan, allowed: tuple[str, ...]) -> dict[str, list[Any]]:
    """{name: [when the run began, now]} of what was allowed to change, also by an earlier resume.

    UserError for the first change since the run last went on that was not allowed.
    """
    began = scientific(Settings.from_dict(before["settings"]))
    began |= {"data": before["data"]["fingerprint"], "precision": before["resolved"]["precision"]}
    resumed = before.get("resumed", {"settings": before["settings"], "changed": {}})
    then = scientific(Settings.from_dict(resumed["settings"]))
    then |= {name: resumed["changed"].get(name, [began[name]])[-1] for name in ("data", "precision")}
    now = scientific(plan.settings) | {"data": plan.data["fingerprint"], "precision": plan.precision}
    unknown = [name for name in allowed if name not in now]
    if unknown:
        raise UserError(f"--allow-change {unknown[0]}: expected one of {', '.join(sorted(now))}")
    for name in now:
        if now[name] != then[name] and name not in allowed:
            raise UserError(
                f"--resume: {name} is {now[name]} and was {then[name]} in this run; "
                f"put it back, or say --allow-change {name} as well"
            )
    return {name: [began[name], now[name]] for name in now if now[name] != began[name]}


def _engine(plan: Plan, model: Model, point: Checkpoint | None) -> tuple[Engine, Progress]:
    """The engine, at its start or where the checkpoint stood."""
    if point is not None:
        checkpoint.load_weights(point, model.module)
    engine = Engine(
        plan.world, model, plan.deepspeed, plan.settings.train, plan.precision, compiled=plan.shapes
    )  # fmt: skip
    if point is None:
        return engine, Progress()
    engine.state.load(
        point.reader(plan.world.device), point.step - point.progress.skipped, point.about.get("loss_scale")
    )
    return engine, point.progress


def _train(
    plan: Plan, data: Prepared, model: Model, engine: Engine, progress: Progress, about: dict[str, Any],
    point: Checkpoint | None, stop: Stop, request: Request,
) -> int:  # fmt: skip
    """From the first record to the finished event; whatever happens, the sinks are closed with the exit code."""
    folder = Path(plan.settings.run_folder)
    if request.resume is not None:  # before later rows go: after a kill in between rows are cut then, none is missing
        plan.world.once(lambda: checkpoint.drop_after(folder / "checkpoints", progress.step))
    sinks = Sinks(plan, folder, about, progress, resumed=request.resume is not None)
    saver = Checkpoints(
        folder / "checkpoints", plan.world, keep=plan.settings.output.keep,
        identity={"run_id": about["run_id"], "mode": plan.settings.mode, "base": model.facts["fingerprint"]},
    )  # fmt: skip
    code = 1
    try:
        if request.resume is not None:
            sinks.write(_resumed(plan, about, point, progress, sinks.dropped, request))
        facts = Facts.of({**about, "resolved": plan.resolved()})
        observer = Observer(engine, facts, Sampler(engine, data, plan.settings), sinks.kept())
        for event in observer.begin(progress.step, progress.seconds):
            sinks.write(event)
        with stop.deferred(), plan.world.board.watched(plan.settings.engine.hang_timeout):
            stream = train(engine, data, plan.course, progress, saver, stop.asked, observer.drew)
            progress = sinks.take(stream, observer)
            stop.look_up()  # another rank may have been the first to see that the launcher is gone
        signalled = max(plan.world.gather(stop.signal))
        if progress.pending or signalled:
            code = 128 + signalled
            return code
        _finish(plan, data, model, engine, progress, about, sinks, folder, observer.sample_seconds)
        code = 0
        return code
    finally:
        sinks.close(code)


def _resumed(
    plan: Plan, about: Mapping[str, Any], point: Checkpoint | None, progress: Progress, dropped: int, request: Request
) -> EventRecord:  # fmt: skip
    changed = about["resumed"]["changed"]
    where = point.folder.name if point else "the start: the run had no checkpoint"
    message = f"resumed from {where}" + (f", {dropped} rows after it cut off" if dropped else "")
    message += "".join(f"; passed over: {problem}" for problem in (point.passed_over if point else ()))
    message += "".join(f"; {name} changed from {old} to {new}" for name, (old, new) in changed.items())
    facts = {"checkpoint": where, "rows_cut": dropped, "changed": changed, "resolved": plan.resolved()}
    return EventRecord(event="resumed", step=progress.step, message=message, time=progress.seconds, facts=facts)


def _finish(
    plan: Plan, data: Prepared, model: Model, engine: Engine, progress: Progress, about: dict[str, Any],
    sinks: "Sinks", folder: Path, sample_seconds: float,
) -> None:  # fmt: skip
    """Export, load the export again, and say how it went."""
    began = time.perf_counter()
    world, settings = plan.world, plan.settings
    final = progress.val_loss
    assert final is not None, "the last step is always evaluated"
    best = world.once(lambda: _best(settings, folder, progress))
    ids = fixed_rows(data)
    engine.put_back()
    logits = check_logits(model.module, ids, world.device)
    weights = gathered(engine.state.whole_weights(), keep=world.rank == 0 and best is None)
    measured = {
        "peak_memory_bytes": max(world.gather(peak_memory(world.device))),
        "optimizer_bytes": max(world.gather(engine.state.optimizer_bytes())),
    }
    exported: dict[str, Any] = {"which": settings.output.export, "step": best.step if best else progress.step,
                "loss": best.val_loss if best else final}  # fmt: skip

    def make() -> Check:
        source, kept, answers = model, weights, logits
        if best is not None:  # the engine holds the last weights: the best are read back, in a model of their own
            source = model_at(folder, settings, best, about)
            kept = {name: p.detach().cpu() for name, p in source.module.named_parameters() if p.requires_grad}
            answers = check_logits(source.module, ids, world.device)
        expected = Expected(
            input_ids=ids, logits=answers, tied=model.tied, loss=exported["loss"], data=data.folder,
            eval_batch=settings.train.eval_batch, device=world.device.type, precision=plan.precision,
            threads=world.threads, half=plan.precision == "fp16" and best is None,
        )  # fmt: skip
        rows = list(records.read(folder / "metrics.jsonl"))
        return export(
            folder / "model", source.module, kept, base=base_of(model, folder),
            tokenizer=settings.model.model if plan.data["tokenizer"] else None, expected=expected,
            card=lambda check: card_text(
                about, rows, check, step=exported["step"], measured=measured,
                chosen=_chosen(exported, progress),
            ),
        )  # fmt: skip

    check = world.once(make)
    place = position(progress, plan.course, len(data.train))
    seconds = progress.seconds + time.perf_counter() - began
    facts: dict[str, Any] = {
        "wall_seconds": seconds,
        "device_hours": seconds * world.size / 3600,
        "sample_seconds": sample_seconds,
        **measured,
        "checkpoint_bytes": _size(max((folder / "checkpoints").glob("step-*"), default=None)),
        "export_bytes": _size(folder / "model"),
        "best": vars(progress.best) if progress.best else None,
        "final": {"step": progress.step, "epoch": place["epoch"], "loss": final},
        "early_stop": plan.course.out_of_patience(progress) and progress.step < plan.course.total_steps,
        "exported": exported,
        "export": check.line(),
    }
    which = f" holds step {best.step}, the best," if best else ""
    message = f"finished after {progress.step} steps; {folder / 'model'}{which} {check.line()}"
    sinks.write(EventRecord(event="finished", step=progress.step, message=message, time=seconds, facts=facts))
    if check.problems:
        raise RunFailed(f"{folder / 'model'}: {check.line()}; checkpoints and records are whole")


def _best(settings: Settings, folder: Path, progress: Progress) -> Checkpoint | None:
    """The checkpoint to export with --export best; None: the weights at hand, which are the best or were asked for."""
    if settings.output.export == "last":
        return None
    best = checkpoint.choose(folder / "checkpoints", "best")
    return best if best.step != progress.step else None


def _chosen(exported: Mapping[str, Any], progress: Progress) -> str:
    """What the model card says of the choice of the weights; empty for the last ones, which need no word."""
    if exported["which"] == "last":
        return ""
    return (
        f"These are the weights with the lowest validation loss ({exported['loss']:.4f}) of those that were saved; "
        f"training went on to step {progress.step:,}."
    )


def _size(folder: Path | None) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder and folder.exists() else 0


class Sinks:
    """Where the records go: on rank 0 to metrics.jsonl, the terminal and W&B; nowhere on the others."""

    def __init__(self, plan: Plan, folder: Path, about: dict[str, Any], progress: Progress, *, resumed: bool):
        self.plan = plan
        self.folder = folder
        self.sinks: list[Sink] = []
        self.dropped = 0
        if plan.world.rank != 0:
            return
        show_plan(plan.lines())
        rows = folder / "metrics.jsonl"
        if resumed and rows.exists():
            self.dropped = rewind(rows, progress.step if progress.step else -1, pending=progress.pending)
        course = plan.course
        bar = ProgressBar(course.total_steps, course.total_steps / course.steps_per_epoch)
        self.sinks = [
            JsonlSink(rows, resume=resumed),
            bar,
            start_wandb(about, folder, resumed=resumed, say=bar.say),
            *start_also(plan.settings.output.also, about, folder, after=progress.step if resumed else -1, say=bar.say),
        ]
        if plan.settings.output.profile:
            self.sinks.append(ProfileSink(folder, plan.settings.output.profile, bar.say))

    def write(self, record: Record) -> None:
        """Hand a record to every sink."""
        for sink in self.sinks:
            sink.write(record)

    def kept(self) -> Iterator[Record]:
        """The rows that an earlier process left, on rank 0."""
        if self.sinks:
            yield from records.read(self.folder / "metrics.jsonl")

    def take(self, stream: Generator[Record, None, Progress], observer: Observer) -> Progress:
        """Write every record of the stream, and what the observer adds; returns what the stream returned."""
        while True:
            try:
                record = next(stream)
            except StopIteration as end:
                return end.value
            began = time.perf_counter()
            self.write(record)
            observer.wrote(began)
            for event in observer.after(record):
                self.write(event)

    def close(self, exit_code: int) -> None:
        """Close every sink, then show the table of a run that ended well."""
        for sink in self.sinks:
            sink.close(exit_code)
        if self.sinks and exit_code == 0:
            show_end(records.read(self.folder / "metrics.jsonl"), self.plan.not_comparable())
