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


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """Something that is wrong with a run: how it was seen, what it likely comes from, and the flag that may help."""

    code: str
    seen: str  #: the evidence in words
    cause: str
    remedy: str  #: a flag with a value, as it would be typed
    evidence: dict[str, Any] = field(default_factory=dict)  #: the numbers

    def to_record(self, step: int, time: float) -> EventRecord:
        """The event that keeps it; its message is the one line for the console."""
        topic = TOPICS[self.code]
        message = f"{topic}: {self.seen}; likely cause: {self.cause}; try {self.remedy}"
        facts = {"code": self.code, "topic": topic, **vars(self)}
        return EventRecord(event="diagnosis", step=step, message=message, time=time, facts=facts)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What the rules must know of a run; all of it stands in run.json."""

    mode: str
    lr: float
    warmup_steps: int
    max_grad_norm: float
    epsilon: float
    dropout: float
    num_trainable_params: int
    total_steps: int
    has_early_stopping: bool
    eval_every: str
    precision: str
    device: str
    world_size: int
    num_nodes: int
    micro_batch_size: int
    eval_batch_size: int
    num_val_examples: int
    target_token_share: float  #: of the training tokens, those that count in the loss
    wandb_mode: str  #: online, offline or disabled
    num_local_gpus: int  #: that this machine has, used or not

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "RunInfo":
        """The facts in the content of a run.json; of a resumed run as it goes on."""
        resolved, data = metadata["resolved"], metadata["data"]
        settings = metadata.get("resumed", metadata)["settings"]
        train = settings["train"]
        return cls(
            mode=metadata["mode"],
            lr=train["lr"],
            warmup_steps=resolved["warmup_steps"],
            max_grad_norm=train["max_grad_norm"],
            epsilon=train["epsilon"],
            dropout=resolved["dropout"],
            num_trainable_params=metadata["model"]["trainable"],
            total_steps=resolved["total_steps"],
            has_early_stopping=bool(train.get("early_stop")),
            eval_every=settings["output"]["eval_every"],
            precision=resolved["precision"],
            device=resolved["device"],
            world_size=resolved["ranks"],
            num_nodes=resolved["nodes"],
            micro_batch_size=resolved["micro_batch"],
            eval_batch_size=train["eval_batch"],
            num_val_examples=data["val"]["examples"],
            target_token_share=data["train"]["counted_tokens"] / max(1, data["train"]["tokens"]),
            wandb_mode=metadata["wandb"]["mode"],
            num_local_gpus=metadata["hardware"].get("gpus_here") or 0,
        )
