"""The losses and gradients of many users, each with its own parameters of one model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext._torch_compat import tree_map
from eaml_ext.adaptation import objective
from eaml_ext.adaptation._flat_params import FlatParams
from eaml_ext.adaptation._update import Evaluation
from eaml_ext.meta._batching import Batching, Map, vmapped
from eaml_ext.meta._cuda_graphs import GraphCache
from eaml_ext.meta._inner_loop import twice_differentiable_attention
from eaml_ext.meta._python_state import PythonState
from eaml_ext.meta.functional import functional_call


def evaluate_users(
    where: str,
    model: nn.Module,
    flat: FlatParams,
    losses: objective.Losses,
    batch: dict[str, Any],
    experience: dict[str, Any] | None,
    batching: Batching,
    graphs: GraphCache | None,
) -> Callable[[Tensor], Evaluation]:
    """Return the function ``theta (users, parameters) -> Evaluation`` for a batch of all users.

    Args:
        where: the beginning of messages.
        model: the model; a call does not change it.
        flat: the adapted parameters of the model.
        losses: the losses of one user.
        batch: the result of :func:`objective.check_batch`, with the leading dimension ``users``.
        experience: states, targets and weights, ``(users, n, ...)``, or None.
        batching: maps over users.
        graphs: captures and replays the losses and gradients on CUDA; None: they run as usual.
    """
    mask_dims, trainable = batch.get("mask_dims"), flat.trainable()
    data: dict[str, Any] = {n: batch[n] for n in objective.ENTRIES if n in batch and n != "mask_dims"}
    in_dims = (0, *tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, (data, experience)))

    def losses_of_user(theta: Tensor, data: dict[str, Any], experience: Any) -> tuple[Tensor, Tensor]:
        chosen = flat.named(theta)

        def call(*inputs: Any) -> Any:
            return functional_call(model, chosen, inputs)

        return losses(call, {**data, "mask_dims": mask_dims}, experience)

    def compute(batch: Map, theta: Tensor, data: dict[str, Any], experience: Any) -> list[Tensor]:
        leaf = theta.detach().requires_grad_()
        total, goal = batch(losses_of_user, in_dims)(leaf, data, experience)
        # Users are independent: each row of the gradient of the sum is the gradient of one user's objective.
        (gradient,) = objective.gradients(where, goal.sum(), [leaf])
        return [total.detach().to(torch.promote_types(total.dtype, theta.dtype)), gradient]

    def totals_and_gradient(batch: Map, theta: Tensor) -> list[Tensor]:
        if graphs is None or batch is not vmapped or not graphs.serves(theta.device):
            return compute(batch, theta, data, experience)
        state = PythonState(model, losses)
        key = state.key, mask_dims
        return graphs.run_nested(lambda nest: compute(batch, *nest), key, (theta, data, experience), state.tensors)

    def evaluate(theta: Tensor) -> Evaluation:
        with torch.enable_grad(), twice_differentiable_attention():  # vmap runs attention by its formula alone
            totals, gradient = batching.run(partial(totals_and_gradient, theta=theta), theta.device)
        return Evaluation(totals, lambda: gradient if trainable is None else torch.where(trainable, gradient, 0.0))

    return evaluate
