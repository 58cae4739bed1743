"""`python -m helpers.exchange_worker FILE`: how long shards take between two ranks, by our messages and by gloo."""

import json
import random
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.distributed import gradients
from trainer.distributed.process_group import destroy_process_group, init_distributed

NUM_ROUNDS = 5
NUM_ELEMENTS = 957_680  # of a shard: half of the demo's weights


def main(file: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    context = init_distributed("cpu")
    shard, flat = torch.ones(NUM_ELEMENTS), torch.zeros(2 * NUM_ELEMENTS)
    ways = {
        "our all_gather": lambda: gradients.all_gather(flat, shard),
        "our reduce_scatter": lambda: gradients.reduce_scatter(flat),
        "gloo's all_gather": lambda: dist.all_gather_into_tensor(flat, shard),
        "gloo's all_to_all": lambda: dist.all_to_all_single(torch.empty_like(flat), flat),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    dice = random.Random(0)
    for _ in range(NUM_ROUNDS):
        for name in dice.sample(list(ways), len(ways)):
            context.all_gather_object(None)
            start = time.perf_counter()
            ways[name]()
            context.all_gather_object(None)
            seconds[name].append(time.perf_counter() - start)
    if context.rank == 0:
        Path(file).write_text(json.dumps(seconds))
    destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
