"""How steps are run is decided once, from the settings, the model and the device alone."""

from helpers.engines import plan_execution


def test_a_gpu_records_graphs_and_keeps_two_steps_in_flight_and_a_cpu_does_neither():
    gpu, cpu = plan_execution(device="cuda"), plan_execution()
    assert (gpu.path, gpu.steps_in_flight, gpu.blockwise_attention) == ("graphs", 2, False)
    assert (cpu.path, cpu.steps_in_flight) == ("eager", 1)
    assert plan_execution("--execution", "eager", device="cuda").path == "eager"
    assert plan_execution("--execution", "compile", device="cuda").path == "compile+graphs"
    assert plan_execution("--execution", "compile").path == "compile"
    assert plan_execution("--execution", "compile").compiled_shapes == ((2, 1024),)
    for flags in (("--quant", "nf4"), ("--activation-checkpointing",), ("--ds-config", "zero3")):
        assert plan_execution(*flags, device="cuda").path == "eager", flags
    assert plan_execution("--optim", "adamw", device="cuda").steps_in_flight == 1, "its updates wait for the numbers"


def test_adapters_are_fused_where_their_formula_is_plain_loras():
    assert plan_execution().fused_lora
    for flags in ("--adapter dora", "--lora-dropout 0.1", "--quant nf4", "--ds-config zero3"):
        assert not plan_execution(*flags.split()).fused_lora, flags
    for flags in (
        "--adapter rslora",
        "--adapter pissa",
        "--precision bf16",
        "--activation-checkpointing",
        "--ds-config zero2",
        "--modules-to-save bias,wte",
        "--execution compile",
    ):
        assert plan_execution(*flags.split()).fused_lora, flags
