"""The Mamba of HuggingFace transformers on the fused scan: the same model, weights and cache, another ``forward``."""

from typing import Any

from torch import Tensor, nn

from eaml_ext.nn.mamba import mixer_scan, mixer_step

try:
    from transformers.models.mamba.modeling_mamba import MambaMixer
except ImportError as error:
    raise ImportError(
        f"eaml_ext.integrations.transformers: transformers with a Mamba model is needed, "
        f"pip install 'eaml_ext[transformers]' ({error})"
    ) from error


class FusedMambaMixer(MambaMixer):
    """MambaMixer whose convolution, scan and step run on this package's ops; see :func:`accelerate`."""

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """``(batch, length, hidden_size)`` -> the same shape; reads and updates ``cache_params``."""
        layer = self.layer_idx
        if cache_params is not None and cache_params.is_recording_past(layer):  # keeps all inputs, to be cut back
            y: Tensor = super().forward(hidden_states, cache_params, attention_mask, **kwargs)
            return y
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask.unsqueeze(-1).to(hidden_states.dtype)
        if cache_params is None:
            return mixer_scan(self, hidden_states, mask=attention_mask)[0]
        conv_state = cache_params.get_conv_state(layer, state_idx=0)
        ssm_state = cache_params.get_recurrent_state(layer, state_idx=0)
        if ssm_state is not None and hidden_states.shape[1] == 1 and attention_mask is None:
            y, conv_state, ssm_state = mixer_step(self, hidden_states.squeeze(1), conv_state, ssm_state)
            y = y.unsqueeze(1)
        else:
            y, conv_state, ssm_state = mixer_scan(self, hidden_states, conv_state, ssm_state, mask=attention_mask)
        cache_params.update_conv_state(conv_state, layer, conv_kernel_size=self.conv_kernel_size)
        cache_params.update_recurrent_state(ssm_state, layer)
        return y


def accelerate(model: nn.Module) -> nn.Module:
    """Lets the Mamba layers of a transformers model (``MambaForCausalLM``, ``MambaModel``) run on the fused scan.

    In place. Logits, gradients and generation are those of the path that transformers takes without mamba_ssm, up to
    rounding, with one difference: a prompt given in parts through a cache continues from the state that the cache
    holds, where that path starts each part from zero. Parameters, ``state_dict`` and ``save_pretrained`` are as before.

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
