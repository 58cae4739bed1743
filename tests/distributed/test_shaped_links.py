"""A step's time against the speed of the link between two hosts, beside the model of `bench/comm_model.py`.

`pytest tests/distributed/test_shaped_links.py -m sweep -n 0 -s` prints the table of launch/README.md. Two hosts
(network namespaces), one rank of one thread on each; links of several speeds in turn, so that other work on the
machine meets all of them alike. The least over the rounds counts. Steps over slow links are held against the model,
and what leaves a host without a limit against the bytes that it counts.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers.exchange_worker import NUM_ELEMENTS
from helpers.hosts import ENVIRON, ROOT, Hosts, started_hosts

from trainer.distributed.bytes_sent import bytes_sent
from trainer.distributed.gradients import MIN_BUCKET_BYTES
from trainer.tools.bench.comm_model import Workload, communication_of_two_processors
from trainer.tools.bench.configs import BenchmarkConfig

#: Mbit/s, by what trains: links over which a step waits for longer than other work on the machine moves it
RATES: dict[str, tuple[int | None, ...]] = {"full": (None, 50, 20), "lora": (None, 4, 2)}
NUM_ROUNDS = 3
PAYLOAD = 1448 / 1514  # of a full Ethernet frame: the rest is its headers, IP's and TCP's
MODEL_TOLERANCE = 0.15
FULL, TIED, ADAPTERS = 1_915_360, 2048 * 160, 102_400  # the demo's model, its tied embedding, its adapters
PERSISTENT = 563_680  # of the model: tensors of at most 100,000 elements, which ZeRO 3 keeps whole
MAX_HEADERS = 0.08  # of the bytes: headers, acknowledgements of what comes, barriers
Case = tuple[str, str, int]  # mode, ZeRO file, bytes of a bucket at least
AT_ONCE = 2**40  # bytes of a bucket: all gradients leave together, after the backward
CASES = [("full", "zero0", MIN_BUCKET_BYTES["gloo"]), ("full", "zero0", AT_ONCE)] + [
    (mode, zero, MIN_BUCKET_BYTES["gloo"]) for mode, zero in (("full", "zero1"), ("full", "zero3"), ("lora", "zero1"))
]


def start_ranks(hosts: Hosts, module: str, file: Path, log_folder: Path) -> list[subprocess.Popen[bytes]]:
    """A worker on each host, with the file that it reads or writes."""
    env = {
        **ENVIRON,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h1",
        "MASTER_PORT": "29500",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    argv = [sys.executable, "-m", module, str(file)]
    return [
        hosts.start(name, argv, log_folder / f"{name}.log", env | {"RANK": str(rank)})
        for rank, name in enumerate(hosts.pids)
    ]


def measure(hosts: Hosts, mode: str, zero: str, bucket_bytes: int, folder: Path) -> dict[int | None, list[list[float]]]:
    """{Mbit/s: [seconds of a step, bytes that leave a host meanwhile] in each round}."""
    rates = RATES[mode]
    config = BenchmarkConfig(
        program="ours",
        mode=mode,
        global_batch=4,
        ds_config=zero,
        world_size=2,
        model="demo-base",
        block_size=64,
        dropout=0.0,
        num_windows=NUM_ROUNDS * len(rates),
        steps_per_window=3,
    )
    folder.mkdir()
    job = folder / "job.json"
    job.write_text(json.dumps({"config": asdict(config), "folder": str(folder), "bucket_bytes": bucket_bytes}))
    hosts.shape_links(None)
    ranks = start_ranks(hosts, "helpers.link_worker", job, folder)

    def wait_for(name: str) -> None:
        deadline = time.monotonic() + 240
        while not all((folder / f"{name}-{rank}").exists() for rank in (0, 1)):
            logs = [(folder / f"{host}.log").read_text() for host in hosts.pids]
            assert all(process.poll() in (None, 0) for process in ranks), logs
            assert time.monotonic() < deadline, logs
            time.sleep(0.02)

    wait_for("ready")
    figures: dict[int | None, list[list[float]]] = {rate: [] for rate in rates}
    for window in range(config.num_windows):
        rate = rates[window % len(rates)]
        hosts.shape_links(rate)
        (folder / f"go-{window}").touch()
        wait_for(f"done-{window}")
        figures[rate].append(json.loads((folder / f"done-{window}-0").read_text()))
    return figures


def make_workload(mode: str, compute_seconds: float) -> Workload:
    if mode == "lora":
        return Workload(
            compute_seconds=compute_seconds, num_trainable=ADAPTERS, num_frozen=FULL, num_persistent=ADAPTERS
        )
    return Workload(
        compute_seconds=compute_seconds, num_trainable=FULL, tied_share=TIED / FULL, num_persistent=PERSISTENT
    )


def model(mode: str, zero: str, bucket_bytes: int, compute_seconds: float, megabits: float) -> tuple[float, float]:
    """(seconds of a step, hidden share of its communication)."""
    costs = communication_of_two_processors(
        stage=int(zero[-1]),
        workload=make_workload(mode, compute_seconds),
        bandwidth=megabits * 1e6 / 8 * PAYLOAD,
        bucket_bytes=bucket_bytes,
    )
    return compute_seconds + costs.exposed, costs.hidden / (costs.hidden + costs.exposed)


def count_bytes(mode: str, zero: str) -> float:
    """What a rank sends in a step; DeepSpeed's reduce_scatter over gloo sends twice what is needed."""
    workload, stage = make_workload(mode, compute_seconds=1), int(zero[-1])
    num_bytes = bytes_sent(
        stage=stage,
        num_trainable=workload.num_trainable,
        num_frozen=workload.num_frozen,
        world_size=2,
        num_persistent=workload.num_persistent,
    )
    return num_bytes + (workload.gradient_bytes / 2 if stage == 3 else 0)


def describe(case: Case) -> str:
    mode, zero, bucket_bytes = case
    return f"{mode}, {zero}" + ", gradients at once" * (bucket_bytes == AT_ONCE)


@pytest.fixture(scope="module")
def measured_cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Case, dict[int | None, float]]]:
    """{case: {Mbit/s: seconds}}, which the tests fill; drawn beside the model at the end, the file's path printed."""
    cases: dict[Case, dict[int | None, float]] = {}
    yield cases
    path = tmp_path_factory.mktemp("plot") / "step-time-over-links.svg"
    draw(cases, path)
    print(f"\n{path}")


def draw(cases: dict[Case, dict[int | None, float]], path: Path) -> None:
    """Seconds of a step against Mbit/s: points as measured, lines by the model."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for case, seconds in cases.items():
        rates = [2.0 ** (power / 4) for power in range(33)]  # 1 to 256 Mbit/s
        (line,) = axes.plot(rates, [model(*case, seconds[None], rate)[0] for rate in rates], linewidth=1)
        shaped = [rate for rate in seconds if rate is not None]
        axes.plot(shaped, [seconds[rate] for rate in shaped], "o", color=line.get_color(), label=describe(case))
    axes.set(xscale="log", yscale="log", xlabel="link, Mbit/s", ylabel="seconds a step")
    axes.legend(title="points measured, lines by the model")
    figure.savefig(path)


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=lambda case: describe(case))
def test_a_step_over_shaped_links_takes_what_the_comm_model_says(case, measured_cases, tmp_path):
    mode = case[0]
    with started_hosts(tmp_path / "hosts") as hosts:
        figures = measure(hosts, *case, tmp_path / "run")
    measured_cases[case] = {rate: min(seconds for seconds, _ in figures[rate]) for rate in RATES[mode]}
    free, *shaped = measured_cases[case].values()
    modelled = [model(*case, free, rate) for rate in RATES[mode] if rate is not None]
    cells = [
        f"{1e3 * measured:.0f} ({1e3 * expected:.0f}, {hidden:.0%} hidden)"
        for measured, (expected, hidden) in zip(shaped, modelled, strict=True)
    ]
    num_bytes, expected_bytes = min(num for _, num in figures[None]), count_bytes(*case[:2])
    cells.append(f"{num_bytes / 1e6:.2f} ({expected_bytes / 1e6:.2f}) MB")
    print(f"\n| {describe(case)} | {1e3 * free:.0f} | {' | '.join(cells)} |")
    assert shaped == pytest.approx([expected for expected, _ in modelled], rel=MODEL_TOLERANCE)
    assert expected_bytes <= num_bytes <= (1 + MAX_HEADERS) * expected_bytes


@pytest.mark.sweep
@pytest.mark.timeout(300)
def test_shards_take_what_the_link_takes(tmp_path):
    """Both ways at once; beside them gloo's own collectives, which let the two directions wait for one another."""
    megabits = 20
    with started_hosts(tmp_path / "hosts") as hosts:
        hosts.shape_links(megabits)
        ranks = start_ranks(hosts, "helpers.exchange_worker", tmp_path / "seconds.json", tmp_path)
        codes = [process.wait(240) for process in ranks]
        assert codes == [0, 0], [(tmp_path / f"{name}.log").read_text() for name in hosts.pids]
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    print(*(f"\n{name}: {', '.join(f'{value:.2f}' for value in values)} s" for name, values in seconds.items()))
    expected = 4 * NUM_ELEMENTS / (megabits * 1e6 / 8 * PAYLOAD)
    for name in ("our all_gather", "our reduce_scatter"):
        assert statistics.median(seconds[name]) == pytest.approx(expected, rel=MODEL_TOLERANCE)
