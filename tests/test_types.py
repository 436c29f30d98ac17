"""Types of the public names: mypy checks this file in `make lint`, and the tests run it."""

import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from typing_extensions import assert_type

from eaml_ext import (
    SSM,
    ExperienceBuffer,
    Experiences,
    Mamba,
    Mamba2,
    MetaMAML,
    Neighbors,
    PackedKeys,
    knn,
    selective_scan,
)
from eaml_ext import selective_scan_step as step
from eaml_ext.nn import linear_step
from eaml_ext.ops import selective_scan as scan


def test_types_of_ops_are_exact() -> None:
    u, A = torch.rand(2, 3, 4), -torch.ones(3, 3)
    assert_type(selective_scan(u, u, A, u, u), Tensor)
    assert_type(scan(u, u, A, u, u, return_last_state=False), Tensor)
    assert_type(scan(u, u, A, u, u, return_last_state=True), tuple[Tensor, Tensor])
    assert_type(step(torch.zeros(2, 3, 3), u[..., 0], u[..., 0], A, u[..., 0], u[..., 0]), tuple[Tensor, Tensor])
    assert_type(knn(torch.rand(2, 3), torch.rand(4, 3), k=2), Neighbors)
    assert_type(knn(torch.rand(2, 3), torch.rand(4, 3), k=2).indices, Tensor)
    assert_type(PackedKeys(4, 3).search(torch.rand(2, 3), 1), Neighbors)


def test_types_wrong_arguments_are_errors_of_the_checker() -> None:
    x = torch.rand(2, 3)
    for call in (
        lambda: selective_scan("u"),  # type: ignore[call-overload]
        lambda: knn(x, x),  # type: ignore[call-arg]
        lambda: SSM(state_dims=3),  # type: ignore[call-arg]
        lambda: MetaMAML(SSM(3), inner_lr="much", outer_lr=0.1),  # type: ignore[arg-type]
    ):
        try:
            call()
        except TypeError:
            continue
        raise AssertionError("a wrong argument was taken")


def test_types_of_models_and_buffer_are_exact() -> None:
    model = SSM(state_dim=3, hidden_dim=8, output_dim=2)
    assert_type(model.scan(torch.rand(2, 5, 3)), tuple[Tensor, Tensor])
    assert_type(Mamba(8).scan(torch.rand(2, 5, 8)), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(Mamba2(8, headdim=4).scan(torch.rand(2, 5, 8)), tuple[Tensor, tuple[Tensor, Tensor]])
    assert_type(linear_step(torch.nn.Linear(3, 2), torch.rand(1, 3)), Tensor)
    x, y = torch.rand(2, 5, 3), torch.rand(2, 5, 2)
    maml = MetaMAML(model, inner_lr=0.1, outer_lr=0.1)
    assert_type(maml.meta_update([(x, y, x, y)], mse_loss), float)
    buffer = ExperienceBuffer(10)
    buffer.add(x.flatten(0, 1), y.flatten(0, 1), context_embedding=x.flatten(0, 1))
    assert_type(buffer.retrieve(torch.rand(3), k=2), Experiences)
    assert_type(buffer.retrieve(torch.rand(3), k=2).distances, Tensor | None)
