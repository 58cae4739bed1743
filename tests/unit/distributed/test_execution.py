"""How steps are run is decided once, from the settings, the model and the device alone."""

from helpers.engines import plan_execution


def test_a_gpu_records_graphs_and_keeps_two_steps_in_flight_and_a_cpu_does_neither():
    gpu, cpu = plan_execution(device="cuda"), plan_execution()
    assert (gpu.path, gpu.steps_in_flight, gpu.blockwise_attention) == ("graphs", 2, False)
    assert (cpu.path, cpu.steps_in_flight) == ("eager", 1)
    assert "eager (no GPU)" in cpu.describe()
    for flags, reason in (
        ("--execution eager", "--execution eager"),
        ("--quant nf4", "--quant"),
        ("--activation-checkpointing", "--activation-checkpointing"),
        ("--ds-config zero1", "ZeRO 1"),
        ("--ds-config zero3", "ZeRO 3"),
    ):
        plan = plan_execution(*flags.split(), device="cuda")
        assert (plan.path, plan.eager_reason) == ("eager", reason)
        assert f"eager ({reason})" in plan.describe()
    assert plan_execution("--optim", "adamw", device="cuda").steps_in_flight == 1, "its updates wait for the numbers"
