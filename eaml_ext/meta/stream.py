"""phi_{k+1} = phi_k - lr dl_k(phi_k)/dphi_k,  theta -= outer_lr d/dtheta mean_k l_k(phi_k): MAML along streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from eaml_ext import _check
from eaml_ext.meta._batching import Batching
from eaml_ext.meta._inner_loop import twice_differentiable_attention
from eaml_ext.meta._optimizer import check_state, load_state, make_optimizer, step_if_finite
from eaml_ext.meta._stream_loop import StreamLoop
from eaml_ext.meta._streams import Streams, check_streams
from eaml_ext.meta._types import LossFn, Params
from eaml_ext.meta._validation import (
    check_buffers_constant,
    check_entries,
    check_loss_fn,
    check_model,
    check_parameters,
    check_rate,
    check_tensors,
)
from eaml_ext.meta.functional import outside_inference_mode, trainable_parameters
from eaml_ext.meta.masked_loss import MaskedLoss
from eaml_ext.meta.selection import ParameterFilter, norm_parameters, output_parameters, select
from eaml_ext.meta.stream_experience import StreamExperience

StreamMemory = Literal["reverse_over_reverse", "recompute"]
"""How the gradient through the updates is computed: see ``memory`` of :class:`StreamMAML`."""


class StreamMAML:
    """End-to-end test-time training: a model trained through the updates that it will make along a stream.

    A stream is cut into chunks of ``chunk_size`` steps. The model predicts chunk k with its slow weights, the fast
    weights phi_k and the state after chunk k - 1. Then phi takes ``inner_steps`` gradient steps on the loss of the
    chunk. The outer loss is the mean loss of all predictions. Its gradient flows through all updates and the state, in
    exact second order, to the initial weights, the step sizes and, with ``experience``, the encoder of the memory.

    At test time an :class:`eaml_ext.adaptation.Adapter` makes the same updates, with its guards around them::

        Adapter(maml.model, cfg, step_sizes=maml.step_sizes).adapt_stream(loss_fn, batches)

    A model with ``scan`` and ``step``, as :class:`eaml_ext.nn.SSM`, is called as ``scan(x, state)``; any other model as
    ``model(x)``, with ``x`` ``(1, chunk_size, ...)``. All streams run as one vmapped batch. Where ``vmap`` cannot run
    the model, streams run one at a time, after one RuntimeWarning.

    Args:
        model: its parameters that require grad are learned in place.
        inner_lr: initial step size of the updates.
        outer_lr: learning rate of the outer optimizer.
        first_order: treat the gradients of the updates as constants; nothing in ``experience`` is learned then.
        chunk_size: steps of a chunk; the last chunk of a stream may be shorter.
        parameters: the fast weights: a prefix of names or several, a compiled pattern that is searched in the name, or
            ``(name, parameter) -> bool``. None: the last norm and the output layer. Gradients of parameters behind the
            last scan, as also its output projection, need no backward pass through a scan and so are cheap.
        learn_inner_lr: learn one positive step size for each fast weight, through its logarithm.
        step_size_lr: learning rate of these logarithms; None: ten times ``outer_lr``.
        inner_steps: gradient steps after a chunk.
        label_delay: the number of chunks until the targets of a chunk are known. The update after chunk k is then taken
            on chunk k - label_delay, from the state before it. 0: they are known when the chunk has been predicted.
        truncation: chunks through which the gradient flows back. None: all.
        memory: ``"reverse_over_reverse"`` keeps the graph of all chunks. ``"recompute"`` keeps the fast weights, the
            state and the memory's keys of each chunk, and recomputes one chunk at a time: equal gradients to rounding.
            It raises ValueError where a loss differs between the two passes.
        optimizer: outer optimizer, called as ``optimizer(parameters, lr=outer_lr)``; it must step without a
            closure. The logarithms of step sizes are a parameter group of their own.
        grad_clip_norm: largest norm of the outer gradient; None: not clipped.
        experience: the memory of past chunks, learned too; None: none.

    Attributes:
        skipped_updates: meta-updates skipped because a loss or a gradient was not finite.
        last_losses: ``(streams, chunks)``, the outer losses of the last meta-update, detached; None before the first.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size, ``parameters`` selects nothing, or ``experience``
            shares a fast weight.

    Source: MAML (Finn, Abbeel & Levine 2017) along a sequence, as in TTT-E2E (Tandon et al. 2025, arXiv 2512.23675);
    learned step sizes after Meta-SGD (Li, Zhou, Chen & Li 2017).

    >>> from torch.nn.functional import mse_loss
    >>> from eaml_ext import SSM
    >>> maml = StreamMAML(SSM(2, 16, 2), inner_lr=0.05, outer_lr=1e-3, chunk_size=16)
    >>> waves = torch.randn(8, 129, 2).cumsum(1)  # (streams, time, features)
    >>> loss = maml.meta_update(waves[:, :-1], waves[:, 1:], mse_loss)
    >>> maml.last_losses.shape, list(maml.step_sizes)
    (torch.Size([8, 8]), ['norm.weight', 'head.weight', 'head.bias'])
    >>> maml.predict(waves[:, :-1], waves[:, 1:], mse_loss).shape
    torch.Size([8, 128, 2])
    """

    @outside_inference_mode()
    def __init__(
        self,
        model: nn.Module,
        inner_lr: float,
        outer_lr: float,
        first_order: bool = False,
        *,
        chunk_size: int,
        parameters: ParameterFilter | None = None,
        learn_inner_lr: bool = True,
        step_size_lr: float | None = None,
        inner_steps: int = 1,
        label_delay: int = 0,
        truncation: int | None = None,
        memory: StreamMemory = "reverse_over_reverse",
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        grad_clip_norm: float | None = 1.0,
        experience: StreamExperience | None = None,
    ):
        where = "StreamMAML"
        check_model(where, model)
        self.model = model
        self.inner_lr = check_rate(where, "inner_lr", inner_lr)
        self.outer_lr = check_rate(where, "outer_lr", outer_lr)
        self.first_order = _check.flag(where, "first_order", first_order)
        self.chunk_size = _check.positive(where, "chunk_size", chunk_size, integer=True)
        self.inner_steps = _check.positive(where, "inner_steps", inner_steps, integer=True)
        self.label_delay = _check.positive(where, "label_delay", label_delay, zero=True, integer=True)
        self.truncation = truncation
        if truncation is not None:
            self.truncation = _check.positive(where, "truncation", truncation, integer=True)
        self.grad_clip_norm = grad_clip_norm
        if grad_clip_norm is not None:
            self.grad_clip_norm = _check.positive(where, "grad_clip_norm", grad_clip_norm)
        if memory not in get_args(StreamMemory):
            raise ValueError(f"{where}: memory must be one of {', '.join(get_args(StreamMemory))}, got {memory!r}")
        self.memory = memory
        if not callable(optimizer):
            raise TypeError(f"{where}: optimizer must be callable, got {type(optimizer).__name__}")
        if experience is not None and not isinstance(experience, StreamExperience):
            raise TypeError(f"{where}: experience must be a StreamExperience, got {type(experience).__name__}")
        self.experience = experience
        trainable = trainable_parameters(model)
        chosen = _default_parameters(model) if parameters is None else parameters
        fast = select(where, model, chosen)
        self._names = tuple(fast)
        shared = {id(p) for p in ([] if experience is None else experience.parameters())}
        for name, p in fast.items():
            if id(p) in shared:  # an Adapter's updates would change the encoder, those of the outer loss do not
                raise ValueError(f"{where}: experience must not share a fast weight of the model, got {name}")
        learned = _check.flag(where, "learn_inner_lr", learn_inner_lr)
        self._log_step_sizes = {
            name: torch.full((), self.inner_lr, dtype=p.dtype.to_real(), device=p.device).log().requires_grad_(learned)
            for name, p in trainable.items()
            if name in self._names
        }
        leaves = [*trainable.values(), *self._experience_parameters()]
        self.optimizer = make_optimizer(where, optimizer, leaves, self.outer_lr)
        if learned:
            rate = 10 * self.outer_lr if step_size_lr is None else check_rate(where, "step_size_lr", step_size_lr)
            self.optimizer.add_param_group({"params": list(self._log_step_sizes.values()), "lr": rate})
        self.skipped_updates = 0
        self.last_losses: Tensor | None = None
        self._batching = Batching(where, "stream")

    @property
    def fast_names(self) -> list[str]:
        """The names of the fast weights."""
        return list(self._names)

    @property
    def step_sizes(self) -> Params:
        """The step size of each fast weight, a scalar, by name: ``step_sizes`` of an Adapter."""
        return {name: log.detach().exp() for name, log in self._log_step_sizes.items()}

    @outside_inference_mode()
    def meta_update(
        self,
        x: Tensor,
        y: Tensor,
        loss_fn: LossFn,
        *,
        outer_loss_fn: LossFn | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        hidden_state: Any = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> float:
        """One outer step on a batch of streams.

        A step whose loss or gradients are not finite is skipped: parameters and optimizer stay as they are, and
        ``skipped_updates`` counts it.

        Args:
            x: ``(streams, time, ...)``, the model's input.
            y: ``(streams, time, ...)``, what ``loss_fn`` takes as target. ``mse_loss`` broadcasts a target without the
                feature axis of the prediction, and only torch's UserWarning reports it.
            loss_fn: the loss of the updates, ``(prediction, target) -> scalar`` of one chunk, ``(1, chunk_size, ...)``.
            outer_loss_fn: the loss of the predictions, of the same kind; None: ``loss_fn``. With another loss, ``y``
                may hold the targets of both, and each loss reads its own part.
            reset: ``(streams, time)``, bool; the state is zeroed before step t. The fast weights are kept.
            lengths: ``(streams,)``, int64 or int32, at least 1; stream b has ``lengths[b]`` steps, followed by padding.
                The losses are then a :class:`MaskedLoss`, and the model takes ``lengths``.
            cu_seqlens: ``(streams + 1,)``, int32 or int64; x and y are one row ``(1, time, ...)`` that holds the
                streams one after another, and these are their boundaries. Losses and model are as with ``lengths``.
            hidden_state: the state before the first step, ``(streams, ...)`` or a nest of such tensors; None: zero.
            past: ``x`` and ``y`` ``(streams, n, chunk_size, ...)`` of chunks that are in the memory at the start, the
                oldest first, n at most ``slots``.

        Returns:
            The mean outer loss over all steps of all streams, before the step.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or size, or a parameter requires grad that the
                optimizer does not hold; nothing modified.
        """
        where = "StreamMAML.meta_update"
        options = {"reset": reset, "lengths": lengths, "cu_seqlens": cu_seqlens}
        streams, weights = self._streams(where, x, y, **options, hidden_state=hidden_state, past=past)
        loop = self._loop(where, loss_fn, outer_loss_fn, lengths is not None or cu_seqlens is not None)
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        check_parameters(where, "StreamMAML", loop.params, held)
        if self.experience is not None:
            check_parameters(where, "StreamMAML", trainable_parameters(self.experience), held)
        # Step sizes are leaves, not functions of their logarithms, because the gradient is taken window by window.
        learned = {n: rate.requires_grad_() for n, rate in loop.rates.items() if self._log_step_sizes[n].requires_grad}
        params = [*loop.params.values(), *self._experience_parameters()]
        leaves = [*params, *learned.values()]
        window = self.truncation or len(streams.chunks)
        method = loop.recomputed_gradient if self.memory == "recompute" else loop.gradient
        with torch.enable_grad(), twice_differentiable_attention(not self.first_order):
            losses, grads = self._batching.run(
                lambda batch: method(batch, streams, weights, leaves, window), weights.device
            )
        if all(g is None for g in grads):
            raise ValueError(f"{where}: the outer loss does not depend on the learned parameters")
        self.last_losses = losses
        loss = (losses * weights.to(losses)).sum()
        for i, rate in enumerate(learned.values(), len(params)):
            g = grads[i]
            grads[i] = None if g is None else g * rate.detach()  # with respect to the logarithm
        if self.grad_clip_norm is not None:
            norm = get_total_norm([g for g in grads if g is not None])
            scale = (self.grad_clip_norm / norm).clamp(max=1)
            grads = [None if g is None else g * scale.to(g.dtype) for g in grads]
        targets = [*params, *(self._log_step_sizes[n] for n in learned)]
        if not step_if_finite(where, self.optimizer, targets, grads, loss):
            self.skipped_updates += 1
        return float(loss)

    @outside_inference_mode()
    def predict(
        self,
        x: Tensor,
        y: Tensor,
        loss_fn: LossFn,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        hidden_state: Any = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the predictions of all streams, ``(streams, time, ...)``, each chunk's before the update on it.

        The arguments are those of :meth:`meta_update`. The model does not change; no gradient is recorded. With
        ``cu_seqlens`` streams are rows of the result, padded to the longest.
        """
        where = "StreamMAML.predict"
        options = {"reset": reset, "lengths": lengths, "cu_seqlens": cu_seqlens}
        streams, weights = self._streams(where, x, y, **options, hidden_state=hidden_state, past=past)
        loop = self._loop(where, loss_fn, None, lengths is not None or cu_seqlens is not None)
        with torch.no_grad(), twice_differentiable_attention(False):
            _, predictions = self._batching.run(lambda batch: loop.losses(batch, streams), weights.device)
        return predictions[:, 0]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that :meth:`meta_update` changes: model, step sizes, experience, optimizer, the count."""
        return {
            "model": self.model.state_dict(),
            "log_step_sizes": {name: log.detach() for name, log in self._log_step_sizes.items()},
            "experience": {} if self.experience is None else self.experience.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped_updates": self.skipped_updates,
        }

    @outside_inference_mode()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            TypeError, ValueError: the state is of another model; nothing modified.
        """
        where, own = "StreamMAML.load_state_dict", self.state_dict()
        check_entries(where, state, own)
        for part in ("model", "log_step_sizes", "experience"):
            check_tensors(where, part, state[part], own[part])
        check_state(where, state["optimizer"], self.optimizer)
        skipped = _check.positive(where, "skipped_updates", state["skipped_updates"], zero=True, integer=True)
        self.model.load_state_dict(state["model"])
        if self.experience is not None:
            self.experience.load_state_dict(state["experience"])
        with torch.no_grad():
            for name, log in self._log_step_sizes.items():
                log.copy_(state["log_step_sizes"][name])
        load_state(self.optimizer, state["optimizer"])
        self.skipped_updates = skipped

    def _streams(self, where: str, x: Tensor, y: Tensor, **options: Any) -> tuple[Streams, Tensor]:
        slots = None if self.experience is None else self.experience.slots
        return check_streams(where, self.model, self.chunk_size, slots, x, y, **options)

    def _experience_parameters(self) -> list[nn.Parameter]:
        """The parameters of the experience that require grad and are not the model's."""
        own = {id(p) for p in self.model.parameters()}
        some = [] if self.experience is None else self.experience.parameters()
        return [p for p in some if p.requires_grad and id(p) not in own]

    def _loop(self, where: str, loss_fn: LossFn, outer_loss_fn: LossFn | None, masked: bool) -> StreamLoop:
        """The updates under the present parameters."""
        for module in (self.model, self.experience):
            if module is not None:
                check_buffers_constant(where, module)
        for name, fn in (("loss_fn", loss_fn), ("outer_loss_fn", outer_loss_fn)):
            if name == "loss_fn" or fn is not None:
                check_loss_fn(where, fn)
                if masked and not isinstance(fn, MaskedLoss):
                    kind = getattr(fn, "__name__", type(fn).__name__)
                    raise TypeError(f"{where}: streams of several lengths need a MaskedLoss as {name}, got {kind}")
        params = trainable_parameters(self.model)
        names = tuple(name for name in self._names if name in params)
        if not names:
            raise ValueError(f"{where}: all fast weights are frozen, {', '.join(self._names)}")
        rates = {name: rate for name, rate in self.step_sizes.items() if name in names}
        return StreamLoop(
            where,
            self.model,
            params,
            names,
            rates,
            self.inner_steps,
            self.first_order,
            self.label_delay,
            loss_fn,
            outer_loss_fn,
            self.experience,
        )


def _default_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters of the output layer and of the last norm, if there is one."""
    output = output_parameters(model)
    try:
        norm = norm_parameters(model)[-1].rpartition(".")[0]
    except ValueError:
        return output
    return [*([norm] if norm else norm_parameters(model)), *output]
