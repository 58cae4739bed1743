"""Rows of many lengths take few widths where steps are recorded."""

import numpy as np
import pytest
import torch

from trainer.data.sampler import IGNORE_INDEX, MicroBatch
from trainer.distributed.device_copy import copy_to_device


@pytest.mark.parametrize(("width", "max_width", "expected"), [(20, None, 64), (64, None, 64), (65, 100, 100)])
def test_recorded_rows_are_padded_to_a_multiple_with_labels_that_do_not_count(width, max_width, expected):
    ids = np.ones((2, width), dtype=np.int64)
    micro_batch = MicroBatch(input_ids=ids, labels=ids, tokens=2 * width, index=0)
    device = torch.device("cpu")
    padded, labels = copy_to_device(micro_batch, device, 64, max_width)
    assert padded.shape == labels.shape == (2, expected)
    assert int((labels != IGNORE_INDEX).sum()) == 2 * width
    assert copy_to_device(micro_batch, device)[0].shape == (2, width)
