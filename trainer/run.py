"""One run, wired: the only file that knows all the others."""

import json
import secrets
import string
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.cli import CliArgs
from trainer.config.errors import TrainingError, UserError, report_error
from trainer.config.settings import Settings, apply_overrides, fields_fixed_on_resume
from trainer.data.dataset import PreparedDataset, load, prepare
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import (
    DistContext,
    destroy_process_group,
    init_distributed,
    is_peer_failure,
    peak_memory_bytes,
)
from trainer.distributed.signals import SignalHandler
from trainer.export.export_cli import load_model_at_checkpoint
from trainer.export.folder import base_model_ref, collect_state_dict, export_folder
from trainer.export.model_card import render_model_card
from trainer.export.verify import ReferenceOutputs, VerificationResult, compute_logits, fixed_input_ids
from trainer.model.build import TrainableModel, build_model, load_config, save_base_model
from trainer.tools.finders.batch_finder import find_micro_batch_size
from trainer.tools.finders.files import FINDER_FILES
from trainer.tools.finders.lr_finder import find_lr
from trainer.tracking import records
from trainer.tracking.console import ProgressBar
from trainer.tracking.eval_records import EVAL_RECORDS_FILE, EvalRecordsLogger, rewind_evaluations
from trainer.tracking.extra_loggers import start_extra_loggers
from trainer.tracking.jsonl import JsonlLogger, rewind
from trainer.tracking.loggers import RecordLogger, check_loggers
from trainer.tracking.profiler import ProfileLogger
from trainer.tracking.records import EventRecord, Record
from trainer.tracking.summary import show_plan, show_summary
from trainer.tracking.wandb_keys import run_group
from trainer.tracking.wandb_logger import start_wandb, wandb_mode
from trainer.training import checkpoint
from trainer.training.callbacks import Callbacks
from trainer.training.checkpoint import Checkpoint, CheckpointManager, TrainState
from trainer.training.diagnostics.types import RunInfo
from trainer.training.generation import GenerationEvaluator, check_prompts_available
from trainer.training.loop import record_axes, train
from trainer.training.run_plan import RunPlan, make_plan, validate_early

METADATA_TMP = ".run.json.tmp"


def run(args: CliArgs, signal_handler: SignalHandler) -> int:
    """Do what was asked; returns the exit code. Where one rank fails all do, and one of them says why."""
    world = init_distributed()
    try:
        return main(args, world, signal_handler)
    except Exception as error:
        with signal_handler.defer_signals():  # a launcher that has seen one rank end signals all others
            is_reporting_rank, failure = world.watchdog.claim_error_report(), error
            if is_peer_failure(error):
                failure = TrainingError(world.watchdog.describe_lost_peer() if is_reporting_rank else "")
            if is_reporting_rank and isinstance(failure, (UserError, TrainingError)):
                report_error(failure)
            world.watchdog.close(has_failed=True)
        if isinstance(failure, (UserError, TrainingError)):
            return failure.exit_code
        raise  # a mistake of ours, with its traceback
    finally:
        world.watchdog.close()
        destroy_process_group()


def main(args: CliArgs, world: DistContext, signal_handler: SignalHandler) -> int:
    """One run from its arguments to its exit code."""
    settings, previous_metadata = world.on_rank_zero(lambda: resolve_output_dir(args))
    world.on_rank_zero(lambda: validate_early(settings, world))
    world.on_rank_zero(lambda: check_loggers(settings.output))
    folder = Path(settings.run_folder)
    data = prepare_data(settings, world)
    check_prompts_available(settings, data)
    on_meta = args.dry_run or args.find_batch
    model = build_model(settings, on_meta=on_meta, with_fingerprint=world.rank == 0, device=world.device)
    plan = make_plan(settings, world, data, model.metadata, load_config(settings.model))
    if args.dry_run:
        if world.rank == 0:
            show_plan(plan.summary_lines())
        return 0
    if args.runs_finder:
        return run_finder(args, plan, data, model)
    resume_checkpoint = (
        world.on_rank_zero(lambda: select_checkpoint(folder, args.resume, model)) if previous_metadata else None
    )
    metadata = world.on_rank_zero(lambda: write_metadata(folder, plan, previous_metadata, args))
    engine, state = build_engine(plan, model, resume_checkpoint)
    return run_training(plan, data, model, engine, state, metadata, resume_checkpoint, signal_handler, args)


def run_finder(args: CliArgs, plan: RunPlan, data: PreparedDataset, model: TrainableModel) -> int:
    """Trials instead of the run; the exit code."""
    if plan.dist_context.rank == 0:
        show_plan(plan.summary_lines())
    with plan.dist_context.watchdog.watch_for_hangs(plan.settings.engine.hang_timeout):
        if args.find_lr is not None:
            return find_lr(args.find_lr, plan, data, build_engine(plan, model, None)[0])
        return find_micro_batch_size(plan, data)


def resolve_output_dir(args: CliArgs) -> tuple[Settings, dict[str, Any] | None]:
    """The settings of the run and, where one is resumed, its run.json; UserError where the folder is not as asked."""
    settings = args.settings
    folder = Path(settings.run_folder)
    if args.resume is None:
        if args.allow_change:
            raise UserError(f"--allow-change {args.allow_change[0]}: goes with --resume; a new run may have any")
        if args.runs_finder:  # they only put their own files beside whatever is there
            return settings, None
        if folder.is_dir() and any(path.name not in (METADATA_TMP, *FINDER_FILES) for path in folder.iterdir()):
            raise UserError(f"{folder} is not empty: pass --resume to go on with that run, or another --output-dir")
        return settings, None
    try:
        previous_metadata = json.loads((folder / "run.json").read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"--resume: no run in {folder} (no run.json there); name its folder with --output-dir"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"--resume: cannot read {folder / 'run.json'}: {error}") from error
    saved_settings = Settings.from_dict(previous_metadata.get("resumed", previous_metadata)["settings"])
    if saved_settings.mode != settings.mode:
        raise UserError(
            f"--mode {settings.mode}: the run in {folder} is --mode {saved_settings.mode}; a mode cannot change on "
            "resume"
        )
    overrides = {**args.overrides, "output": {**args.overrides["output"], "output_dir": settings.run_folder}}
    return apply_overrides(saved_settings, overrides, settings.overridden), previous_metadata


def prepare_data(settings: Settings, world: DistContext) -> PreparedDataset:
    """Tokenised once by one rank of each node, then mapped by all."""

    def say(line: str) -> None:
        if world.rank == 0:
            print(line, flush=True)

    def prepare_folder() -> Path:
        return prepare(
            settings.data, model=settings.model.model, global_batch=settings.train.global_batch, log=say
        ).folder

    return load(world.on_rank_zero(prepare_folder, per_node=True))


def select_checkpoint(folder: Path, which: str | None, model: TrainableModel) -> Checkpoint | None:
    """The checkpoint to go on from; None where the run ended before its first one and may begin again."""
    if which == "latest" and not any((folder / "checkpoints").glob("step-*")):
        return None
    resume_checkpoint = checkpoint.resolve_checkpoint(folder / "checkpoints", which or "latest")
    if resume_checkpoint.metadata["base"] != model.metadata["fingerprint"]:
        raise UserError(
            f"checkpoint {resume_checkpoint.folder} is of a run on another base model "
            f"({resume_checkpoint.metadata['base']}, "
            f"here {model.metadata['fingerprint']})"
        )
    return resume_checkpoint


def write_metadata(
    folder: Path, plan: RunPlan, previous_metadata: Mapping[str, Any] | None, args: CliArgs
) -> dict[str, Any]:
    """Check what a resume may not change, and write run.json; returns the run's description."""
    if previous_metadata is not None:
        changes = validate_resume_overrides(previous_metadata, plan, args.allow_change)
        resume_info = {"settings": plan.settings.as_dict(), "changed": changes}
        metadata = {
            **previous_metadata,
            "resumed": resume_info,
        }  # `settings` stay those it began with; the next resume takes these
        _write_run_json(folder, metadata, plan.settings)
        return metadata
    run_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    output = plan.settings.output
    wandb = {
        "id": run_id,
        "project": output.wandb_project,
        "group": run_group(plan.data_info["source"]),
        "mode": wandb_mode(output.wandb),
    }
    metadata = plan.to_metadata(run_id=run_id, wandb=wandb)
    _write_run_json(folder, metadata, plan.settings)
    return metadata


def _write_run_json(folder: Path, metadata: Mapping[str, Any], settings: Settings) -> None:
    """Put run.json there, whole or not at all, and what an adapter stands on where nobody else has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary_path = folder / METADATA_TMP
        checkpoint.write_text(temporary_path, json.dumps(metadata, indent=1) + "\n")
        temporary_path.replace(folder / "run.json")
        if settings.mode == "lora" and settings.model.init == "random":
            save_base_model(settings, folder / "base")  # again on resume: a kill may have cut it off
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write there: {error.strerror}; name another folder with --output-dir"
        ) from error


def validate_resume_overrides(
    previous_metadata: Mapping[str, Any], plan: RunPlan, allowed_names: tuple[str, ...]
) -> dict[str, list[Any]]:
    """{name: [when the run began, now]} of what was allowed to change, also by an earlier resume.

    UserError for the first change since the run last went on that was not allowed.
    """
    initial = fields_fixed_on_resume(Settings.from_dict(previous_metadata["settings"]))
    initial |= {
        "data": previous_metadata["data"]["fingerprint"],
        "precision": previous_metadata["resolved"]["precision"],
    }
    last_resume = previous_metadata.get("resumed", {"settings": previous_metadata["settings"], "changed": {}})
    previous = fields_fixed_on_resume(Settings.from_dict(last_resume["settings"]))
    previous |= {name: last_resume["changed"].get(name, [initial[name]])[-1] for name in ("data", "precision")}
    current = fields_fixed_on_resume(plan.settings) | {
        "data": plan.data_info["fingerprint"],
        "precision": plan.precision,
    }
    unknown_names = [name for name in allowed_names if name not in current]
    if unknown_names:
        raise UserError(f"--allow-change {unknown_names[0]}: expected one of {', '.join(sorted(current))}")
    for name in current:
        if current[name] != previous[name] and name not in allowed_names:
            raise UserError(
                f"--resume: {name} is {current[name]} and was {previous[name]} in this run; "
                f"put it back, or say --allow-change {name} as well"
            )
    return {name: [initial[name], current[name]] for name in current if current[name] != initial[name]}


def build_engine(
    plan: RunPlan, model: TrainableModel, resume_checkpoint: Checkpoint | None
) -> tuple[Engine, TrainState]:
    """The engine, at its start or where the checkpoint stood."""
    if resume_checkpoint is not None:
        checkpoint.load_weights(resume_checkpoint, model.module)
    engine = Engine(
        plan.dist_context, model, plan.deepspeed_config, plan.settings.train, plan.precision,
        compiled_shapes=plan.compiled_shapes
    )  # fmt: skip
    if resume_checkpoint is None:
        return engine, TrainState()
    engine.state.load_state_dict(
        resume_checkpoint.tensor_reader(plan.dist_context.device),
        resume_checkpoint.step - resume_checkpoint.train_state.skipped_steps,
        resume_checkpoint.metadata.get("loss_scale"),
    )
    return engine, resume_checkpoint.train_state


def run_training(
    plan: RunPlan, data: PreparedDataset, model: TrainableModel, engine: Engine, state: TrainState,
    metadata: dict[str, Any],
    resume_checkpoint: Checkpoint | None, signal_handler: SignalHandler, args: CliArgs,
) -> int:  # fmt: skip
    """From the first record to the finished event; whatever happens, the sinks are closed with the exit code."""
    folder = Path(plan.settings.run_folder)
    if args.resume is not None:  # before later rows go: after a kill in between rows are cut then, none is missing
        plan.dist_context.on_rank_zero(lambda: checkpoint.delete_checkpoints_after(folder / "checkpoints", state.step))
    metric_logger = MetricLogger(plan, folder, metadata, state, data=data, is_resumed=args.resume is not None)
    checkpoint_manager = CheckpointManager(
        folder / "checkpoints", plan.dist_context, save_total_limit=plan.settings.output.save_total_limit,
        identity={"run_id": metadata["run_id"], "mode": plan.settings.mode, "base": model.metadata["fingerprint"]},
    )  # fmt: skip
    exit_code = 1
    try:
        if args.resume is not None:
            metric_logger.log(
                _resumed_event(plan, metadata, resume_checkpoint, state, metric_logger.num_truncated, args)
            )
        run_info = RunInfo.from_metadata({**metadata, "resolved": plan.resolved()})
        callbacks = Callbacks(
            engine, run_info, GenerationEvaluator(engine, data, plan.settings), metric_logger.previous_records()
        )
        for event in callbacks.on_train_begin(state.step, state.elapsed_seconds):
            metric_logger.log(event)
        with (
            signal_handler.defer_signals(),
            plan.dist_context.watchdog.watch_for_hangs(plan.settings.engine.hang_timeout),
        ):
            record_stream = train(
                engine,
                data,
                plan.schedule,
                state,
                checkpoint_manager,
                signal_handler.stop_requested,
                callbacks.add_data_time,
            )
            state = metric_logger.log_stream(record_stream, callbacks)
            signal_handler.check_launcher()  # another rank may have been the first to see that the launcher is gone
        signal_number = max(plan.dist_context.all_gather_object(signal_handler.signal_number))
        if state.eval_pending or signal_number:
            exit_code = 128 + signal_number
            return exit_code
        finalize(plan, data, model, engine, state, metadata, metric_logger, folder, callbacks.sample_seconds)
        exit_code = 0
        return exit_code
    finally:
        metric_logger.close(exit_code)


def _resumed_event(
    plan: RunPlan, metadata: Mapping[str, Any], resume_checkpoint: Checkpoint | None, state: TrainState,
    num_truncated: int, args: CliArgs
) -> EventRecord:  # fmt: skip
    changes = metadata["resumed"]["changed"]
    source = resume_checkpoint.folder.name if resume_checkpoint else "the start: the run had no checkpoint"
    message = f"resumed from {source}" + (f", {num_truncated} rows after it cut off" if num_truncated else "")
    message += "".join(
        f"; passed over: {reason}" for reason in (resume_checkpoint.skipped_reasons if resume_checkpoint else ())
    )
    message += "".join(f"; {name} changed from {old} to {new}" for name, (old, new) in changes.items())
    facts = {"checkpoint": source, "rows_cut": num_truncated, "changed": changes, "resolved": plan.resolved()}
    return EventRecord(event="resumed", step=state.step, message=message, time=state.elapsed_seconds, facts=facts)


def finalize(
    plan: RunPlan, data: PreparedDataset, model: TrainableModel, engine: Engine, state: TrainState,
    metadata: dict[str, Any],
    metric_logger: "MetricLogger", folder: Path, sample_seconds: float,
) -> None:  # fmt: skip
    """Export, load the export again, and say how it went."""
    start_time = time.perf_counter()
    world, settings = plan.dist_context, plan.settings
    final_loss = state.val_loss
    assert final_loss is not None, "the last step is always evaluated"
    best_checkpoint = world.on_rank_zero(lambda: choose_best_checkpoint(settings, folder, state))
    input_ids = fixed_input_ids(data)
    engine.restore_fp32()
    logits = compute_logits(model.module, input_ids, world.device)
    weights = collect_state_dict(engine.state.gather_weights(), should_keep=world.rank == 0 and best_checkpoint is None)
    measurements = {
        "peak_memory_bytes": max(world.all_gather_object(peak_memory_bytes(world.device))),
        "optimizer_bytes": max(world.all_gather_object(engine.state.optimizer_bytes())),
    }
    export_info: dict[str, Any] = {"which": settings.output.export,
        "step": best_checkpoint.step if best_checkpoint else state.step,
                "loss": best_checkpoint.val_loss if best_checkpoint else final_loss}  # fmt: skip

    def export_and_verify() -> VerificationResult:
        source_model, exported_weights, reference_logits = model, weights, logits
        if (
            best_checkpoint is not None
        ):  # the engine holds the last weights: the best are read back, in a model of their own
            source_model = load_model_at_checkpoint(folder, settings, best_checkpoint, metadata)
            exported_weights = {
                name: p.detach().cpu() for name, p in source_model.module.named_parameters() if p.requires_grad
            }
            reference_logits = compute_logits(source_model.module, input_ids, world.device)
        reference_outputs = ReferenceOutputs(
            input_ids=input_ids, logits=reference_logits, is_tied=model.has_tied_embeddings, loss=export_info["loss"],
            data_folder=data.folder,
            eval_batch=settings.train.eval_batch, device=world.device.type, precision=plan.precision,
            num_threads=world.num_threads, is_fp16=plan.precision == "fp16" and best_checkpoint is None,
        )  # fmt: skip
        metric_records = list(records.read_records(folder / "metrics.jsonl"))
        return export_folder(
            folder / "model", source_model.module, exported_weights, base_model=base_model_ref(model, folder),
            tokenizer=settings.model.model if plan.data_info["tokenizer"] else None,
            reference_outputs=reference_outputs,
            render_card=lambda verification: render_model_card(
                metadata, metric_records, verification, step=export_info["step"], measurements=measurements,
                choice_reason=describe_choice(export_info, state),
            ),
        )  # fmt: skip

    verification = world.on_rank_zero(export_and_verify)
    axes = record_axes(state, plan.schedule, len(data.train))
    elapsed_seconds = state.elapsed_seconds + time.perf_counter() - start_time
    facts: dict[str, Any] = {
        "wall_seconds": elapsed_seconds,
        "device_hours": elapsed_seconds * world.world_size / 3600,
        "sample_seconds": sample_seconds,
        **measurements,
        "checkpoint_bytes": dir_size(max((folder / "checkpoints").glob("step-*"), default=None)),
        "export_bytes": dir_size(folder / "model"),
        "best": vars(state.best) if state.best else None,
        "final": {"step": state.step, "epoch": axes["epoch"], "loss": final_loss},
        "early_stop": plan.schedule.early_stopping_triggered(state) and state.step < plan.schedule.total_steps,
        "exported": export_info,
        "export": verification.summary(),
    }
    export_note = f" holds step {best_checkpoint.step}, the best," if best_checkpoint else ""
    message = f"finished after {state.step} steps; {folder / 'model'}{export_note} {verification.summary()}"
    metric_logger.log(
        EventRecord(event="finished", step=state.step, message=message, time=elapsed_seconds, facts=facts)
    )
    if verification.problems:
        raise TrainingError(f"{folder / 'model'}: {verification.summary()}; checkpoints and records are whole")


def choose_best_checkpoint(settings: Settings, folder: Path, state: TrainState) -> Checkpoint | None:
    """The checkpoint to export with --export best; None: the weights at hand, which are the best or were asked for."""
    if settings.output.export == "last":
        return None
    best_checkpoint = checkpoint.resolve_checkpoint(folder / "checkpoints", "best")
    return best_checkpoint if best_checkpoint.step != state.step else None


def describe_choice(export_info: Mapping[str, Any], state: TrainState) -> str:
    """What the model card says of the choice of the weights; empty for the last ones, which need no word."""
    if export_info["which"] == "last":
        return ""
    return (
        f"These are the weights with the lowest validation loss ({export_info['loss']:.4f}) of those that were saved; "
        f"training went on to step {state.step:,}."
    )


def dir_size(folder: Path | None) -> int:
    """Bytes of all files under a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder and folder.exists() else 0


class MetricLogger:
    """Where the records go: on rank 0 to metrics.jsonl, the terminal and W&B; nowhere on the others."""

    def __init__(
        self, plan: RunPlan, folder: Path, metadata: dict[str, Any], state: TrainState, *, data: PreparedDataset,
        is_resumed: bool,
    ):  # fmt: skip
        self.plan = plan
        self.folder = folder
        self.loggers: list[RecordLogger] = []
        self.num_truncated = 0
        if plan.dist_context.rank != 0:
            return
        show_plan(plan.summary_lines())
        metrics_path = folder / "metrics.jsonl"
        if is_resumed and metrics_path.exists():
            last_step = state.step if state.step else -1
            self.num_truncated = rewind(metrics_path, last_step, eval_pending=state.eval_pending)
            rewind_evaluations(folder / EVAL_RECORDS_FILE, last_step, eval_pending=state.eval_pending)
        schedule = plan.schedule
        progress_bar = ProgressBar(schedule.total_steps, schedule.total_steps / schedule.steps_per_epoch)
        self.loggers = [
            EvalRecordsLogger(folder, data.row_info("val")),  # before the line that says so
            JsonlLogger(metrics_path, resume=is_resumed),
            progress_bar,
            start_wandb(metadata, folder, is_resumed=is_resumed, say=progress_bar.say),
            *start_extra_loggers(
                plan.settings.output.report_to,
                metadata,
                folder,
                resume_step=state.step if is_resumed else -1,
                say=progress_bar.say,
            ),
        ]
        if plan.settings.output.profile:
            self.loggers.append(ProfileLogger(folder, plan.settings.output.profile, progress_bar.say))

    def log(self, record: Record) -> None:
        """Hand a record to every sink."""
        for logger in self.loggers:
            logger.log(record)

    def previous_records(self) -> Iterator[Record]:
        """The rows that an earlier process left, on rank 0."""
        if self.loggers:
            yield from records.read_records(self.folder / "metrics.jsonl")

    def log_stream(self, record_stream: Generator[Record, None, TrainState], callbacks: Callbacks) -> TrainState:
        """Write every record of the stream, and what the observer adds; returns what the stream returned."""
        while True:
            try:
                record = next(record_stream)
            except StopIteration as stop_iteration:
                return stop_iteration.value
            start_time = time.perf_counter()
            self.log(record)
            callbacks.add_logging_time(start_time)
            for event in callbacks.on_record(record):
                self.log(event)

    def close(self, exit_code: int) -> None:
        """Close every sink, then show the table of a run that ended well."""
        for logger in self.loggers:
            logger.close(exit_code)
        if self.loggers and exit_code == 0:
            show_summary(records.read_records(self.folder / "metrics.jsonl"), self.plan.incomparable_reasons())
