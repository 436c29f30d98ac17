"""The Mamba of HuggingFace transformers on the fused scan: the same model, weights and cache, another ``forward``."""

import inspect
from typing import Any

from torch import Tensor, nn

from eaml_ext.nn._mamba_mixer import mixer_scan, mixer_step

try:
    from transformers.cache_utils import Cache
    from transformers.models.mamba.modeling_mamba import MambaMixer
except ImportError as error:
    raise ImportError(
        f"eaml_ext.integrations.transformers: transformers with a Mamba model is needed, "
        f"pip install 'eaml_ext[transformers]' ({error})"
    ) from error


_SIGNATURE = inspect.signature(MambaMixer.forward)
_DEFAULTS = {name: parameter.default for name, parameter in _SIGNATURE.parameters.items()}
_EXTRA = next((name for name, p in _SIGNATURE.parameters.items() if p.kind is p.VAR_KEYWORD), "")
_CACHE = "cache" if "cache" in _DEFAULTS else "cache_params"  # the second is the name before transformers 5.24


def _cache_is_supported() -> bool:
    """Whether this transformers' ``Cache`` takes the calls below."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "is_recording_past": ((0,), {}),
        "get_conv_state": ((0,), {"state_idx": 0}),
        "get_recurrent_state": ((0,), {"state_idx": 0}),
        "update_conv_state": ((None, 0), {"conv_kernel_size": 4}),
        "update_recurrent_state": ((None, 0), {}),
    }
    try:
        for name, (args, kwargs) in calls.items():
            inspect.signature(getattr(Cache, name)).bind(None, *args, **kwargs)
    except (AttributeError, TypeError):
        return False
    return True


_CACHE_IS_SUPPORTED = _cache_is_supported()


class FusedMambaMixer(MambaMixer):
    """MambaMixer whose convolution, scan and step run on this package's ops; see :func:`accelerate`."""

    @property
    def d_conv(self) -> int:
        """Width of the convolution, under the name that ``mixer_scan`` reads."""
        width: int = self.conv_kernel_size
        return width

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``(batch, length, hidden_size)`` -> the same shape; reads and updates the cache.

        The arguments are those of transformers' own ``forward``, which runs instead where an argument or a cache is
        not one that this method handles.
        """
        given = _SIGNATURE.bind(self, *args, **kwargs).arguments
        given.update(given.pop(_EXTRA, {}))
        hidden_states, cache, mask = (given.pop(name, None) for name in ("hidden_states", _CACHE, "attention_mask"))
        layer = given.pop("self").layer_idx
        delegated = hidden_states is None or any(value is not _DEFAULTS.get(name) for name, value in given.items())
        if not delegated and cache is not None:  # a recording cache keeps all inputs, so that it can be cropped
            delegated = not _CACHE_IS_SUPPORTED or not isinstance(cache, Cache) or cache.is_recording_past(layer)
        if delegated:
            y: Tensor = super().forward(*args, **kwargs)
            return y
        if mask is not None:
            hidden_states = hidden_states * mask.unsqueeze(-1).to(hidden_states.dtype)
        if cache is None:
            return mixer_scan(self, hidden_states, mask=mask)[0]
        conv_state = cache.get_conv_state(layer, state_idx=0)
        ssm_state = cache.get_recurrent_state(layer, state_idx=0)
        if ssm_state is not None and hidden_states.shape[1] == 1 and mask is None:
            y, conv_state, ssm_state = mixer_step(self, hidden_states.squeeze(1), conv_state, ssm_state)
            y = y.unsqueeze(1)
        else:
            y, conv_state, ssm_state = mixer_scan(self, hidden_states, conv_state, ssm_state, mask=mask)
        cache.update_conv_state(conv_state, layer, conv_kernel_size=self.conv_kernel_size)
        cache.update_recurrent_state(ssm_state, layer)
        return y


def accelerate(model: nn.Module) -> nn.Module:
    """Lets the Mamba layers of a transformers model (``MambaForCausalLM``, ``MambaModel``) run on the fused scan.

    In place. Logits, gradients and generation are those of the path that transformers takes without mamba_ssm, up to
    rounding, with one difference: a prompt given in parts through a cache continues from the state that the cache
    holds, where that path starts each part from zero. Parameters, ``state_dict`` and ``save_pretrained`` are as before.
    A call with an argument or a cache that this package does not handle runs transformers' own ``forward``.

    Args:
        model: any module that holds transformers' ``MambaMixer`` layers.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it holds no such layer.

    >>> import torch
    >>> from transformers import MambaConfig, MambaForCausalLM
    >>> model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2))
    >>> tokens = torch.randint(50, (2, 9))
    >>> before = model(tokens).logits
    >>> torch.allclose(accelerate(model)(tokens).logits, before, atol=1e-4)
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    mixers = [module for module in model.modules() if type(module) in (MambaMixer, FusedMambaMixer)]
    if not mixers:
        raise ValueError(f"accelerate: model must hold MambaMixer layers of transformers, got {type(model).__name__}")
    for mixer in mixers:
        mixer.__class__ = FusedMambaMixer
    return model
