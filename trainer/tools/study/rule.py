"""The rule of a study: everything that decides its answer, written and hashed before the first trial."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError, model_validator

from trainer.config.errors import UserError
from trainer.config.files import read_json_object, write_atomically
from trainer.report.judge import Margin

RULE_FILE = "rule.json"
METHODS = ("full", "lora")
RUNG_FACTOR = 4  # each rung's runs are this many times as long as the previous rung's, and a fourth of them goes on
MIN_RUNG_STEPS = 6  # a shorter run says nothing about a rate
MIN_MAX_LR = 1e-5  # a lower --max-lr leaves no grid
NUM_CHOICE_SEEDS = 3  # search seeds by which the best rate is told from its neighbours


class Rule(BaseModel):
    """What is searched, with which budget, and how the answer is drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[Literal["full"], Literal["lora"]] = ("full", "lora")
    lora_ranks: tuple[PositiveInt, ...]
    total_steps: PositiveInt  #: optimizer steps of a run of full length
    rungs: tuple[int, ...]  #: steps of the runs of each rung, the last one the full length
    search_seeds: tuple[NonNegativeInt, ...] = (1,)
    answer_seeds: tuple[NonNegativeInt, ...]  #: of the runs that the answer is drawn from; no search seed
    max_lrs: dict[str, float] = {}  #: of a method: the highest rate that may be tried
    margin: Margin
    train_argv: tuple[str, ...]  #: flags of launch/train.py that every run has
    data: str  #: the first 12 hex digits of the fingerprint of the data that they are trained and judged on

    @model_validator(mode="after")
    def _refuse_impossible(self) -> "Rule":
        for flag, values in (("--lora-ranks", self.lora_ranks), ("--seeds", self.answer_seeds)):
            if not values or len(set(values)) < len(values):
                raise UserError(f"{flag} {','.join(map(str, values))}: expected one or more values, each only once")
        if shared := set(self.search_seeds) & set(self.answer_seeds):
            raise UserError(f"--seeds {min(shared)}: the search has it; the answer needs seeds of its own")
        for method, lr in self.max_lrs.items():
            if method not in self.methods or not MIN_MAX_LR <= lr < 1000:
                raise UserError(
                    f"--max-lr {method}={lr:g}: expected METHOD=LR with one of {', '.join(self.methods)} and a rate "
                    f"from {MIN_MAX_LR:g}"
                )
        return self

    @property
    def contestants(self) -> dict[str, int | None]:
        """{name: LoRA rank} of all that are searched; full has none, and one rank alone is not in the name."""
        has_several = len(self.lora_ranks) > 1
        return {"full": None} | {"lora" + f"-r{rank}" * has_several: rank for rank in self.lora_ranks}

    @property
    def choice_seeds(self) -> tuple[int, ...]:
        """Further search seeds, by which the best rate is chosen among its neighbours."""
        taken = {*self.search_seeds, *self.answer_seeds}
        free = (seed for seed in itertools.count(1) if seed not in taken)
        return tuple(itertools.islice(free, max(0, NUM_CHOICE_SEEDS - len(self.search_seeds))))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def plan_rungs(total_steps: int) -> tuple[int, ...]:
    """The steps of each rung, shortest first: a sixteenth, a fourth and all; none is too short to tell rates apart."""
    lengths = (max(MIN_RUNG_STEPS, -(-total_steps // RUNG_FACTOR**power)) for power in (2, 1))
    return (*sorted({steps for steps in lengths if 2 * steps <= total_steps}), total_steps)


def write_rule(folder: Path, rule: Rule, *, working_dir: str) -> None:
    """Write the rule of a new study; for one that goes on, check that it is the same. UserError names what differs."""
    path = folder / RULE_FILE
    if path.exists():
        stored_values = read_rule(folder)[0].model_dump(mode="json")
        for name, value in rule.model_dump(mode="json").items():
            if value != (stored := stored_values[name]):
                if name == "margin":
                    stored, value = (f"{m.describe()} (by {m.measure})" for m in (Margin(**stored), rule.margin))
                raise UserError(f"{path}: {name} is {stored} there and {value} now; name another folder (--output-dir)")
        return
    content = {"schema_version": 2, "rule": rule.model_dump(mode="json"), "sha256": rule.sha256}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if other_file := next(iter(folder.iterdir()), None):
            raise UserError(f"{folder} holds {other_file.name} and no study; name an empty folder with --output-dir")
        # json, not pydantic: the bytes of a path that is not UTF-8 are lone surrogates, which pydantic refuses.
        write_atomically(path, json.dumps(content | {"working_dir": working_dir}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output-dir {folder}: cannot write there ({error.strerror}); name another folder") from error


def read_rule(folder: Path) -> tuple[Rule, str]:
    """(rule, working folder of the study); UserError where there is none, or it was changed since it was hashed."""
    path = folder / RULE_FILE
    if not path.exists():
        raise UserError(f"{folder}: no study there (no {RULE_FILE}); name the folder of one")
    stored = read_json_object(path)
    try:
        if (version := stored.get("schema_version")) != 2:
            raise UserError(f"its schema_version is {version}")
        rule, sha256 = Rule.model_validate(stored.get("rule")), stored.get("sha256")
    except (UserError, ValidationError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{path}: not the rule of a study of version 2 ({problem})") from None
    if rule.sha256 != sha256:
        raise UserError(
            f"{path}: was changed after the study began: its hash is {rule.sha256[:12]} now and was "
            f"{str(sha256)[:12]} then; restore it, or start another study"
        )
    return rule, str(stored.get("working_dir"))
