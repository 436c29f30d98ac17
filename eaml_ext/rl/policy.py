"""h_t = SSM(o_1..t);  pi(a) = Categorical(W h_t) or Normal(W h_t, exp(s));  V = w . h_t: policies with memory."""

from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from eaml_ext import _check, checkpoint
from eaml_ext.meta._cuda_graphs import GraphCache
from eaml_ext.meta._python_state import PythonState
from eaml_ext.nn import SSM
from eaml_ext.nn._row_invariant import linear, row_invariant
from eaml_ext.nn.cores import CORES_WITH_STEP_SIZE
from eaml_ext.nn.padding import given
from eaml_ext.rl._feedforward import FeedForward

# Ten times Mamba's step sizes, because the effect of an action must show within a few steps.
DT_MIN, DT_MAX = 0.01, 1.0


class SSMMetaPolicy(nn.Module):
    """Actor and critic on one SSM, for tasks that a single observation does not identify. States are explicit.

    :meth:`scan` evaluates whole sequences, for a loss; :meth:`step` advances all environments by one time step. On a
    CPU with kernels both return the same bits, in any batch and with any number of threads, so the first ratio of PPO
    is exactly 1. This holds in float32 and float64 with plain linear layers and the named cores, except "s5" and "lru":
    their state is rounded between calls. It does not hold under autocast, ``torch.compile`` and transforms of
    ``torch.func``. On a GPU bits may differ.

    ``reset`` marks the steps before which the state is zeroed. A policy that adapts by gradient is reset at every
    episode; a policy that adapts in context, at every trial (Duan et al. 2016, "RL^2").

    **Two-dimensional input is a batch** of single steps, as in :class:`eaml_ext.nn.SSM`.

    Args:
        state_dim: size of an observation, including appended entries (last action, last reward, ...).
        action_dim: number of discrete actions, or size of a continuous action.
        hidden_dim: width of the SSM and of the features that actor and critic read.
        device: device of the parameters.
        continuous: True: actions are ``(action_dim,)`` floats, drawn from independent normals. Their standard
            deviations are parameters and do not depend on the observation. False: actions are integers in
            [0, action_dim).
        state_size, num_layers, core: as in :class:`eaml_ext.nn.SSM`.
        dt_min, dt_max: as in :class:`eaml_ext.nn.SSM`. Default: 0.01 and 1, because with the step sizes of a language
            model the effect of an action shows only after hundreds of steps.
        feedforward: True: perceptrons ``f`` and ``g`` with ``2 hidden_dim`` hidden units enclose each core:
            ``u = norm(x + f(x))``, ``y = core(u)``, ``y + g(norm(u + y))``. The core's input is then a nonlinear
            function of action and observation. This adds about ``8 hidden_dim**2`` parameters a layer. Lu et al. 2023
            (arXiv 2303.03982) also place S5 between perceptrons.
        compile: on a GPU, capture :meth:`step` without gradient in a CUDA graph, in the second call with equal shapes
            and settings, and replay it from then on. The graph reads parameters and buffers in place. A replay runs no
            Python, so no hooks of submodules. On a CPU it has no effect. Files do not store it.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or an input has the wrong shape.

    >>> policy = SSMMetaPolicy(state_dim=84, action_dim=4)
    >>> policy(torch.randn(32, 84)).shape
    torch.Size([32, 4])
    >>> distribution, value, state = policy.step(torch.randn(32, 84), policy.init_hidden(32))
    >>> distribution.sample().shape, value.shape
    (torch.Size([32]), torch.Size([32]))
    >>> distribution, value, state = policy.scan(torch.randn(32, 10, 84), state)
    >>> distribution.entropy().shape, value.shape
    (torch.Size([32, 10]), torch.Size([32, 10]))
    """

    mean: Tensor
    std: Tensor
    _graphs: GraphCache | None = None  # of objects that were pickled before graphs existed

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        hidden_dim: int = 64,
        device: str | torch.device = "cpu",
        *,
        continuous: bool = False,
        state_size: int = 16,
        num_layers: int = 1,
        core: str | Callable[[int, int], nn.Module] = "s6",
        dt_min: float | None = None,
        dt_max: float | None = None,
        feedforward: bool = False,
        compile: bool = False,
    ):
        super().__init__()
        where = "SSMMetaPolicy"
        self._graphs = GraphCache(where) if _check.flag(where, "compile", compile) else None
        state_dim = _check.positive(where, "state_dim", state_dim, integer=True)
        action_dim = _check.positive(where, "action_dim", action_dim, integer=True)
        hidden_dim = _check.positive(where, "hidden_dim", hidden_dim, integer=True)
        _check.flag(where, "continuous", continuous)
        if not callable(core) and core in CORES_WITH_STEP_SIZE:
            dt_min, dt_max = (
                default if given is None else given for given, default in ((dt_min, DT_MIN), (dt_max, DT_MAX))
            )
        ssm: dict[str, Any] = {
            "state_size": _check.positive(where, "state_size", state_size, integer=True),
            "num_layers": _check.positive(where, "num_layers", num_layers, integer=True),
            "core": core,
            "dt_min": None if dt_min is None else _check.number(where, "dt_min", dt_min),
            "dt_max": None if dt_max is None else _check.number(where, "dt_max", dt_max),
        }
        self.options = {
            "state_dim": state_dim,
            "action_dim": action_dim,
            "hidden_dim": hidden_dim,
            "continuous": bool(continuous),
            **ssm,
            "feedforward": bool(_check.flag(where, "feedforward", feedforward)),
        }
        if feedforward:
            wrapped = {name: ssm.pop(name) for name in ("core", "dt_min", "dt_max")}
            ssm["core"] = partial(FeedForward, **wrapped)
        self.state_dim, self.action_dim, self.continuous = state_dim, action_dim, bool(continuous)
        self.ssm = SSM(state_dim, hidden_dim, hidden_dim, device, **ssm)
        self.actor = nn.Linear(hidden_dim, action_dim)
        self.critic = nn.Linear(hidden_dim, 1)
        if continuous:
            self.log_std = nn.Parameter(torch.zeros(action_dim))
        with torch.no_grad():  # the initial policy is close to uniform, or standard normal
            self.actor.weight.mul_(0.01)
            self.actor.bias.zero_()
        self.register_buffer("mean", torch.zeros(state_dim))  # of observations, for their normalisation
        self.register_buffer("std", torch.ones(state_dim))
        self.to(device)

    def normalise(self, obs: Tensor) -> None:
        """Set mean and standard deviation of the observation normalisation from data.

        Entries that do not vary are not normalised. Without normalisation training is slow, because some observations
        are a hundredth of others: a pole's angle in radians.

        Args:
            obs: ``(..., state_dim)``, floating.

        Raises:
            TypeError, ValueError: ``obs`` is no tensor of that shape, is empty, or is not finite; nothing is modified.
        """
        _check.tensor("SSMMetaPolicy.normalise", "obs", obs)
        if obs.dim() == 0 or obs.shape[-1] != self.state_dim or obs.numel() == 0:
            wanted = f"(..., {self.state_dim}), not empty"
            raise ValueError(f"SSMMetaPolicy.normalise: obs must have shape {wanted}, got {tuple(obs.shape)}")
        rows = obs.detach().reshape(-1, self.state_dim).to(self.mean.device, torch.float64)
        if not bool(rows.isfinite().all()):
            got = float(rows[~rows.isfinite()][0])
            raise ValueError(f"SSMMetaPolicy.normalise: obs must be finite, got {got}")
        std = rows.std(0, correction=0)
        # 1e-7 is the relative rounding error of float32: an entry that varies by less is constant.
        varies = std > torch.clamp(1e-7 * rows.abs().amax(0), min=1e-6)
        self.mean.copy_(torch.where(varies, rows.mean(0), 0.0))
        self.std.copy_(torch.where(varies, std, 1.0))

    @property
    def has_normalisation(self) -> bool:
        """True if :meth:`normalise` or a loaded state has set mean or standard deviation."""
        return bool((self.mean != 0).any() or (self.std != 1).any())

    def forward(self, obs: Tensor, hidden_state: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Return logits, or means if continuous.

        Args:
            obs: ``(batch, state_dim)`` or ``(batch, time, state_dim)``, floating.
            hidden_state: ``(batch, ...)``; the state before the first step. Default: zero.
            lengths: ``(batch,)``, int64 or int32, of sequences; row b has ``lengths[b]`` steps, followed by padding.

        Returns:
            ``(batch, action_dim)`` or ``(batch, time, action_dim)``.
        """
        with row_invariant():
            return linear(self.actor, torch.tanh(self.ssm(self._normalised(obs), hidden_state, lengths)))

    def init_hidden(self, batch: int) -> Tensor:
        """Return the zero state, ``(batch, ...)``."""
        return self.ssm.init_hidden(batch)

    def scan(
        self,
        obs: Tensor,
        state: Tensor | None = None,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Distribution, Tensor, Tensor]:
        """Evaluate a whole sequence.

        Args:
            obs: ``(batch, time, state_dim)``, floating.
            state: ``(batch, ...)``; the state before the first step. Default: zero.
            reset: ``(batch, time)``, bool; the state is zeroed before step t. Default: never.
            cu_seqlens: ``(sequences + 1,)``, int32; the boundaries of the sequences packed into the only row of
                ``obs``, from 0 to ``time``; each has one row of the state. Trials of different lengths need no padding.

        Returns:
            The distribution of actions, of batch shape ``(batch, time)``; values ``(batch, time)``; the last state.
        """
        parameters, value, state = self.scan_tensors(obs, state, reset, cu_seqlens)
        return self.distribution(parameters), value, state

    def step(
        self, obs: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Distribution, Tensor, Tensor]:
        """Advance by one step of :meth:`scan`.

        Args:
            obs: ``(batch, state_dim)``, floating.
            state: ``(batch, ...)``; the state that the last step returned. Default: zero.
            reset: ``(batch,)``, bool; the state is zeroed before the step. Default: never.

        Returns:
            The distribution of actions, of batch shape ``(batch,)``; values ``(batch,)``; the next state.
        """
        parameters, value, state = self.step_tensors(obs, state, reset)
        return self.distribution(parameters), value, state

    def scan_tensors(
        self,
        obs: Tensor,
        state: Tensor | None = None,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`scan`, but returns the distribution's parameters, which a vmapped function can return."""
        with row_invariant():
            y, state = self.ssm.scan(self._normalised(obs), state, reset, **given(cu_seqlens=cu_seqlens))
            return (*self._heads(y), state)

    def step_tensors(
        self, obs: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`step`, but returns the distribution's parameters."""
        graphs, compiling = self._graphs, torch.compiler.is_compiling()
        if graphs is None or compiling or torch.is_grad_enabled() or not isinstance(obs, Tensor):
            return self._step_tensors(obs, state, reset)
        if not graphs.serves(obs.device):
            return self._step_tensors(obs, state, reset)
        python = PythonState(self)
        parameters, value, state = graphs.run_nested(
            lambda inputs: [*self._step_tensors(*inputs)], python.key, (obs, state, reset), python.tensors
        )
        return parameters, value, state

    def _step_tensors(self, obs: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if reset is not None:
            _check.tensor("SSMMetaPolicy.step", "reset", reset)
            _check.dtype("SSMMetaPolicy.step", "reset", reset, (torch.bool,))
            _check.shape("SSMMetaPolicy.step", "reset", reset, obs.shape[:1], str(tuple(obs.shape[:1])))
            if state is not None:
                # Not a product, because the state of the last episode may be infinite.
                state = state.masked_fill(reset.view(-1, *[1] * (state.dim() - 1)), 0.0)
        with row_invariant():
            y, state = self.ssm.step(self._normalised(obs), state)
            return (*self._heads(y), state)

    def distribution(self, parameters: Tensor) -> Distribution:
        """Return the distribution of actions with the parameters that :meth:`scan_tensors` returned.

        Args:
            parameters: ``(..., action_dim)`` logits; if continuous ``(..., 2 action_dim)``, means and log standard
                deviations.
        """
        if not self.continuous:
            return Categorical(logits=parameters, validate_args=False)
        mean, log_std = parameters.chunk(2, dim=-1)
        return Independent(Normal(mean, log_std.exp(), validate_args=False), 1, validate_args=False)

    def save(self, path: str | PathLike[str]) -> None:
        """Write weights and options to a file, without code.

        Raises:
            ValueError: ``core`` is a custom callable; save the ``state_dict`` of such a policy.
        """
        checkpoint.save_module("SSMMetaPolicy.save", self, self.options, path, kind="SSMMetaPolicy")

    @classmethod
    def load(cls, path: str | PathLike[str], device: str | torch.device = "cpu") -> "SSMMetaPolicy":
        """Return the policy that :meth:`save` wrote. Loading never runs code from the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or holds no SSMMetaPolicy.
        """
        return checkpoint.load_module("SSMMetaPolicy.load", cls, path, device, kind="SSMMetaPolicy")

    def _normalised(self, obs: Tensor) -> Tensor:
        # The SSM raises an error for an argument of another shape or dtype.
        fits = isinstance(obs, Tensor) and obs.shape[-1:] == self.mean.shape and obs.dtype == self.mean.dtype
        return (obs - self.mean) / self.std if fits else obs

    def _heads(self, y: Tensor) -> tuple[Any, Tensor]:
        y = torch.tanh(y)
        parameters: Any = linear(self.actor, y)
        if self.continuous:
            parameters = torch.cat([parameters, self.log_std.expand_as(parameters)], dim=-1)
        return parameters, linear(self.critic, y).squeeze(-1)
