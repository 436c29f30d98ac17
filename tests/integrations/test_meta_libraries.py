"""higher and TorchOpt (extra ``bench``) take meta-gradients through the scan that are those of MetaMAML."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from eaml_ext import SSM, MetaMAML

STEPS, RATE = 2, 0.05


@pytest.fixture
def model() -> nn.Module:
    return SSM(3, 8, 2, state_size=4).double()


@pytest.fixture
def task() -> list[Tensor]:
    """Inputs and targets of support and query sequences."""
    return [torch.randn(2, 7, size, dtype=torch.float64) for size in (3, 2, 3, 2)]


def meta_gradients(model: nn.Module, task: list[Tensor]) -> list[Tensor]:
    support_x, support_y, query_x, query_y = task
    params = dict(model.named_parameters())
    maml = MetaMAML(model, inner_lr=RATE, outer_lr=1e-3)
    adapted = maml.adapt_params(params, support_x, support_y, mse_loss, STEPS)
    loss = mse_loss(torch.func.functional_call(model, adapted, (query_x,)), query_y)
    return list(torch.autograd.grad(loss, list(params.values())))


def test_higher_inner_loop_gives_the_meta_gradients_of_maml(model, task):
    higher = pytest.importorskip("higher", reason="higher is not installed")
    support_x, support_y, query_x, query_y = task
    want = meta_gradients(model, task)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (learner, inner):
        for _ in range(STEPS):
            inner.step(mse_loss(learner(support_x), support_y))
        got = torch.autograd.grad(mse_loss(learner(query_x), query_y), list(model.parameters()))
    torch.testing.assert_close(list(got), want)


def test_torchopt_meta_sgd_gives_the_meta_gradients_of_maml(model, task):
    torchopt = pytest.importorskip("torchopt", reason="torchopt is not installed")
    support_x, support_y, query_x, query_y = task
    want, initial = meta_gradients(model, task), list(model.parameters())
    inner = torchopt.MetaSGD(model, lr=RATE)
    for _ in range(STEPS):
        inner.step(mse_loss(model(support_x), support_y))
    got = torch.autograd.grad(mse_loss(model(query_x), query_y), initial)
    torch.testing.assert_close(list(got), want)
