"""Was LoRA good enough for your data? `python launch/study.py --data records.csv --max-steps 200`.

Searches the rate of every method alike, judges the winners on test records with fresh seeds, and prints one sentence
with its interval. All other flags go to launch/train.py. Started again, it goes on where it was; `--join FOLDER` adds
workers. Exit code: 0 answered, 1 something failed, 2 a mistake, 3 an answer is refused, 130 interrupted.
"""

import contextlib
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config.argument_parser import ArgumentParser
from trainer.config.cli import parse_args
from trainer.config.errors import UserError, report_error
from trainer.tracking.safe_stream import protect_standard_streams


def build_parser() -> ArgumentParser:
    """The command line; what it does not know is for launch/train.py."""
    parser = ArgumentParser(prog="study.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("study"), metavar="DIR", help="folder of the study (default: study)")
    add("--join", type=Path, metavar="DIR", help="work on the study of this folder, from here or another machine")
    add("--workers", type=int, default=1, metavar="N", help="trials side by side on this machine (default: 1)")
    add("--gpus-per-trial", type=int, metavar="G", help="each trial's own GPUs; left out: 1 where there are any")
    add(
        "--methods",
        default="full,lora",
        metavar="NAMES",
        help="full, lora and, for exploration, dora, rslora, pissa, lora-nf4, lora-int8 (default: full,lora)",
    )
    add("--ranks", default="8", metavar="N,N", help="LoRA ranks to try; full tries so many more rates (default: 8)")
    add("--seeds", default="101,102,103", metavar="N,N", help="of the answer's runs (default: 101,102,103)")
    add("--search-seeds", default="1", metavar="N,N", help="of the search's runs, none of --seeds (default: 1)")
    add(
        "--margin",
        default="2%",
        metavar="X",
        help="how much worse is good enough: 2%% of what full gained, 0.01nats a token, or 0.005bpb (default: 2%%)",
    )
    add(
        "--looks",
        type=int,
        default=1,
        metavar="N",
        help="times to look at the answer, with ever more of --seeds; they share the level (default: 1, at the end)",
    )
    add("--quarter-batch", action="store_true", help="run the finalists with a quarter of the batch too")
    add("--budget", metavar="TIME", help="fit the study into 45m, 2h or 1d, and say what was left out")
    add("--wandb-report", metavar="ENTITY/PROJECT", help="save the answer's page as a W&B Report too")
    add("--dry-run", action="store_true", help="print what the study would run, run nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Plan or join, run, answer; a mistake is one line on stderr."""
    parser = build_parser()
    try:
        args, train_argv = parser.parse_known_args(argv)
        for flag, number, least in (("--workers", args.workers, 1), ("--gpus-per-trial", args.gpus_per_trial, 0)):
            if number is not None and number < least:
                raise UserError(f"{flag} {number}: expected a whole number from {least}")
        if args.wandb_report is not None:
            from trainer.report.wandb_report import parse_target

            args.wandb_report = parse_target(args.wandb_report)
        if args.join is not None:
            _refuse_rule_flags(args, train_argv, parser)
        elif not _plan(args, train_argv, parser):
            return 0
        return _run(args)
    except UserError as error:
        return report_error(error)


def _refuse_rule_flags(args: Any, train_argv: list[str], parser: ArgumentParser) -> None:
    """UserError for a flag beside --join that would change the study it names."""
    allowed = ("join", "workers", "gpus_per_trial", "wandb_report")
    values = {name: value for name, value in vars(args).items() if name not in allowed}
    changed = [f"--{name.replace('_', '-')}" for name, value in values.items() if value != parser.get_default(name)]
    if flags := [*changed, *train_argv]:
        raise UserError(f"{flags[0]}: not with --join, whose study has its rule; expected --workers")


def _plan(args: Any, train_argv: list[str], parser: ArgumentParser) -> bool:
    """Write the rule of the study, or see that it is that of the one that goes on; whether it is to be run."""
    from trainer.report import margin
    from trainer.tools.study import planning, rule, worker

    start_time = time.monotonic()
    runs = [partial(planning.run_train, slot) for slot in worker.make_slots(args.workers, args.gpus_per_trial)]
    for argument in train_argv:
        if argument.partition("=")[0] in worker.RESERVED_FLAGS:
            raise UserError(
                f"{argument}: the study sets it for each of its runs; expected other flags of launch/train.py"
            )
    has_test_data = any(argument.partition("=")[0] == "--test-data" for argument in train_argv)
    passed_argv = [*(["--test-fraction", "0"] if has_test_data else []), *train_argv]
    settings = parse_args(["--mode", "full", *worker.DEFAULT_ARGV, *passed_argv], companion=parser).settings
    if settings.train.warmup_steps:
        raise UserError(
            f"--warmup-steps {settings.train.warmup_steps}: the short runs of a search might never be warm; give "
            "--warmup-ratio, which is the same for all"
        )
    if args.quarter_batch and settings.train.global_batch % 4:
        raise UserError(f"--quarter-batch: --global-batch {settings.train.global_batch} cannot be divided by 4")
    methods = tuple(args.methods.split(","))
    rule.check_methods(methods)
    print(f"reading the data and loading {', '.join(methods)}", flush=True)
    total_steps, data = planning.resolve_run(methods, passed_argv, runs[0])
    passed_argv = _without_flag(passed_argv, "--max-steps")  # each run has its own
    study_rule = rule.Rule(
        methods=methods,
        lora_ranks=_parse_numbers("--ranks", args.ranks),
        total_steps=total_steps,
        rungs=rule.plan_rungs(total_steps),
        search_seeds=_parse_numbers("--search-seeds", args.search_seeds),
        answer_seeds=_parse_numbers("--seeds", args.seeds),
        margin=margin.parse_margin(args.margin),
        looks=args.looks,
        quarter_batch=settings.train.global_batch // 4 if args.quarter_batch else None,
        train_argv=tuple(passed_argv),
        data=data,
    )
    costs = None
    if args.budget is not None and not (args.output_dir / rule.RULE_FILE).exists():
        seconds = planning.parse_duration("--budget", args.budget)
        print(f"--budget {args.budget}: measuring what runs take here, three short ones of each method", flush=True)
        costs = planning.measure_costs(methods, passed_argv, runs)
        seconds_left = seconds - (time.monotonic() - start_time)
        study_rule = planning.fit_to_budget(study_rule, seconds_left, costs, args.workers)
    elif args.budget is not None:  # what the time is for was decided when the study began
        study_rule = planning.cut_like(rule.read_rule(args.output_dir)[0], study_rule)
    for line in planning.describe_plan(study_rule, costs, args.workers):
        print(line, flush=True)
    if not args.dry_run:
        rule.write_rule(args.output_dir, study_rule, working_dir=str(Path.cwd()))
        print(f"rule {study_rule.sha256[:12]} in {args.output_dir / rule.RULE_FILE}", flush=True)
    return not args.dry_run


def _run(args: Any) -> int:
    """Work on the study, then answer."""
    from trainer.tools.study.answer import AnswerRefusedError
    from trainer.tools.study.study import Study, live_table
    from trainer.tools.study.trial_queue import TrialQueue
    from trainer.tracking.console import is_terminal

    study = Study.open(args.join or args.output_dir)
    should_stop, is_shown = threading.Event(), is_terminal(sys.stdout)
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda *_: should_stop.set())
    with live_table(study) if is_shown else contextlib.nullcontext():
        study.run(
            num_workers=args.workers,
            gpus_per_trial=args.gpus_per_trial,
            should_stop=should_stop,
            log=(lambda line: None) if is_shown else partial(print, flush=True),
        )
    queue = TrialQueue(study.folder, "answer")
    state = study.state(queue)
    if state.needed or should_stop.is_set():
        return _stopped()
    for outcome in state.outcomes.values():
        if outcome.problem is None or outcome.problem != state.refusal:
            print(outcome.describe())
    if failed := [trial for trial in queue.trials().values() if trial.failure]:
        print(f"failed: {len(failed)} trials, the first {failed[0].name}: {failed[0].failure}")
    if state.refusal is not None:
        raise AnswerRefusedError(f"refused to rank: {state.refusal}")
    return _answer(args, study, state, queue.results(), should_stop)


def _answer(args: Any, study: Any, state: Any, results: Any, should_stop: threading.Event) -> int:
    """Time the finalists, judge, and write and print the answer and what stands beside it."""
    from trainer.report.compare_cli import REFUSED_EXIT_CODE, print_verdict
    from trainer.report.write import write_report
    from trainer.tools.study import answer
    from trainer.tools.study.finalist_timing import time_finalists
    from trainer.tools.study.worker import make_slots

    answer.judge(answer.read_groups(study.folder, state.answers), study.rule)  # refused before anything is timed
    finalists = {method: state.outcomes[method].winner for method in ("full", "lora")}
    slot = make_slots(1, args.gpus_per_trial)[0]
    print("timing the finalists in alternation", flush=True)
    if (timing := time_finalists(study.folder, study.rule, finalists, slot, should_stop)) is None:
        return _stopped()
    comparison = answer.compare_study(study.folder, study.rule, state, results, timing)
    paths = write_report(comparison, study.folder)
    verdict = comparison.verdict
    print()
    exploratory = [line for line in verdict.details if line.startswith("Exploratory: ")]
    print_verdict(verdict, [*exploratory, f"a page to send: {paths[0]} (for machines: answer.json beside it)"])
    if args.wandb_report is not None:
        from trainer.report.wandb_report import save_report

        entity, project = args.wandb_report
        print(f"W&B Report: {save_report(comparison, entity, project, study.folder)}")
    return REFUSED_EXIT_CODE if verdict.comparisons[0].is_margin_under_floor else 0


def _stopped() -> int:
    print("stopped; the same command goes on", file=sys.stderr)
    return 130


def _without_flag(argv: list[str], flag: str) -> list[str]:
    """The arguments without a flag and its value."""
    rest, is_value = [], False
    for argument in argv:
        if is_value or argument.partition("=")[0] == flag:
            is_value = argument == flag and not is_value
        else:
            rest.append(argument)
    return rest


def _parse_numbers(flag: str, text: str) -> tuple[int, ...]:
    """The whole numbers of a comma-separated list; UserError where one is none, or not above 0."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) <= 0:
        raise UserError(f"{flag} {text}: expected numbers above 0 separated by commas")
    return numbers


if __name__ == "__main__":
    protect_standard_streams()
    sys.exit(main())
