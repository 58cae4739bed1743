"""`--profile`: a run that is shorter than what was asked for."""

import pytest
from helpers.fake_runs import make_metadata, make_records

from trainer.tracking.profiler import ProfileLogger


@pytest.mark.parametrize(("num_steps", "message"), [(2, "before its step 4"), (3, "before its step 4"), (4, "of 1 st")])
def test_a_run_that_ends_while_it_is_profiled_says_what_there_is(num_steps, message, tmp_path, caplog):
    caplog.set_level("INFO", "trainer")
    profile_logger = ProfileLogger(tmp_path, 5)
    for record in make_records(make_metadata())[: 1 + num_steps]:  # an evaluation, then steps
        profile_logger.log(record)
    profile_logger.close(0)
    assert message in caplog.text
    assert (tmp_path / "profile").exists() == (num_steps > 3)
