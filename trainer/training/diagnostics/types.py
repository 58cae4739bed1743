"""What a diagnosis says, and what its rules must know of a run beside its records."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.tracking.records import EventRecord

#: every code and what it means for the user; codes of one meaning are different ways to see it
TOPICS = {
    "flat_loss": "not learning",
    "no_gradient": "not learning",
    "adapter_still_zero": "not learning",
    "no_rate": "not learning",
    "masked_labels": "not learning",
    "always_clipped": "not learning",
    "diverging": "diverging",
    "overfitting": "overfitting",
    "overflow": "overflow",
    "waiting_for_data": "too slow",
    "python_bound": "too slow",
    "slow_logging": "too slow",
    "much_evaluation": "too slow",
    "unused_ranks": "too slow",
}
#: those that a clock decides: another machine, or a resumed run, may see others
BY_THE_CLOCK = tuple(code for code, topic in TOPICS.items() if topic == "too slow")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong with a run: how it was seen, what it likely comes from, and the flag that may help."""

    code: str
    seen: str  #: the evidence in words
    cause: str
    remedy: str  #: a flag with a value, as it would be typed
    evidence: dict[str, Any] = field(default_factory=dict)  #: the numbers

    @property
    def topic(self) -> str:
        """What it means for the user."""
        return TOPICS[self.code]

    def record(self, step: int, time: float) -> EventRecord:
        """The event that keeps it; its message is the one line for the console."""
        message = f"{self.topic}: {self.seen}; likely cause: {self.cause}; try {self.remedy}"
        facts = {
            "code": self.code, "topic": self.topic, "seen": self.seen, "cause": self.cause, "remedy": self.remedy,
            "evidence": self.evidence,
        }  # fmt: skip
        return EventRecord(event="diagnosis", step=step, message=message, time=time, facts=facts)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the rules must know of a run; all of it stands in run.json."""

    mode: str
    lr: float
    warmup_steps: int
    clip: float
    epsilon: float
    dropout: float
    trainable: int
    total_steps: int
    early_stop: bool
    eval_every: str
    precision: str
    device: str
    ranks: int
    nodes: int
    micro_batch: int
    eval_batch: int
    val_examples: int
    counted_share: float  #: of the training tokens, those that count in the loss
    wandb: str  #: online, offline or disabled
    gpus_here: int  #: that this machine has, used or not

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> "Facts":
        """The facts in the content of a run.json; of a resumed run as it goes on."""
        resolved, data = run["resolved"], run["data"]
        settings = run.get("resumed", run)["settings"]
        train = settings["train"]
        return cls(
            mode=run["mode"], lr=train["lr"], warmup_steps=train["warmup_steps"], clip=train["clip"],
            epsilon=train["epsilon"], dropout=resolved["dropout"], trainable=run["model"]["trainable"],
            total_steps=resolved["total_steps"], early_stop=bool(train.get("early_stop")),
            eval_every=settings["output"]["eval_every"], precision=resolved["precision"], device=resolved["device"],
            ranks=resolved["ranks"], nodes=resolved["nodes"], micro_batch=resolved["micro_batch"],
            eval_batch=train["eval_batch"], val_examples=data["val"]["examples"],
            counted_share=data["train"]["counted_tokens"] / max(1, data["train"]["tokens"]),
            wandb=run["wandb"]["mode"], gpus_here=run["hardware"].get("gpus_here") or 0,
        )  # fmt: skip
