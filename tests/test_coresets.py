"""Coresets: which images a ranking gives, and hard labels as logits."""

import pytest
import torch
import torch.nn.functional as F

from pad.difficulty.ranking import first_of_each_class
from pad.errors import InputError
from pad.labels import hard_logits

ROWS = [torch.tensor([4, 0, 2]), torch.tensor([5, 1]), torch.tensor([3, 6, 8, 7])]  # classes of several sizes


def test_each_end_of_every_class():
    assert first_of_each_class(ROWS, 2).tolist() == [4, 0, 5, 1, 3, 6]
    assert first_of_each_class(ROWS, 2, "hardest").tolist() == [2, 0, 1, 5, 7, 8]


def test_a_class_that_is_too_small_is_named():
    with pytest.raises(InputError, match="ipc: 3 images are asked for, but class 1 has 2"):
        first_of_each_class(ROWS, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_labels_are_one_hot_to_the_last_bit(dtype):
    classes = torch.tensor([0, 3, 1])
    logits = hard_logits(classes, 200)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert torch.equal(logits.to(dtype).softmax(dim=1), F.one_hot(classes, 200).to(dtype))
