"""theta -= outer_lr d/dtheta mean_i L(theta_i; query_i),  theta_i = theta - inner_lr dL(theta; support_i)/dtheta."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext import _check
from eaml_ext._renamed import rename_keys
from eaml_ext._torch_compat import tree_leaves
from eaml_ext.distributed import Group, check_group
from eaml_ext.meta._batching import Batching
from eaml_ext.meta._cuda_graphs import GraphCache
from eaml_ext.meta._distributed import all_ranks_succeed, broadcast_model, gradient_over_ranks
from eaml_ext.meta._hessian_vector_products import HessianVectorProducts, Memory, check_memory
from eaml_ext.meta._inner_loop import InnerLoop, twice_differentiable_attention
from eaml_ext.meta._meta_gradient import MetaGradient, PureFunction, task_losses
from eaml_ext.meta._optimizer import check_state, load_state, make_optimizer, step_if_finite
from eaml_ext.meta._padding import pad_set
from eaml_ext.meta._types import DataSet, LossFn, Params, Task
from eaml_ext.meta._validation import (
    check_buffers_constant,
    check_entries,
    check_inner_parameters,
    check_loss_fn,
    check_loss_fns,
    check_mask,
    check_model,
    check_pair,
    check_parameters,
    check_prefixes,
    check_rate,
    check_sequence_support,
    check_tasks,
    check_tensors,
)
from eaml_ext.meta.functional import (
    detached_copy,
    functional_call,
    outside_inference_mode,
    recordable,
    select_parameters,
    trainable_parameters,
)


class MetaMAML:
    """Model-agnostic meta-learning (Finn, Abbeel & Levine 2017, algorithm 1) over any ``nn.Module``, and its relatives.

    Tasks of equal shapes run as one vmapped batch, in which every op runs once. Tasks of other shapes need a batch of
    their own, unless ``loss_fn`` is a :class:`MaskedLoss`, with which they are padded and share it:

    - A set may have any number of rows. The model must compute each row by itself.
    - A set may be a list of sequences of any lengths, ``(time_i, ...)``, each with its targets ``(time_i, ...)``. The
      model is called as ``model(x, lengths=lengths)`` with ``x`` ``(n, time, ...)``, zero after each row's last step,
      and ``lengths`` ``(n,)``, which may be 0; :class:`eaml_ext.nn.SSM` takes them.

    Loss and gradient of a task are those of the task alone, to rounding. A batch is split where padding would more than
    double it.

    Meta-gradients are exact second order, also through :func:`eaml_ext.ops.selective_scan`. Tasks run one at a time,
    after one RuntimeWarning, where ``vmap`` cannot run the model: recurrent layers of torch, control flow that depends
    on data, ``torch.utils.checkpoint``.

    The parameters that require grad at the time of a call are learned. Parameters may be frozen, and unfrozen again,
    at any time; one that is unfrozen or replaced for the first time after construction needs a new MetaMAML. Changes of
    buffers in ``forward`` are discarded, so batch norm must be in eval mode.

    *Several processes.* With a ``group`` (:class:`eaml_ext.distributed.Group`) each rank passes its own part of the
    meta-batch to :meth:`meta_update`: any number of tasks, also none. Losses are gathered and meta-gradients summed
    over the ranks. All ranks take the same step on the mean over all tasks, which is the step of one process to
    rounding. A step that is not finite on one rank is skipped on all. Parameters and buffers start as on rank 0.

    Args:
        model: called as ``model(x)``; its parameters that require grad are meta-learned in place.
        inner_lr: step size of the inner loop's gradient descent.
        outer_lr: learning rate of the outer optimizer.
        first_order: treat inner gradients as constants (FOMAML).
        inner_steps: inner steps in :meth:`meta_update`, and the default of :meth:`adapt`.
        optimizer: outer optimizer, built as ``optimizer(parameters, lr=outer_lr)``; it must step without a closure.
        learn_inner_lr: learn a step size for each number in the adapted parameters, all starting at ``inner_lr``
            (Meta-SGD; Li, Zhou, Chen & Li 2017); they are in ``inner_lrs``.
        inner_parameters: the parameters that the inner loop adapts: a prefix of parameter names or several (``"head"``
            means ``head.weight`` and ``head.bias``); None: all. The last layer alone is ANIL (Raghu et al. 2020).
        reptile: the meta-gradient is mean_i (theta - theta_i) / inner_lr, without any outer derivative (Reptile;
            Nichol, Achiam & Schulman 2018). The inner loop uses the support set; the query set is only measured.
        micro_batch: the most tasks that run at once. Gradients are accumulated: less memory, the same result to
            rounding.
        compile: ``torch.compile`` the inner loop and its outer gradient, once per loss and shape of a batch. Each
            compilation takes seconds to a minute and is kept, so few losses and shapes pay off. Where compilation
            fails, a RuntimeWarning gives the reason and the usual path runs. Results are equal to rounding. On a GPU
            the kernels are also captured in a CUDA graph, in the second call with equal loss, shapes and settings;
            later calls replay it. The latest 16 graphs are kept. Model and loss then read tensors of one device, do
            not wait for the GPU (``.item()``, ``if tensor``, boolean indexing) and draw random numbers only from
            torch's default generator. Their hooks, prints and counters do not run in a replay. A change of their
            attributes, closures, containers or training mode, or a tensor in the place of another, leads to a new
            graph. A change of globals or of attributes of classes does not and has no effect. Where a graph cannot be
            captured, or 32 calls in a row had none, a RuntimeWarning gives the reason; kernels are launched one by one.
        group: the ranks that share the tasks of a meta-batch; None: this process has all of them.
        memory: how :meth:`meta_update` computes second order. ``"reverse_over_reverse"`` keeps the graph of all inner
            steps. ``"recompute"`` keeps their parameters and recomputes one step at a time for a Hessian-vector
            product, in 4/3 of the time or more. ``"forward_over_reverse"`` computes these products by forward mode
            (MixFlow-MG; Kemaev et al. 2025, arXiv 2505.00793). A model that forward mode cannot run is recomputed after
            one RuntimeWarning; an ``autograd.Function`` with ``jvp`` needs a ``backward`` of differentiable operations.
            All three give equal gradients, to rounding, and, where ``vmap`` runs the model, draw equal numbers from
            torch's default generators. The last two raise ValueError where a support loss changes between two calls, by
            other random numbers or state of the model. First order and Reptile keep no graph and ignore ``memory``.

    Attributes:
        skipped_updates: meta-updates skipped because a loss or a gradient was not finite.
        last_losses: ``(tasks,)``, the query losses of the last meta-update, detached, those of all ranks one after the
            other; None before the first.
        inner_lrs: name to tensor of the parameter's shape, with ``learn_inner_lr``; else empty.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or size; a model without trainable parameters or made
            inside ``torch.inference_mode``; an optimizer that needs a closure (LBFGS, SAM). Also ``reptile`` together
            with ``learn_inner_lr`` or ``inner_parameters``, to which it gives no gradient, and a model with other
            parameters than on rank 0. Also ``compile`` together with another ``memory`` than the default.

    >>> model = torch.nn.Linear(4, 1)
    >>> maml = MetaMAML(model, inner_lr=0.1, outer_lr=0.01)
    >>> x, y = torch.randn(10, 4), torch.randn(10, 1)
    >>> loss = maml.meta_update([(x, y, x, y)] * 8, torch.nn.functional.mse_loss)
    >>> adapted = maml.adapt(x, y, torch.nn.functional.mse_loss, num_steps=5)

    Learned step sizes for the last layer alone, four tasks at a time:

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    >>> maml = MetaMAML(net, 0.1, 0.01, learn_inner_lr=True, inner_parameters="2", micro_batch=4)
    >>> loss = maml.meta_update([(x, y, x, y)] * 8, torch.nn.functional.mse_loss)
    >>> list(maml.inner_lrs), maml.last_losses.shape
    (['2.weight', '2.bias'], torch.Size([8]))

    Next-step prediction on engines that ran for 128 to 362 steps, in one batch:

    >>> from eaml_ext import SSM
    >>> from eaml_ext.meta import MaskedLoss
    >>> maml = MetaMAML(SSM(14, 16, 14), inner_lr=0.1, outer_lr=0.01)
    >>> engines = [torch.randn(steps, 14) for steps in (128, 206, 362)]
    >>> tasks = [([e[:64]], [e[1:65]], [e[64:-1]], [e[65:]]) for e in engines]
    >>> loss = maml.meta_update(tasks, MaskedLoss(torch.nn.MSELoss(reduction="none")))
    """

    _graphs: GraphCache | None = None  # of objects that were pickled before graphs existed
    _products: HessianVectorProducts | None = None  # None: the graph of the inner loop gives the meta-gradient

    @outside_inference_mode()
    def __init__(
        self,
        model: nn.Module,
        inner_lr: float,
        outer_lr: float,
        first_order: bool = False,
        *,
        inner_steps: int = 1,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        learn_inner_lr: bool = False,
        inner_parameters: str | Sequence[str] | None = None,
        reptile: bool = False,
        micro_batch: int | None = None,
        compile: bool = False,
        group: Group | None = None,
        memory: Memory = "reverse_over_reverse",
    ):
        where = "MetaMAML"
        check_model(where, model)
        self.inner_lr = check_rate(where, "inner_lr", inner_lr)
        self.outer_lr = check_rate(where, "outer_lr", outer_lr)
        self.inner_steps = _check.positive(where, "inner_steps", inner_steps, integer=True)
        self.micro_batch = micro_batch
        if micro_batch is not None:
            self.micro_batch = _check.positive(where, "micro_batch", micro_batch, integer=True)
        flags = {"first_order": first_order, "learn_inner_lr": learn_inner_lr, "reptile": reptile, "compile": compile}
        for name, flag in flags.items():
            _check.flag(where, name, flag)
        if not callable(optimizer):
            raise TypeError(f"{where}: optimizer must be callable, got {type(optimizer).__name__}")
        if reptile and (learn_inner_lr or inner_parameters is not None):
            other = "learn_inner_lr" if learn_inner_lr else "inner_parameters"
            raise ValueError(f"{where}: reptile learns nothing but what the inner loop moves, {other} needs MAML")
        check_memory(where, memory, bool(compile))
        check_group(where, group)
        self.group, self.model = group, model
        self.first_order, self.reptile, self.compile = bool(first_order), bool(reptile), bool(compile)
        self._known = self.parameters()
        if not self._known:
            raise ValueError(f"{where}: model has no parameters that require grad")
        self._inner_prefixes = check_prefixes(where, model, inner_parameters)
        rated = self.inner_names if learn_inner_lr else []
        self.inner_lrs: Params = {n: torch.full_like(self._known[n], self.inner_lr, requires_grad=True) for n in rated}
        if group is not None:
            broadcast_model(where, group, model)
        leaves = [*self._known.values(), *self.inner_lrs.values()]
        self.optimizer = make_optimizer(where, optimizer, leaves, self.outer_lr)
        self.skipped_updates = 0
        self.last_losses: Tensor | None = None
        self._compiled: dict[tuple[LossFn, InnerLoop], PureFunction] = {}
        self._graphs = GraphCache(where)
        if memory != "reverse_over_reverse" and not (self.first_order or self.reptile):
            self._products = HessianVectorProducts(where, forward=memory == "forward_over_reverse")
        self._batching = Batching(where, "task")

    @property
    def inner_names(self) -> list[str]:
        """The names of the parameters that the inner loop adapts now."""
        return select_parameters(self.model, self._inner_prefixes)

    def parameters(self) -> Params:
        """The model's parameters that require grad now, by name."""
        return trainable_parameters(self.model)

    def call(self, params: Params, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``model(x)`` under other parameters; the model itself is left as it is.

        Args:
            params: parameters by name, each of its shape in the model; the others are the model's own.
            x: what the model takes, any shape.
            lengths: ``(n,)``, integer, passed to the model by name; None: not passed.
        """
        if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
            params, x = recordable((params, x))
        out: Tensor = functional_call(self.model, params, (x,), None if lengths is None else {"lengths": lengths})
        return out

    @outside_inference_mode()
    def adapt_params(
        self,
        params: Params,
        support_x: DataSet,
        support_y: DataSet,
        loss_fn: LossFn,
        num_steps: int | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Params:
        """The inner loop: ``num_steps`` of gradient descent from ``params`` on one support set.

        A pure function, differentiable to every order the model is (twice, through the selective scan), and vmappable.

        Args:
            params: parameters by name, as from :meth:`parameters`. Frozen parameters among them are not adapted.
            support_x: ``(n, ...)``, what the model takes, or n sequences.
            support_y: ``(n, ...)``, what ``loss_fn`` takes as target, or n sequences.
            loss_fn: ``(prediction, target) -> scalar``.
            num_steps: at least 0, where 0 returns ``params``; None: ``inner_steps``.
            mask: ``(n,)`` or ``(n, time)``, bool, False at the padding of tensors; ``loss_fn`` is then a MaskedLoss.
                A row's steps come before its padding. None: tensors have no padding.

        Returns:
            The adapted parameters by name, connected to ``params`` (and ``inner_lrs``) where gradients are recorded.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, or no parameter is left to adapt. Also a parameter
                without a learned step size: it was frozen or had another shape when ``inner_lrs`` were made.
        """
        where = "MetaMAML.adapt_params"
        num_steps = self.inner_steps if num_steps is None else num_steps
        num_steps = _check.positive(where, "num_steps", num_steps, zero=True, integer=True)
        check_loss_fn(where, loss_fn)
        inner = self._inner_loop(where, params, num_steps)
        check_sequence_support(where, [(support_x, support_y)], self.model, [loss_fn])
        if not (isinstance(support_x, Tensor) and isinstance(support_y, Tensor)):
            check_pair(where, "support", support_x, support_y)
            support_x, support_y, mask = pad_set(support_x, support_y)
        elif mask is not None:
            check_mask(where, mask, support_x, self.model, loss_fn)
        params, x, y = recordable((params, support_x, support_y))
        with twice_differentiable_attention(not self.first_order and torch.is_grad_enabled()):
            return inner.adapt(params, self.inner_lrs, x, y, loss_fn, mask)

    @outside_inference_mode()
    def adapt(self, support_x: DataSet, support_y: DataSet, loss_fn: LossFn, num_steps: int | None = None) -> nn.Module:
        """A copy of the model adapted to one support set. **Detached**: no gradient reaches the meta-parameters.

        For a differentiable inner loop use :meth:`adapt_params`, whose arguments and errors these are. The model itself
        is left as it is.

        Args:
            support_x: ``(n, ...)``, n at least 1, or n sequences.
            support_y: ``(n, ...)``, or n sequences.
            loss_fn: ``(prediction, target) -> scalar``.
            num_steps: at least 0; None: ``inner_steps``.
        """
        check_pair("MetaMAML.adapt", "support", support_x, support_y)
        start = {name: p.detach() for name, p in self.parameters().items()}
        with torch.no_grad():
            adapted = self.adapt_params(start, support_x, support_y, loss_fn, num_steps)
            module = detached_copy(self.model)
            for name, p in module.named_parameters():
                if name in adapted:
                    p.copy_(adapted[name])
        return module

    @outside_inference_mode()
    def task_losses(self, params: Params, tasks: Sequence[Task], loss_fn: LossFn | Sequence[LossFn]) -> Tensor:
        """Query loss after adaptation of each task, ``(len(tasks),)``, in their order, differentiable in ``params``.

        Args:
            params: parameters by name, as from :meth:`parameters`.
            tasks: ``(support_x, support_y, query_x, query_y)`` each, at least one, as of :meth:`meta_update`.
            loss_fn: one for all tasks or one for each; tasks that share shapes and loss run as one batch.
        """
        where = "MetaMAML.task_losses"
        params, tasks = recordable((params, check_tasks(where, tasks)))
        loss_fns = check_loss_fns(where, loss_fn, len(tasks))
        check_sequence_support(where, tasks, self.model, loss_fns)
        inner = self._inner_loop(where, params, self.inner_steps)
        with twice_differentiable_attention(not self.first_order and torch.is_grad_enabled()):
            return self._batching.run(
                lambda batch: task_losses(batch, inner, params, self.inner_lrs, tasks, loss_fns), tasks[0][0][0].device
            )

    @outside_inference_mode()
    def meta_update(
        self, tasks: Iterable[Task], loss_fn: LossFn | Sequence[LossFn], *, kl_radius: float = 0.0
    ) -> float:
        """One outer step on a batch of tasks.

        A step whose loss or gradients are not finite is skipped: parameters and optimizer stay as they are, and
        ``skipped_updates`` counts it.

        Args:
            tasks: ``(support_x, support_y, query_x, query_y)`` each: ``(n, ...)`` twice and ``(m, ...)`` twice, or n
                and m sequences. Shapes may differ from task to task. With a group, this rank's tasks; all ranks call
                together. ``mse_loss`` broadcasts a target without the feature axis of the prediction, and only torch's
                UserWarning reports it.
            loss_fn: ``(prediction, target) -> scalar``, or a list of one for each task; a MaskedLoss lets tasks of
                different sizes run as one batch.
            kl_radius: step on the worst weighting of the tasks whose KL divergence from the plain mean is at most
                this many nats (:func:`eaml_ext.meta.kl_dro.kl_dro_weights`), found by one more pass without gradient.

        Returns:
            The mean query loss after adaptation, before the step.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or size, a parameter requires grad that the optimizer
                does not hold, or the optimizer's step needs a closure; nothing modified.
            RankError: another rank was given such an argument, failed in its tasks, or has died.
        """
        where, group = "MetaMAML.meta_update", self.group

        def check() -> tuple[list[Task], list[LossFn], float]:
            radius = _check.positive(where, "kl_radius", kl_radius, zero=True)
            checked = check_tasks(where, tasks, empty=group is not None)
            if any(t.is_inference() for t in tree_leaves(checked)):
                checked = recordable(checked)
            params = self.parameters()
            check_parameters(where, "MetaMAML", params, self._known.values())
            self._inner_loop(where, params, self.inner_steps)
            fns = check_loss_fns(where, loss_fn, len(checked))
            check_sequence_support(where, checked, self.model, fns)
            return checked, fns, radius

        if group is None:
            mine, loss_fns, radius = check()
            gradient = self._meta_gradient()
            with torch.enable_grad():
                losses, grads = gradient.run(mine, loss_fns, radius)
        else:
            (mine, loss_fns, radius), gathered = all_ranks_succeed(where, group, check, 1, lambda got: [len(got[0])])
            counts = gathered[:, 0].tolist()
            if not sum(counts):
                raise ValueError(f"{where}: tasks is empty on all ranks")
            gradient = self._meta_gradient()
            with torch.enable_grad():
                losses, grads = gradient_over_ranks(where, group, gradient, mine, loss_fns, radius, counts)
        loss, self.last_losses = losses.mean(), losses
        if not step_if_finite(where, self.optimizer, gradient.leaves, grads, loss):
            self.skipped_updates += 1
        return float(loss)

    def state_dict(self) -> dict[str, Any]:
        """Everything :meth:`meta_update` changes: model, step sizes, optimizer, count of skipped updates."""
        return {
            "model": self.model.state_dict(),
            "inner_lrs": {name: rate.detach() for name, rate in self.inner_lrs.items()},
            "optimizer": self.optimizer.state_dict(),
            "skipped_updates": self.skipped_updates,
        }

    @outside_inference_mode()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, also in version 0.1.

        Raises:
            TypeError, ValueError: the state is of another model; nothing modified.
        """
        where = "MetaMAML.load_state_dict"
        check_entries(where, state, self.state_dict())
        own, model, rates = self.model.state_dict(), state["model"], state["inner_lrs"]
        if isinstance(model, dict) and isinstance(rates, dict) and set(model) != set(own):
            model, rates = rename_keys(model), rename_keys(rates, model.keys())  # of 0.1
        check_tensors(where, "model", model, own)
        check_tensors(where, "inner_lrs", rates, self.inner_lrs)
        check_state(where, state["optimizer"], self.optimizer)
        skipped = _check.positive(where, "skipped_updates", state["skipped_updates"], zero=True, integer=True)
        self.model.load_state_dict(model)
        with torch.no_grad():
            for name, rate in self.inner_lrs.items():
                rate.copy_(rates[name])
        load_state(self.optimizer, state["optimizer"])
        self.skipped_updates = skipped

    def _inner_loop(self, where: str, params: Params, steps: int) -> InnerLoop:
        """The inner loop from ``params``; raises ValueError where it cannot adapt them."""
        check_buffers_constant(where, self.model)
        names = tuple(name for name in self.inner_names if name in params)
        check_inner_parameters(where, params, names, self.inner_lrs)
        return InnerLoop(self.call, names, self.inner_lr, steps, self.first_order)

    def _meta_gradient(self) -> MetaGradient:
        """The meta-gradient under the present parameters, which the caller has checked."""
        names = tuple(self.inner_names)
        return MetaGradient(
            self.model,
            InnerLoop(self.call, names, self.inner_lr, self.inner_steps, self.first_order),
            self.parameters(),
            {name: self.inner_lrs[name] for name in names if name in self.inner_lrs},
            self._batching,
            self._compiled,
            self._graphs,
            self._products,
            self.micro_batch,
            self.reptile,
            self.compile,
        )
