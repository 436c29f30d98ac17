"""Meta-learning: MAML with exact second-order gradients, tasks batched by vmap."""

from eaml_ext.meta.maml import MetaMAML

__all__ = ["MetaMAML"]
