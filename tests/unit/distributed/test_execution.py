"""How steps are run is decided once, from the settings, the model and the device alone."""

from dataclasses import replace
from typing import Any

import torch

from trainer.config import cli
from trainer.distributed.deepspeed_config import build_deepspeed_config, read_deepspeed_file
from trainer.distributed.execution import make_execution_plan
from trainer.distributed.process_group import simulated_context


def plan_of(*flags: str, device: str = "cpu", ranks: int = 1, model_dropout: float = 0.0) -> Any:
    """The execution plan of these flags, without a model or a process group."""
    settings = cli.parse_args(["--mode", "lora", "--preset", "card", *flags]).settings
    precision = settings.engine.precision or "fp32"
    config = build_deepspeed_config(
        read_deepspeed_file(settings.engine.ds_config or "zero0"), batch=settings.train.batch(1), max_grad_norm=1.0,
        precision=precision,
    )  # fmt: skip
    context = replace(simulated_context(ranks, "cpu"), device=torch.device(device))
    return make_execution_plan(
        settings, context, config, precision=precision, model_dropout=model_dropout, micro_batch_size=2
    )


def test_a_gpu_records_graphs_and_keeps_two_steps_in_flight_and_a_cpu_does_neither():
    gpu, cpu = plan_of(device="cuda"), plan_of()
    assert (gpu.path, gpu.steps_in_flight, gpu.blockwise_attention) == ("graphs", 2, False)
    assert (cpu.path, cpu.steps_in_flight) == ("eager", 1)
    assert plan_of("--execution", "eager", device="cuda").path == "eager"
    assert plan_of("--execution", "compile", device="cuda").path == "compile+graphs"
    assert plan_of("--execution", "compile").path == "compile"
    assert plan_of("--execution", "compile").compiled_shapes == ((2, 1024),)
    for flags in (("--quant", "nf4"), ("--activation-checkpointing",), ("--ds-config", "zero3")):
        assert plan_of(*flags, device="cuda").path == "eager", flags
    assert plan_of("--optim", "adamw", device="cuda").steps_in_flight == 1, "its updates wait for the numbers"


def test_adapters_are_fused_where_their_formula_is_plain_loras():
    assert plan_of().fused_lora
    for flags in ("--adapter dora", "--lora-dropout 0.1", "--quant nf4", "--ds-config zero3", "--execution compile"):
        assert not plan_of(*flags.split()).fused_lora, flags
    for flags in ("--adapter rslora", "--adapter pissa", "--precision bf16", "--activation-checkpointing",
                  "--ds-config zero2", "--modules-to-save bias,wte"):  # fmt: skip
        assert plan_of(*flags.split()).fused_lora, flags
