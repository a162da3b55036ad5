"""Text towers of Hugging Face transformers: a model of theirs, one vector of its tokens, and a projection.

None of their repositories' own code is run: only architectures that transformers itself has.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from clipscale.config.hub import fetch, require_transformers
from clipscale.config.model import HFPool, HFProjection, Text
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.models.groups import STEP
from clipscale.models.packing import Packing, check_lengths, unpad

CONFIG = "config.json"
# Kinds that cannot be trained on captions, and why.
_REFUSED = {"xlnet": "has weights that captions do not train (mask_emb)"}


class HFTextTower(nn.Module):
    """Captions to Float[B, D], by a text model of transformers.

    Takes packed captions, as our own tower does, and pads them to a multiple of 8 tokens with a mask. The features are
    those of open_clip's ``HFTextEncoder``, whose ``cls_pooler`` is ``cls_last_hidden_state_pooler`` here. There is no
    dropout, whatever the model's configuration says: the gradient is that of the batch, however it is shared out.

    Raises ConfigError for an architecture that transformers does not have, or that has no room for the context.
    """

    def __init__(self, config: Text, context_length: int, embed_dim: int) -> None:
        super().__init__()
        spec = hf_config(config)
        self.context_length, self.eot_id = context_length, config.eot_id
        self.pool = config.hf_pool or usual_pool(spec)
        pad = getattr(spec, "pad_token_id", None)  # null or -1 where there is none
        self.pad_id = pad if isinstance(pad, int) and 0 <= pad < spec.vocab_size else 0
        self.transformer: Any = _build(config, spec)
        _check_room(config, self.transformer, context_length)
        width = int(spec.hidden_size)
        if config.hf_proj is HFProjection.linear:
            self.proj: nn.Module = nn.Linear(width, embed_dim, bias=False)
        else:
            hidden = (width + embed_dim) // 2
            layers = nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False)
            self.proj = nn.Sequential(*layers)

    @property
    def blocks(self) -> list[nn.Module]:
        """Its layers, in order: the list of modules that holds most of the parameters."""
        lists = [module for module in self.transformer.modules() if isinstance(module, nn.ModuleList)]
        return [*max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=())]

    def compile_blocks(self, backend: Any = "inductor") -> None:
        """Compile each layer by torch.compile. Captions are padded to a multiple of 8 tokens, so few shapes exist."""
        for block in self.blocks:
            block.compile(backend=backend)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor | Packing) -> torch.Tensor:
        """Features of packed captions: ``ids`` Int[T], all captions end to end, and ``lengths`` Int[B].

        As :meth:`clipscale.models.text.TextTower.forward`.
        """
        packing = lengths if isinstance(lengths, Packing) else self.packing(lengths, ids.device)
        packing.require(ids)
        (shape,) = packing.groups
        padded = F.pad(ids.long(), (0, 1), value=self.pad_id).index_select(0, packing.tokens).view(shape)
        real = (packing.tokens < packing.real).view(shape)
        tokens = self.transformer(input_ids=padded, attention_mask=real.long()).last_hidden_state
        return self.proj(self._pool(tokens, real))

    def _pool(self, tokens: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Float[B, d] of Float[B, L, d] and Bool[B, L]."""
        if self.pool is HFPool.cls:
            return tokens[:, 0]
        if self.pool is HFPool.mean:
            return (tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        ends = real.sum(1) - 1
        return tokens.gather(1, ends[:, None, None].expand(-1, 1, tokens.shape[-1])).squeeze(1)

    def packing(
        self, lengths: torch.Tensor, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Packing:
        """How captions of ``lengths`` Int[B], on the host, are computed here, in any dtype: on ``device``, or that of
        the weights.

        Raises ValueError when a caption is empty, or longer than the context.
        """
        lengths = lengths.cpu()
        longest = check_lengths(lengths, self.context_length)
        size = min(-(-longest // STEP) * STEP, self.context_length)
        return Packing.filled(lengths, size, device or next(self.parameters()).device)

    def pack(self, padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Padded ids Int[B, L] as packed ids Int[T] and lengths Int[B].

        Raises ValueError for a row without an end-of-text token.
        """
        return unpad(padded, self.eot_id)

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Set the weights as the architecture has them at first, each module's drawn from the seed and its own name."""
        with torch.random.fork_rng(devices=[]):
            # Parents after their children, as transformers goes: some draw anew what those have drawn.
            for name, module in reversed([*self.transformer.named_modules()]):
                torch.manual_seed(zlib.crc32(f"{seed}:text.transformer.{name}".encode()))
                self.transformer._init_weights(module)


def read_hf_config(text: Text) -> dict[str, Any]:
    """The ``config.json`` of the model that ``model.text.hf`` names, downloaded where it is not on this machine.

    Raises ConfigError when there is none.
    """
    setting = f"model.text.hf={text.hf}"
    require_transformers(setting)
    try:
        file = fetch(str(text.hf), [CONFIG]) / CONFIG
        found = json.loads(file.read_text())
    except ClipscaleError as error:
        raise ConfigError(f"{setting}: {error}") from None
    except OSError:
        raise ConfigError(f"{setting} holds no {CONFIG}; it is not a model that transformers wrote") from None
    except ValueError:
        raise ConfigError(f"{setting}: its {CONFIG} is not JSON") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{setting}: its {CONFIG} holds no configuration")
    return found


def hf_config(text: Text) -> Any:
    """transformers' configuration of the tower, with every dropout 0; the recorded one if there is one.

    Raises ConfigError for an architecture that transformers does not have, and one that is no text model.
    """
    setting = f"model.text.hf={text.hf}"
    require_transformers(setting)
    from transformers import CONFIG_MAPPING

    found = text.hf_config if text.hf_config is not None else read_hf_config(text)
    kind = str(found.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"{setting} is of the type {kind}, which this transformers does not have; code that comes with weights is "
            "never run"
        )
    if kind in _REFUSED:
        raise ConfigError(f"{setting} is of the type {kind}, which {_REFUSED[kind]}")
    drops = {key: 0.0 for key, value in found.items() if "drop" in key and isinstance(value, float | int)}
    try:
        spec = CONFIG_MAPPING[kind].from_dict({**found, **drops})
    except Exception as error:
        raise ConfigError(f"{setting}: {str(error).splitlines()[0]}") from None
    # Those that the file leaves to transformers' defaults.
    for key, value in spec.to_dict().items():
        if "drop" in key and isinstance(value, float) and value:
            setattr(spec, key, 0.0)
    if not all(isinstance(getattr(spec, key, None), int) for key in ("hidden_size", "vocab_size")):
        raise ConfigError(f"{setting} is of the type {kind}, which is no text model with tokens of one width")
    spec.use_cache = False  # what generation keeps; checkpointing would keep it twice
    return spec


def usual_pool(spec: Any) -> HFPool:
    """How the features of a kind of model are usually pooled."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if spec.model_type == "bert":
        return HFPool.cls
    if spec.model_type == "clip_text_model":
        return HFPool.last
    kind, is_encoder = type(spec), getattr(spec, "is_encoder_decoder", False)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING and not is_encoder:
        return HFPool.last
    return HFPool.mean


def text_part(model: Any) -> Any:
    """Of a model of transformers what computes tokens: the encoder of two parts, and no pooler, which nothing reads."""
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def hf_class(spec: Any) -> Any:
    """Which of transformers' classes makes a text tower of a configuration."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING, AutoModel, AutoModelForTextEncoding

    if type(spec) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return AutoModelForTextEncoding
    if type(spec) not in MODEL_MAPPING:
        raise ConfigError(f"the type {spec.model_type} is none that transformers makes alone (by AutoModel)")
    return AutoModel


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the progress bars and reports of transformers: what matters in them is raised."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _build(config: Text, spec: Any) -> nn.Module:
    try:
        model: nn.Module = text_part(hf_class(spec).from_config(spec, dtype=torch.float32))
    except Exception as error:
        raise ConfigError(f"model.text.hf={config.hf}: {str(error).splitlines()[0]}") from None
    return model


def _check_room(config: Text, transformer: Any, context_length: int) -> None:
    """Raise ConfigError where the model has fewer positions than a caption may have tokens."""
    room = getattr(transformer.config, "max_position_embeddings", None)
    if room is None:
        return  # positions relative to each other
    for name, module in transformer.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            room -= module.padding_idx + 1  # RoBERTa and its kin count from behind the padding's
    if context_length > room:
        raise ConfigError(
            f"model.context_length={context_length} exceeds the {room} positions of model.text.hf={config.hf}; use "
            f"model.context_length={room}"
        )
