"""Tests that are not marked `gpu` see none, on any machine; those that are get fresh processes that see all."""

import os
from pathlib import Path

import pytest
from helpers import gpu_visibility
from helpers.launch_ranks import run_on_ranks


def test_no_test_without_the_gpu_mark_sees_a_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def save_devices(out: str) -> None:
    Path(out).write_text(os.environ["CUDA_VISIBLE_DEVICES"])


@pytest.mark.parametrize(("on_gpu", "expected"), [(False, ""), (True, "3,5")])
def test_ranks_see_the_gpus_of_the_session_only_where_they_are_asked_for(on_gpu, expected, tmp_path, monkeypatch):
    monkeypatch.setenv(gpu_visibility._ORIGINAL, "3,5")
    log = tmp_path / "log"
    assert run_on_ranks(1, save_devices, str(tmp_path / "out"), log=log, on_gpu=on_gpu) == 0, log.read_text()
    assert (tmp_path / "out").read_text() == expected
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
