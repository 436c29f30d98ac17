"""Mamba models of HuggingFace transformers on the fused scan: their models, weights and caches, another ``forward``."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from eaml_ext.nn._decoding import project_step
from eaml_ext.nn._mamba2_mixer import UNLIMITED, Mamba2MixerLayer, mamba2_scan, mamba2_step
from eaml_ext.nn._mamba_mixer import MambaMixerLayer, mixer_scan, mixer_step
from eaml_ext.nn.submodule import is_plain

try:
    from transformers.activations import ACT2FN
    from transformers.cache_utils import Cache
    from transformers.modeling_utils import PreTrainedModel
    from transformers.models.bamba.modeling_bamba import BambaMixer
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
    from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
    from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer
except ImportError as error:
    raise ImportError(
        f"eaml_ext.integrations.transformers: transformers with a Mamba model is needed, "
        f"pip install 'eaml_ext[transformers]' ({error})"
    ) from error


# Models pass these arguments of theirs on to all layers. No mixer computes anything from them.
_WITHOUT_EFFECT = frozenset(
    {
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "use_cache",
    }
)


def _cache_is_supported() -> bool:
    """Return whether the ``Cache`` of the installed transformers accepts the calls of ``_FusedMixer``."""
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


# A subclass per mixer replaces `forward`. transformers' own mapping of kernels replaces functions inside it, for all
# models of a process, and only with the package `kernels`. Mamba-1's mixers pass no state to the function of the scan,
# so that a prompt in parts would start from zero. They pass weights in place of calls, so that adapters had no effect.
class _FusedMixer(nn.Module):
    """The ``forward`` of all fused mixers, before transformers' class in the bases of each."""

    _own_signature: ClassVar[inspect.Signature]
    _own_defaults: ClassVar[Mapping[str, Any]]
    _own_kwargs: ClassVar[str]
    _cache_name: ClassVar[str]

    if TYPE_CHECKING:  # attributes have the types of transformers' classes

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls) -> None:
        signature = inspect.signature(super().forward)
        cls._own_signature = signature
        cls._own_defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
        cls._own_kwargs = next((n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), "")
        cls._cache_name = "cache" if "cache" in cls._own_defaults else "cache_params"  # renamed in transformers 5.24

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
        given = self._own_signature.bind(self, *args, **kwargs).arguments
        given.update(given.pop(self._own_kwargs, {}))
        given.pop("self")
        hidden_states, cache, mask = (
            given.pop(name, None) for name in ("hidden_states", self._cache_name, "attention_mask")
        )
        unsupported = hidden_states is None or any(
            value is not self._own_defaults.get(name) for name, value in given.items() if name not in _WITHOUT_EFFECT
        )
        if not unsupported and cache is not None:  # a recording cache keeps all inputs, so that it can be cropped
            unsupported = (
                not _CACHE_IS_SUPPORTED or not isinstance(cache, Cache) or cache.is_recording_past(self.layer_idx)
            )
        if unsupported:
            y: Tensor = super().forward(*args, **kwargs)
            return y
        if mask is not None:
            hidden_states = hidden_states * mask.unsqueeze(-1).to(hidden_states.dtype)
        if cache is None:
            return self._scan(hidden_states, None, None, mask)[0]
        conv_state = cache.get_conv_state(self.layer_idx, state_idx=0)
        ssm_state = cache.get_recurrent_state(self.layer_idx, state_idx=0)
        if ssm_state is not None and hidden_states.shape[1] == 1 and mask is None:
            y, conv_state, ssm_state = self._step(hidden_states.squeeze(1), conv_state, ssm_state)
            y = y.unsqueeze(1)
        else:
            y, conv_state, ssm_state = self._scan(hidden_states, conv_state, ssm_state, mask)
        cache.update_conv_state(conv_state, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        cache.update_recurrent_state(ssm_state, self.layer_idx)
        return y

    def _scan(
        self, x: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(batch, length, hidden_size)`` -> the same shape, and the states after the last step."""
        raise NotImplementedError(f"{type(self).__name__}: _scan is not defined")

    def _step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(batch, hidden_size)`` -> the same shape, and the states after the step."""
        raise NotImplementedError(f"{type(self).__name__}: _step is not defined")


# --- Mamba-1 ---------------------------------------------------------------------------------------------------------


class _FusedMamba1(_FusedMixer):
    def _layer(self) -> MambaMixerLayer:
        return cast(MambaMixerLayer, self)

    def _scan(
        self, x: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return mixer_scan(self._layer(), x, conv_state, ssm_state, mask=mask)

    def _step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return mixer_step(self._layer(), x, conv_state, ssm_state)


class _NormalisedLayer:
    """A mixer whose ``x_proj`` normalises dt, B and C; all else is the mixer's."""

    def __init__(self, mixer: Any):
        self.mixer = mixer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mixer, name)

    def x_proj(self, x: Tensor) -> Tensor:
        mixer = self.mixer
        sizes = (mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size)
        dt, B, C = mixer.x_proj(x).split(sizes, dim=-1)
        return torch.cat([mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)], dim=-1)


class _FusedNormalisedMamba1(_FusedMamba1):
    def _layer(self) -> MambaMixerLayer:
        return cast(MambaMixerLayer, _NormalisedLayer(self))


class FusedMambaMixer(_FusedMamba1, MambaMixer):
    """transformers' ``MambaMixer`` with convolution, scan and step on this package's ops; see :func:`accelerate`."""


class FusedFalconMambaMixer(_FusedNormalisedMamba1, FalconMambaMixer):
    """``FalconMambaMixer`` as :class:`FusedMambaMixer`; dt, B and C are normalised."""


class FusedJambaMambaMixer(_FusedNormalisedMamba1, JambaMambaMixer):
    """``JambaMambaMixer`` as :class:`FusedMambaMixer`; dt, B and C are normalised, with learned weights."""


# --- Mamba-2 ---------------------------------------------------------------------------------------------------------


class _FusedMamba2(_FusedMixer):
    @property
    def d_ssm(self) -> int:
        """Channels of the scan, under the name that ``mamba2_scan`` reads."""
        width: int = self.intermediate_size
        return width

    @property
    def ngroups(self) -> int:
        """Groups of heads with a common B and C, under the name that ``mamba2_scan`` reads."""
        number: int = self.n_groups
        return number

    def _scan(
        self, x: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        # transformers and mamba_ssm clamp step sizes in sequences, not in single steps.
        is_step = ssm_state is not None and x.shape[1] == 1
        limit = UNLIMITED if is_step else self.time_step_limit
        gate, x, dt = self._project(x)
        y, conv_state, ssm_state = mamba2_scan(
            cast(Mamba2MixerLayer, self), x, dt, self._scan_gate(gate), conv_state, ssm_state, mask=mask, dt_limit=limit
        )
        return self._outputs(y, gate), conv_state, ssm_state

    def _step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, x, dt = self._project(x)
        y, conv_state, ssm_state = mamba2_step(
            cast(Mamba2MixerLayer, self), x, dt, self._scan_gate(gate), conv_state, ssm_state
        )
        return self._outputs(y, gate), conv_state, ssm_state

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """``(*, hidden_size)`` -> the gate ``(*, d_ssm)``, x, B and C ``(*, conv_dim)``, dt ``(*, num_heads)``."""
        return self._split(self.in_proj(x))

    def _split(self, projected: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = projected.split((self.intermediate_size, self.conv_dim, self.num_heads), dim=-1)
        return parts

    def _scan_gate(self, gate: Tensor) -> Tensor | None:
        """Return the gate of the op, None where ``norm`` gates."""
        return None

    def _outputs(self, y: Tensor, gate: Tensor) -> Tensor:
        projected: Tensor = self.out_proj(self.norm(y, gate).to(y.dtype))
        return projected


class FusedMamba2Mixer(_FusedMamba2, Mamba2Mixer):
    """``Mamba2Mixer`` as :class:`FusedMambaMixer`."""


class FusedBambaMixer(_FusedMamba2, BambaMixer):
    """``BambaMixer`` as :class:`FusedMambaMixer`."""


class FusedGraniteMoeHybridMambaLayer(_FusedMamba2, GraniteMoeHybridMambaLayer):
    """``GraniteMoeHybridMambaLayer`` as :class:`FusedMambaMixer`."""


class FusedNemotronHMamba2Mixer(_FusedMamba2, NemotronHMamba2Mixer):
    """``NemotronHMamba2Mixer`` as :class:`FusedMambaMixer`."""


class FusedZamba2MambaMixer(_FusedMamba2, Zamba2MambaMixer):
    """``Zamba2MambaMixer`` as :class:`FusedMambaMixer`."""


class FusedFalconH1Mixer(_FusedMamba2, FalconH1Mixer):
    """``FalconH1Mixer`` as :class:`FusedMambaMixer`; the projection is scaled, and the norm is optional."""

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        scale: Any = self.ssm_in_multiplier
        return self._split(self.in_proj(x * scale) * self.mup_vector.view(-1))

    def _scan_gate(self, gate: Tensor) -> Tensor | None:
        return None if self.mamba_rms_norm else gate

    def _outputs(self, y: Tensor, gate: Tensor) -> Tensor:
        if self.mamba_rms_norm:
            return super()._outputs(y, gate)
        projected: Tensor = self.out_proj(y)
        return projected


# --- models ----------------------------------------------------------------------------------------------------------

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    cls.__bases__[-1]: cls
    for cls in (
        FusedMambaMixer,
        FusedFalconMambaMixer,
        FusedJambaMambaMixer,
        FusedMamba2Mixer,
        FusedBambaMixer,
        FusedGraniteMoeHybridMambaLayer,
        FusedNemotronHMamba2Mixer,
        FusedZamba2MambaMixer,
        FusedFalconH1Mixer,
    )
}


def accelerate(model: nn.Module) -> nn.Module:
    """Run the Mamba layers of a transformers model on the fused scan, in place.

    The layers are those of Mamba, Falcon-Mamba, Jamba, Mamba-2, Bamba, Granite-4 (``GraniteMoeHybrid``), Nemotron-H,
    Zamba2 and Falcon-H1. Attention, MLPs and experts between them stay as they are. The layer that makes the logits
    runs as :func:`eaml_ext.nn.linear_step` in generation on a CPU.

    Up to rounding, logits, gradients and generation equal those of transformers without mamba_ssm, with one difference.
    A prompt passed in parts through a cache continues from the state in the cache; transformers' Mamba-1 layers start
    each part from zero. Parameters, ``state_dict`` and ``save_pretrained`` do not change. A call with an unsupported
    argument or cache runs transformers' own ``forward``.

    Args:
        model: any module that holds such layers of transformers.

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
    mixers = [module for module in model.modules() if type(module) in _FUSED or type(module) in _FUSED.values()]
    if not mixers:
        names = ", ".join(cls.__name__ for cls in _FUSED)
        others = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "A_log")})
        raise ValueError(
            f"accelerate: model must hold a layer of transformers of type {names}, "
            f"got {type(model).__name__}{' with ' + ', '.join(others) if others else ''}"
        )
    for mixer in mixers:
        mixer.__class__ = _FUSED.get(type(mixer), type(mixer))
        if is_plain(mixer.act, type(ACT2FN["silu"])):  # the ops know torch's class alone
            mixer.act = nn.SiLU().train(mixer.training)
    for part in model.modules():
        head = cast(Any, part).get_output_embeddings() if isinstance(part, PreTrainedModel) else None
        if is_plain(head, nn.Linear):
            head.__class__ = _LogitsLayer
    return model


class _LogitsLayer(nn.Linear):
    """A layer of logits that runs as :func:`eaml_ext.nn.linear_step` in single steps."""

    def forward(self, input: Tensor) -> Tensor:
        return project_step(input, self.weight, self.bias)
