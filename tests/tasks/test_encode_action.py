import numpy as np
import pytest
import torch
from gymnasium import spaces

from eaml_ext.tasks import encode_action

BOX = spaces.Box(-1.0, 1.0, (2, 2))


def test_discrete_is_one_hot_and_minds_the_start():
    space = spaces.Discrete(3, start=-1)
    expected = torch.tensor([[[1.0, 0, 0], [0, 0, 1.0]]])
    assert torch.equal(encode_action(space, np.array([[-1, 1]])), expected)
    assert torch.equal(encode_action(space, torch.tensor(0)), torch.tensor([0.0, 1.0, 0.0]))


def test_box_is_flattened():
    encoded = encode_action(BOX, np.arange(12.0).reshape(3, 2, 2))
    assert torch.equal(encoded, torch.arange(12.0).reshape(3, 4)) and encoded.dtype == torch.float32
    assert encode_action(BOX, np.zeros((2, 2))).shape == (4,)
    assert encode_action(spaces.Box(0.0, 1.0, ()), np.zeros(5)).shape == (5, 1)


def test_empty_batches():
    assert encode_action(spaces.Discrete(2), np.zeros((0, 3), int)).shape == (0, 3, 2)
    assert encode_action(BOX, np.zeros((0, 2, 2))).shape == (0, 4)


@pytest.mark.parametrize(
    ("space", "action", "error", "text"),
    [
        (spaces.MultiBinary(2), [0, 1], TypeError, r"space must be Discrete or Box, got MultiBinary\(2\)"),
        (spaces.Discrete(2), [0.5], TypeError, r"action must be integers for Discrete\(2\), got torch.float32"),
        (spaces.Discrete(2), [0, 2], ValueError, r"action must lie in Discrete\(2\), got 0 to 2"),
        (spaces.Discrete(2), [-1], ValueError, r"action must lie in Discrete\(2\), got -1 to -1"),
        (BOX, np.zeros((2, 3)), ValueError, r"action must have shape \(\*, \*\(2, 2\)\), got \(2, 3\)"),
        (BOX, np.zeros(2), ValueError, r"action must have shape \(\*, \*\(2, 2\)\), got \(2,\)"),
    ],
)
def test_refuses(space, action, error, text):
    with pytest.raises(error, match=f"^encode_action: {text}$"):
        encode_action(space, action)
