"""`launch/compare.py` as people run it: what it writes and prints, its exit codes, and how light it is."""

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fake_runs import make_metadata, make_run_folder, write_eval_records
from helpers.fake_wandb import child_env

SCRIPT = Path(__file__).parents[3] / "launch" / "compare.py"
#: runs the script of its first argument, and writes down which heavy packages it imported
LIST_IMPORTS_CODE = """
import atexit, json, runpy, sys
heavy = {"torch", "transformers", "deepspeed", "datasets", "matplotlib", "wandb"}
atexit.register(lambda: json.dump(sorted(heavy & set(sys.modules)), open("heavy.json", "w")))
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The script's main in this process, started in `tmp_path` by nobody who is logged in to W&B."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    script = runpy.run_path(str(SCRIPT))
    return lambda *arguments: script["main"](list(arguments))


def test_two_runs_give_a_verdict_a_table_and_two_files(tmp_path: Path) -> None:
    make_run_folder(tmp_path / "full")
    make_run_folder(tmp_path / "lora", "lora", wall_seconds=61.0, peak_memory_bytes=430_000_000)
    names = {"report.html", "answer.json"}
    (tmp_path / "comparison").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "comparison" / "answer.json").write_text('{"comparisons": []}')
    # a link in a folder of ours is replaced, not written through
    (tmp_path / "comparison" / "report.html").symlink_to(tmp_path / "precious")
    command = [sys.executable, "-c", LIST_IMPORTS_CODE, str(SCRIPT), "full", "lora"]
    env = child_env(HOME=str(tmp_path), MPLCONFIGDIR=str(tmp_path / "mpl"))
    process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (tmp_path / "precious").read_text() == "precious"
    heavy = json.loads((tmp_path / "heavy.json").read_text())
    assert heavy == ["matplotlib"], "a whole comparison needs no torch"
    assert (process.returncode, process.stderr) == (0, "")
    for text in (
        "Cannot tell whether LoRA (rank 8, lr 0.005) is as good as full (lr 0.0005): validation loss 2.1211",
        "Memory: 0.43x (430.0 MB against 1.00 GB)",
        "\n- full-s42, lora-s42: not comparable with the card: other data",
        "report: comparison/report.html",
    ):
        assert text in process.stdout
    assert re.search(r"1 \| +30 \| +1.2262 \| +[\d.]+ \| +[\d.]+ \| +\+0\.[\d]+ \|", process.stdout)
    assert {path.name for path in (tmp_path / "comparison").iterdir()} == names


@pytest.mark.usefixtures("no_pictures")
def test_the_card_is_mentioned_only_beside_runs_where_it_belongs_or_where_it_is_asked_for(tmp_path, main, capsys):
    for mode in ("full", "lora"):
        metadata = make_metadata(mode, preset="gpt2", data__form="messages", not_comparable_with_card=["other data"])
        make_run_folder(tmp_path / mode, metadata=metadata)
    for flags, is_shown in (((), False), (("--card",), True)):
        main("full", "lora", *flags)
        texts = [capsys.readouterr().out, (tmp_path / "comparison" / "report.html").read_text()]
        assert [re.search(r"the card|\| card|gpt2-acled-t2s", text) is not None for text in texts] == [is_shown] * 2


def test_a_run_of_the_trainer_is_plotted_and_never_ranked(tmp_path, main, capsys) -> None:
    from transformers import TrainerState

    logs = [
        {"step": 10 * n, "epoch": n / 9, "loss": 4 - n / 9, "grad_norm": 1.0, "learning_rate": 1e-3} for n in (1, 9)
    ]
    logs += [{"step": 90, "epoch": 1.0, "eval_loss": 2.25, "eval_runtime": 1.0}, {"step": 90, "train_loss": 3.0}]
    for name, history in (("checkpoint-10", logs[:1]), ("checkpoint-90", logs)):
        (tmp_path / "theirs" / name).mkdir(parents=True)
        TrainerState(log_history=history).save_to_json(str(tmp_path / "theirs" / name / "trainer_state.json"))
    make_run_folder(tmp_path / "full")
    make_run_folder(tmp_path / "lora", "lora")
    assert main("full", "lora") == 0
    answer = (tmp_path / "comparison" / "answer.json").read_text()
    assert main("full", "theirs", "lora") == 0
    output = capsys.readouterr().out
    assert "theirs is a run of Hugging Face's Trainer: plotted, never ranked." in output
    assert (tmp_path / "comparison" / "answer.json").read_text() == answer
    page = (tmp_path / "comparison" / "report.html").read_text()
    assert "theirs: 2.2500" in page
    assert "var(--trainer)" in page
    assert main("theirs") == 2
    assert "only runs of Hugging Face's Trainer: expected a run of this program" in capsys.readouterr().err
    damaged = write_eval_records(tmp_path / "lora", {0: [4.0]}, targets=[9]) / "eval_records/step-000000-val.parquet"
    damaged.write_bytes(b"PAR1")
    write_eval_records(tmp_path / "full", {0: [4.0]}, targets=[9])
    assert main(str(tmp_path / "full"), str(tmp_path / "lora")) == 0
    page = (tmp_path / "comparison" / "report.html").read_text()
    assert ("lora-s42: step-000000-val.parq" in page, str(tmp_path) in page) == (True, False), "it is passed on"


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_cannot_be_read_or_is_on_other_data_is_said_and_decides_the_exit_code(tmp_path, main, capsys):
    make_run_folder(tmp_path / "demo", losses={0: 4.0, 1: 3.0, 2: 2.0, 3: 1.5})
    make_run_folder(tmp_path / "other", metadata=make_metadata("lora", data__fingerprint="other"))
    (make_run_folder(tmp_path / "lo\nra", "lora") / "metrics.jsonl").write_text("")
    for name, exit_code, said in (
        ("lo\nra", 0, "Full: validation loss 1.5000 at best"),
        ("other", 3, "LoRA and full are not comparable with one another (other data)"),
    ):
        assert main("demo", name) == exit_code
        output = capsys.readouterr()
        assert said in output.out
        note = "note: lo\\nra: no metrics: neither a step nor an evaluation was written; left out\n"
        assert output.err == note * (name != "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no RUN given: expected run folders"),
        (["gone"], "error: gone: no such run folder"),
        (["full", "other\nerror: fake"], "error: other\\nerror: fake: no such run folder"),
        (["full", "--no-card"], "--no-card: the card is left out unless it belongs there, and --card asks for it"),
        (["full", "--decide-by", "exact"], "--decide-by exact: expected loss or score:NAME"),
        (["full", "--margin", "2pt"], "--margin 2pt: expected a number above 0 and its unit, such as 2%"),
        (["full", "--wandb-report", "project"], "--wandb-report project: expected ENTITY/PROJECT"),
        (["full", "--wandb-report", "e/p"], "--wandb-report: not logged in"),
        (["full", "--output-dir", "mine"], "--output-dir mine: report.html there was not written by this program"),
        (["full", "--output-dir", "study"], "--output-dir study: answer.json there was not written by this program"),
    ],
)
def test_a_mistake_in_compare_is_one_line_and_exit_code_2(
    tmp_path: Path, main: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    make_run_folder(tmp_path / "full")
    for name, content in (("mine/report.html", "mine"), ("study/answer.json", '{"comparisons": [], "study": {}}')):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(*arguments) == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "comparison").exists(), "slow work before the mistake was found"
