"""Which trials come next: successive halving over rates and ranks, as a pure function of the results so far.

Every rung is a whole short run whose schedule ends at zero. The first tries every second rate of the grid. The leader's
two neighbours on the grid of rates always go on with it, and are run where they were not: so a best rate is never the
last one tried. At the edge of the grid the neighbour extends it, within bounds; a leader at a bound leaves its method
under-tuned, and the study refuses to rank.
(Successive halving: Jamieson and Talwalkar, arXiv 1502.07943; rates for LoRA about ten times those of full:
Schulman et al., "LoRA Without Regret", 2025.)
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from trainer.tools.study.rule import PRIMARY, RUNG_FACTOR, Rule

RATE_DECADES = {"full": (-6, -2)}  # powers of ten that the grid of rates spans
ADAPTER_RATE_DECADES = (-5, -1)
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
    rate_index: int  #: place on the method's grid; the rate is 10 ** (index / rates per decade)
    rates_per_decade: int

    @property
    def lr(self) -> float:
        return float(f"{10 ** (self.rate_index / self.rates_per_decade):.3g}")

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
    """The search of one method under a rule, as far as these results go; it is over where none is missing."""

    def __init__(self, rule: Rule, method: str, results: Results) -> None:
        self.rule, self.method, self._results = rule, method, results
        ranks = rule.lora_ranks if method != "full" else (None,)
        refinement = len(rule.lora_ranks) // len(ranks)  # more rates where there are no ranks: equal budgets
        per_decade = RATES_PER_DECADE * refinement
        low, high = RATE_DECADES.get(method, ADAPTER_RATE_DECADES)
        self.grid = [
            Candidate(method=method, lora_rank=rank, rate_index=index, rates_per_decade=per_decade)
            for rank in ranks
            for index in range(low * per_decade, high * per_decade + 1)
        ]
        self.bounds = ((low - EXTENSION_DECADES) * per_decade, (high + EXTENSION_DECADES) * per_decade)
        self.trials: list[TrialSpec] = []  #: all that were needed so far
        self.missing: list[TrialSpec] = []  #: those without a result
        self.winner: Candidate | None = None  #: None where every trial of a rung failed, too
        self.loss = math.inf  #: of the winner
        self.problem = ""  #: why the method cannot be ranked
        self._walk()

    @property
    def num_steps(self) -> int:
        return sum(spec.num_steps for spec in self.trials)

    def describe(self) -> str:
        """What it came to, in one line."""
        if self.winner is None or self.problem:
            return self.problem
        rank = f", rank {self.winner.lora_rank}" if self.winner.lora_rank else ""
        return (
            f"{self.method}: best rate {self.winner.lr:g}{rank} (validation loss {self.loss:.4f}) of "
            f"{len(self.trials)} trials, {self.num_steps:,} steps"
        )

    def _walk(self) -> None:
        """Note what is needed, rung by rung, until results are missing or nothing can be trained."""
        candidates = [c for c in self.grid if (c.rate_index - self.grid[0].rate_index) % FIRST_RUNG_STRIDE == 0]
        last_rung = len(self.rule.rungs) - 1
        for rung in range(last_rung + 1):
            pending = list(candidates)
            while pending:
                new_trials = [spec for candidate in pending for spec in self.specs_at(candidate, rung)]
                self.trials += new_trials
                self.missing = [spec for spec in new_trials if spec.name not in self._results]
                if self.missing:
                    return
                loss, leader = self._leader(candidates, rung)
                if math.isinf(loss):  # longer runs will not change that
                    self.problem = f"{self.method}: every trial failed"
                    return
                pending = [neighbour for neighbour in self._neighbours(leader) if neighbour not in candidates]
                candidates = [*candidates, *pending]
            if rung < last_rung:
                # The best, a fourth of the grid at most, and the leader's neighbours; before the last rung those alone.
                num_best = 1 if rung == last_rung - 1 else len(self.grid) // RUNG_FACTOR
                ranked = sorted((self._loss(candidate, rung), candidate) for candidate in candidates)
                best = [candidate for loss, candidate in ranked[:num_best] if not math.isinf(loss)]
                candidates = list(dict.fromkeys([*best, *self._neighbours(ranked[0][1])]))
        self.winner, self.loss = leader, loss
        beside = [spec.name for neighbour in self._neighbours(leader) for spec in self.specs_at(neighbour, last_rung)]
        if leader.rate_index in self.bounds:
            side = "lowest" if leader.rate_index == self.bounds[0] else "highest"
            self.problem = (
                f"{self.method} is under-tuned: its best rate {leader.lr:g} is the {side} that the study may try, and "
                "a better one may lie beyond it"
            )
        elif unknown := [name for name in beside if math.isnan(self._results[name])]:
            self.problem = (
                f"{self.method}: {unknown[0]} failed without diverging, and stands beside the best rate, "
                f"{leader.lr:g}: it may be the better one (see trials/{unknown[0]}/log)"
            )

    def _neighbours(self, leader: Candidate) -> list[Candidate]:
        low, high = self.bounds
        return [leader.at(i) for i in (leader.rate_index - 1, leader.rate_index + 1) if low <= i <= high]

    def _leader(self, candidates: Iterable[Candidate], rung: int) -> tuple[float, Candidate]:
        """The candidate with the lowest mean loss, the lower rate of equals."""
        return min((self._loss(candidate, rung), candidate) for candidate in candidates)

    def _loss(self, candidate: Candidate, rung: int) -> float:
        losses = [self._results.get(spec.name, math.inf) for spec in self.specs_at(candidate, rung)]
        return math.inf if any(map(math.isnan, losses)) else sum(losses) / len(losses)

    def specs_at(self, candidate: Candidate, rung: int) -> list[TrialSpec]:
        """The runs of a candidate on a rung, one a search seed."""
        return [
            TrialSpec(phase="search", candidate=candidate, num_steps=self.rule.rungs[rung], seed=seed)
            for seed in self.rule.search_seeds
        ]


@dataclass(frozen=True, kw_only=True)
class StudyState:
    """Where a study stands: a pure function of its rule and the results."""

    needed: tuple[TrialSpec, ...]  #: to be run now; none where the study is over
    outcomes: Mapping[str, MethodSearch]  #: those that are over, by method
    answers: tuple[TrialSpec, ...] = ()  #: the runs that the answer is drawn from, once they are known
    refusal: str | None = None  #: why the study will not rank its primary methods


def study_state(rule: Rule, results: Results) -> StudyState:
    """What comes next: the searches of all methods side by side, then the answer's runs."""
    searches = [MethodSearch(rule, method, results) for method in rule.methods]
    outcomes = {search.method: search for search in searches if not search.missing}
    refusal = next((o.problem for o in outcomes.values() if o.problem and o.method in PRIMARY), None)
    if refusal is not None:
        return StudyState(needed=(), outcomes=outcomes, refusal=refusal)
    if len(outcomes) < len(searches):
        waiting = []
        for search in searches:  # in turn, the method with the fewest results first: fair when cut off
            num_results = len(search.trials) - len(search.missing)
            waiting += [(num_results + n, spec) for n, spec in enumerate(search.missing)]
        needed = tuple(spec for _, spec in sorted(waiting, key=lambda item: item[0]))
        return StudyState(needed=needed, outcomes=outcomes)
    answers = [
        TrialSpec(phase="answer", candidate=outcome.winner, num_steps=rule.total_steps, seed=seed)
        for seed in rule.answer_seeds
        for outcome in outcomes.values()
        if outcome.winner is not None and not outcome.problem
    ]
    failed = {s.candidate.method: s.name for s in answers if not math.isfinite(results.get(s.name, 0.0))}
    if name := next((failed[method] for method in PRIMARY if method in failed), None):
        return StudyState(needed=(), outcomes=outcomes, refusal=f"{name} failed, and each pair of seeds is needed")
    answers = [spec for spec in answers if spec.candidate.method not in failed]
    needed = tuple(spec for spec in answers if spec.name not in results)
    return StudyState(needed=needed, outcomes=outcomes, answers=tuple(answers))


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
