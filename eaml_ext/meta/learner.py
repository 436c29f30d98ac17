"""params = initial + shift(mean_t context_t), then gradient descent on support pairs and on similar experience."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext.experience import Experiences
from eaml_ext.meta._batching import Batching, Map
from eaml_ext.meta._inner_loop import descend
from eaml_ext.meta._optimizer import step_if_finite
from eaml_ext.meta._types import LossFn, Params
from eaml_ext.meta._validation import check_loss_fn, check_parameters, check_rate
from eaml_ext.meta.functional import functional_call, outside_inference_mode, recordable, trainable_parameters

Pairs = tuple[Tensor, Tensor]


class MetaLearner(nn.Module):
    """A meta-learned network that adapts to a task from its context, its support set, and similar experience.

    The network is input_dim → hidden_dim → hidden_dim → output_dim (ReLU). The context, averaged over time, shifts its
    initial parameters by a learned linear map that starts at zero; ``inner_steps`` of gradient descent follow. All of
    it is differentiable to ``parameters()``, the meta-parameters: network, ``shift`` and ``log_temperature``. Frozen
    ones are not learned; those of the network are neither shifted nor adapted.

    Args:
        input_dim: size of an input, and of the context (an encoder's hidden size).
        output_dim: size of an output (of an action).
        hidden_dim: width of the network; ``shift`` has input_dim numbers for each number of the network.
        meta_lr: learning rate of :meth:`meta_update` (Adam).
        inner_lr, inner_steps: step size and number of steps of the inner loop.
        loss_fn: ``(prediction (output_dim,), target (output_dim,)) -> scalar``, for one pair.
        temperature: scale of distances in :meth:`adapt_with_experience`, the start of its learning.

    Attributes:
        skipped_updates: meta-updates skipped because a loss or a gradient was not finite.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size.

    >>> learner = MetaLearner(input_dim=16, output_dim=2, hidden_dim=32, meta_lr=1e-3)
    >>> context = torch.randn(50, 16)
    >>> params = learner.adapt(context, (torch.randn(10, 16), torch.randn(10, 2)))
    >>> learner.forward(torch.randn(5, 16), params=params).shape
    torch.Size([5, 2])
    """

    @outside_inference_mode()
    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dim: int,
        meta_lr: float,
        *,
        inner_lr: float = 1e-2,
        inner_steps: int = 5,
        loss_fn: LossFn = F.mse_loss,
        temperature: float = 1.0,
    ):
        super().__init__()
        where = "MetaLearner"
        self.input_dim = input_dim = _check.positive(where, "input_dim", input_dim, integer=True)
        self.output_dim = output_dim = _check.positive(where, "output_dim", output_dim, integer=True)
        hidden_dim = _check.positive(where, "hidden_dim", hidden_dim, integer=True)
        self.inner_steps = _check.positive(where, "inner_steps", inner_steps, integer=True)
        meta_lr, temperature = check_rate(where, "meta_lr", meta_lr), check_rate(where, "temperature", temperature)
        self.inner_lr = check_rate(where, "inner_lr", inner_lr)
        check_loss_fn(where, loss_fn)
        self.loss_fn = loss_fn
        self.network = nn.Sequential(
            nn.Linear(input_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, output_dim),
        )
        self.shift = nn.Linear(input_dim, sum(p.numel() for p in self.network.parameters()), bias=False)
        nn.init.zeros_(self.shift.weight)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=meta_lr)
        self.skipped_updates = 0
        self._batching = Batching(where, "pair")

    def forward(self, query_set: Tensor, params: Params | None = None) -> Tensor:
        """Return predictions, ``(m, output_dim)``.

        Args:
            query_set: ``(m, input_dim)``.
            params: what :meth:`adapt` returned; None: the initial parameters.
        """
        self._check_inputs("MetaLearner.forward", "query_set", query_set)
        if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            query_set, params = recordable((query_set, params))
        predictions: Tensor
        if params is None:
            predictions = self.network(query_set)
            return predictions
        names = [name for name, _ in self.network.named_parameters()]
        if not isinstance(params, dict) or list(params) != names:
            raise ValueError(f"MetaLearner.forward: params must be what adapt returned, a dict of {', '.join(names)}")
        predictions = functional_call(self.network, params, (query_set,))
        return predictions

    @outside_inference_mode()
    def adapt(self, context: Tensor, support_set: Pairs) -> Params:
        """Return the parameters adapted to a task, by name, for :meth:`forward`.

        Args:
            context: ``(time, input_dim)`` or, averaged already, ``(input_dim,)``.
            support_set: ``(inputs, targets)``: ``(n, input_dim)`` and ``(n, output_dim)``.

        Returns:
            Parameters that are connected to the meta-parameters, and to the context where it requires grad.
        """
        return self._batching.run(lambda batch: self._adapt(batch, context, support_set), self.log_temperature.device)

    @outside_inference_mode()
    def adapt_with_experience(self, context: Tensor, support_set: Pairs, experiences: Experiences) -> Params:
        """:meth:`adapt`, on the support set and the (state, action) pairs of retrieved experiences together.

        A support pair has weight 1, a pair of an experience at distance d has weight exp(-d / temperature). That is at
        most 1, unless the buffer has log-weights, which are part of its distances. Experiences that were drawn, not
        searched, have weight 1. The loss is the weighted mean, so it is bounded for any number of pairs.

        Args:
            context, support_set: as in :meth:`adapt`.
            experiences: what ``ExperienceBuffer.retrieve`` returned for one query; k = 0 is plain adaptation. Its field
                ``state`` is ``(k, input_dim)`` or ``(k, time, input_dim)``. Its field ``action`` is ``(k, output_dim)``
                or ``(k, time, output_dim)``; integer actions without the last dimension become one-hot. Steps of
                ragged fields after each item's last are left out.
        """
        return self._batching.run(
            lambda batch: self._adapt_with_experience(batch, context, support_set, experiences),
            self.log_temperature.device,
        )

    @outside_inference_mode()
    def meta_update(self, tasks: Iterable[tuple[Any, ...]]) -> float:
        """Take one step of Adam on the mean query loss after adaptation; return it (before the step).

        A step that is not finite is skipped and counted in ``skipped_updates``.

        Args:
            tasks: ``(context, support_set, query_set)`` or ``(context, support_set, query_set, experiences)`` each. The
                query set is ``(inputs, targets)``: ``(m, input_dim)`` and ``(m, output_dim)``; the others are as in
                :meth:`adapt_with_experience`.
        """
        where = "MetaLearner.meta_update"
        tasks = list(tasks)
        if not tasks:
            raise ValueError(f"{where}: tasks is empty")
        check_parameters(where, "MetaLearner", trainable_parameters(self), self.optimizer.param_groups[0]["params"])
        leaves = [p for p in self.parameters() if p.requires_grad]
        if not leaves:
            raise ValueError(f"{where}: the learner has no parameters that require grad")

        def compute(batch: Map) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            losses = []
            for i, task in enumerate(tasks):
                if not isinstance(task, (tuple, list)) or len(task) not in (3, 4):
                    raise ValueError(f"{where}: tasks[{i}] must be (context, support_set, query_set[, experiences])")
                x, y = self._pairs(where, task[2], "query_set")
                adapt = self._adapt if len(task) == 3 else self._adapt_with_experience
                params = adapt(batch, *task[:2], *task[3:])
                losses.append(self._losses(batch, params, x, y).mean())
            loss = torch.stack(losses).mean()
            return loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True)

        with torch.enable_grad():
            loss, grads = self._batching.run(compute, self.log_temperature.device)
        if not step_if_finite(where, self.optimizer, leaves, grads, loss):
            self.skipped_updates += 1
        return float(loss)

    # ------------------------------------------------------------------------------------------------- inside

    def _losses(self, batch: Map, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The loss of each pair, ``(n,)``."""
        losses = batch(self.loss_fn)(functional_call(self.network, params, (x,)), y)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            raise ValueError("MetaLearner: loss_fn must return a scalar tensor")
        return losses

    def _adapt(self, batch: Map, context: Any, support_set: Any) -> Params:
        where = "MetaLearner.adapt"
        x, y = self._pairs(where, support_set)
        return self._descend(where, batch, self._initial(where, context), x, y, torch.ones_like(x[:, 0]))

    def _adapt_with_experience(self, batch: Map, context: Any, support_set: Any, experiences: Any) -> Params:
        where = "MetaLearner.adapt_with_experience"
        x, y = self._pairs(where, support_set)
        initial = self._initial(where, context)
        states, actions, weights = self._experience(where, experiences)
        counts = torch.cat([torch.ones_like(x[:, 0]), weights])
        return self._descend(where, batch, initial, torch.cat([x, states]), torch.cat([y, actions]), counts)

    def _descend(self, where: str, batch: Map, initial: Params, x: Tensor, y: Tensor, counts: Tensor) -> Params:
        weights = counts / counts.sum()
        start = {name: initial[name] for name, p in self.network.named_parameters() if p.requires_grad}
        if not start:
            raise ValueError(f"{where}: the network has no parameters that require grad")

        def loss(params: Params) -> Tensor:
            losses = self._losses(batch, {**initial, **params}, x, y)
            return losses @ weights.to(losses)

        return {**initial, **descend(loss, start, self.inner_lr, self.inner_steps)}

    def _initial(self, where: str, context: Any) -> Params:
        """The network's parameters, those that require grad shifted by the context."""
        _check.tensor(where, "context", context)
        context = recordable(context)
        if context.dim() not in (1, 2) or context.shape[-1] != self.input_dim or not context.numel():
            wanted = f"(time, {self.input_dim}) or ({self.input_dim},)"
            raise ValueError(f"{where}: context must have shape {wanted}, got {tuple(context.shape)}")
        self._check_kind(where, "context", context)
        shift = self.shift(context.mean(dim=0) if context.dim() == 2 else context)
        sizes = [p.numel() for p in self.network.parameters()]
        if sum(sizes) != len(shift):
            check_parameters(where, "MetaLearner", trainable_parameters(self), self.optimizer.param_groups[0]["params"])
            raise ValueError(f"{where}: network was replaced after this MetaLearner was made: make a new MetaLearner")
        parts = shift.split(sizes)
        named = self.network.named_parameters()
        return {n: p + part.view_as(p) if p.requires_grad else p for (n, p), part in zip(named, parts, strict=True)}

    def _pairs(self, where: str, pairs: Any, name: str = "support_set") -> Pairs:
        if not isinstance(pairs, (tuple, list)) or len(pairs) != 2:
            raise TypeError(f"{where}: {name} must be (inputs, targets), got {type(pairs).__name__}")
        inputs, targets = pairs
        self._check_inputs(where, f"{name}[0]", inputs)
        _check.tensor(where, f"{name}[1]", targets)
        wanted = (len(inputs), self.output_dim)
        _check.shape(where, f"{name}[1]", targets, wanted, str(wanted))
        self._check_kind(where, f"{name}[1]", targets)
        if not len(inputs):
            raise ValueError(f"{where}: {name} is empty")
        return recordable((inputs, targets))

    def _experience(self, where: str, experiences: Any) -> tuple[Tensor, Tensor, Tensor]:
        """States ``(pairs, input_dim)``, actions ``(pairs, output_dim)`` and their weights ``(pairs,)``."""
        if not isinstance(experiences, Experiences):
            kind = type(experiences).__name__
            raise TypeError(f"{where}: experiences must be what ExperienceBuffer.retrieve returned, got {kind}")
        for name in ("state", "action"):
            if name not in experiences.fields:
                fields = ", ".join(experiences.fields)
                raise ValueError(f"{where}: experiences have no field {name!r}, the stored fields are {fields}")
        state, action, distances = recordable((experiences.state, experiences.action, experiences.distances))
        if experiences.indices.dim() != 1:
            raise ValueError(f"{where}: experiences must be those of one query, take experiences[i]")
        if state.dim() not in (2, 3) or state.shape[-1] != self.input_dim:
            wanted = f"(k, {self.input_dim}) or (k, time, {self.input_dim})"
            raise ValueError(f"{where}: experiences.state must have shape {wanted}, got {tuple(state.shape)}")
        self._check_kind(where, "experiences.state", state)
        if not action.is_floating_point() and action.shape == state.shape[:-1]:
            if action.numel() and not 0 <= int(action.min()) <= int(action.max()) < self.output_dim:
                raise ValueError(f"{where}: experiences.action must lie in [0, {self.output_dim})")
            action = F.one_hot(action.long(), self.output_dim).to(state.dtype)
        sizes = (*state.shape[:-1], self.output_dim)
        _check.shape(where, "experiences.action", action, sizes, str(sizes))
        self._check_kind(where, "experiences.action", action)
        weights = state.new_ones(len(state))
        if distances is not None:
            weights = torch.exp(-distances.to(state.dtype) / self.log_temperature.exp())
        steps = state[0].numel() // self.input_dim if len(state) else 1
        weights = weights.repeat_interleave(steps)
        pairs = state.reshape(-1, self.input_dim), action.reshape(-1, self.output_dim), weights
        if "state" not in experiences.ragged:
            return pairs
        inputs, targets, weights = (x[experiences.mask.flatten()] for x in pairs)
        return inputs, targets, weights

    def _check_inputs(self, where: str, name: str, value: Any) -> None:
        _check.tensor(where, name, value)
        _check.shape(where, name, value, (None, self.input_dim), f"(n, {self.input_dim})")
        self._check_kind(where, name, value)

    def _check_kind(self, where: str, name: str, value: Tensor) -> None:
        like = self.log_temperature
        _check.dtype(where, name, value, (like.dtype,))
        _check.device(where, name, value, like.device, "the learner")
