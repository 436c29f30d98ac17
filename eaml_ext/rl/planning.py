"""a_0..a_H = argmax sum_h gamma^h r_h alive_h,  o_{h+1} = model(o_h, a_h): model-predictive control, acting by a_0.

Random shooting takes the best of random action sequences (Nagabandi et al. 2018, "Neural network dynamics for
model-based deep reinforcement learning"). The cross-entropy method draws further sequences around the best ones
(Rubinstein 1999).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eaml_ext import _check
from eaml_ext.rl.losses import check_fraction
from eaml_ext.rl.trajectories import Policy, collect
from eaml_ext.tasks.base import Task, TaskDistribution, action_width

if TYPE_CHECKING:
    from gymnasium.spaces import Space

SMOOTHING = 0.1  # weight of the last proposal in the next one, which keeps the probability of every action above 0

Outcomes = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(obs, action, next_obs)``, ``(tasks, candidates, ...)`` each -> rewards, terminations, ``(tasks, candidates)``."""


class WorldModel(Protocol):
    """The dynamics model of a :class:`Planner`; rows ``(tasks, candidates)`` step as one batch."""

    def init_hidden(self, tasks: int) -> Tensor:
        """Return the state before the first step, ``(tasks, 1, ...)``."""

    def step(self, obs: Tensor, action: Tensor, start: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the next observations.

        Args:
            obs: ``(tasks, candidates, obs_dim)``, float32.
            action: ``(tasks, candidates, action_dim)``, float32, as ``encode_action`` encodes it.
            start: ``(tasks, candidates)``, bool; an episode starts here.
            state: ``(tasks, candidates, ...)``; the state that the last step returned.

        Returns:
            Next observations ``(tasks, candidates, obs_dim)`` and the next state.
        """


class Planner:
    """Act in many tasks at once by the first action of the best predicted sequence; plan at every step.

    A ``Policy`` for :func:`eaml_ext.rl.collect`. The model's state covers the episode so far. The rest of the last plan
    is one of the candidates, and is preferred among equally good ones.

    Args:
        model: the dynamics model. Planning runs on the device of its states.
        outcomes: rewards and terminations of predicted transitions. For a distribution that has ``outcomes``:
            ``functools.partial(dist.outcomes, tasks)``.
        action_space: of one task, ``Discrete`` or a bounded ``Box``.
        horizon: steps of a sequence.
        candidates: sequences per task, at least 2.
        iterations: 1: random shooting, with uniformly drawn actions. More: the cross-entropy method.
        elites: number of best sequences to which the next proposal is fitted. Default: a tenth of ``candidates``, at
            least 2.
        gamma: discount of one step, in [0, 1].

    Raises:
        TypeError, ValueError: an argument has another type or is out of its range.

    >>> from functools import partial
    >>> from eaml_ext.tasks import CartPoleTasks
    >>> class Still:  # predicts that nothing moves
    ...     def init_hidden(self, tasks):
    ...         return torch.zeros(tasks, 1, 0)
    ...     def step(self, obs, action, start, state):
    ...         return obs, state
    >>> dist = CartPoleTasks()
    >>> tasks = dist.sample(4, "test")
    >>> planner = Planner(Still(), partial(dist.outcomes, tasks), dist.action_space, horizon=5, candidates=8)
    >>> planned_returns(dist, tasks, planner, steps=20).shape
    torch.Size([4])
    """

    def __init__(
        self,
        model: WorldModel,
        outcomes: Outcomes,
        action_space: Space[Any],
        *,
        horizon: int = 15,
        candidates: int = 64,
        iterations: int = 1,
        elites: int | None = None,
        gamma: float = 1.0,
    ) -> None:
        from gymnasium.spaces import Box, Discrete

        if not (hasattr(model, "step") and hasattr(model, "init_hidden")):
            raise TypeError(f"Planner: model must have step and init_hidden, got {type(model).__name__}")
        if not callable(outcomes):
            raise TypeError(f"Planner: outcomes must be callable, got {type(outcomes).__name__}")
        if not isinstance(action_space, (Discrete, Box)):
            raise TypeError(f"Planner: action_space must be Discrete or Box, got {type(action_space).__name__}")
        if isinstance(action_space, Box) and not action_space.is_bounded():
            raise ValueError(f"Planner: action_space must be bounded, got {action_space}")
        self.model, self.outcomes, self.action_space = model, outcomes, action_space
        self.horizon = _check.positive("Planner", "horizon", horizon, integer=True)
        self.candidates = _check.integer("Planner", "candidates", candidates, 2)
        self.iterations = _check.positive("Planner", "iterations", iterations, integer=True)
        elites = max(2, self.candidates // 10) if elites is None else elites
        self.elites = _check.positive("Planner", "elites", elites, integer=True)
        if self.elites > self.candidates:
            raise ValueError(f"Planner: elites must be <= candidates {self.candidates}, got {self.elites}")
        self.gamma = check_fraction("Planner", "gamma", gamma)
        self._state: Tensor | None = None
        self._plan: Tensor | None = None  # (tasks, horizon, action_dim)

    @torch.no_grad()
    def __call__(self, observations: np.ndarray, resets: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return the actions of all tasks.

        Args:
            observations: ``(tasks, *observation shape)``, float32.
            resets: ``(tasks,)``, bool; an episode starts here.
            generator: the source of all randomness.

        Returns:
            ``(tasks,)`` integers or ``(tasks, *shape)`` floats.
        """
        n = len(observations)
        if self._state is None or len(self._state) != n:
            self._state, self._plan = self.model.init_hidden(n), None
        device = self._state.device
        obs = torch.from_numpy(np.array(observations, np.float32).reshape(n, 1, -1)).to(device)
        start = torch.from_numpy(np.array(resets, bool).reshape(n, 1)).to(device)
        draw = torch.Generator(device).manual_seed(int(generator.integers(2**63)))
        proposal = self._uniform(n, device)
        best = self._draw(proposal, 1, draw)
        if self._plan is not None:
            best = torch.where(start.view(n, 1, 1, 1), best, torch.cat([self._plan[:, None, 1:], best[:, :, -1:]], 2))
        for _ in range(self.iterations):
            sequences = torch.cat([best, self._draw(proposal, self.candidates - 1, draw)], dim=1)
            score = self._predicted_returns(obs, start, sequences)
            # argmax returns the first maximum, which is the last plan unless another sequence is better.
            best = sequences.take_along_dim(score.argmax(1).view(n, 1, 1, 1), dim=1)
            elite = sequences.take_along_dim(score.topk(self.elites, dim=1).indices[..., None, None], dim=1)
            proposal = self._fit_proposal(proposal, elite)
        self._plan = best.squeeze(1)
        self._state = self.model.step(obs, best[:, :, 0], start, self._state)[1]
        return self._decode(self._plan[:, 0].cpu().numpy())

    def _predicted_returns(self, obs: Tensor, start: Tensor, sequences: Tensor) -> Tensor:
        """Sequences ``(tasks, candidates, horizon, action_dim)`` -> discounted returns, ``(tasks, candidates)``."""
        rows = sequences.shape[:2]
        obs, start = obs.expand(*rows, -1), start.expand(rows)
        assert self._state is not None
        state = self._state.expand(*rows, *self._state.shape[2:])
        score, alive = obs.new_zeros(rows), torch.ones_like(start)
        for h, action in enumerate(sequences.unbind(2)):
            following, state = self.model.step(obs, action, start, state)
            reward, terminated = self.outcomes(obs, action, following)
            # Not a product, because a reward after the end may be infinite.
            score = score + self.gamma**h * reward.masked_fill(~alive, 0.0)
            alive, obs, start = alive & ~terminated, following, torch.zeros_like(start)
        return score.nan_to_num(nan=-torch.inf, posinf=-torch.inf)

    def _uniform(self, n: int, device: torch.device) -> tuple[Tensor, ...]:
        width = action_width(self.action_space)
        if not hasattr(self.action_space, "low"):
            return (torch.full((n, self.horizon, width), 1 / width, device=device),)
        low, high = self._bounds(device)
        middle = ((low + high) / 2).expand(n, self.horizon, width)
        return middle, ((high - low) / 12**0.5).expand(n, self.horizon, width)

    def _bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        space: Any = self.action_space
        low, high = (torch.from_numpy(np.ravel(b).astype(np.float32)).to(device) for b in (space.low, space.high))
        return low, high

    def _draw(self, proposal: tuple[Tensor, ...], count: int, generator: torch.Generator) -> Tensor:
        """Draw ``(tasks, count, horizon, action_dim)`` from probabilities, or from means and standard deviations."""
        if len(proposal) == 1:
            (probs,) = proposal
            n, horizon, width = probs.shape
            drawn = torch.multinomial(probs.flatten(0, 1), count, replacement=True, generator=generator)
            return F.one_hot(drawn.view(n, horizon, count), width).to(probs.dtype).transpose(1, 2)
        mean, std = (p.unsqueeze(1) for p in proposal)
        shape = (mean.shape[0], count, *mean.shape[2:])
        low, high = self._bounds(mean.device)
        # A uniform distribution of this mean and standard deviation, as in the first iteration, clipped to the bounds.
        noise = (torch.rand(shape, generator=generator, device=mean.device) - 0.5) * 12**0.5
        return (mean + std * noise).clamp(low, high)

    def _fit_proposal(self, proposal: tuple[Tensor, ...], elite: Tensor) -> tuple[Tensor, ...]:
        fit = (elite.mean(1),) if len(proposal) == 1 else (elite.mean(1), elite.std(1, correction=0))
        return tuple(SMOOTHING * old + (1 - SMOOTHING) * new for old, new in zip(proposal, fit, strict=True))

    def _decode(self, action: np.ndarray) -> np.ndarray:
        space: Any = self.action_space
        if hasattr(space, "low"):
            return np.asarray(action.reshape(-1, *space.shape).clip(space.low, space.high), space.dtype)
        return np.asarray(action.argmax(-1) + space.start, space.dtype)


def planned_returns(
    dist: TaskDistribution[Any], tasks: Sequence[Task], policy: Policy | None, steps: int, seed: int = 0
) -> Tensor:
    """Return the return of the first episode of each task under a :class:`Planner` or any other policy.

    One seed gives the same tasks the same starting states, whatever the policy.

    Args:
        dist, tasks, seed, policy: as in :func:`eaml_ext.rl.collect`.
        steps: steps of each task, after which an episode is cut.

    Returns:
        ``(tasks,)``, float32.

    Raises:
        TypeError, ValueError: as :func:`eaml_ext.rl.collect`.
    """
    data = collect(dist, tasks, steps, seed, policy)
    first = data.resets.long().cumsum(1) == 1
    return data.rewards.masked_fill(~first, 0.0).sum(1)
