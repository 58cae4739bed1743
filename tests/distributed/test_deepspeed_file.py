"""A file for --ds-config is taken, or refused in one line that names it."""

import json
import os

import pytest
from helpers.any_inputs import JSON_VALUES, check_inputs, many_inputs
from hypothesis import strategies as st

from trainer.config.errors import UserError
from trainer.distributed.deepspeed_config import read_deepspeed_file

KEYS = st.sampled_from(
    [
        "stage",
        "offload_optimizer",
        "offload_param",
        "device",
        "reduce_bucket_size",
        "overlap_comm",
        "sub_group_size",
        "zero_optimization",
        "communication_data_type",
        "train_batch_size",
        "gradient_clipping",
        "pin_memory",
    ]
)
OBJECTS = st.dictionaries(KEYS, JSON_VALUES | st.dictionaries(KEYS, JSON_VALUES, max_size=3), max_size=4)
CONTENTS = (
    st.binary(max_size=40)
    | st.builds(lambda zero, rest: json.dumps({**rest, "zero_optimization": zero}).encode(), OBJECTS, OBJECTS)
    | st.integers(1, 3000).map(lambda depth: b'{"zero_optimization":' * depth + b"{}" + b"}" * depth)
)


@many_inputs(150)
def test_any_content_of_a_file_is_taken_or_refused_in_one_line(num_inputs, tmp_path):
    path = tmp_path / "any.json"

    def check(content):
        path.write_bytes(content)
        message = f"--ds-config {path}: "
        try:
            read_deepspeed_file(str(path))
        except UserError as error:
            message = str(error)
        assert message.startswith(f"--ds-config {path}: ")
        assert "\n" not in message

    check_inputs(num_inputs, check, CONTENTS)


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match="no such file"):
        read_deepspeed_file(str(tmp_path / "pipe.json"))
