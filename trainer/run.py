"""One run, top to bottom: the only file that knows all the others."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config.choices import scorer_file
from trainer.config.cli import CliArgs
from trainer.config.errors import TrainingError, UserError, permission_denied, report_error
from trainer.config.files import folder_size, write_atomically
from trainer.config.settings import Settings
from trainer.data import hf_hub
from trainer.data.dataset import PreparedDataset, load
from trainer.data.prepare import prepare
from trainer.data.tokenizer import find_model, load_tokenizer, show_examples
from trainer.distributed import process_group
from trainer.distributed.engine import Engine
from trainer.distributed.launch_environment import find_launch_warning, read_launch_environment
from trainer.distributed.machine import find_gpu_problem
from trainer.distributed.process_group import DistContext, refuse_differences
from trainer.distributed.watch import SignalHandler
from trainer.export import fresh_process
from trainer.export.folder import refuse_lost_files
from trainer.model.build import TrainableModel, get_max_positions, load_config
from trainer.model.lora import adopt_adapter
from trainer.model.loss import find_packing_problem
from trainer.tools.find_batch import find_micro_batch_size
from trainer.tracking.console import show_plan
from trainer.tracking.run_lock import RunLock
from trainer.tracking.wandb_logger import check_loggers
from trainer.training import checkpoint, run_folder
from trainer.training.evaluation import OTHER_SPLITS, evaluate_other_splits, read_base_evaluations
from trainer.training.generation import check_test_records
from trainer.training.loop import train
from trainer.training.recorder import Recorder
from trainer.training.run_plan import RunPlan, build_planned_model, make_plan, validate_early
from trainer.training.schedule import TrainState


def run(args: CliArgs, signal_handler: SignalHandler) -> int:
    """Do what was asked; returns the exit code. Where one rank fails all do, and one of them says why."""
    launch = read_launch_environment(os.environ)
    if args.dry_run and launch.rank > 0:  # a plan is made by one, without joining anybody
        return 0
    if launch.rank == 0 and (warning := find_launch_warning(os.environ)):
        print(f"warning: {warning}", file=sys.stderr)
    if args.dry_run:
        if problem := find_gpu_problem(os.environ):
            raise UserError(problem)
        context = process_group.simulated_context(launch.world_size)
    else:
        context = process_group.init_distributed(join_timeout_seconds=args.settings.engine.hang_timeout)
    try:
        return _run(args, context, signal_handler)
    except Exception as error:
        with signal_handler.defer_signals():  # a launcher that has seen one rank end signals all others
            is_reporting_rank = context.watchdog.claim_error_report()
            failure = permission_denied(error) if isinstance(error, PermissionError) else error
            if process_group.is_peer_failure(error):
                failure = TrainingError(context.watchdog.describe_lost_peer(error) if is_reporting_rank else "")
            if is_reporting_rank and isinstance(failure, (UserError, TrainingError)):
                report_error(failure)
            context.watchdog.close(has_failed=True)
        if isinstance(failure, (UserError, TrainingError)):
            return failure.exit_code
        raise  # a mistake of ours, with its traceback
    finally:
        context.watchdog.close()
        process_group.destroy_process_group()


def _run(args: CliArgs, context: DistContext, signal_handler: SignalHandler) -> int:
    request = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()}
    given = request.pop("--settings")
    watch_work = partial(context.watchdog.watch_work, given.engine.hang_timeout)
    with watch_work():
        refuse_differences(context, process_group.program_facts(context, given.as_dict(), request))
        args = replace(args, settings=context.on_rank_zero(lambda: adopt_adapter(given)))

    def check_request() -> tuple[Settings, dict[str, Any] | None]:
        settings, previous = run_folder.resolve_output_dir(args)
        for scorer in settings.output.score:  # code runs only where the user has named it
            if scorer_file(scorer) and scorer not in args.settings.output.score:
                raise UserError(f"--score {scorer}: is code that run.json names; give the flag again, or another one")
        validate_early(settings, context)
        check_loggers(settings.output)
        if settings.output.export != "none" and not args.dry_run:
            refuse_lost_files(Path(settings.run_folder) / "model")
        return settings, previous

    with watch_work():
        settings, previous = context.on_rank_zero(check_request)
        if args.resume == "auto" and previous is None:
            run_folder.refuse_run_elsewhere(Path(settings.run_folder), context)

    def prepare_folder() -> Path:
        """Downloaded, hashed and tokenised by one rank of each host, then read by all of it."""
        log = partial(print, flush=True) if context.rank == 0 else lambda line: None
        folder = prepare(
            settings.data,
            model=settings.model.model,
            global_batch=settings.train.global_batch,
            max_positions=get_max_positions(load_config(settings.model)),
            log=log,
            heartbeat=context.watchdog.heartbeat,
        ).folder
        with_weights = settings.model.init == "pretrained" and not args.dry_run  # now that the data are right
        source = find_model(settings.model.model)
        hf_hub.download_model(source.path, with_weights=with_weights, log=log, revision=source.revision)
        return folder

    with watch_work():
        data = load(context.on_rank_zero(prepare_folder, per_node=True))
    hf_hub.go_offline()
    if args.show_example and context.rank == 0:
        print(*show_examples(data.train, load_tokenizer(settings.model.model), args.show_example), sep="\n")
    with watch_work():
        context.on_rank_zero(lambda: check_test_records(settings, data))
        fingerprints = {"the data": data.metadata["fingerprint"][:12]}
        fingerprints["the configuration of the base model"] = process_group.config_digest(load_config(settings.model))
        refuse_differences(context, fingerprints)
        plan = make_plan(settings, context, data)
    plan = replace(plan, spellings=args.notes)
    if (args.dry_run or args.find_batch) and context.rank == 0:
        use = run_folder.describe_use(Path(settings.run_folder))
        in_use = [("", [("note", use)])] if use and args.dry_run and not args.resume else []
        show_plan([*plan.sections(), *in_use], plan.set_by_user())
    if args.dry_run:
        return 0
    if args.find_batch:
        return find_micro_batch_size(plan, data)
    with watch_work():
        model = build_planned_model(plan, with_fingerprint=True)
        fingerprint = model.metadata["fingerprint"]
        digest = process_group.short_digest(repr(plan.deepspeed_config).encode())
        refuse_differences(context, {"DeepSpeed's configuration": digest, "the base model": fingerprint})
        if settings.data.packing and (problem := context.on_rank_zero(lambda: find_packing_problem(model.causal))):
            raise UserError(f"--packing: not for {type(model.causal).__name__}: {problem}; leave --packing out")
    plan = replace(plan, model_info={**plan.model_info, "fingerprint": fingerprint})
    lock = RunLock(Path(settings.run_folder))
    with watch_work():
        context.on_rank_zero(lock.acquire)
    try:
        with watch_work():
            # Once more, now that nobody else writes there: another run may have come or gone on meanwhile.
            _, previous = context.on_rank_zero(lambda: run_folder.resolve_output_dir(args))
            plan = replace(plan, host_lines=tuple(run_folder.describe_hosts(settings, context)))
        return _train_and_export(args, plan, data, model, previous, signal_handler)
    finally:
        lock.release()


def build_engine(
    plan: RunPlan, model: TrainableModel, source: checkpoint.Checkpoint | None
) -> tuple[Engine, TrainState]:
    """The engine of a plan and the state of the run: at its start, or where the checkpoint `source` stood."""
    if source is not None and plan.deepspeed_file.stage == 3:  # which sends rank 0's weights to the others
        plan.dist_context.on_rank_zero(lambda: checkpoint.load_weights(source, model.module))
    elif source is not None:
        checkpoint.load_weights(source, model.module, plan.dist_context)
    engine = Engine(plan.dist_context, model, plan.deepspeed_config, plan.settings.train, plan.execution)
    if source is None:
        return engine, TrainState()
    checkpoint.load_optimizer(source, engine)
    return engine, source.train_state


def _train_and_export(
    args: CliArgs,
    plan: RunPlan,
    data: PreparedDataset,
    model: TrainableModel,
    previous: Mapping[str, Any] | None,
    signal_handler: SignalHandler,
) -> int:
    context, settings, folder = plan.dist_context, plan.settings, Path(plan.settings.run_folder)
    with context.watchdog.watch_work(settings.engine.hang_timeout):
        source, metadata = context.on_rank_zero(
            lambda: run_folder.begin_run(plan, previous, args.resume, args.allow_change)
        )
        engine, state = build_engine(plan, model, source)
        if previous is not None:  # before later rows go: after a kill in between rows are cut then, none is missing
            context.on_rank_zero(lambda: checkpoint.delete_checkpoints_after(folder / "checkpoints", state.step))
    recorder = Recorder(plan, data, engine, metadata, state)
    exit_code = 1
    try:
        checkpoints = checkpoint.CheckpointManager(
            folder / "checkpoints",
            context,
            save_total_limit=settings.output.save_total_limit,
            identity=plan.checkpoint_identity(),
            record_digests=recorder.digests,
        )
        with context.watchdog.watch_work(settings.engine.hang_timeout):
            recorder.begin(state, source)
            base_nll = context.on_rank_zero(lambda: read_base_evaluations(metadata, data))
        with signal_handler.defer_signals(), context.watchdog.watch_for_hangs(settings.engine.hang_timeout, folder):
            if not state.step and state.eval_pending and settings.output.export != "none":
                for event in evaluate_other_splits(plan, data, engine, state, step=0, base_nll=base_nll):
                    recorder.log(event)
            should_stop = signal_handler.stop_requested
            stream = train(engine, data, plan.schedule, state, checkpoints, should_stop, base_nll.get("val"))
            state = recorder.follow(stream)
            signal_handler.check_launcher()  # another rank may have been the first to see that the launcher is gone
            signal_numbers = context.all_gather_object(signal_handler.signal_number)
        if any(signal_numbers):
            if context.rank == 0:
                names = [signal.Signals(number).name for number in sorted(set(signal_numbers) - {0})]
                with contextlib.suppress(OSError):  # a disk that takes none is left at that
                    write_atomically(folder / run_folder.REQUEUE_FILE, " ".join(names) + "\n")
            exit_code = 128 + max(signal_numbers)
        else:
            with context.watchdog.watch_work(settings.engine.hang_timeout):
                _finish(plan, data, engine, state, recorder)
            exit_code = 0
        return exit_code
    finally:
        recorder.close(exit_code)


def _finish(plan: RunPlan, data: PreparedDataset, engine: Engine, state: TrainState, recorder: Recorder) -> None:
    """Export a checkpoint and log what the run took. TrainingError where the export is not what was evaluated."""
    start_time = time.perf_counter()
    context, settings, folder = plan.dist_context, plan.settings, Path(plan.settings.run_folder)
    choice: dict[str, Any] | None = None
    result: dict[str, Any] = {"summary": "nothing exported", "problems": []}
    if settings.output.export != "none":
        choice = {"which": settings.output.export, "step": state.step, "loss": state.val_loss}
        if settings.output.export == "best":
            best = context.on_rank_zero(lambda: checkpoint.resolve_checkpoint(folder / "checkpoints", "best"))
            choice |= {"step": best.step, "loss": best.val_loss}
            if best.step != state.step and any(len(getattr(data, split)) for split in OTHER_SPLITS):
                checkpoint.load_for_evaluation(best, engine)
    with context.watchdog.watch_for_hangs(settings.engine.hang_timeout, folder):
        for event in evaluate_other_splits(plan, data, engine, state, step=choice["step"]) if choice else ():
            recorder.log(event)
        measurements = engine.measure_memory()
    if choice is not None:
        engine.release_memory()  # the process that exports needs some of it
        request = {
            "run_folder": str(folder),
            "checkpoint": f"step-{choice['step']}",
            "output_dir": str(folder / "model"),
            "is_own_export": True,
            "data_folder": str(data.folder),
        }
        limit = settings.engine.hang_timeout
        result = context.on_rank_zero(lambda: fresh_process.export_in_fresh_process(request, limit))
    elapsed_seconds = state.elapsed_seconds + time.perf_counter() - start_time
    facts = {
        "wall_seconds": elapsed_seconds,
        "device_hours": elapsed_seconds * context.world_size / 3600,
        **measurements,
        "checkpoint_bytes": folder_size(max((folder / "checkpoints").glob("step-*"), default=None)),
        "export_bytes": folder_size(folder / "model"),
        "best": vars(state.best) if state.best else None,
        "final": {"step": state.step, "epoch": plan.schedule.record_axes(state)["epoch"], "loss": state.val_loss},
        "early_stop": plan.schedule.is_stopped_early(state) and state.step < plan.schedule.total_steps,
        "exported": choice,
        "export": result["summary"],
    }
    where = f"{folder / 'model'} " if choice else ""
    if choice and choice["step"] != state.step:
        where += f"holds step {choice['step']}, the best, "
    message = f"finished after {state.step} steps; {where}{result['summary']}"
    recorder.log_event("finished", replace(state, elapsed_seconds=elapsed_seconds), message, facts)
    if result["problems"]:
        raise TrainingError(f"{folder / 'model'}: {result['summary']}; checkpoints and records are whole")
