"""The Mamba of HuggingFace transformers on the fused scan: its model, weights and cache with another ``forward``."""

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
_KWARGS = next((name for name, p in _SIGNATURE.parameters.items() if p.kind is p.VAR_KEYWORD), "")
_CACHE = "cache" if "cache" in _DEFAULTS else "cache_params"  # renamed in transformers 5.24


def _cache_is_supported() -> bool:
    """Return whether the ``Cache`` of the installed transformers accepts the calls of ``FusedMambaMixer``."""
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
    """transformers' ``MambaMixer`` with convolution, scan and step on this package's ops; see :func:`accelerate`."""

    @property
    def d_conv(self) -> int:
        """Width of the convolution, under the name that ``mixer_scan`` reads."""
        width: int = self.conv_kernel_size
        return width

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a sequence or a step, and update the cache.

        The arguments are those of transformers' own ``forward``, which runs instead for arguments and caches that this
        method does not support.

        Args:
            hidden_states: ``(batch, length, hidden_size)``, floating.
            cache: a ``Cache`` of transformers, or None.
            attention_mask: ``(batch, length)``; 0 marks padding.

        Returns:
            ``(batch, length, hidden_size)``.
        """
        given = _SIGNATURE.bind(self, *args, **kwargs).arguments
        given.update(given.pop(_KWARGS, {}))
        hidden_states, cache, mask = (given.pop(name, None) for name in ("hidden_states", _CACHE, "attention_mask"))
        layer = given.pop("self").layer_idx
        unsupported = hidden_states is None or any(value is not _DEFAULTS.get(name) for name, value in given.items())
        if not unsupported and cache is not None:  # a recording cache keeps all inputs, so that it can be cropped
            unsupported = not _CACHE_IS_SUPPORTED or not isinstance(cache, Cache) or cache.is_recording_past(layer)
        if unsupported:
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
    """Run the Mamba layers of a transformers model (``MambaForCausalLM``, ``MambaModel``) on the fused scan, in place.

    Up to rounding, logits, gradients and generation equal those of transformers without mamba_ssm, with one difference.
    A prompt passed in parts through a cache continues from the state in the cache; transformers starts each part from
    zero. Parameters, ``state_dict`` and ``save_pretrained`` do not change. A call with an unsupported argument or cache
    runs transformers' own ``forward``.

    Args:
        model: any module that holds transformers' ``MambaMixer`` layers.

    Returns:
        The same model.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no such layer.

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
