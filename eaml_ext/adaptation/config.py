"""The limits of an adaptation."""

import math
from dataclasses import dataclass

from eaml_ext import _check


@dataclass(frozen=True)
class AdaptationConfig:
    """The six numbers that limit how far and how fast an Adapter changes a model.

    Below, θ are the adapted parameters taken as one vector and g is the gradient of the objective.

    Attributes:
        lr: step size, > 0. One step is ``θ ← θ − lr·g`` (or what the Adapter's ``optimizer`` does with this lr).
        grad_clip_norm: ``g ← g · min(1, grad_clip_norm / ‖g‖)`` before each step. None or 0: off.
        trust_region_eps: after each step θ is projected onto ``‖θ − a‖ ≤ trust_region_eps·‖a‖``, where a is θ at the
            start of the call. If a is exactly 0, the radius is trust_region_eps itself. Each call has a new region, so
            a long stream can move far. None or 0: off. With the default, 0.1, no call changes θ by more than a tenth
            of its norm. With the other defaults a call moves θ by at most 5 · 0.01 · 1.0 = 0.05.
        ema_decay: d in ``average ← d·average + (1 − d)·θ``, computed whenever the loss at θ is accepted. It is also d
            in the running mean and variance of the losses with which calls begin. Their weights ``d^age`` are
            normalised to sum to 1, so both are unbiased from the first call on. Adapter describes the spike rule and
            the rollback, which use them. In [0, 1); None or 0: the average is the last accepted θ, and no finite loss
            is a spike.
        entropy_weight: β in ``objective = total loss + β·H``, where H is the mean entropy of the softmax of the
            predictions on the current batch. It applies only to logits with integer class targets. 0 or None: off.
        max_steps_per_call: the largest number of gradient steps in one call, an integer ≥ 1.

    Raises:
        TypeError: a value is not a number of the right kind.
        ValueError: a value is out of its range.

    >>> AdaptationConfig(lr=0.05).max_steps_per_call
    5
    >>> AdaptationConfig(ema_decay=1.5)
    Traceback (most recent call last):
        ...
    ValueError: AdaptationConfig: ema_decay must be >= 0 and < 1, got 1.5
    """

    lr: float = 0.01
    grad_clip_norm: float | None = 1.0
    trust_region_eps: float | None = 0.1
    ema_decay: float | None = 0.99
    entropy_weight: float | None = 0.0
    max_steps_per_call: int = 5

    def __post_init__(self) -> None:
        for name in ("lr", "grad_clip_norm", "trust_region_eps", "ema_decay", "entropy_weight"):
            value = getattr(self, name)
            if value is None and name != "lr":
                continue
            value = _check.number("AdaptationConfig", name, value)
            if name == "lr" and not 0 < value < math.inf:
                raise ValueError(f"AdaptationConfig: lr must be > 0 and finite, got {value!r}")
            if name == "ema_decay" and not 0 <= value < 1:
                raise ValueError(f"AdaptationConfig: ema_decay must be >= 0 and < 1, got {value!r}")
            if not 0 <= value < math.inf:
                raise ValueError(f"AdaptationConfig: {name} must be >= 0 and finite, got {value!r}")
            object.__setattr__(self, name, float(value))
        steps = _check.positive("AdaptationConfig", "max_steps_per_call", self.max_steps_per_call, integer=True)
        object.__setattr__(self, "max_steps_per_call", steps)
