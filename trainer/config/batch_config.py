"""The batch sum: micro-batch x accumulation x ranks = global batch."""

import math
from dataclasses import dataclass

from trainer.config.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How one optimizer step's examples are divided."""

    micro_batch_size: int  #: examples of one forward on one rank
    gradient_accumulation_steps: int
    world_size: int  #: ranks
    packed_width: int | None = None  #: tokens of a row that several examples may share; None: one example a row

    @classmethod
    def divide(cls, global_batch: int, micro_batch: int | None, world_size: int) -> "BatchConfig":
        """The global batch over the ranks; without a micro-batch in one forward. UserError on a remainder."""
        if micro_batch is None and global_batch % world_size:
            num_ranks = max(n for n in range(1, world_size + 1) if global_batch % n == 0)
            raise UserError(
                f"--global-batch {global_batch}: {global_batch} examples / {world_size} ranks is not whole; "
                f"use {_format_ranks(num_ranks)}, or pass --global-batch "
                f"{math.ceil(global_batch / world_size) * world_size}"
            )
        micro_batch_size = micro_batch or global_batch // world_size
        pass_size = micro_batch_size * world_size
        if global_batch % pass_size:
            raise UserError(
                f"--global-batch {global_batch}: {global_batch} is not micro-batch {micro_batch_size} x "
                f"{_format_ranks(world_size)} x a whole accumulation (one pass is {pass_size}); pass --micro-batch or "
                "--global-batch so that it divides"
            )
        return cls(
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=global_batch // pass_size,
            world_size=world_size,
        )

    @property
    def global_batch(self) -> int:
        """Examples per optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    def __str__(self) -> str:
        accumulation = f"{self.gradient_accumulation_steps} accumulation"
        product = f"{self.micro_batch_size} micro-batch x {accumulation} x {_format_ranks(self.world_size)}"
        packed = f", packed into rows of at most {self.packed_width} tokens" if self.packed_width else ""
        return f"{product} = {self.global_batch} global batch{packed}"


def _format_ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"
