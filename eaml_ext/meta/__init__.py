"""Meta-learning: MAML with exact second-order gradients, tasks batched by vmap."""

from eaml_ext.meta.maml import MetaMAML
from eaml_ext.meta.past_models import PastModels

__all__ = ["MetaMAML", "PastModels"]
