"""Was LoRA good enough for your data? `python launch/study.py --data records.csv --max-steps 200`.

Searches the learning rate of every method alike, judges the best settings on test records with fresh seeds, and prints
one sentence with its interval. All other flags go to launch/train.py. Started again, it goes on where it was; `--join
FOLDER` adds workers. Exit code: 0 answered, 1 something failed, 2 a mistake, 3 an answer is refused, 130 interrupted.
"""

import argparse
import signal
import sys
import threading
from functools import partial
from pathlib import Path

from trainer.config.argument_parser import ArgumentParser, whole_number, whole_numbers
from trainer.config.cli import parse_args
from trainer.config.errors import UserError, report_error
from trainer.tracking.safe_stream import protect_standard_streams

#: Flags of launch/train.py that the study sets for each of its runs.
RESERVED_FLAGS = (
    *("--mode", "--adapter", "--quant", "--seed", "--lr", "--lora-rank", "--output-dir", "--run-name", "--export"),
    *("--resume", "--dry-run", "--find-lr", "--find-batch"),
)
JOIN_FLAGS = ("join", "workers", "gpus_per_trial", "wandb_report")  # all others would change the study that is joined


def build_parser() -> ArgumentParser:
    """The command line; what it does not know is for launch/train.py."""
    parser = ArgumentParser(prog="study.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    per_trial = partial(whole_number, least=0)
    methods_help = "full, lora and, for exploration, dora, rslora, pissa, lora-nf4, lora-int8 (default: full,lora)"
    ranks_help = "LoRA ranks to try; full tries as many more rates (default: 8)"
    seeds_help = "of the answer's runs (default: 101,102,103)"
    search_help = "of the search's runs, none of --seeds (default: 1)"
    margin_help = "how much worse is good enough: 2%% of what full gained, 0.01nats a token, or 0.005bpb (default: 2%%)"
    add("--output-dir", type=Path, default=Path("study"), metavar="DIR", help="folder of the study (default: study)")
    add("--join", type=Path, metavar="DIR", help="work on the study of this folder, from here or another machine")
    add("--workers", type=whole_number, default=1, metavar="N", help="trials at a time on this machine (default: 1)")
    add("--gpus-per-trial", type=per_trial, metavar="G", help="each trial's own GPUs (default: 1 where there are any)")
    add("--methods", default="full,lora", metavar="NAMES", help=methods_help)
    add("--ranks", type=whole_numbers, default=(8,), metavar="N,N", help=ranks_help)
    add("--seeds", type=whole_numbers, default=(101, 102, 103), metavar="N,N", help=seeds_help)
    add("--search-seeds", type=whole_numbers, default=(1,), metavar="N,N", help=search_help)
    add("--margin", default="2%", metavar="X", help=margin_help)
    add("--wandb-report", metavar="ENTITY/PROJECT", help="save the answer's page as a W&B Report too")
    add("--dry-run", action="store_true", help="print trials, steps and an estimate of the time; run no trial")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Plan or join, run, answer; a mistake is one line on stderr."""
    parser = build_parser()
    try:
        args, train_argv = parser.parse_known_args(argv)
        if args.wandb_report is not None:
            from trainer.report.wandb_report import parse_target

            args.wandb_report = parse_target(args.wandb_report)
        if args.join is None:
            plan(args, train_argv, parser)
            return 0 if args.dry_run else run(args)
        given = [n for n, value in vars(args).items() if n not in JOIN_FLAGS and value != parser.get_default(n)]
        if flags := [*(f"--{name.replace('_', '-')}" for name in given), *train_argv]:
            raise UserError(f"{flags[0]}: not with --join, whose study has its rule; expected --workers")
        return run(args)
    except UserError as error:
        return report_error(error)


def plan(args: argparse.Namespace, train_argv: list[str], parser: ArgumentParser) -> None:
    """Print the plan; write the rule of the study, or check that it is that of the one that goes on."""
    from trainer.report.judge import parse_margin
    from trainer.tools.study import planning, rule
    from trainer.tools.study.search import expected_trials
    from trainer.tools.study.trial_process import make_slots
    from trainer.tools.study.trials import DEFAULT_ARGV

    slots = make_slots(args.workers, args.gpus_per_trial)
    for argument in train_argv:
        if argument.partition("=")[0] in RESERVED_FLAGS:
            raise UserError(
                f"{argument}: the study sets it for each of its runs; expected other flags of launch/train.py"
            )
    has_test_data = any(argument.partition("=")[0] == "--test-data" for argument in train_argv)
    train_argv = [*(["--test-fraction", "0"] if has_test_data else []), *train_argv]
    settings = parse_args(["--mode", "full", *DEFAULT_ARGV, *train_argv], companion=parser).settings
    if settings.train.warmup_steps:
        raise UserError(
            f"--warmup-steps {settings.train.warmup_steps}: the short runs of a search might end before it; give "
            "--warmup-ratio, which is the same for all"
        )
    methods = tuple(args.methods.split(","))
    rule.check_methods(methods)
    max_steps_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    max_steps_parser.add_argument("--max-steps")
    print(f"reading the data and loading {', '.join(methods)}", flush=True)
    total_steps, data = planning.resolve_run(methods, train_argv, slots[0])
    study_rule = rule.Rule(
        methods=methods,
        lora_ranks=args.ranks,
        total_steps=total_steps,
        rungs=rule.plan_rungs(total_steps),
        search_seeds=args.search_seeds,
        answer_seeds=args.seeds,
        margin=parse_margin(args.margin),
        train_argv=tuple(max_steps_parser.parse_known_args(train_argv)[1]),  # each run has its own --max-steps
        data=data,
    )
    for method in methods:
        num_steps = [spec.num_steps for spec in expected_trials(study_rule) if spec.candidate.method == method]
        print(f"{method}: {len(num_steps)} trials, {sum(num_steps):,} steps", flush=True)
    if args.dry_run:
        minutes = planning.estimate_minutes(study_rule, slots)
        print(f"about {minutes:,.0f} minutes: an estimate from {planning.NUM_TIMED_STEPS} timed steps of each method")
    else:
        rule.write_rule(args.output_dir, study_rule, working_dir=str(Path.cwd()))
        print(f"rule {study_rule.sha256[:12]} in {args.output_dir / rule.RULE_FILE}", flush=True)


def run(args: argparse.Namespace) -> int:
    """Work on the study, then answer."""
    from trainer.report.compare_cli import REFUSED_EXIT_CODE, print_verdict
    from trainer.report.page import write_report
    from trainer.tools.study import answer
    from trainer.tools.study.finalist_timing import time_finalists
    from trainer.tools.study.study import Study
    from trainer.tools.study.trial_process import make_slots
    from trainer.tools.study.trials import read_results, read_trials

    study, slots = Study.open(args.join or args.output_dir), make_slots(args.workers, args.gpus_per_trial)
    should_stop = threading.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda *_: should_stop.set())
    study.run(slots, should_stop, partial(print, flush=True))
    state = study.state()
    if state.needed or should_stop.is_set():
        return stopped()
    for outcome in state.outcomes.values():
        if outcome.problem is None or outcome.problem != state.refusal:
            print(outcome.describe())
    failures = [f"{name}: {trial.failure}" for name, trial in read_trials(study.folder).items() if trial.failure]
    if failures:
        print(f"{len(failures)} trials failed, the first was {failures[0]}")
    if state.refusal is not None:
        raise answer.AnswerRefusedError(f"refused to rank: {state.refusal}")
    answer.judge(answer.read_groups(study.folder, state.answers), study.rule)  # refused before anything is timed
    finalists = {m: outcome.winner for m, outcome in state.outcomes.items() if outcome.winner is not None}
    print("timing the finalists in alternation", flush=True)
    if (timing := time_finalists(study.folder, study.rule, finalists, slots[0], should_stop)) is None:
        return stopped()
    comparison = answer.compare_study(study.folder, study.rule, state, read_results(study.folder), timing)
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


def stopped() -> int:
    """Say so; the exit code of an interrupted study."""
    print("stopped; the same command goes on", file=sys.stderr)
    return 130


if __name__ == "__main__":
    protect_standard_streams()
    sys.exit(main())
