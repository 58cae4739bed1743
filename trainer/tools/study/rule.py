"""The rule of a study: everything that decides its answer, written and hashed before the first trial."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.files import write_atomically
from trainer.config.json_file import read_json_object
from trainer.report.margin import Margin

RULE_FILE = "rule.json"
METHODS = {
    "full": ("--mode", "full"),
    "lora": ("--mode", "lora"),
    "dora": ("--mode", "lora", "--adapter", "dora"),
    "rslora": ("--mode", "lora", "--adapter", "rslora"),
    "pissa": ("--mode", "lora", "--adapter", "pissa"),
    "lora-nf4": ("--mode", "lora", "--quant", "nf4"),
    "lora-int8": ("--mode", "lora", "--quant", "int8"),
}
PRIMARY = ("full", "lora")  # the comparison that the answer is about; others are exploratory
MIN_UNITS = 20  # test records or groups; below it the interval's approximation has not been checked
MIN_ANSWER_SEEDS = 3  # below it nothing is said of a method, only of the models
RUNG_FACTOR = 4  # a rung's runs are so many times as long as those of the rung before, and a fourth of them goes on
MIN_RUNG_STEPS = 6  # a shorter run says nothing of a rate


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is searched, with which budget, and how the answer is drawn."""

    methods: tuple[str, ...]
    lora_ranks: tuple[int, ...]
    total_steps: int  #: optimizer steps of a run of full length
    rungs: tuple[int, ...]  #: steps of the runs of each rung, the last one the full length
    search_seeds: tuple[int, ...]
    answer_seeds: tuple[int, ...]  #: of the runs that the answer is drawn from, on the test split; no search seed
    margin: Margin
    looks: int
    train_argv: tuple[str, ...]  #: flags of launch/train.py that every run has
    data: str  #: the first 12 hex digits of the fingerprint of what they are trained and judged on
    level: float = 0.95  #: of the answer's intervals over all looks
    quarter_batch: int | None = None  #: a quarter of the global batch, where the finalists run with that too
    left_out: tuple[str, ...] = ()  #: what --budget had no time for

    def __post_init__(self) -> None:
        check_methods(self.methods)
        for flag, values in (
            ("--methods", self.methods),
            ("--ranks", self.lora_ranks),
            ("--search-seeds", self.search_seeds),
            ("--seeds", self.answer_seeds),
        ):
            if len(set(values)) < len(values):
                raise UserError(f"{flag} {','.join(map(str, values))}: expected one value or more, none of them twice")
        if shared := set(self.search_seeds) & set(self.answer_seeds):
            raise UserError(f"--seeds {min(shared)}: also in --search-seeds; the answer needs seeds of its own")
        if self.looks < 1:
            raise UserError(f"--looks {self.looks}: expected a whole number from 1")
        if len(self.seeds_by_look) < self.looks:
            raise UserError(
                f"--looks {self.looks}: {len(self.answer_seeds)} seeds, of which the first look takes "
                f"{MIN_ANSWER_SEEDS}, allow {len(self.seeds_by_look)}; give more --seeds"
            )

    @property
    def seeds_by_look(self) -> tuple[tuple[int, ...], ...]:
        """The answer's seeds at each look: all at the last one, evenly more at each, not below three at the first."""
        num_seeds = len(self.answer_seeds)
        first = min(num_seeds, max(MIN_ANSWER_SEEDS, -(-num_seeds // self.looks)))
        counts = {num_seeds - (num_seeds - first) * later // max(1, self.looks - 1) for later in range(self.looks)}
        return tuple(self.answer_seeds[:count] for count in sorted(counts))

    def look_of(self, num_seeds: int) -> int:
        """The number, from 1, of the look that has so many seeds."""
        return [len(seeds) for seeds in self.seeds_by_look].index(num_seeds) + 1

    @property
    def level_per_look(self) -> float:
        """The level of one look: all looks together have the rule's."""
        return 1 - (1 - self.level) / self.looks

    @property
    def sha256(self) -> str:
        """Its hash, in hex."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What the file holds under `rule`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Rule":
        """The rule again; TypeError or KeyError where it is none."""
        if not isinstance(values, dict):
            raise TypeError(f"{type(values).__name__} in place of a rule")
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**{**fields, "margin": Margin(**values["margin"])})


def check_methods(methods: tuple[str, ...]) -> None:
    """UserError for a method that there is not, and where one of the primary ones is missing."""
    for method in methods:
        if method not in METHODS:
            raise UserError(f"--methods {method}: expected some of {', '.join(METHODS)}")
    if missing := [method for method in PRIMARY if method not in methods]:
        raise UserError(f"--methods {','.join(methods)}: expected {missing[0]} among them")


def plan_rungs(total_steps: int) -> tuple[int, ...]:
    """The steps of each rung, shortest first: a sixteenth, a fourth and all; none is too short to tell rates.

    Of the whole grid, 17 rates, that is 28 % of the steps: 11 short runs, 4 or 5, and 3. Where the best rate moves by a
    place from rung to rung it is 35 to 40 %; each further place in whole runs is one more of them, or 6 %.
    """
    lengths = (max(MIN_RUNG_STEPS, -(-total_steps // RUNG_FACTOR**power)) for power in (2, 1))
    return (*sorted({steps for steps in lengths if 2 * steps <= total_steps}), total_steps)


def write_rule(folder: Path, rule: Rule, *, working_dir: str) -> None:
    """Write the rule of a new study; of one that goes on, check that it is the same. UserError names what differs."""
    path = folder / RULE_FILE
    if path.exists():
        stored_rule, _ = read_rule(folder)
        for name, value in rule.to_dict().items():
            if (stored := stored_rule.to_dict()[name]) != value:
                raise UserError(
                    f"{path}: {name} is {stored} in the study that goes on there and {value} now; start a study with "
                    "another rule in another folder (--output-dir)"
                )
        return
    content = {"rule": rule.to_dict(), "sha256": rule.sha256, "working_dir": working_dir}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if leftover := next(iter(folder.iterdir()), None):
            raise UserError(f"{folder} holds {leftover.name} and no study; name an empty folder with --output-dir")
        write_atomically(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot write there ({error.strerror}); name another folder") from error


def read_rule(folder: Path) -> tuple[Rule, str]:
    """(rule, working folder of the study); UserError where there is none, or it was changed since it was hashed."""
    path = folder / RULE_FILE
    if not path.exists():
        raise UserError(f"{folder}: no study there (no {RULE_FILE}); name the folder of one")
    content = read_json_object(path)
    try:
        rule, working_dir, digest = Rule.from_dict(content["rule"]), str(content["working_dir"]), content["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the rule of a study ({error}); name the folder of one") from None
    if rule.sha256 != digest:
        raise UserError(
            f"{path}: was changed after the fact: its contents have the hash {rule.sha256[:12]}, at the start they had "
            f"{digest[:12]}; put it back, or start another study"
        )
    return rule, working_dir
