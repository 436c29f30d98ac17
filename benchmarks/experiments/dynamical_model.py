"""A neural vector field that is linear in a context vector, and its training, jointly or by MetaMAML."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, vmap

from eaml_ext import MetaMAML

Params = dict[str, Tensor]
SEGMENT = 5  # steps that the second part of training predicts


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Attributes:
        first_seconds, second_seconds: CPU time of the two parts of training.
        hidden: width of the two hidden layers.
        context: numbers in the context vector.
        substeps: solver steps between two states.
        lr: peak learning rate of the first part; ``segment_lr``: of the second; ``meta_lr``: that of meta-learners.
        inner_lr: step size at which the learned ones start; ``inner_steps``: their number.
        support: trajectories of a task's support set in training; the query set has ``query``.
        batch: segments of an environment in an update without an inner loop, at most.
        weight_decay: AdamW's, of the field and of the contexts.
    """

    first_seconds: float = 40.0
    second_seconds: float = 60.0
    hidden: int = 32
    context: int = 2
    substeps: int = 1
    lr: float = 1e-2
    segment_lr: float = 1e-3
    meta_lr: float = 1e-3
    inner_lr: float = 0.5
    inner_steps: int = 6
    support: int = 4
    query: int = 4
    batch: int = 128
    weight_decay: float = 0.0


class VectorField(nn.Module):
    """dx/dt = (W_0 + sum_k c_k W_k) h(x) with an MLP h and a context c, solved over the steps of the input.

    Args:
        states: any ``(..., dim)``; the field works in units of their standard deviation.
        config: sizes.

    ``forward`` takes ``(..., n, states, dim)`` with a context ``(..., context)``, reads the first state of each row and
    returns all states.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, states: Tensor, config: Config):
        super().__init__()
        flat, hidden = states.flatten(0, -2), config.hidden
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("std", flat.std(0))
        dim, self.substeps = flat.shape[1], config.substeps
        self.context = nn.Parameter(torch.zeros(config.context))
        self.first, self.second = nn.Linear(dim, hidden), nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, (1 + config.context) * dim)

    def forward(self, x: Tensor) -> Tensor:
        mixture = torch.cat([torch.ones_like(self.context[..., :1]), self.context], -1)
        parts = mixture.shape[-1]
        weight = torch.einsum("...k,kdh->...hd", mixture, self.output.weight.unflatten(0, (parts, -1)))
        bias = (mixture @ self.output.bias.unflatten(0, (parts, -1))).unsqueeze(-2)

        def slope(z: Tensor) -> Tensor:
            return F.silu(self.second(F.silu(self.first(z)))) @ weight + bias

        z, step, states = (x[..., 0, :] - self.mean) / self.std, 1 / self.substeps, []
        states.append(z)
        for _ in range(x.shape[-2] - 1):
            for _ in range(self.substeps):
                a = slope(z)
                b = slope(torch.add(z, a, alpha=step / 2))
                c = slope(torch.add(z, b, alpha=step / 2))
                d = slope(torch.add(z, c, alpha=step))
                z = torch.add(z, a + 2 * (b + c) + d, alpha=step / 6)
            states.append(z)
        return torch.stack(states, -2) * self.std + self.mean


class Stacked(nn.Module):
    """One model for each of several environments, which share the parameters that are not named.

    ``forward`` takes ``(environments, n, steps, dim)``. Adam treats each number by itself, so that one Adapter of the
    stack takes the steps of an Adapter for each environment.
    """

    def __init__(self, model: nn.Module, params: Params):
        super().__init__()
        self.shared = [model]  # a list hides it from named_parameters
        self.own = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(p.clone()) for name, p in params.items()})

    def forward(self, x: Tensor) -> Tensor:
        own = {name.replace("/", "."): p for name, p in self.own.items()}
        if [*own] == ["context"]:  # the field has this case itself, twice as fast
            result: Tensor = functional_call(self.shared[0], own, (x,))
            return result
        return vmap(lambda params, x: functional_call(self.shared[0], params, (x,)))(own, x)


def segments(trajectories: Tensor, steps: int, stride: int = 1) -> Tensor:
    """Cut trajectories ``(..., n, 20, dim)`` into segments ``(..., n * starts, steps + 1, dim)``."""
    return trajectories.unfold(-2, steps + 1, stride).mT.flatten(-4, -3)


def weighted(x: Tensor, weight: Tensor) -> Tensor:
    """Return segments ``(n, states, dim)`` as a target whose last state holds the weight of the loss, ``()``."""
    return torch.cat([x, weight.expand_as(x[:, :1])], 1)


def loss_fn(model: VectorField) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of :func:`weighted` targets: the mean squared error in variances times the weight."""
    std = model.std
    return lambda prediction, target: ((prediction - target[:, :-1]) / std).square().mean() * target[0, -1, 0]


def mse(predictions: Tensor, trajectories: Tensor) -> float:
    """Return the published error: the mean over all 20 states, of which the first is given."""
    return float((predictions - trajectories).square().mean())


class ClippedAdam(torch.optim.Adam):
    """AdamW that clips the gradient to the norm 1."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0):
        super().__init__(params, lr, weight_decay=weight_decay, decoupled_weight_decay=True)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 1.0)
        super().step()


def paced(optimizer: torch.optim.Optimizer, lr: float, seconds: float) -> Iterator[int]:
    """Yield the number of an update until the CPU time is used; the rate rises over 40 updates, then is a cosine."""
    begin, updates = time.process_time(), 0
    while (now := (time.process_time() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * group.get("factor", 1) * (0.51 + 0.49 * math.cos(math.pi * now)) * min(1.0, (updates + 1) / 40)
            )
        yield updates
        updates += 1


def train_joint(
    model: VectorField, contexts: Tensor, data: Tensor, config: Config, second: bool = False, learn: bool = True
) -> None:
    """Train the field and a context of each environment, ``(environments, context)``, by gradient descent on both.

    Args:
        model: the field.
        contexts: changed in place.
        data: trajectories of each environment.
        config: settings.
        second: the second part of training, in place of the first.
        learn: train the contexts, too.
    """
    steps, lr, seconds = (
        (SEGMENT, config.segment_lr, config.second_seconds) if second else (1, config.lr, config.first_seconds)
    )
    x = segments(data, steps)
    stacked = Stacked(model, {"context": contexts})
    params = [p for name, p in model.named_parameters() if name != "context"]
    optimizer = ClippedAdam([*params, *stacked.own.values()] if learn else params, weight_decay=config.weight_decay)
    for _ in paced(optimizer, lr, seconds):
        chosen = x[:, torch.randint(x.shape[1], (min(x.shape[1], config.batch),))]
        optimizer.zero_grad()
        ((stacked(chosen) - chosen) / model.std).square().mean().backward()
        optimizer.step()
    contexts.copy_(stacked.own["context"].detach())


def curvatures(model: VectorField, data: Tensor) -> Tensor:
    """Return Gauss-Newton matrices of one-step losses in the context, ``(environments, trajectories, k, k)``."""

    def errors(context: Tensor, x: Tensor) -> Tensor:
        return (functional_call(model, {"context": context}, (x,))[:, 1] / model.std).flatten()

    with torch.no_grad():
        x = segments(data.unsqueeze(2), 1)
        jacobian = vmap(vmap(jacfwd(errors), (None, 0)), (None, 0))(model.context, x)
        return jacobian.mT @ jacobian / jacobian.shape[-2]


def precondition(model: VectorField, contexts: Tensor, data: Tensor) -> None:
    """Change coordinates of the context: mean 0, and all environments' Hessians over their trace have the mean 1."""
    with torch.no_grad():
        found = curvatures(model, data).mean(1)
        found = found / found.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        factor, mean = torch.linalg.cholesky(found.mean(0)), contexts.mean(0)
        for p in (model.output.weight, model.output.bias):
            parts = p.view(1 + len(mean), -1)
            parts[0] += mean @ parts[1:]
            parts[1:] = torch.linalg.inv(factor) @ parts[1:]
        contexts.copy_((contexts - mean) @ factor)


def support_set(trajectories: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Return steps of ``(n, 20, dim)`` and targets with the weight that makes the mean of the Hessian's trace 1."""
    x = segments(trajectories, 1)
    return x, weighted(x, 1 / curvature.mean(0).diagonal().mean())


def meta_optimizer(weight_decay: float, leaves: list[Tensor], lr: float) -> ClippedAdam:
    """Return AdamW for the parameters and, with thirty times their rate, for the inner step sizes, the last leaf."""
    groups = [{"params": leaves[:-1]}, {"params": leaves[-1:], "factor": 30, "weight_decay": 0.0}]
    return ClippedAdam(groups, lr, weight_decay)


def train_meta(model: VectorField, data: Tensor, config: Config, first_order: bool) -> MetaMAML:
    """Meta-train the field; the inner loop adapts the context to some trajectories of an environment."""
    maml = MetaMAML(
        model,
        config.inner_lr,
        config.meta_lr,
        first_order,
        inner_steps=config.inner_steps,
        optimizer=partial(meta_optimizer, config.weight_decay),
        learn_inner_lr=True,
        inner_parameters="context",
    )
    loss, one = loss_fn(model), torch.ones(())
    for update in paced(maml.optimizer, config.meta_lr, config.second_seconds):
        if update % 100 == 0:
            found = curvatures(model, data)
        tasks = []
        for trajectories, curvature in zip(data, found, strict=True):
            rows = torch.randperm(len(trajectories))
            support, query = rows[: config.support], rows[-config.query :]
            x = segments(trajectories[query], SEGMENT, 2)
            tasks.append((*support_set(trajectories[support], curvature[support]), x, weighted(x, one)))
        maml.meta_update(tasks, loss)
    return maml
