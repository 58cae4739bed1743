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
        pass_size = (micro_batch or 1) * world_size
        if global_batch % pass_size:
            product = f"{pass_size} (micro-batch {micro_batch or 1} x {world_size} rank{'s' * (world_size > 1)})"
            remedy = f"--global-batch {math.ceil(global_batch / pass_size) * pass_size}"
            raise UserError(f"--global-batch {global_batch}: expected a multiple of {product}; try {remedy}")
        micro_batch = micro_batch or global_batch // world_size
        accumulation = global_batch // (micro_batch * world_size)
        return cls(micro_batch_size=micro_batch, gradient_accumulation_steps=accumulation, world_size=world_size)

    @property
    def global_batch(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' * (self.world_size > 1)}"
        product = f"{self.micro_batch_size} micro-batch x {self.gradient_accumulation_steps} accumulation x {ranks}"
        packed = f", packed into rows of at most {self.packed_width} tokens" if self.packed_width else ""
        return f"{product} = {self.global_batch} global batch{packed}"
