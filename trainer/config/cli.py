"""The command line, generated from the dataclasses of `settings`: a flag cannot drift from its field."""

import argparse
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from trainer.config.errors import UserError
from trainer.config.schema import GROUPS, LORA_RATE_FACTOR, MODES, PRESETS, Settings, base, resolve

TITLES = {
    "model": "model",
    "lora": "LoRA (with --mode lora)",
    "data": "data",
    "train": "training",
    "engine": "engine",
    "output": "output",
}


@dataclass(frozen=True, kw_only=True)
class LrRange:
    """The sweep of `--find-lr`."""

    start: float
    end: float
    steps: int = 100

    def __post_init__(self) -> None:
        if not (0 < self.start < self.end < math.inf and self.steps >= 20):
            raise UserError(
                f"--find-lr {self.start:g}:{self.end:g}:{self.steps}: expected START:END or START:END:STEPS with "
                "0 < START < END and 20 steps or more"
            )

    @classmethod
    def read(cls, text: str, mode: str) -> "LrRange":
        """From START:END[:STEPS]; `default`: from far too low to far too high, for LoRA ten times higher."""
        if text == "default":
            factor = LORA_RATE_FACTOR if mode == "lora" else 1.0
            return cls(start=1e-7 * factor, end=1.0 * factor)
        try:
            start, end, *rest = text.split(":")
            (steps,) = rest or ["100"]
            return cls(start=float(start), end=float(end), steps=int(steps))
        except ValueError:
            raise UserError(f"--find-lr {text}: expected START:END or START:END:STEPS, for instance 1e-6:1") from None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for: the settings of the run, and what to do with them."""

    settings: Settings
    given: Mapping[str, Mapping[str, Any]]  #: the flags that were given, {group: {field: value}}
    resume: str | None  #: None, `latest`, `best` or `step-N`
    allow_change: tuple[str, ...]  #: settings that may differ from those of the run that is resumed
    dry_run: bool
    find_lr: LrRange | None = None  #: a range test instead of the run
    find_batch: bool = False  #: trials of micro-batches instead of the run

    @property
    def finds(self) -> bool:
        """Whether something is to be found rather than trained."""
        return self.find_lr is not None or self.find_batch


class _Parser(argparse.ArgumentParser):
    """Raises UserError instead of printing usage: one line, once, is printed by the caller."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def read(arguments: Sequence[str] | None = None) -> Request:
    """The request of a command line; UserError on any mistake, SystemExit(0) after --help."""
    given = vars(parser().parse_args(sys.argv[1:] if arguments is None else list(arguments)))
    values: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    overridden = []
    for name, group in GROUPS.items():
        for field in _fields(group):
            key = f"{name}.{field.name}"
            if key in given:
                values[name][field.name] = given[key]
                overridden.append(field.metadata["flag"])
    _check_one(given)
    return Request(
        settings=resolve(given["mode"], given["preset"], values, tuple(overridden)),
        given=values,
        resume=given["resume"],
        allow_change=tuple(name.replace("-", "_") for names in given["allow_change"] for name in names.split(",")),
        dry_run=given["dry_run"],
        find_lr=LrRange.read(given["find_lr"], given["mode"]) if given["find_lr"] else None,
        find_batch=given["find_batch"],
    )


def _check_one(given: Mapping[str, Any]) -> None:
    """UserError where more than one thing is asked for."""
    asked = [f"--{name.replace('_', '-')}" for name in ("find_lr", "find_batch", "dry_run", "resume") if given[name]]
    if len(asked) > 1 and asked[0] != "--dry-run":
        raise UserError(f"{asked[0]} and {asked[1]}: one at a time")


def words(request: Request, **instead: Mapping[str, Any]) -> list[str]:
    """A command line with the request's mode, preset and given settings, those of `instead` (by group) over them."""
    line = ["--mode", request.settings.mode, "--preset", request.settings.preset]
    for name, group in GROUPS.items():
        values = {**request.given.get(name, {}), **instead.get(name, {})}
        for field in _fields(group):
            if field.name in values:
                value = values[field.name]
                if field.type is bool:
                    line += [] if value else [field.metadata["flag"]]
                else:
                    line += [field.metadata["flag"], ",".join(value) if isinstance(value, tuple) else str(value)]
    return line


def parser() -> argparse.ArgumentParser:
    """The argument parser; a setting not given is absent from its result, so presets can be told."""
    top = _Parser(
        prog="deepspeed launch/train.py",
        description="Fine-tune GPT-2 through DeepSpeed ZeRO: every weight (full) or LoRA adapters (lora).",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
        allow_abbrev=False,
    )
    run = top.add_argument_group("run")
    run.add_argument("--mode", required=True, choices=MODES, help="train every weight, or LoRA adapters")
    run.add_argument(
        "--preset", choices=PRESETS, default="demo",
        help="demo: embedded model and data, sized for a CPU; card: the published settings of gpt2-acled-t2s "
        "(default: demo)",
    )  # fmt: skip
    run.add_argument(
        "--resume", nargs="?", const="latest", metavar="step-N|best",
        help="go on from the run folder's newest whole checkpoint, or from the one named",
    )  # fmt: skip
    run.add_argument(
        "--allow-change", action="append", default=[], metavar="NAME",
        help="with --resume: let this setting differ from the first part of the run; recorded (for instance lr)",
    )  # fmt: skip
    run.add_argument("--dry-run", action="store_true", help="resolve everything, print the plan, train nothing")
    run.add_argument(
        "--find-lr", nargs="?", const="default", metavar="START:END[:STEPS]",
        help="suggest a learning rate by a range test, train nothing (default: 1e-7:1, with --mode lora 1e-6:10, "
        "in 100 steps)",
    )  # fmt: skip
    run.add_argument(
        "--find-batch", action="store_true",
        help="try micro-batches for this global batch, suggest the fastest that fits, train nothing",
    )  # fmt: skip
    run.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the launcher passes it; LOCAL_RANK says the same
    for name, group in GROUPS.items():
        section = top.add_argument_group(TITLES[name])
        for field in _fields(group):
            _add(section, name, field)
    return top


def _fields(group: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(group) if "flag" in field.metadata]


def _add(section: Any, group: str, field: dataclasses.Field[Any]) -> None:
    meta = field.metadata
    common = {"dest": f"{group}.{field.name}", "default": argparse.SUPPRESS}
    if field.type is bool:  # a switch: given, it is the other way round
        action = "store_false" if field.default else "store_true"
        section.add_argument(meta["flag"], action=action, help=meta["help"], **common)
        return
    kind = _parse_type(field.type)
    section.add_argument(
        meta["flag"], type=kind, choices=meta["choices"] or None, help=f"{meta['help']}{_default(group, field)}",
        metavar=None if meta["choices"] else _METAVARS.get(kind, "NAMES"), **common,
    )  # fmt: skip


def _parse_type(annotation: Any) -> Any:
    """The function that reads one argument of a field's type."""
    if isinstance(annotation, types.UnionType):  # X | None
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    return {int: int, float: float, str: str}.get(annotation, _names)


_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _default(group: str, field: dataclasses.Field[Any]) -> str:
    """The default as `--help` prints it, with the unit; both presets where they differ."""
    unit = f" {field.metadata['unit']}" if field.metadata["unit"] else ""
    presets = {name: base(name).get(group, {}).get(field.name, field.default) for name in PRESETS}
    if field.default is None or field.default == ():
        return f" [{unit.strip()}]" if unit else ""
    if presets["demo"] == presets["card"]:
        return f" (default: {presets['demo']}{unit})"
    return f" (default: demo {presets['demo']}, card {presets['card']}{unit})"
