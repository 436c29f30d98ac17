"""The loss and gradient of a model's own parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eaml_ext.adaptation import objective
from eaml_ext.adaptation._flat_params import FlatParams
from eaml_ext.adaptation._update import Evaluation
from eaml_ext.meta._cuda_graphs import GraphCache
from eaml_ext.meta._python_state import PythonState

Data = tuple[dict[str, Any], dict[str, Any] | None]
"""``(batch, experience)``."""


def evaluate_model(
    where: str,
    model: nn.Module,
    call: Callable[..., Any],
    flat: FlatParams,
    losses: objective.Losses,
    batch: dict[str, Any],
    experience: dict[str, Any] | None,
    graphs: GraphCache | None,
) -> Callable[[Tensor], Evaluation]:
    """Return the function ``theta (1, parameters) -> Evaluation``, which sets the model's parameters.

    The first theta must be the model's parameters.

    Args:
        where: the beginning of messages.
        model: the model.
        call: calls the model, perhaps with a state of its own.
        flat: the adapted parameters of the model.
        losses: total and objective.
        batch: the result of :func:`objective.check_batch`.
        experience: states, targets and weights, ``(n, ...)``, or None.
        graphs: captures and replays losses and gradients on CUDA, where ``call`` has no state; None: they run as usual.
    """
    entries = {n: batch[n] for n in objective.ENTRIES if n in batch}
    anchor: Tensor | None = None

    def objectives(data: Data) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            return losses(call, *data)

    def gradient(goal: Tensor) -> Tensor:
        return flat.concatenate(objective.gradients(where, goal, flat.params))

    def total_and_gradient(data: Data) -> list[Tensor]:
        total, goal = objectives(data)
        return [total.detach().view(1), gradient(goal)]

    def evaluate(theta: Tensor) -> Evaluation:
        nonlocal anchor
        if anchor is None:
            anchor = theta
        elif theta is not anchor:
            flat.write(theta)
        if graphs is None or not graphs.serves(theta.device):
            total, goal = objectives((entries, experience))
            return Evaluation(total.detach().view(1), lambda: gradient(goal))
        state = PythonState(model, losses)
        key = state.key, tuple([p.requires_grad for p in flat.params])
        total, found = graphs.run_nested(total_and_gradient, key, (entries, experience), state.tensors)
        return Evaluation(total, lambda: found)

    return evaluate
