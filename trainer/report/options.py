"""What a user, or a study, says of a comparison beside its runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.report.margin import Margin
from trainer.report.paired_interval import LEVEL
from trainer.report.views import View


@dataclass(frozen=True, kw_only=True)
class RateCurve:
    """Validation losses (nats per token) of one mode by learning rate, of runs of one length."""

    mode: str
    losses: Mapping[float, float]
    num_steps: int = 0
    run_ids: tuple[str, ...] = ()  #: of whole runs, as W&B knows them


@dataclass(frozen=True, kw_only=True)
class StudyContext:
    """How the compared settings were chosen, by whom and on what: what a study knows and its answer's runs do not."""

    choice: str  #: the end of the sentence
    lines: tuple[str, ...]  #: for people: rule, searches, timing
    rate_curves: tuple[RateCurve, ...]  #: of its searches, the whole runs last
    views: tuple[View, ...]  #: both modes at equal cost, on the searches' curves
    rule: Mapping[str, Any]  #: the content of its rule.json
    facts: Mapping[str, Any]  #: further content of answer.json


@dataclass(frozen=True, kw_only=True)
class CostRatio:
    """LoRA's cost over full's, None with the reason where they may not be divided; the costs themselves beside it."""

    ratio: float | None
    reason: str
    full: float | None  #: mean over runs, in seconds or bytes
    lora: float | None
    is_of_a_step: bool = False  #: whether the costs are those of a step instead of a run


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """How full and LoRA are judged; with `study` by its rule: the first LoRA group is the one that it is about."""

    margin: Margin = field(default_factory=Margin)
    level: float = LEVEL
    step_time: CostRatio | None = None  #: of a step of each mode, timed in alternation; None where they were not
    study: StudyContext | None = None


DEFAULT_OPTIONS = ComparisonOptions()
