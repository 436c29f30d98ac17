"""Test-time adaptation with guards: a few bounded gradient steps per call on a batch and on retrieved experience."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext._renamed import adapter_entries, adapter_statistics
from eaml_ext.adaptation import _experience, objective
from eaml_ext.adaptation._flat_params import FlatParams, ModelBuffers
from eaml_ext.adaptation._model import evaluate_model
from eaml_ext.adaptation._state import check_adapter_state
from eaml_ext.adaptation._stream import StreamedModel
from eaml_ext.adaptation._update import gradient_descent, guarded_update, optimizer_step
from eaml_ext.adaptation._users import evaluate_users
from eaml_ext.adaptation.config import AdaptationConfig
from eaml_ext.adaptation.guards import UserHistory, check_history
from eaml_ext.experience import ExperienceBuffer, retrieval
from eaml_ext.meta._batching import Batching
from eaml_ext.meta._cuda_graphs import GraphCache
from eaml_ext.meta._optimizer import load_state, make_optimizer
from eaml_ext.meta._types import LossFn, Params
from eaml_ext.meta._validation import check_buffers_constant, check_model
from eaml_ext.meta.functional import detached_copy, outside_inference_mode
from eaml_ext.meta.selection import ParameterFilter


class Adapter:
    """Adapts a model to a stream of batches, a few guarded gradient steps per call.

    The reported loss and the objective of the steps are::

        total     = loss_current + experience_weight · loss_experience
        objective = total / (1 + experience_weight) + entropy_weight · H

    The division makes the step size independent of the weight; without experience, total is loss_current, undivided.
    Each step clips the gradient by its global norm, moves θ and projects it onto the trust region around the parameters
    at the start of the call. AdaptationConfig has the formulas.

    *Rollback.* A loss, gradient or parameter vector that is not finite ends the call, and so does a spike of the loss.
    θ returns to the averaged parameters, even if they lie outside the trust region. The model's buffers return to their
    values before the call, and the optimizer's state is cleared.

    *Spike.* A total v is a spike when ``v − m > max(6·s, |m|)``, with m and s the running mean and standard deviation
    of the totals with which accepted calls began. The rule applies after 10 of them; those of the first 10 that are
    outliers by the same rule around their median are removed and replaced. Spikes do not enter m and s. The third call
    in a row that begins with a spike restarts the statistics and is accepted, because the task has changed. A rollback
    therefore costs one evaluation of the loss, happens once per call, and cannot stop the adaptation for good.

    The model's mode (train or eval) is never changed, nor is any ``.grad``, nor a parameter that requires no gradient
    or is not selected. A parameter may be frozen, and unfrozen again, at any time. If a parameter is unfrozen or
    replaced for the first time after construction, a new Adapter is required. The model must stay on its device. After
    setting its parameters by other means, call :meth:`snapshot`, then :meth:`reset`.

    Args:
        model: called as ``model(states)`` or ``model(states, hidden_state)``; returns one tensor.
        cfg: the limits; None: the defaults of AdaptationConfig.
        experience_buffer: the source of experience; None: none is used.
        experience_weight: w ≥ 0 above; 0: nothing is retrieved.
        retriever: ``(buffer, batch_dict) -> {"states": ..., "targets": ...} or None``, called once per call; see
            ``eaml_ext.experience.retrieval``. With ``"weights"`` ``(n,)`` too, loss_experience is the mean of the
            items' own losses, each ``loss_fn(prediction (1, ...), target (1, ...))``, with these weights. With
            ``"mask"`` ``(n, time)``, which a buffer with ragged fields adds, loss_fn receives only the steps where it
            is True, as with the mask of a batch. The default
            returns one item for each row of the batch: the nearest to ``batch_dict["context_embedding"]`` if given,
            without those of ``batch_dict["task"]``; uniform ones otherwise.
        parameters: the parameters that adapt, by a prefix of names or several (``"head"`` means ``head.weight`` and
            ``head.bias``), a compiled pattern that is searched in the name, or ``(name, parameter) -> bool``. The
            usual choices are :func:`norm_parameters` and :func:`output_parameters`. Default: all that require a
            gradient.
        optimizer: a ``torch.optim`` class or any factory called as ``optimizer(params, lr=lr)``; its state persists
            across calls, and it must step without a closure. Default: plain gradient descent, without state.
        compile: on a GPU, replay the loss and its gradient as a CUDA graph in :meth:`adapt` and :meth:`adapt_many`. It
            is captured in the second step with equal loss, shapes and settings. The requirements on model and loss are
            those of ``compile`` in :class:`eaml_ext.meta.MetaMAML`. On a CPU it has no effect.
        step_sizes: the step size of each adapted parameter by name, in place of ``cfg.lr``: a number, or a tensor that
            broadcasts to the parameter, as :attr:`eaml_ext.meta.StreamMAML.step_sizes`. Parameters that it does not
            name have ``cfg.lr``. Without ``parameters``, those that it names adapt. Excludes ``optimizer``.

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

    _graphs: GraphCache | None = None  # of objects that were pickled before graphs and step sizes existed
    _step_sizes: Tensor | None = None

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
        compile: bool = False,
        step_sizes: Mapping[str, float | Tensor] | None = None,
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
        self._graphs = GraphCache(where) if _check.flag(where, "compile", compile) else None
        if step_sizes is not None and optimizer is not None:
            raise ValueError(f"{where}: step_sizes must be None with an optimizer, which has a learning rate")
        with torch.no_grad():
            flat = FlatParams(model, parameters, step_sizes)
            if step_sizes is not None:
                self._step_sizes = flat.step_sizes(where, cfg.lr, step_sizes)

        self.model = model
        self.cfg = cfg
        self.experience_buffer = experience_buffer
        self.experience_weight = experience_weight
        self._retriever = _experience.default_retriever if retriever is None else retriever
        self._flat, self._buffers = flat, ModelBuffers(model)
        self._optimizer = None if optimizer is None else make_optimizer(where, optimizer, flat.params, cfg.lr)
        self._users, self._items = Batching(where, "user"), Batching(where, "experience item")
        self._history = self.history(1)
        self.snapshot()
        self._history.average = self._home

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        memo[id(self)] = copied = object.__new__(type(self))
        vars(copied).update(detached_copy(vars(self), memo))
        return copied

    @property
    def last_steps(self) -> int:
        """The number of gradient steps of the last call."""
        return self._history.last_steps[0]

    @property
    def rollbacks(self) -> int:
        """The number of calls that ended in a rollback since the last reset."""
        return self._history.rollbacks[0]

    # ------------------------------------------------------------------------------------------------ one model

    @outside_inference_mode()
    def adapt(self, loss_fn: LossFn, batch_dict: Mapping[str, Any]) -> float:
        """Take up to ``max_steps_per_call`` gradient steps; return the total loss before the last of them.

        Args:
            loss_fn: ``(predictions, targets) -> scalar``.
            batch_dict: ``states`` ``(n, ...)`` and ``targets`` ``(n, ...)``. Optional: ``hidden_state``, the model's
                second argument (a tensor or a nest of them); ``mask``, bool ``(n,)`` or ``(n, time)``; and for the
                retriever ``context_embedding`` and ``task``. With a mask, loss_fn receives only the predictions and
                targets where it is True, flattened to ``(count, ...)``. All tensors are on the model's device, floating
                states and targets in its dtype.

        Returns:
            The total loss; after a rollback the offending value, which may be NaN.

        Raises:
            TypeError, ValueError: the batch is empty or does not fit together. The value of loss_fn is no scalar that
                depends on the adapted parameters. A parameter was unfrozen or replaced after construction. The
                parameters are then as before the call.
        """
        where = "Adapter.adapt"
        self._flat.check_trainable(where)
        batch = objective.check_batch(where, loss_fn, batch_dict, self._like, 1)
        return self._adapt(where, self.model, loss_fn, batch, self._retrieve(where, batch_dict), self._graphs)

    def adapt_stream(
        self, loss_fn: LossFn, batches: Iterable[Mapping[str, Any]], *, label_delay: int = 0
    ) -> Iterator[tuple[Tensor, float]]:
        """Apply :meth:`adapt` along a stream; each batch is predicted before the model adapts to it.

        A recurrent model (one with ``scan`` and ``step``, as :class:`eaml_ext.nn.SSM`) keeps its hidden state from
        batch to batch, without gradient. It runs ``scan`` on states ``(n, time, features)`` and on tokens, integers
        ``(n, time)``, and ``step`` on others. The hidden state starts at zero, and again at zero where n changes. A
        batch with a ``hidden_state`` replaces it (None: zero). A batch after which it would not be finite leaves it as
        it was. The prediction is that of the first step, so it costs no further evaluation.

        With all guards off, these are the updates through which :class:`eaml_ext.meta.StreamMAML` trains.

        Args:
            loss_fn: as in :meth:`adapt`.
            batches: an iterable of arguments of :meth:`adapt`; each is read when its result is requested. ``reset``
                ``(n, time)``, bool, zeroes the state of a recurrent model before step t.
            label_delay: the number of batches until the targets of a batch are known. The steps after a batch are then
                taken on the batch that came ``label_delay`` earlier, from the hidden state before it. The entry
                ``targets`` of a batch is read no earlier, so it may be added to the dict until then.

        Yields:
            ``(predictions, total)``: the model's output for a batch before the steps on it, and the result of
            :meth:`adapt`; NaN for each of the first ``label_delay`` batches, after which no step is taken.

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
        label_delay = _check.positive(where, "label_delay", label_delay, zero=True, integer=True)
        return self._stream(where, loss_fn, batches, label_delay)

    def _stream(
        self, where: str, loss_fn: LossFn, batches: Iterable[Mapping[str, Any]], delay: int
    ) -> Iterator[tuple[Tensor, float]]:
        model = StreamedModel(where, self.model)
        waiting: deque[tuple[Mapping[str, Any], Tensor, Any]] = deque()  # batches, their states, hidden states
        for given in batches:
            with outside_inference_mode():
                self._flat.check_trainable(where)
                objective.check_entry(where, given, "states", self._like, 1)
                start = model.begin(given)
                prediction = model.predict(given, start) if delay else None
                waiting.append((given, given["states"], start))
                value = math.nan
                if len(waiting) > delay:
                    due, states, start = waiting.popleft()
                    if due.get("states") is not states:
                        raise ValueError(f"{where}: the states of a batch must stay in its dict until it has targets")
                    batch = objective.check_batch(where, loss_fn, due, self._like, 1)
                    experience = self._retrieve(where, due)
                    value = self._adapt(where, model.bind(batch, start), loss_fn, batch, experience)
                result = model.end() if prediction is None else prediction, value
            yield result

    def _adapt(
        self,
        where: str,
        call: Callable[..., Any],
        loss_fn: LossFn,
        batch: dict[str, Any],
        experience: dict[str, Any] | None,
        graphs: GraphCache | None = None,
    ) -> float:
        """Apply the guarded update to the model's own parameters: one user, without vmap."""
        flat, history, losses = self._flat, self._history, self._losses(where, loss_fn)
        buffers, rollbacks = self._buffers.copy(), history.rollbacks[0]
        history.last_steps[0] = 0
        step = gradient_descent(self.cfg.lr, self._step_sizes)
        if self._optimizer is not None:
            step = optimizer_step(where, self._optimizer, flat)
        evaluate = evaluate_model(where, self.model, call, flat, losses, batch, experience, graphs)

        with torch.no_grad():
            anchor = flat.vector()
            try:
                theta, totals = guarded_update(evaluate, anchor, step, self.cfg, history, flat.trainable())
            except BaseException:
                self._buffers.write(buffers)
                if not torch.equal(flat.vector(), anchor):
                    self._write(anchor)
                raise
            if history.rollbacks[0] > rollbacks:
                self._write(theta)
                self._buffers.write(buffers)
            else:
                flat.write(theta)
        return float(totals)

    # ------------------------------------------------------------------------------------------- many users at once

    @outside_inference_mode()
    def adapt_many(
        self,
        loss_fn: LossFn,
        batch_dict: Mapping[str, Any],
        params: Mapping[str, Tensor] | None = None,
        history: UserHistory | None = None,
        *,
        per_user: str | Sequence[str] = (),
    ) -> tuple[Params, Tensor]:
        """Adapt a batch of independent users at once, each a copy of the model; the model itself does not change.

        Every user takes ``max_steps_per_call`` plain gradient steps with its own clip and trust region. With
        ``history`` each has its own average and loss statistics too, and the steps are those of :meth:`adapt` by an
        Adapter of its own. Without a history there is no spike rule. A user whose loss, gradient or parameters are not
        finite then returns to its parameters before the call and stays there until the next. All users share the
        model's buffers, so batch norm must be in eval mode. Where ``torch.func.vmap`` cannot run the model or the loss,
        users run one at a time, after one RuntimeWarning.

        Args:
            loss_fn: as in :meth:`adapt`, for one user; runs under ``torch.func.vmap``.
            batch_dict: as in :meth:`adapt`. ``states``, ``targets``, ``hidden_state``, ``mask`` and
                ``context_embedding`` have one more leading dimension, ``users``; ``task`` is one id for all users, or a
                tensor, array or sequence of ``users`` entries. The retriever is called for each user with its part of
                these, and with every other entry whole, whatever its shape. It must return equally many items for all
                users. With ``mask``, all users must have equally many True.
            params: the result of an earlier call, from which the users continue; default: every user starts at the
                model.
            history: from :meth:`history`, the same object in every call; it is updated in place.
            per_user: names of further entries, one or several, for the retriever: sequences of ``users`` values, or
                tensors and arrays ``(users, ...)``, also in nests.

        Returns:
            ``(params, losses)``: name to ``(users, *shape)`` for the adapted parameters, to be used with
            :func:`eaml_ext.meta.functional.functional_call`, and ``(users,)``, each user's total at its last step.

        Raises:
            TypeError, ValueError: as in :meth:`adapt`. ``params`` or ``history`` do not fit. An entry with one value
                per user has another leading dimension. The model has batch norm in training mode. This adapter has an
                ``optimizer``, which has no state per user.

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
        self._flat.check_trainable(where)
        check_buffers_constant(where, self.model)
        batch = objective.check_batch(where, loss_fn, batch_dict, self._like, 2)
        users, flat = len(batch["states"]), self._flat
        with torch.no_grad():
            anchor = flat.vector().repeat(users, 1) if params is None else flat.stack(where, params, users)
        check_history(where, history, anchor)
        experience = None
        if self._uses_experience:
            parts = _experience.split_by_user(where, batch_dict, users, per_user)
            experience = _experience.stack_experience(where, [self._retrieve(where, part) for part in parts])
        losses = self._losses(where, loss_fn)
        evaluate = evaluate_users(where, self.model, flat, losses, batch, experience, self._users, self._graphs)
        with torch.no_grad():
            theta, totals = guarded_update(
                evaluate, anchor, gradient_descent(self.cfg.lr, self._step_sizes), self.cfg, history, flat.trainable()
            )
        return flat.named(theta), totals

    def history(self, users: int) -> UserHistory:
        """Return the state that :meth:`adapt_many` keeps of ``users`` users from call to call, as before any call.

        Its attributes ``rollbacks`` and ``last_steps``, lists of one integer per user, are as those of an Adapter;
        ``average`` ``(users, parameters)`` holds the averaged parameters, and :meth:`ema_params` names them.
        """
        users = _check.positive("Adapter.history", "users", users, integer=True)
        return UserHistory(users, self.cfg.ema_decay or 0.0)

    def ema_params(self, history: UserHistory) -> Params:
        """Return the averaged parameters of each user, named and shaped as the result of :meth:`adapt_many`."""
        if not isinstance(history, UserHistory):
            kind = type(history).__name__
            raise TypeError(f"Adapter.ema_params: history must come from Adapter.history, got {kind}")
        if history.average is None:
            raise ValueError("Adapter.ema_params: history has seen no call of adapt_many yet")
        return self._flat.named(history.average)

    # -------------------------------------------------------------------------------------------- loss and experience

    def _losses(self, where: str, loss_fn: LossFn) -> objective.Losses:
        weights = self.experience_weight, self.cfg.entropy_weight or 0.0
        return partial(objective.losses, where, loss_fn, *weights, self._items)

    @property
    def _uses_experience(self) -> bool:
        given = self.experience_buffer is not None or self._retriever is not _experience.default_retriever
        return bool(self.experience_weight) and given

    def _retrieve(self, where: str, batch: Mapping[str, Any]) -> dict[str, Any] | None:
        if not self._uses_experience:
            return None
        found = self._retriever(self.experience_buffer, batch)  # type: ignore[arg-type]
        return _experience.check_experience(where, found, self._like)

    # ---------------------------------------------------------------------------------------- parameters and state

    @outside_inference_mode()
    def ema_model(self) -> nn.Module:
        """Return a copy of the model with the averaged parameters, which vary less on a noisy stream."""
        self._flat.check_replaced("Adapter.ema_model")
        model = detached_copy(self.model)
        chosen = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self._flat.named(self._average[0]).items():
                if chosen[name].requires_grad:
                    chosen[name].copy_(value)
        return model

    @outside_inference_mode()
    def snapshot(self) -> None:
        """Save the adapted parameters and the model's buffers for :meth:`reset`; the constructor does so, too."""
        self._flat.check_replaced("Adapter.snapshot")
        with torch.no_grad():
            self._home = self._flat.vector()
        self._home_buffers = self._buffers.copy()

    @outside_inference_mode()
    def reset(self) -> None:
        """Return to the snapshot; average, statistics, counters and the optimizer's state restart from there."""
        self._flat.check_replaced("Adapter.reset")
        with torch.no_grad():
            self._write(self._home)
            self._buffers.write(self._home_buffers)
        self._history = self.history(1)
        self._history.average = self._home

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the state besides the model's own ``state_dict``; with both, a run continues exactly."""
        return {
            "average": self._entries(self._average),
            "snapshot": self._entries(self._home),
            "snapshot_buffers": [v.clone() for v in self._home_buffers],
            "statistics": self._history.state_of(0),
            "last_steps": self.last_steps,
            "rollbacks": self.rollbacks,
            "optimizer": None if self._optimizer is None else copy.deepcopy(self._optimizer.state_dict()),
        }

    @outside_inference_mode()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`, also of version 0.1; the model's own state is loaded separately.

        Raises:
            ValueError: an entry is missing, or names or shapes differ; nothing has been modified then.
        """
        where = "Adapter.load_state_dict"
        if isinstance(state, Mapping) and "statistics" in state:
            state = {**state, "statistics": adapter_statistics(state["statistics"])}
            names = self.model.state_dict().keys()
            state |= {e: adapter_entries(state[e], names) for e in ("average", "snapshot") if e in state}
        flat, history = self._flat, self._history
        check_adapter_state(where, state, self.state_dict(), flat, self._optimizer)
        if self._optimizer is not None:
            load_state(self._optimizer, state["optimizer"])
        with torch.no_grad():
            average, home = (flat.concatenate([state[e][n] for n in flat.names]) for e in ("average", "snapshot"))
            history.average, self._home = average.to(self._home), home.to(self._home)
        self._home_buffers = [
            value.to(own, copy=True) for own, value in zip(self._home_buffers, state["snapshot_buffers"], strict=True)
        ]
        history.load_state_of(0, state["statistics"])
        history.last_steps[0], history.rollbacks[0] = state["last_steps"], state["rollbacks"]

    @property
    def _average(self) -> Tensor:
        assert self._history.average is not None  # set by the constructor
        return self._history.average

    @property
    def _like(self) -> Tensor:
        """A tensor with the dtype and device of the adapted parameters."""
        return self._flat.params[0]

    def _entries(self, vector: Tensor) -> Params:
        """Return copies of the parameters in a vector, ``(1, parameters)``, in its dtype."""
        return {name: v.clone() for name, v in zip(self._flat.names, self._flat.split(vector[0]), strict=True)}

    def _write(self, vector: Tensor) -> None:
        """Set the parameters that are not frozen, ``(1, parameters)``, and clear the optimizer's state."""
        self._flat.write(vector)
        if self._optimizer is not None:
            self._optimizer.state.clear()  # its moments depend on the steps that are undone
