"""Flags and values of transformers, TRL and peft as ours, by the table spellings.yaml: exactly, or not at all."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trainer.config.errors import UserError

TRUE, FALSE, NONE = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("", "none", "null", "~")
LIST_FLAGS = {"--data", "--report-to", "--lora-target-modules", "--modules-to-save"}  # elsewhere separated by blanks
SPELLED_PARTS = ("same", "switches", "together", "no_effect", "only")
TRANSFORMERS_BATCH, TRANSFORMERS_SAVE_STEPS = "8", "500"  # the batch per device and save_steps that it takes itself


@functools.cache
def read_table() -> dict[str, Any]:
    """The table, turned round: {section: {spelling: what it becomes}}; `values` as it stands."""
    table = yaml.safe_load(Path(__file__).with_name("spellings.yaml").read_text(encoding="utf-8"))
    table["together"] = dict.fromkeys(table["together"].split())
    for part in ("same", "switches", "no_effect", "elsewhere"):
        table[part] = {name: ours for ours, names in table[part].items() for name in names.split()}
    table["elsewhere"] |= dict(word.split("=") for word in table["nearest"].split())
    table["only"] = {
        k: (v.lower().split(), answer) for answer, names in table["only"].items() for k, v in names.items()
    }
    return table


def is_value(word: str) -> bool:
    """Whether a word behind a flag is its value: no flag, or a negative number."""
    return not word.startswith("-") or re.match(r"-[\d.]", word) is not None


def separate_values(*words: str) -> str:
    """Words like --flag=value as one types them, with a blank."""
    return " ".join(word.replace("=", " ", 1) for word in words)


@dataclass
class Translation:
    """A command line in our flags, what the plan says of it, and what has no equivalent."""

    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    given: dict[str, str] = field(default_factory=dict)  #: {spelling: its value}
    places: dict[str, int] = field(default_factory=dict)  #: {spelling: among which words it was given last}
    put_words: dict[str, tuple[str, str]] = field(default_factory=dict)  #: {our flag: (spelling, word of ours for it)}

    def value_of(self, flag: str) -> str | None:
        """The value of a flag of ours where it was given last."""
        return next((w.partition("=")[2] for w in reversed(self.words) if w.startswith(f"{flag}=")), None)

    def find(self, *names: str) -> tuple[str, str | None]:
        """(name, value) of the first of some spellings that was given and is not none; ("", None) without one."""
        found = ((name, self.given[name]) for name in names if self.given.get(name, "").lower() not in NONE)
        return next(found, ("", None))

    def put(self, key: str, *words: str, note: str = "") -> None:
        """Take words of ours in the place where a spelling was given, as of two flags the last one counts, and say so;
        a problem where another spelling says something else of the same flag."""
        for word in words:
            other, taken = self.put_words.get(flag := word.partition("=")[0], (key, word))
            if taken == word or other == key:
                self.put_words[flag] = key, word
            else:
                self.problems.append(f"--{other} and --{key}: exclude one another; expected one of them")
        self.notes.append(f"{note or f'{key} is {separate_values(*words)}'} here")


def translate(argv: Sequence[str], takes_value: Mapping[str, bool], num_ranks: int = 1) -> Translation:
    """A command line in our flags; words that nobody knows stay as they are. `takes_value`: our flags and whether each
    is followed by a value; `num_ranks`: processes, by which a batch per device is multiplied."""
    table, result, rest = read_table(), Translation(), list(argv)
    ignored: dict[str, list[str]] = {}
    while rest:
        word = rest.pop(0)
        name, is_joined, value = word.partition("=")
        key, flag = name[2:].replace("-", "_"), name.replace("_", "-")
        part = next((part for part in SPELLED_PARTS if key in table[part]), "")
        ours = flag if flag in takes_value else table["same"].get(key, "").partition(" ")[0]
        if not name.startswith("--") or not (part or ours) or (ours and ours not in takes_value):
            result.words.append(word)
            continue
        known = table["values"].get(key) or table["values"].get(ours, {})
        is_switch = not takes_value[ours] if ours else part == "switches"
        values = [value] if is_joined else []
        while rest and (not values or (not is_joined and not LIST_FLAGS.isdisjoint((ours, flag)))):
            if is_joined or not is_value(rest[0]) or (is_switch and rest[0].lower() not in TRUE + FALSE):
                break
            values.append(rest.pop(0))
        is_given = bool(values)
        value = (" " if ours == "--data" else ",").join(values or ["true"])
        if part:
            result.given[key], result.places[key] = value, len(result.words)
        try:
            if part == "no_effect":
                ignored.setdefault(table[part][key], []).append(key)
            elif part == "only":
                accepted, answer = table[part][key]
                if value.lower() not in (*accepted, *NONE):
                    raise UserError(answer)
            elif part == "together":
                if not is_given:
                    del result.given[key]
                    raise UserError("expected one argument")
            elif is_switch:
                if value.lower() not in TRUE + FALSE + NONE:
                    raise UserError("expected true or false")
                if value.lower() in TRUE and ours:
                    result.words.append(ours)
                elif value.lower() in TRUE:
                    result.put(key, table[part][key].replace(" ", "="))
            elif not is_given and "true" not in known:
                result.words.append(ours)  # argparse says that a value is missing
            elif own := _our_word(known, ours, value, none_is_nothing=part == "same"):
                is_changed, remark = own != f"{ours}={value}", table["same"].get(key, "").partition(" ")[2]
                note = f"{key} {value} is {separate_values(own)}" if is_changed else f"{key} is {ours}"
                if part:
                    result.put(key, own, note=note)
                    result.notes[-1] += f" {remark}".rstrip()
                else:
                    result.words.append(own)
                    result.notes += [f"{note} here"] if is_changed else []
        except UserError as error:
            result.problems.append(f"{name} {value if is_given else ''}".rstrip() + f": {error}")
    for take in (functools.partial(_take_batch, num_ranks=num_ranks), _take_intervals, _take_rest):
        try:
            take(result)
        except UserError as error:
            result.problems.append(str(error))
    for key, word in sorted(result.put_words.values(), key=lambda item: -result.places[item[0]]):
        result.words.insert(result.places[key], word)
    result.notes += [f"{', '.join(names)}: without effect, {reason}" for reason, names in ignored.items()]
    return result


def _our_word(known: Mapping[str, str], ours: str, value: str, *, none_is_nothing: bool) -> str:
    key = value.lower()
    if "true" in known:
        key = "true" if key in TRUE else "false" if key in FALSE else key
    if none_is_nothing and key in NONE and key not in known:
        return ""
    if ours == "--report-to" and key in NONE:
        return "--wandb=disabled"
    if ours in LIST_FLAGS:
        return f"{ours}={','.join(known.get(item.lower(), item) for item in value.split(','))}"
    if ours == "--warmup-steps" and re.fullmatch(r"0?\.\d+", value):  # a share, since transformers 5
        return f"--warmup-ratio={value}"
    if ours == "--resume":
        value = re.sub(r"^.*checkpoint-(\d+)/?$", r"step-\1", value)
    changed = known.get(key, known.get("*", value))
    if changed.startswith("!"):
        raise UserError(changed[1:])
    return f"{ours}={changed}" if changed or not value else ""


def _whole(name: str, value: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,9}", value):
        raise UserError(f"--{name} {value}: expected a whole number from 1")
    return int(value)


def _take_batch(result: Translation, *, num_ranks: int) -> None:
    """Per device x accumulation x processes is our global batch; what is missing is what transformers takes."""
    name, per_device = result.find("per_device_train_batch_size", "per_gpu_train_batch_size")
    _, accumulation = result.find("gradient_accumulation_steps")
    if per_device is None and accumulation is None:
        return
    own_batch, micro = result.value_of("--global-batch"), per_device or result.value_of("--micro-batch")
    steps = _whole("gradient_accumulation_steps", accumulation or "1")
    if micro is None and own_batch is not None:
        micro = str(max(1, _whole("global-batch", own_batch) // (steps * num_ranks)))
    size = _whole(name or "micro-batch", micro or TRANSFORMERS_BATCH)
    batch = size * steps * num_ranks
    product = f"per device {size} x accumulation {steps} x {num_ranks} process{'es' * (num_ranks > 1)}"
    key = max(("gradient_accumulation_steps", name), key=lambda key: result.places.get(key, -1))
    if own_batch is not None and accumulation is not None and own_batch != str(batch):
        raise UserError(f"--global-batch {own_batch}: {product} makes {batch}; expected one of them")
    words = [f"--micro-batch={size}", *([f"--global-batch={batch}"] if own_batch is None else [])]
    result.put(key, *words, note=f"{product} is {separate_values(*words)}")


def _take_intervals(result: Translation) -> None:
    for flag, strategies, steps_name in (
        ("--eval-every", ("eval_strategy", "evaluation_strategy"), "eval_steps"),
        ("--save-every", ("save_strategy",), "save_steps"),
    ):
        name, strategy = result.find(*strategies)
        _, steps = result.find(steps_name)
        if strategy is None and steps is None:
            continue
        every = {"no": "never", "false": "never", "epoch": "epoch", "steps": ""}.get((strategy or "steps").lower())
        if every is None:
            raise UserError(f"--{name} {strategy}: expected no, epoch or steps, as {flag} never, epoch or a number")
        if every:
            result.put(name, f"{flag}={every}", note=f"{name} {strategy} is {flag} {every}")
            continue
        steps = steps or (TRANSFORMERS_SAVE_STEPS if flag == "--save-every" else result.given.get("logging_steps"))
        if steps is None:
            raise UserError(f"--{name} {strategy}: expected --{steps_name} N too")
        key, every = steps_name if steps_name in result.given else name, str(_whole(steps_name, steps))
        result.put(key, f"{flag}={every}", note=f"{steps_name} {steps} is {flag} {every}")


def _take_rest(result: Translation) -> None:
    """What depends on other flags: bf16 that is off, a schedule without warm-up, parts of a name, a second seed."""
    if result.given.get("bf16", "").lower() in FALSE and "--precision" not in result.put_words:
        result.put("bf16", "--precision=fp32", note="bf16 false is --precision fp32")
    if result.given.get("lr_scheduler_type", "").lower() == "constant":
        if re.search("[1-9]", f"{result.value_of('--warmup-steps')}{result.value_of('--warmup-ratio')}"):
            raise UserError(
                "--lr_scheduler_type constant: has no warm-up in transformers; expected constant_with_warmup"
            )
        result.put("lr_scheduler_type", "--warmup-ratio=0", note="lr_scheduler_type constant is --warmup-ratio 0")
    (_, name), (_, config) = result.find("dataset_name"), result.find("dataset_config")
    if config is not None and (name is None or ":" in name):
        raise UserError(f"--dataset_config {config}: expected with --dataset_name ID, or as --data ID:CONFIG")
    if name is not None:
        result.put("dataset_name", f"--data={name}{f':{config}' if config else ''}")
    _, data_seed = result.find("data_seed")
    if data_seed not in (None, seed := result.value_of("--seed") or "42"):
        raise UserError(f"--data_seed {data_seed}: expected --seed, here {seed}, for weights, order and dropout alike")
