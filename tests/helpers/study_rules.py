"""The rule of a study, for tests that change one thing of it, and trials of it."""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.report.judge import Margin
from trainer.tools.study.rule import Rule, plan_rungs
from trainer.tools.study.search import Candidate


def make_rule(total_steps: int = 160, **changes: Any) -> Rule:
    """Full against LoRA of rank 8 with three fresh seeds."""
    values: dict[str, Any] = {
        "lora_ranks": (8,),
        "rungs": plan_rungs(total_steps),
        "answer_seeds": (101, 102, 103),
        "margin": Margin(),
        "train_argv": (),
        "data": "d1" * 6,
    }
    return Rule(total_steps=total_steps, **{**values, **changes})


def make_candidate(method: str = "full", rate_index: int = 0) -> Candidate:
    """At the rate 10 ** (rate_index / 4)."""
    return Candidate(method=method, lora_rank=None if method == "full" else 8, rate_index=rate_index)


def write_stub_plan(_: object, argv: Sequence[str], path: Path) -> None:
    """In place of `study.write_plan`: what the test's variables say."""
    num_steps = int(dict(itertools.pairwise(" ".join(argv).replace("=", " ").split())).get("--max-steps", 160))
    facts = [num_steps, os.environ.get("STUB_DATA", "d1" * 6), int(os.environ.get("STUB_TEST", 40)), ""]
    path.write_text(json.dumps(facts))
