# SPDX-License-Identifier: Apache-2.0
"""Pack: what goes to a GPU in one copy."""

import numpy as np
import torch

from streaminator.engine.batch import _Upload


def test_numbers_sent_in_one_copy_arrive_in_their_shapes_and_aligned() -> None:
    given = [[[1, 2, 3], [4, 5, 6]], [], [7] * 17, list(range(20)), [8]]
    upload = _Upload([np.array(numbers, np.int64) for numbers in given], torch.device("cpu"))
    assert [tensor.tolist() for tensor in upload.tensors] == given
    assert all(tensor.data_ptr() % 16 == 0 for tensor in upload.tensors)
    first, last = upload.tensors[0], upload.tensors[-1]
    assert upload.numbers[0] == first[0, 0]
    assert upload.numbers.data_ptr() < last.data_ptr()
