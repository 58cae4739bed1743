"""Which trials come next: successive halving over rates and ranks, as a pure function of the results so far.

launch/README.md says how a study searches. (Successive halving: Jamieson and Talwalkar, arXiv 1502.07943; rates for
LoRA about ten times those of full: Schulman et al., "LoRA Without Regret", 2025.)
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.tools.study.rule import RUNG_FACTOR, Rule

RATE_DECADES = {"full": (-6, -2), "lora": (-5, -1)}  # powers of ten that the grid of rates spans
EXTENSION_DECADES = 2  # by how much a grid may be extended on either side
RATES_PER_DECADE = 4
FIRST_RUNG_STRIDE = 2  # its leader's neighbours fill in what it passes over

#: name of a finished trial -> its final validation loss, infinity where it diverged, NaN where it failed otherwise
Results = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, order=True)
class Candidate:
    """One setting of a method."""

    method: str
    lora_rank: int | None
    rate_index: int  #: place on the method's grid; the rate is 10 ** (index / RATES_PER_DECADE)

    @property
    def lr(self) -> float:
        return float(f"{10 ** (self.rate_index / RATES_PER_DECADE):.3g}")

    @property
    def label(self) -> str:
        return "-".join([self.method, *([f"r{self.lora_rank}"] if self.lora_rank else []), f"lr{self.lr:g}"])

    def at(self, rate_index: int) -> "Candidate":
        return dataclasses.replace(self, rate_index=rate_index)


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """One run of launch/train.py."""

    phase: Literal["search", "answer"]
    candidate: Candidate
    num_steps: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its run; another trial has another one."""
        return f"{self.phase}-{self.candidate.label}-t{self.num_steps}-s{self.seed}"


class MethodSearch:
    """The search of one contestant of a rule, as far as these results go; it is over where none is missing."""

    def __init__(self, rule: Rule, contestant: str, results: Results) -> None:
        self.rule, self.name, self._results = rule, contestant, results
        lora_rank = rule.contestants[contestant]
        self.method = "full" if lora_rank is None else "lora"
        low, high = RATE_DECADES[self.method]
        cap = rule.max_lrs.get(self.method)
        #: the highest place that the user allows; none where the study may try what it likes
        self.highest = None if cap is None else math.floor(math.log10(cap) * RATES_PER_DECADE + 0.01)
        self.bounds = ((low - EXTENSION_DECADES) * RATES_PER_DECADE, (high + EXTENSION_DECADES) * RATES_PER_DECADE)
        if self.highest is not None:
            self.bounds = (self.bounds[0], min(self.highest, self.bounds[1]))
        self.grid = [
            Candidate(method=self.method, lora_rank=lora_rank, rate_index=index)
            for index in range(low * RATES_PER_DECADE, min(high * RATES_PER_DECADE, self.bounds[1]) + 1)
        ]
        #: steps and seeds of the runs of each rung; after the last one the choice between neighbours
        self.stages = [(num_steps, rule.search_seeds) for num_steps in rule.rungs]
        self.stages.append((rule.total_steps, (*rule.search_seeds, *rule.choice_seeds)))
        self.trials: list[TrialSpec] = []  #: all that were needed so far
        self.missing: list[TrialSpec] = []  #: those without a result
        self.winner: Candidate | None = None  #: None where every trial of a rung failed, too
        self.loss = math.inf  #: of the winner, the mean over the seeds of the choice
        self.problem = ""  #: why the method cannot be ranked
        self._walk()

    @property
    def num_steps(self) -> int:
        return sum(spec.num_steps for spec in self.trials)

    def describe(self) -> str:
        if self.winner is None or self.problem:
            return self.problem
        cap = ", the highest that --max-lr allows" if self.winner.rate_index == self.highest else ""
        seeds = f", mean of {len(self.stages[-1][1])} seeds" if len(self.stages[-1][1]) > 1 else ""
        return (
            f"{self.name}: best rate {self.winner.lr:g}{cap} (validation loss {self.loss:.4f}{seeds}) of "
            f"{len(self.trials)} trials, {self.num_steps:,} steps"
        )

    @property
    def chosen_among(self) -> list[Candidate]:
        return [] if self.winner is None else [self.winner, *self._neighbours(self.winner)]

    def answer_specs(self) -> list[TrialSpec]:
        assert self.winner is not None
        num_steps, seeds = self.rule.total_steps, self.rule.answer_seeds
        return [TrialSpec(phase="answer", candidate=self.winner, num_steps=num_steps, seed=seed) for seed in seeds]

    def _walk(self) -> None:
        """Note what is needed, stage by stage, until results are missing or nothing can be trained."""
        candidates = self.grid[::FIRST_RUNG_STRIDE]
        for stage in range(len(self.stages)):
            pending = list(candidates)
            while pending:
                specs = [spec for candidate in pending for spec in self.specs_at(candidate, stage)]
                self.trials += [spec for spec in specs if spec not in self.trials]
                self.missing = [spec for spec in specs if spec.name not in self._results]
                if self.missing:
                    return
                ranked = sorted((self.mean_loss(candidate, stage), candidate) for candidate in candidates)
                loss, leader = ranked[0]
                if math.isinf(loss):
                    lowest = min(candidates, key=lambda candidate: candidate.rate_index)
                    has_diverged = any(math.isinf(self._results[spec.name]) for spec in self.specs_at(lowest, stage))
                    if stage == 0 or not has_diverged or lowest.rate_index == self.bounds[0]:
                        self.problem = f"{self.name}: every trial failed"
                        return
                    pending = [lowest.at(lowest.rate_index - 1)]
                else:
                    pending = [neighbour for neighbour in self._neighbours(leader) if neighbour not in candidates]
                candidates = [*candidates, *pending]
            # The best, a fourth of the grid at most, and the leader's neighbours; from the last rung on those alone.
            num_best = len(self.grid) // RUNG_FACTOR if stage < len(self.rule.rungs) - 2 else 1
            best = [candidate for loss, candidate in ranked[:num_best] if not math.isinf(loss)]
            candidates = list(dict.fromkeys([*best, *self._neighbours(leader)]))
        self.winner, self.loss = leader, loss
        beside = [spec.name for neighbour in self.chosen_among[1:] for spec in self.specs_at(neighbour, -1)]
        if leader.rate_index in self.bounds and leader.rate_index != self.highest:
            side = "lowest" if leader.rate_index == self.bounds[0] else "highest"
            self.problem = (
                f"{self.name} is under-tuned: its best rate {leader.lr:g} is the {side} that the study may try, and "
                "a better one may lie beyond it"
            )
        elif unknown := [name for name in beside if math.isnan(self._results[name])]:
            self.problem = (
                f"{self.name}: {unknown[0]} failed without diverging, and stands beside the best rate, "
                f"{leader.lr:g}: it may be the better one (see trials/{unknown[0]}/log)"
            )

    def _neighbours(self, leader: Candidate) -> list[Candidate]:
        low, high = self.bounds
        return [leader.at(i) for i in (leader.rate_index - 1, leader.rate_index + 1) if low <= i <= high]

    def mean_loss(self, candidate: Candidate, stage: int) -> float:
        """Over the runs of a stage; infinity where one is missing or failed."""
        losses = [self._results.get(spec.name, math.inf) for spec in self.specs_at(candidate, stage)]
        return math.inf if any(map(math.isnan, losses)) else sum(losses) / len(losses)

    def specs_at(self, candidate: Candidate, stage: int) -> list[TrialSpec]:
        num_steps, seeds = self.stages[stage]
        return [TrialSpec(phase="search", candidate=candidate, num_steps=num_steps, seed=seed) for seed in seeds]


@dataclass(frozen=True, kw_only=True)
class StudyState:
    """Where a study stands: a pure function of its rule and the results."""

    needed: tuple[TrialSpec, ...]  #: to be run now; none where the study is over
    outcomes: Mapping[str, MethodSearch]  #: those that are over; once all are, full and the LoRA that is judged first
    answers: tuple[TrialSpec, ...] = ()  #: the runs that the answer is drawn from, once they are known
    refusal: str | None = None  #: why the study will not rank its primary methods


def study_state(rule: Rule, results: Results) -> StudyState:
    """What comes next: the searches of all contestants side by side, then the answer's runs."""
    searches = [MethodSearch(rule, name, results) for name in rule.contestants]
    outcomes = {search.name: search for search in searches if not search.missing}
    by_method = searches[:1], searches[1:]
    for members in by_method:
        if all(search.problem for search in members):
            return StudyState(needed=(), outcomes=outcomes, refusal=members[0].problem)
    if len(outcomes) < len(searches):
        waiting = []
        for search in searches:  # in turn, the method with the fewest results first: fair when cut off
            num_results = len(search.trials) - len(search.missing)
            waiting += [(num_results + n, spec) for n, spec in enumerate(search.missing)]
        needed = tuple(spec for _, spec in sorted(waiting, key=lambda item: item[0]))
        return StudyState(needed=needed, outcomes=outcomes)
    primary = [min(members, key=lambda search: (bool(search.problem), search.loss)) for members in by_method]
    outcomes = {search.name: search for search in (*primary, *searches)}
    judged = [outcome for outcome in outcomes.values() if outcome.winner is not None and not outcome.problem]
    answers = [outcome.answer_specs() for outcome in judged]
    for search, specs in zip(judged[:2], answers, strict=False):
        values = [results.get(spec.name) for spec in specs]
        if math.inf in values:  # an outcome of the method: in how many seeds, its other runs say
            missing = tuple(spec for spec, value in zip(specs, values, strict=True) if value is None)
            lower = specs[0].candidate.at(specs[0].candidate.rate_index - 1).lr
            refusal = (
                f"{search.name} at {specs[0].candidate.lr:g} diverged in {values.count(math.inf)} of {len(specs)} "
                f"seeds; run the study at {lower:g} (--max-lr {search.method}={lower:g}, another --output-dir)"
            )
            return StudyState(needed=missing, outcomes=outcomes, refusal=None if missing else refusal)
        failed = [spec.name for spec in specs if math.isnan(results.get(spec.name, 0.0))]
        if failed:
            refusal = f"{failed[0]} failed, and each pair of seeds is needed"
            return StudyState(needed=(), outcomes=outcomes, refusal=refusal)
    whole = [specs for specs in answers if all(math.isfinite(results.get(spec.name, 0.0)) for spec in specs)]
    in_pairs = tuple(spec for of_seed in zip(*whole, strict=True) for spec in of_seed)
    needed = tuple(spec for spec in in_pairs if spec.name not in results)
    return StudyState(needed=needed, outcomes=outcomes, answers=in_pairs)


def expected_trials(rule: Rule) -> list[TrialSpec]:
    """All trials of a study where nothing fails and the best rates lie in the middle of the grids."""
    results: dict[str, float] = {}
    specs: list[TrialSpec] = []
    while needed := study_state(rule, results).needed:
        for spec in needed:
            middle = -4.0 if spec.candidate.method == "full" else -3.0
            results[spec.name] = abs(math.log10(spec.candidate.lr) - middle)
        specs += needed
    return specs
