# SPDX-License-Identifier: Apache-2.0
"""Pack: what goes to a GPU in one copy."""

import numpy as np
import torch

from streaminator.engine.batch import _Upload


def test_numbers_sent_in_one_copy_arrive_in_their_shapes_and_aligned() -> None:
    upload = _Upload(torch.device("cpu"), room=64)
    given = [[[1, 2, 3], [4, 5, 6]], [], [7] * 17, list(range(20)), [8]]
    # The fourth has no room left.
    placed = [upload(np.array(numbers, np.int64)) for numbers in given]
    upload.send()
    assert [tensor.tolist() for tensor in placed] == given
    assert all(tensor.data_ptr() % 16 == 0 for tensor in placed)
