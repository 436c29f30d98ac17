"""``o_{t+1} = o_t + scale * SSM((o_t - mean) / std, a_t)``: the dynamics model of the main job."""

from collections.abc import Callable
from functools import lru_cache
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from eaml_ext import _check, checkpoint
from eaml_ext.meta.functional import functional_call
from eaml_ext.nn import SSM
from eaml_ext.rl import Trajectories

RIDGE = 0.1  # penalty of task embeddings, chosen on the split "valid" of CartPole-v1
EMBEDDED_SIZE = 64  # observations and actions with more entries are projected to this size for task embeddings
COLUMNS = 8192  # entries of an observation whose units are computed at once, in float64


class DynamicsModel(nn.Module):
    """Predicts the step ``next_observation - observation``, in units of ``scale``, with an SSM over the episode.

    Input features: observation, action, and 1 where an episode starts, else 0. The state is zeroed there.

    Args:
        obs_dim, action_dim: sizes of observation and encoded action.
        hidden_dim, state_size, num_layers, device: of the :class:`eaml_ext.nn.SSM`.

    Raises:
        TypeError, ValueError: a size that is no positive integer.

    >>> model = DynamicsModel(4, 2, hidden_dim=8)
    >>> model(torch.zeros(20, 7)).shape, model(torch.zeros(3, 20, 7)).shape
    (torch.Size([20, 4]), torch.Size([3, 20, 4]))
    """

    mean: Tensor
    std: Tensor
    scale: Tensor

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_dim: int = 32,
        state_size: int = 16,
        num_layers: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        obs_dim, action_dim = (
            _check.positive("DynamicsModel", name, value, integer=True)
            for name, value in (("obs_dim", obs_dim), ("action_dim", action_dim))
        )
        self.sizes = (obs_dim, action_dim, 1)
        options: dict[str, Any] = {"hidden_dim": hidden_dim, "state_size": state_size, "num_layers": num_layers}
        self.options = {"obs_dim": obs_dim, "action_dim": action_dim, **options}
        self.ssm = SSM(obs_dim + action_dim, output_dim=obs_dim, device=device, **options)
        self.register_buffer("mean", torch.zeros(obs_dim, device=device))  # of observations
        self.register_buffer("std", torch.ones(obs_dim, device=device))
        self.register_buffer("scale", torch.ones(obs_dim, device=device))  # of steps

    def save(self, path: str | PathLike[str]) -> None:
        """Write weights, units and sizes to a file, without code."""
        checkpoint.save_module("DynamicsModel.save", self, self.options, path, kind="dynamics")

    @classmethod
    def load(cls, path: str | PathLike[str], device: str | torch.device = "cpu") -> "DynamicsModel":
        """Return the model that :meth:`save` or the main job wrote. Loading never runs code from the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or holds no DynamicsModel.
        """
        return checkpoint.load_module("DynamicsModel.load", cls, path, device, kind="dynamics")

    def normalise(self, data: Trajectories) -> None:
        """Set the units from data: standard deviations of observations, root mean squares of steps.

        An observation that moves by a constant, such as a clock, thus has steps of size 1. Where all steps are rounding
        errors of the observation's dtype, their unit is the standard deviation of the observation. The units of a
        constant are its size, at least 1.

        Args:
            data: any number of tasks and steps.
        """
        observations, following = (t.flatten(0, -2) for t in (data.observations, data.next_observations))
        for start in range(0, self.sizes[0], COLUMNS):
            columns = slice(start, start + COLUMNS)
            units = _units(observations[:, columns], following[:, columns])
            for buffer, unit in zip((self.mean, self.std, self.scale), units, strict=True):
                buffer[columns] = unit

    def forward(self, x: Tensor) -> Tensor:
        """Predict the steps of whole episodes from a zero state.

        Args:
            x: ``(time, obs_dim + action_dim + 1)`` or ``(batch, time, obs_dim + action_dim + 1)``.

        Returns:
            Steps in units of ``scale``, the same shape with ``obs_dim`` last.
        """
        if x.dim() == 2:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        inputs = self.in_units(x)
        return self.ssm.scan(inputs[..., :-1], reset=inputs[..., -1] > 0.5)[0]

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of :meth:`forward`. The caller zeroes the state where an episode starts.

        Args:
            x: ``(batch, obs_dim + action_dim + 1)``.
            state: ``(batch, ...)``, of the SSM.

        Returns:
            Step ``(batch, obs_dim)``, and the SSM's next state.
        """
        return self.ssm.step(self.in_units(x)[..., :-1], state)

    def in_units(self, x: Tensor) -> Tensor:
        """The features ``(..., obs_dim + action_dim + 1)`` with the observation less ``mean``, over ``std``."""
        observation, rest = x.tensor_split([self.sizes[0]], dim=-1)
        return torch.cat([(observation - self.mean) / self.std, rest], dim=-1)

    def targets(self, observation: Tensor, following: Tensor) -> Tensor:
        """The steps between observations ``(..., obs_dim)`` and those that follow, in units of ``scale``."""
        return (following - observation).to(self.scale.device) / self.scale


class BatchedWorldModel(nn.Module):
    """A dynamics model with parameters of each task, as :class:`eaml_ext.rl.Planner` steps it.

    Args:
        model: the dynamics model.
        params: its parameters by name, each ``(tasks, *shape)``.
    """

    def __init__(self, model: DynamicsModel, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self._params = {f"model.{name}": p for name, p in params.items()}
        self._call: Callable[..., Any] = vmap(lambda params, *args: functional_call(self, params, args))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`DynamicsModel.step` with the parameters of one task."""
        return self.model.step(x, state)

    def init_hidden(self, tasks: int) -> Tensor:
        """The zero state, ``(tasks, 1, ...)``."""
        return self.model.ssm.init_hidden(tasks).unsqueeze(1)

    def step(self, obs: Tensor, action: Tensor, start: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the next observations.

        Args:
            obs: ``(tasks, candidates, obs_dim)``.
            action: ``(tasks, candidates, action_dim)``, encoded.
            start: ``(tasks, candidates)``, bool, an episode starts here.
            state: ``(tasks, candidates, ...)``.

        Returns:
            Next observations, ``(tasks, candidates, obs_dim)``, and the next state.
        """
        if start.any():  # not a product, because the state of a finished episode may be infinite
            state = state.masked_fill(start.view(*start.shape, *[1] * (state.dim() - 2)), 0.0)
        change, state = self._call(self._params, features(obs, action, start), state)
        return obs + change * self.model.scale, state


def features(observation: Tensor, action: Tensor, start: Tensor) -> Tensor:
    """The model's input, ``(..., obs_dim + action_dim + 1)``.

    Args:
        observation: ``(..., obs_dim)``.
        action: ``(..., action_dim)``, encoded.
        start: ``(...,)``, bool, an episode starts here.

    >>> features(torch.zeros(4), torch.ones(2), torch.tensor(True))
    tensor([0., 0., 0., 0., 1., 1., 1.])
    """
    return torch.cat([observation, action, start.unsqueeze(-1).to(observation.dtype)], dim=-1)


def model_data(data: Trajectories, model: DynamicsModel) -> tuple[Tensor, Tensor]:
    """Features and targets of all transitions, ``(tasks, time, ...)`` each, on the model's device."""
    x = features(data.observations, data.actions, data.resets).to(model.scale.device)
    return x, model.targets(data.observations, data.next_observations)


def _units(observations: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and unit of observations ``(transitions, entries)``, and the unit of their steps, in float64."""
    dtype = observations.dtype
    observations, following = observations.double(), following.double()
    size, steps = observations.abs().amax(0), following - observations
    # Absolute part: rounding errors of a simulator that computes zeros from numbers of order one in float64.
    ulp = (torch.finfo(dtype).eps * size).clamp(min=2 * torch.finfo(torch.float64).eps)
    std, step = observations.std(0), steps.square().mean(0).sqrt()
    std = torch.where(std > 2 * ulp, std, size.clamp(min=1))
    # A clock may step by one ulp, more than eps * size / 2. Rounding errors of that size have a mean near 0.
    moves = (step > 2 * ulp) | (steps.mean(0).abs() > ulp / 2)
    return observations.mean(0), std, torch.where(moves, step, std)


def task_embedding(x: Tensor, y: Tensor) -> Tensor:
    """A task's context embedding: ridge-regression weights of steps on features.

    It depends on no learned parameter, so it never goes stale. In float64, because clocks and constants are nearly
    collinear. A fixed random matrix projects observations and actions with more than 64 entries to 64. The weights
    have one entry for each pair of a feature and a step.

    Args:
        x: ``(tasks, time, obs_dim + action_dim + 1)``, as of :meth:`DynamicsModel.in_units`.
        y: ``(tasks, time, obs_dim)``, steps in units of ``scale``.

    Returns:
        ``(tasks, (obs_dim + action_dim + 1) * obs_dim)``, with at most 64 for ``obs_dim`` and ``action_dim``.

    >>> task_embedding(torch.zeros(3, 20, 7), torch.zeros(3, 20, 4)).shape
    torch.Size([3, 28])
    >>> task_embedding(torch.zeros(3, 20, 1003), torch.zeros(3, 20, 1000)).shape
    torch.Size([3, 4288])
    """
    size = y.shape[-1]
    observation, action = _projected(x[..., :size]), _projected(x[..., size:-1])
    inputs = torch.cat([observation, action, torch.ones_like(x[..., :1])], dim=-1).double()
    gram = inputs.mT @ inputs + RIDGE * torch.eye(inputs.shape[-1], dtype=inputs.dtype, device=x.device)
    weights: Tensor = torch.linalg.solve(gram, inputs.mT @ _projected(y).double()).flatten(1).to(y.dtype)
    return weights


def embedding_dim(obs_dim: int, action_dim: int) -> int:
    """Return the size of :func:`task_embedding`.

    >>> embedding_dim(4, 2), embedding_dim(1000, 2)
    (28, 4288)
    """
    obs, action = min(obs_dim, EMBEDDED_SIZE), min(action_dim, EMBEDDED_SIZE)
    return (obs + action + 1) * obs


def _projected(x: Tensor) -> Tensor:
    """Project ``(..., size)`` to ``EMBEDDED_SIZE`` entries; return a smaller ``x`` as it is."""
    return x if x.shape[-1] <= EMBEDDED_SIZE else x @ _projection(x.shape[-1]).to(x)


@lru_cache(maxsize=4)
def _projection(size: int) -> Tensor:
    """Return a matrix ``(size, EMBEDDED_SIZE)`` of random signs, scaled so that it keeps squared norms on average.

    Source: Achlioptas 2003, "Database-friendly random projections".
    """
    signs = torch.randint(2, (size, EMBEDDED_SIZE), generator=torch.Generator().manual_seed(size))
    matrix: Tensor = (2.0 * signs - 1.0) / EMBEDDED_SIZE**0.5
    return matrix
