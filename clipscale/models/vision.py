"""The image tower: any timm architecture, and a projection into the shared space."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.layers.attention_pool2d import AttentionPool2d
from timm.models import is_model_in_modules
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from clipscale.config.model import Activation, ImageProjection, Model
from clipscale.errors import ConfigError
from clipscale.models.drops import Drops
from clipscale.models.vit import compute_what_counts

# Modules of timm with a vit_* that is no VisionTransformer of its, and takes no name of an activation.
_OTHER_VITS = ("eva", "vision_transformer_relpos")
TIMM_ACTIVATIONS = {Activation.gelu: "gelu", Activation.quickgelu: "quick_gelu", Activation.gelu_tanh: "gelu_tanh"}


class VisionTower(nn.Module):
    """Images to Float[B, D].

    Takes UInt8[B, 3, S, S], which it normalises itself (four times fewer bytes on their way to the device), or
    Float[B, 3, S, S], taken as normalised already.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.image_size = config.vision.image_size
        self.trunk = _build_trunk(config)
        compute_what_counts(self.trunk)
        self.drops = Drops(self.trunk, config.vision)
        # CLIP's ResNets project inside their attention pool, its ViTs with a bias-free matrix after the last norm.
        self.proj: nn.Module = nn.Identity()
        width = int(self.trunk.num_features)
        if isinstance(getattr(self.trunk, "head", None), AttentionPool2d):
            pass
        elif config.vision.proj is ImageProjection.linear:
            self.proj = nn.Linear(width, config.embed_dim, bias=False)
        elif width != config.embed_dim:
            raise ConfigError(
                f"model.vision.proj=none leaves the image tower's width of {width}, but model.embed_dim="
                f"{config.embed_dim}; use model.embed_dim={width} or model.vision.proj=linear"
            )
        for name, values in (("mean", config.mean), ("std", config.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1) * 255, persistent=False)

    def forward(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """``seeds`` Int64[B] are what each image's drops are drawn from in training; without, torch's generator is."""
        return self.proj(self.pool(images, seeds))

    def pool(self, images: torch.Tensor, seeds: torch.Tensor | None = None) -> torch.Tensor:
        """What is projected into the shared space, Float[B, width]: the features that the CLIP paper probes."""
        if self.training:
            self.drops.draw(len(images), seeds, images.device)
        return self.trunk(self.normalize(images))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Float[B, 3, S, S] as the trunk takes it, of UInt8[B, 3, S, S]; what is Float already stays as it is."""
        if images.dtype != torch.uint8:
            return images
        # In the weights' dtype, which sharding may have made half precision.
        return ((images.float() - self.mean) / self.std).to(next(self.trunk.parameters()).dtype)


def trunk_activation(name: str) -> str | None:
    """The activation that timm gives its ViT ``name`` where it is told of none; None for other architectures.

    One of the values of :class:`clipscale.config.model.Activation`.
    """
    trunk = _told_nothing(name)
    if not isinstance(trunk, VisionTransformer):
        return None
    first: Any = trunk.blocks[0]
    kind = type(first.mlp.act).__name__.lower()
    return {"gelutanh": Activation.gelu_tanh, "quickgelu": Activation.quickgelu}.get(kind, Activation.gelu).value


def trunk_pool(name: str) -> str | None:
    """How timm pools its architecture ``name`` where it is told nothing, in timm's words: ``avg``, ``token``, ``map``.

    None where it does not say.
    """
    trunk = _told_nothing(name)
    if isinstance(trunk, VisionTransformer):
        return str(trunk.global_pool)
    for place in (getattr(trunk, "head", None), trunk):
        pool: Any = getattr(place, "global_pool", None)
        if hasattr(pool, "pool_type"):
            return str(pool.pool_type)
    return None


def _told_nothing(name: str) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0)


def _build_trunk(config: Model) -> Any:
    vision = config.vision
    if ":" in vision.timm:  # timm would ask a hub, or read a directory, on every rank
        raise ConfigError(f"model.vision.timm={vision.timm} is no architecture; init.weights takes what is elsewhere")
    sizes: dict[str, Any] = dict(
        patch_size=vision.patch_size, embed_dim=vision.width, depth=vision.layers, num_heads=vision.heads
    )
    sizes["global_pool"] = vision.pool.value if vision.pool else None
    is_vit = vision.timm.startswith("vit_")
    options: dict[str, Any] = {"drop_path_rate": vision.drop_path or None}  # some architectures know no such thing
    if is_vit:
        options |= sizes | {"img_size": vision.image_size}
        if not is_model_in_modules(vision.timm, _OTHER_VITS):
            options["act_layer"] = TIMM_ACTIVATIONS[config.activation]
    elif any(value is not None for value in sizes.values()):
        raise ConfigError(
            f"model.vision.timm={vision.timm} is no ViT: leave model.vision.{{patch_size,width,layers,heads,pool}} null"
        )
    pools_itself = vision.timm.startswith("resnet") and vision.timm.endswith("_clip")
    options["num_classes"] = config.embed_dim if pools_itself else 0
    if pools_itself:
        options["img_size"] = vision.image_size
    try:
        return timm.create_model(vision.timm, **{k: v for k, v in options.items() if v is not None})
    except AssertionError as error:
        if vision.pool is None:
            why = str(error) or "an assertion of its own"
            raise ConfigError(f"model.vision.timm={vision.timm} cannot be built of model.vision.*: {why}") from None
        raise ConfigError(
            f"model.vision.pool={vision.pool.value}: timm makes no such {vision.timm} ({error}); use "
            "model.vision.pool=null"
        ) from None
    except TypeError as error:
        raise ConfigError(f"model.vision.timm={vision.timm} cannot be built of model.vision.*: {error}") from None
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise ConfigError(f"model.vision.timm={vision.timm}: {error}; leave out what follows the name") from None
        near = timm.list_models(f"*{vision.timm.split('_')[0]}*")[:5]
        raise ConfigError(
            f"model.vision.timm={vision.timm}: timm has no such model; near it: {', '.join(near)}"
        ) from None
