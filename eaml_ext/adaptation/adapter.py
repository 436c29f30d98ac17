"""Test-time adaptation that cannot blow up: a few guarded gradient steps on the present and on retrieved experience."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext._torch_compat import foreach_copy_, own_buffers, tree_leaves, tree_map
from eaml_ext.adaptation import guards, objective
from eaml_ext.adaptation.config import AdaptationConfig
from eaml_ext.adaptation.selection import ParameterFilter, select
from eaml_ext.experience import ExperienceBuffer, retrieval
from eaml_ext.meta._batching import Batching, Map
from eaml_ext.meta._inner_loop import twice_differentiable_attention
from eaml_ext.meta._optimizer import check_state, load_state, make_optimizer, take_step
from eaml_ext.meta._types import LossFn
from eaml_ext.meta.functional import (
    SUBSTITUTION_LOCK,
    check_buffers_constant,
    check_model,
    detached_copy,
    functional_call,
    outside_inference_mode,
)

_PER_USER = ("states", "targets", "hidden_state", "mask", "context_embedding", "task")


class Adapter:
    """Takes a model through a stream of batches, a few guarded gradient steps per call.

    The loss of a batch, and of the experience retrieved for it, make up what is reported and what is stepped on::

        total     = loss_current + experience_weight · loss_experience
        objective = total / (1 + experience_weight) + entropy_weight · H

    (dividing keeps the step size whatever the weight; without experience total is loss_current, undivided). Each step
    clips the gradient by its global norm, moves θ and projects it onto the trust region around the parameters with
    which the call began: AdaptationConfig has the formulas.

    *Rollback.* A loss, gradient or parameter vector that is not finite, and a loss that spikes, end the call: θ
    returns to the averaged parameters (a rollback is not bound by the trust region), the model's buffers to what they
    were when the call began, and the optimiser starts anew. A total v is a spike when ``v − m > max(6·s, |m|)``, with m
    and s the running mean and standard deviation of the totals with which accepted calls began, once there are 10 of
    them (those among the first 10 that are outliers by the same rule, around the median, are left out and replaced).
    Spikes never enter these statistics, but the third call in a row that begins with one is taken for a new
    regime: the statistics start anew and the call goes through. So a rollback costs one evaluation of the loss and
    can neither repeat inside a call nor freeze a stream that has really changed.

    The model's mode (train or eval) is never changed; parameters that do not require a gradient, or are not selected,
    are never touched, nor is any ``.grad``. A parameter may be frozen, and unfrozen again, at any time; one that is
    unfrozen or replaced for the first time after construction needs a new Adapter. The model must not be moved to
    another device afterwards; when you change its parameters yourself, call :meth:`snapshot`, then :meth:`reset`.

    Args:
        model: called as ``model(states)`` or ``model(states, hidden_state)``; returns one tensor.
        cfg: the limits; None: the defaults of AdaptationConfig.
        experience_buffer: where experience comes from; None: none is used.
        experience_weight: w ≥ 0 above; 0: the buffer is not asked.
        retriever: ``(buffer, batch_dict) -> {"states": ..., "targets": ...} or None``, asked once per call; see
            ``eaml_ext.experience.retrieval``. With ``"weights"`` ``(n,)`` too, loss_experience is the mean of the
            items' own losses, each ``loss_fn(prediction (1, ...), target (1, ...))``, in that proportion.
            Default: the nearest experiences to ``batch_dict["context_embedding"]`` where there is one (those of
            ``batch_dict["task"]``, where given, left out), uniform ones otherwise; as many as the batch has rows.
        parameters: which parameters adapt: a prefix of names or several (``"head"`` means ``head.weight`` and
            ``head.bias``), a compiled pattern that is searched in the name, or ``(name, parameter) -> bool``;
            :func:`norm_parameters` and :func:`output_parameters` name the usual choices. Default: all that require a
            gradient.
        optimizer: a ``torch.optim`` class or any factory called as ``optimizer(params, lr=lr)``, kept across calls; it
            must step without a closure. Default: plain gradient descent, without state.

    Attributes:
        last_steps: how many gradient steps the last call made.
        rollbacks: how many calls ended in a rollback since the last reset.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, the model was made inside ``torch.inference_mode``, a
            parameter is not finite, ``parameters`` selects none, or the optimizer needs a closure (LBFGS, SAM).

    Source: test-time training with the guards of the trust-region and weight-averaging literature; entropy
    minimisation after Wang et al., "Tent", 2021.

    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> adapter = Adapter(nn.Linear(4, 1), AdaptationConfig(lr=0.1))
    >>> batch = {"states": torch.randn(16, 4), "targets": torch.ones(16, 1)}
    >>> losses = [adapter.adapt(nn.MSELoss(), batch) for _ in range(20)]
    >>> losses[-1] < 0.1 * losses[0], adapter.last_steps
    (True, 5)
    """

    @outside_inference_mode()
    def __init__(
        self,
        model: nn.Module,
        cfg: AdaptationConfig | None = None,
        experience_buffer: ExperienceBuffer | None = None,
        experience_weight: float = 0.1,
        *,
        retriever: retrieval.Retriever | None = None,
        parameters: ParameterFilter | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    ):
        where = "Adapter"
        check_model(where, model)
        cfg = AdaptationConfig() if cfg is None else cfg
        if not isinstance(cfg, AdaptationConfig):
            raise TypeError(f"{where}: cfg must be an AdaptationConfig, got {type(cfg).__name__}")
        if experience_buffer is not None and not isinstance(experience_buffer, ExperienceBuffer):
            kind = type(experience_buffer).__name__
            raise TypeError(f"{where}: experience_buffer must be an ExperienceBuffer, got {kind}")
        experience_weight = _check.positive(where, "experience_weight", experience_weight, zero=True)
        if math.isinf(experience_weight):
            raise ValueError(f"{where}: experience_weight must be finite, got {experience_weight!r}")
        for name, value in (("retriever", retriever), ("optimizer", optimizer)):
            if value is not None and not callable(value):
                raise TypeError(f"{where}: {name} must be callable, got {type(value).__name__}")
        selected = select(model, parameters)
        for name, parameter in selected.items():
            if not torch.isfinite(parameter).all():
                raise ValueError(f"{where}: the parameter {name} is not finite")

        self.model = model
        self.cfg = cfg
        self.experience_buffer = experience_buffer
        self.experience_weight = experience_weight
        self.last_steps = 0
        self.rollbacks = 0
        self._retriever = _retrieve if retriever is None else retriever
        self._choice = parameters
        self._known = [p for p in model.parameters() if p.requires_grad]
        self._names = list(selected)
        self._params: list[Tensor] = list(selected.values())
        self._optimizer = None if optimizer is None else make_optimizer(where, optimizer, self._params, cfg.lr)
        self._users, self._items = Batching(where, "user"), Batching(where, "experience item")
        self._statistics = guards.LossStatistics(cfg.ema_decay or 0.0)
        self._buffers = [(m, name) for m in model.modules() for name, b in own_buffers(m).items() if b is not None]
        # Parameters as one vector each: a guard is then a few operations, not a few per parameter.
        with torch.no_grad():
            self._theta = self._vector()
        self._views = guards.unflatten(self._theta, self._params)
        self._anchor, self._average = self._theta.clone(), self._theta.clone()
        self.snapshot()

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        memo[id(self)] = copied = object.__new__(type(self))
        vars(copied).update(detached_copy(vars(self), memo))
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._views = guards.unflatten(self._theta, self._params)  # pickle stores a view as a tensor of its own

    # ------------------------------------------------------------------------------------------------ one model

    @outside_inference_mode()
    def adapt(self, loss_fn: LossFn, batch_dict: Mapping[str, Any]) -> float:
        """Up to ``max_steps_per_call`` gradient steps; returns the total loss at the last step, before it was made.

        Args:
            loss_fn: ``(predictions, targets) -> scalar``.
            batch_dict: ``states`` ``(n, ...)``, ``targets`` ``(n, ...)``; optionally ``hidden_state``, given to the
                model as its second argument (a tensor or a nest of them), ``mask``, bool ``(n,)`` or ``(n, time)``:
                only where it is True do predictions and targets count (they then reach loss_fn flattened to
                ``(count, ...)``); ``context_embedding`` and ``task`` for the retriever. All on the model's device,
                floating states and targets in its dtype.

        Returns:
            The total loss; the offending value (perhaps NaN) when the call ended in a rollback.

        Raises:
            TypeError, ValueError: the batch is empty or does not fit together, loss_fn returns something else than a
                scalar that depends on the adapted parameters, or a parameter was unfrozen or replaced since the Adapter
                was made; no parameter has been modified then.
        """
        where = "Adapter.adapt"
        self._check_parameters(where)
        batch = objective.check_batch(where, loss_fn, batch_dict, self._params[0], 1)
        return self._adapt(where, self.model, loss_fn, batch, self._experience(where, batch_dict))

    def adapt_stream(self, loss_fn: LossFn, batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Tensor, float]]:
        """:meth:`adapt` along a stream: each batch is predicted first, then learned from.

        A recurrent model (one with ``scan`` and ``step``, as :class:`eaml_ext.nn.SSM`) keeps its hidden state from
        batch to batch, without gradient, through ``scan`` for states ``(n, time, ...)`` and ``step`` for ``(n, ...)``.
        It starts at zero, anew where n changes, and where a batch has a ``hidden_state``, from that (None: zero). A
        batch that would make it not finite leaves it as it was. The prediction costs nothing extra: it is that of the
        first step.

        Args:
            loss_fn: as in :meth:`adapt`.
            batches: any iterable of what :meth:`adapt` takes; it is read one by one, as results are asked for.

        Yields:
            ``(predictions, total)``: what the model said of a batch before it saw its targets, and what
            :meth:`adapt` would have returned.

        Raises:
            TypeError, ValueError: as in :meth:`adapt`.

        >>> import torch
        >>> from eaml_ext import SSM
        >>> _ = torch.manual_seed(0)
        >>> wave = torch.linspace(0, 60, 601).sin().view(1, -1, 1)
        >>> batches = [{"states": x[:, :-1], "targets": x[:, 1:]} for x in wave.unfold(1, 6, 5).mT.unbind(1)]
        >>> adapter = Adapter(SSM(1, 16, 1), AdaptationConfig(lr=0.3))
        >>> stream = adapter.adapt_stream(torch.nn.functional.mse_loss, batches)
        >>> errors = [float((y - x["targets"]).square().mean()) for (y, _), x in zip(stream, batches)]
        >>> sum(errors[-20:]) < 0.1 * sum(errors[:20])
        True
        """
        where = "Adapter.adapt_stream"
        objective.check_loss(where, loss_fn)
        if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
            raise TypeError(f"{where}: batches must be an iterable of dicts, got {type(batches).__name__}")
        return self._stream(where, loss_fn, batches)

    def _stream(
        self, where: str, loss_fn: LossFn, batches: Iterable[Mapping[str, Any]]
    ) -> Iterator[tuple[Tensor, float]]:
        hidden, rows = None, 0
        for given in batches:
            prediction, value, hidden, rows = self._stream_step(where, loss_fn, given, hidden, rows)
            yield prediction, value

    @outside_inference_mode()
    def _stream_step(
        self, where: str, loss_fn: LossFn, given: Mapping[str, Any], hidden: Any, rows: int
    ) -> tuple[Tensor, float, Any, int]:
        """One batch of a stream: its prediction and total, the hidden state after it and how many rows that has."""
        self._check_parameters(where)
        recurrent = hasattr(self.model, "scan") and hasattr(self.model, "step")
        batch = objective.check_batch(where, loss_fn, given, self._params[0], 1)
        experience = self._experience(where, given)
        if recurrent:
            if "hidden_state" in given or rows != len(batch["states"]):
                hidden, rows = batch.get("hidden_state"), len(batch["states"])
            batch["hidden_state"] = hidden
        first: list[Any] = []

        def call(x: Tensor, state: Any = None) -> Any:
            if recurrent:
                y, state = (self.model.scan if x.dim() == 3 else self.model.step)(x, state)  # type: ignore[operator]
            else:
                y = self.model(x) if state is None else self.model(x, state)
            if not first:
                first.extend((y, state))
            return y

        value = self._adapt(where, call, loss_fn, batch, experience)
        if recurrent and all(bool(torch.isfinite(leaf).all()) for leaf in tree_leaves(first[1])):
            hidden = tree_map(Tensor.detach, first[1])
        return first[0].detach(), value, hidden, rows

    def _adapt(self, where: str, call: Any, loss_fn: LossFn, batch: Any, experience: Any) -> float:
        buffers = self._copy_buffers()
        with torch.no_grad():
            self._vector(self._theta)
            self._anchor.copy_(self._theta)
        radius = math.inf
        if self.cfg.trust_region_eps:
            radius = self.cfg.trust_region_eps * (float(guards.norm(self._anchor)) or 1.0)
        self.last_steps = 0
        value = math.nan
        for step in range(self.cfg.max_steps_per_call):
            try:
                with torch.enable_grad():
                    total, goal = self._losses(where, call, loss_fn, batch, experience)
                    value = float(total.detach())
                    sound = math.isfinite(value) and not self._statistics.spikes(value, first=step == 0)
                    grads = objective.gradients(where, goal, self._params) if sound else []
            except BaseException:
                with torch.no_grad():
                    self._put_buffers(buffers)
                    if step:
                        self._put(self._anchor)
                raise
            with torch.no_grad():
                if sound:
                    if step == 0:
                        self._statistics.update(value)
                    # Only parameters whose loss has been seen to be sound are averaged: a rollback can trust them.
                    self._average.lerp_(self._theta, 1 - (self.cfg.ema_decay or 0.0))
                    sound = self._step(where, grads, radius)
                if not sound:
                    self.rollbacks += 1
                    self._put(self._average)
                    self._put_buffers(buffers)
                    break
            self.last_steps += 1
        return value

    def _step(self, where: str, grads: list[Tensor], radius: float) -> bool:
        """One clipped and projected step; False when the gradient or the new parameters are not finite."""
        g = torch.cat([grad.reshape(-1) for grad in grads])
        norm = float(guards.norm(g))
        if not math.isfinite(norm):
            return False
        clip = self.cfg.grad_clip_norm or math.inf
        scale = clip / norm if norm > clip else 1.0
        if self._optimizer is None:
            self._theta.add_(g, alpha=-self.cfg.lr * scale)
        else:
            kept = [p.grad for p in self._params]
            for p, grad in zip(self._params, grads, strict=True):
                p.grad = grad * scale if p.requires_grad else None
            try:
                take_step(where, self._optimizer)
            finally:
                for p, old in zip(self._params, kept, strict=True):
                    p.grad = old
            self._vector(self._theta)
        moved = self._theta - self._anchor
        distance = float(guards.norm(moved))
        if not math.isfinite(distance):
            return False
        if distance > radius:
            torch.add(self._anchor, moved, alpha=radius / distance, out=self._theta)
        if self._optimizer is None or distance > radius:
            foreach_copy_(self._params, self._views)
        return True

    # ------------------------------------------------------------------------------------------- many users at once

    @outside_inference_mode()
    def adapt_many(
        self,
        loss_fn: LossFn,
        batch_dict: Mapping[str, Any],
        params: Mapping[str, Tensor] | None = None,
        history: guards.UserHistory | None = None,
        *,
        per_user: str | Sequence[str] = (),
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Adapt a batch of independent users at once, each a copy of the model; the model itself does not change.

        Every user takes ``max_steps_per_call`` plain gradient steps with a clip and a trust region of its own. With
        ``history`` each has an average and loss statistics of its own too, and so exactly what an Adapter of its own
        would do in :meth:`adapt`. Without one there is no spike rule, and a user whose loss, gradient or parameters
        are not finite returns to the parameters it began the call with and stays there until the next. All users share
        the model's buffers, so batch norm must be in eval mode. Where ``torch.func.vmap`` cannot run the model or the
        loss, users run one at a time, after one RuntimeWarning.

        Args:
            loss_fn: as in :meth:`adapt`, for one user; runs under ``torch.func.vmap``.
            batch_dict: as in :meth:`adapt`. ``states``, ``targets``, ``hidden_state``, ``mask`` and
                ``context_embedding`` have one more leading dimension, ``users``; ``task`` is one id for all users, or a
                tensor, array or sequence of ``users`` entries. The retriever gets each user's part of these, and every
                other entry whole, whatever its shape. With ``mask``, all users must have equally many True. Retrieval
                is by user, and must find equally many for all of them.
            params: what an earlier call returned, to go on from there; default: every user starts at the model.
            history: from :meth:`history`, the same object in every call; it is brought up to date in place.
            per_user: names of further entries, one or several, for the retriever: sequences of ``users`` values, or
                tensors and arrays ``(users, ...)``, also in nests.

        Returns:
            ``(params, losses)``: name to ``(users, *shape)`` for the adapted parameters, to be used with
            :func:`eaml_ext.meta.functional.functional_call`, and ``(users,)``, each user's total at its last step.

        Raises:
            TypeError, ValueError: as in :meth:`adapt`; ``params`` or ``history`` do not fit, an entry of each user has
                another leading dimension, the model has batch norm in training mode, or this adapter has an
                ``optimizer``, whose state would have to be one per user.

        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> adapter = Adapter(nn.Linear(4, 1), AdaptationConfig(lr=0.1))
        >>> batch = {"states": torch.randn(8, 16, 4), "targets": torch.randn(8, 16, 1)}
        >>> params, history = None, adapter.history(users=8)
        >>> for _ in range(3):
        ...     params, losses = adapter.adapt_many(nn.functional.mse_loss, batch, params, history)
        >>> params["weight"].shape, losses.shape
        (torch.Size([8, 1, 4]), torch.Size([8]))
        """
        where = "Adapter.adapt_many"
        if self._optimizer is not None:
            raise ValueError(f"{where}: takes plain gradient steps, but this adapter has an optimizer")
        self._check_parameters(where)
        check_buffers_constant(where, self.model)
        batch = objective.check_batch(where, loss_fn, batch_dict, self._params[0], 2)
        users = len(batch["states"])
        anchor = self._stacked(where, params, users)
        if history is not None:
            if not isinstance(history, guards.UserHistory):
                raise TypeError(f"{where}: history must come from Adapter.history, got {type(history).__name__}")
            if len(history.statistics) != users:
                raise ValueError(f"{where}: history is of {len(history.statistics)} users, the batch of {users}")
            if history.average is not None and history.average.shape != anchor.shape:
                got, wanted = history.average.shape[1], anchor.shape[1]
                raise ValueError(f"{where}: history is of {got} numbers per user, the adapted parameters are {wanted}")
        experience = self._experience_of_users(where, batch_dict, users, per_user)
        depth = batch.get("mask_dims")
        data: dict[str, Any] = {n: batch[n] for n in ("states", "targets", "hidden_state", "rows") if n in batch}
        in_dims = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, (anchor, data, experience))

        def losses_of(theta: Tensor, data: dict[str, Any], experience: Any) -> tuple[Tensor, Tensor]:
            parts = guards.unflatten(theta, self._params)
            chosen = {name: v.to(p.dtype) for name, v, p in zip(self._names, parts, self._params, strict=True)}

            def call(*inputs: Any) -> Any:
                return functional_call(self.model, chosen, inputs)

            return self._losses(where, call, loss_fn, {**data, "mask_dims": depth}, experience)

        def evaluate(batch: Map, theta: Tensor) -> tuple[Tensor, Tensor]:
            leaf = theta.detach().requires_grad_()
            total, goal = batch(losses_of, in_dims)(leaf, data, experience)
            # Users share nothing that is asked for: the gradient of the sum holds each one's own.
            (g,) = objective.gradients(where, goal.sum(), [leaf])
            return total.detach(), g

        moving = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in self._params]).to(anchor.device)
        norm = guards.norm(anchor)
        eps, clip = self.cfg.trust_region_eps or math.inf, self.cfg.grad_clip_norm or math.inf
        radius = eps * torch.where(norm > 0, norm, 1.0)
        alive = torch.ones_like(norm, dtype=torch.bool)
        values = torch.zeros_like(norm)
        theta = anchor
        for step in range(self.cfg.max_steps_per_call):
            with torch.enable_grad(), twice_differentiable_attention():  # vmap runs attention by its formula alone
                total, g = self._users.run(partial(evaluate, theta=theta), anchor.device)
            with torch.no_grad():
                g = torch.where(moving, g, 0.0)
                values = torch.where(alive, total, values)
                before, alive = alive, alive & torch.isfinite(total)
                if history is not None:
                    alive = history.observe(theta, values, alive, first=step == 0)
                norm = guards.norm(g)
                moved = theta - (self.cfg.lr * (clip / norm).clamp(max=1)).unsqueeze(1) * g - anchor
                distance = guards.norm(moved)
                alive = alive & torch.isfinite(norm) & torch.isfinite(distance)
                stepped = anchor + (radius / distance).clamp(max=1).unsqueeze(1) * moved
                failed = before & ~alive
                refuge = anchor if history is None or history.average is None else history.average
                theta = torch.where(failed.unsqueeze(1) & moving, refuge, theta)
                theta = torch.where(alive.unsqueeze(1), stepped, theta)
                if history is not None:
                    history.count(alive, failed, first=step == 0)
        parts = [v.view(users, *p.shape).to(p.dtype) for v, p in zip(self._split(theta), self._params, strict=True)]
        return dict(zip(self._names, parts, strict=True)), values

    def history(self, users: int) -> guards.UserHistory:
        """What :meth:`adapt_many` has to know of ``users`` users from call to call; all of them start afresh.

        Its attributes ``rollbacks`` and ``last_steps``, lists of one integer per user, are as those of an Adapter;
        ``average`` ``(users, parameters)`` holds the averaged parameters, and :meth:`ema_params` names them.
        """
        users = _check.positive("Adapter.history", "users", users, integer=True)
        return guards.UserHistory(users, self.cfg.ema_decay or 0.0)

    def ema_params(self, history: guards.UserHistory) -> dict[str, Tensor]:
        """The averaged parameters of each user, named and shaped as :meth:`adapt_many` returns the parameters."""
        if not isinstance(history, guards.UserHistory):
            kind = type(history).__name__
            raise TypeError(f"Adapter.ema_params: history must come from Adapter.history, got {kind}")
        if history.average is None:
            raise ValueError("Adapter.ema_params: history has seen no call of adapt_many yet")
        users = len(history.average)
        parts = zip(self._names, self._split(history.average), self._params, strict=True)
        return {name: v.reshape(users, *p.shape).to(p.dtype) for name, v, p in parts}

    def _stacked(self, where: str, params: Mapping[str, Tensor] | None, users: int) -> Tensor:
        if params is None:
            with torch.no_grad():
                return self._vector().expand(users, -1).clone()
        if not isinstance(params, Mapping):
            raise TypeError(f"{where}: params must be a dict of tensors by name, got {type(params).__name__}")
        if set(params) != set(self._names):
            raise ValueError(f"{where}: params has {', '.join(params)}, wanted {', '.join(self._names)}")
        for name, p in zip(self._names, self._params, strict=True):
            value = params[name]
            _check.tensor(where, f"params[{name!r}]", value)
            _check.shape(where, f"params[{name!r}]", value, (users, *p.shape), str((users, *p.shape)))
            _check.dtype(where, f"params[{name!r}]", value, (p.dtype,))
            _check.device(where, f"params[{name!r}]", value, p.device, "the model")
        return torch.cat([params[name].detach().reshape(users, -1) for name in self._names], 1)

    # -------------------------------------------------------------------------------------------- loss and batch

    def _losses(self, where: str, call: Any, loss_fn: LossFn, batch: Any, experience: Any) -> tuple[Tensor, Tensor]:
        weights = self.experience_weight, self.cfg.entropy_weight or 0.0
        return objective.losses(where, call, loss_fn, batch, experience, *weights, self._items)

    @property
    def _uses_experience(self) -> bool:
        return bool(self.experience_weight) and (self.experience_buffer is not None or self._retriever is not _retrieve)

    def _experience(self, where: str, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
        if not self._uses_experience:
            return None
        found = self._retriever(self.experience_buffer, batch)  # type: ignore[arg-type]
        return objective.check_experience(where, found, self._params[0])

    def _experience_of_users(
        self, where: str, batch: Mapping[str, Any], users: int, per_user: str | Sequence[str]
    ) -> dict[str, Tensor] | None:
        if not self._uses_experience:
            return None
        found = [self._experience(where, part) for part in _by_user(where, batch, users, per_user)]
        kept = [f for f in found if f is not None]
        if not kept:
            return None
        if len(kept) < users or len({tuple((name, x.shape) for name, x in f.items()) for f in kept}) > 1:
            raise ValueError(f"{where}: the retriever must find equally many experiences for all users")
        return {name: torch.stack([f[name] for f in kept]) for name in kept[0]}

    # ------------------------------------------------------------------------------------------------ parameters

    @outside_inference_mode()
    def ema_model(self) -> nn.Module:
        """A copy of the model with the averaged parameters: steadier than the model itself on a noisy stream."""
        self._check_replaced("Adapter.ema_model")
        model = detached_copy(self.model)
        chosen = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self._named(self._average).items():
                if chosen[name].requires_grad:
                    chosen[name].copy_(value)
        return model

    @outside_inference_mode()
    def snapshot(self) -> None:
        """Remember the adapted parameters and the model's buffers as they are, for :meth:`reset`; done on creation."""
        self._check_replaced("Adapter.snapshot")
        with torch.no_grad():
            self._home = self._vector()
        self._home_buffers = self._copy_buffers()

    @outside_inference_mode()
    def reset(self) -> None:
        """Return to the snapshot; average, statistics, counters and optimiser start anew from there."""
        self._check_replaced("Adapter.reset")
        with torch.no_grad():
            self._put(self._home)
            self._put_buffers(self._home_buffers)
            self._average.copy_(self._home)
        self._statistics = guards.LossStatistics(self.cfg.ema_decay or 0.0)
        self.last_steps = self.rollbacks = 0

    def _check_replaced(self, where: str) -> None:
        """Raise ValueError unless the selected parameters are those of the beginning, some of them frozen perhaps."""
        with SUBSTITUTION_LOCK:
            present, known = set(map(id, self.model.parameters())), set(map(id, self._known))
            changed = [n for n, p in zip(self._names, self._params, strict=True) if id(p) not in present]
            if any(p.requires_grad and id(p) not in known for p in self.model.parameters()):
                changed += [name for name, p in select(self.model, self._choice).items() if id(p) not in known]
        if changed:
            text = f"{changed[0]} was unfrozen or replaced after this Adapter was made: make a new Adapter"
            raise ValueError(f"{where}: {text}")

    def _check_parameters(self, where: str) -> None:
        """Raise ValueError where parameters were replaced, or none of those selected requires a gradient."""
        self._check_replaced(where)
        if not any(p.requires_grad for p in self._params):
            raise ValueError(f"{where}: all adapted parameters are frozen, {', '.join(self._names)}")

    def _vector(self, out: Tensor | None = None) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self._params], out=out)

    def _split(self, vector: Tensor) -> Sequence[Tensor]:
        parts: Sequence[Tensor] = vector.split([p.numel() for p in self._params], -1)
        return parts

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._names, guards.unflatten(vector, self._params), strict=True))

    def _put(self, values: Tensor) -> None:
        """Set the parameters that are not frozen."""
        self._theta.copy_(values)
        for p, view in zip(self._params, self._views, strict=True):
            if p.requires_grad:
                p.copy_(view)
        if self._optimizer is not None:
            self._optimizer.state.clear()  # its moments may hold what the rollback is about

    def _put_buffers(self, buffers: list[Tensor]) -> None:
        for (module, name), value in zip(self._buffers, buffers, strict=True):
            own = own_buffers(module).get(name)
            if own is None or own.shape != value.shape or own.is_inference():
                own_buffers(module)[name] = value.clone()
            else:
                own.copy_(value)

    def _copy_buffers(self) -> list[Tensor]:
        return [own_buffers(module)[name].detach().clone() for module, name in self._buffers]

    def state_dict(self) -> dict[str, Any]:
        """What the adapter knows beyond the model's own ``state_dict``, as copies: save both to go on exactly."""
        return {
            "average": {n: v.clone() for n, v in self._named(self._average).items()},
            "snapshot": {n: v.clone() for n, v in self._named(self._home).items()},
            "snapshot_buffers": [v.clone() for v in self._home_buffers],
            "statistics": self._statistics.state_dict(),
            "last_steps": self.last_steps,
            "rollbacks": self.rollbacks,
            "optimizer": None if self._optimizer is None else copy.deepcopy(self._optimizer.state_dict()),
        }

    @outside_inference_mode()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; the model's own state is loaded separately.

        Raises:
            ValueError: an entry is missing, or names or shapes differ; nothing has been modified then.
        """
        where = "Adapter.load_state_dict"
        entries = sorted(self.state_dict())
        if not isinstance(state, Mapping) or sorted(state) != entries:
            raise ValueError(f"{where}: state must be a dict with the entries {', '.join(entries)}")
        for entry in ("average", "snapshot"):
            if set(state[entry]) != set(self._names):
                raise ValueError(f"{where}: {entry} has {', '.join(state[entry])}, wanted {', '.join(self._names)}")
            for name, p in zip(self._names, self._params, strict=True):
                _check.tensor(where, f"{entry} of {name}", state[entry][name])
                _check.shape(where, f"{entry} of {name}", state[entry][name], p.shape, str(tuple(p.shape)))
        if (state["optimizer"] is None) != (self._optimizer is None):
            raise ValueError(f"{where}: one of the state and the adapter has an optimizer, the other has none")
        if self._optimizer is not None:
            check_state(where, state["optimizer"], self._optimizer)
        got, wanted = ([tuple(b.shape) for b in bs] for bs in (state["snapshot_buffers"], self._home_buffers))
        if got != wanted:
            raise ValueError(f"{where}: snapshot_buffers has the shapes {got}, the model's buffers {wanted}")
        if set(state["statistics"]) != set(self._statistics.state_dict()):
            names = ", ".join(sorted(self._statistics.state_dict()))
            raise ValueError(f"{where}: statistics must be a dict with the entries {names}")
        if self._optimizer is not None:
            load_state(self._optimizer, state["optimizer"])
        for entry, vector in (("average", self._average), ("snapshot", self._home)):
            vector.copy_(torch.cat([state[entry][name].detach().reshape(-1) for name in self._names]))
        for own, value in zip(self._home_buffers, state["snapshot_buffers"], strict=True):
            own.copy_(value)
        vars(self._statistics).update(state["statistics"])
        self.last_steps, self.rollbacks = state["last_steps"], state["rollbacks"]


def _retrieve(buffer: ExperienceBuffer, batch: Mapping[str, Any]) -> dict[str, Tensor] | None:
    make = retrieval.nearest if "context_embedding" in batch else retrieval.uniform
    return make(len(batch["states"]))(buffer, batch)


def _by_user(where: str, batch: Mapping[str, Any], users: int, per_user: str | Sequence[str]) -> list[dict[str, Any]]:
    """Each user's part of the entries that are one per user, with all other entries whole."""
    names = [per_user] if isinstance(per_user, str) else per_user
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{where}: per_user must be names of entries, got {per_user!r}")
    for name in names:
        if name not in batch:
            raise ValueError(f"{where}: per_user has {name}, batch_dict has only {', '.join(map(str, batch))}")
    own = {name: batch[name] for name in (*_PER_USER, *names) if batch.get(name) is not None}
    if "task" not in names and not _has_length(own.get("task")):
        own.pop("task", None)
    if "hidden_state" not in names and not _arrays(own.get("hidden_state")):
        own.pop("hidden_state", None)
    parts = {name: _parts(where, name, value, users) for name, value in own.items()}
    return [{**batch, **{name: part[i] for name, part in parts.items()}} for i in range(users)]


def _has_length(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return bool(value.ndim)
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def _arrays(value: Any) -> list[Tensor | np.ndarray]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, (Tensor, np.ndarray))]


def _parts(where: str, name: str, value: Any, users: int) -> list[Any]:
    """Each user's part: an item of a sequence of values, or a nest with an item of each of its tensors."""
    arrays = _arrays(value)
    if not arrays and (not isinstance(value, Sequence) or isinstance(value, (str, bytes))):
        raise TypeError(f"{where}: {name} must be a tensor, an array or a sequence, got {type(value).__name__}")
    for shape in [tuple(leaf.shape) for leaf in arrays] or [(len(value),)]:
        if shape[:1] != (users,):
            raise ValueError(f"{where}: {name} must have shape (users, ...), users = {users}, got {shape}")
    if arrays:
        return [
            tree_map(lambda leaf: leaf[i] if isinstance(leaf, (Tensor, np.ndarray)) else leaf, value)  # noqa: B023
            for i in range(users)
        ]
    return list(value)
