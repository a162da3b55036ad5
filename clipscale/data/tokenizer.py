"""Captions to token ids, by open_clip's tokenizers, or Hugging Face's."""

from __future__ import annotations

import difflib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipscale.config.data import Tokenizer as TokenizerConfig
from clipscale.config.hub import fetch, require_transformers, shareable
from clipscale.config.model import Model
from clipscale.errors import ClipscaleError, ConfigError

# OpenAI's byte-pair encoding is the tokenizer of every open_clip model that does not name another one.
CLIP_MODEL = "ViT-B-32"
HF = "hf:"  # before a name of the Hugging Face hub, or a directory
# Printable ASCII without what could be markup.
PLAIN = re.compile(r"[ !-%'-;=-~]*")
MOST_WORDS = 1 << 16
HF_FILES = ("*.json", "*.txt", "*.model")  # what a tokenizer of the hub may be made of
LETTERS = 16  # per token of the context: what is kept of one word; byte-pair merging is quadratic in its length


class Tokenizer:
    """A tokenizer with a fixed context length.

    Calling it with captions gives Int64[B, L], padded with zeros (ones if 0 ends captions), as ``model.encode_text``
    takes it.

    Args:
        name: ``clip``, an open_clip model name, an ``hf-hub:`` name, or ``hf:`` and a name of the hub or a directory.
        context_length: most tokens per caption, start and end tokens included.
        stored: where :meth:`save` has left what an ``hf:`` name stands for, which is then not asked for again.
    """

    def __init__(self, name: str, context_length: int, stored: Path | None = None) -> None:
        self.name, self.context_length = name, context_length
        self._impl = _load_hf(name, context_length, stored) if name.startswith(HF) else _load(name, context_length)
        self.is_bpe = hasattr(self._impl, "sot_token_id")
        if self.is_bpe:
            self.eot_id, self.vocab_size = int(self._impl.eot_token_id), int(self._impl.vocab_size)
        else:
            inner = self._impl.tokenizer
            end = inner.eos_token_id if inner.eos_token_id is not None else inner.sep_token_id
            if end is None:
                raise ConfigError(f"tokenizer.name={name} has no end-of-text token, at which the text tower pools")
            self.eot_id, self.vocab_size = int(end), len(inner)
        self._words: dict[str, list[int]] = {}

    def encode(
        self, caption: str, choose: Callable[[int, int], Sequence[int]] | None = None
    ) -> tuple[NDArray[np.int32], bool]:
        """Token ids Int32[length] without padding, and whether the caption was cut to the context length.

        Of one that is cut, the first tokens stay, or those whose places ``choose(count, room)`` gives: ``room`` of its
        ``count`` tokens between start and end, in their order.
        """
        if self.is_bpe:
            ids = [self._impl.sot_token_id, *self._bpe(caption), self.eot_id]
            # Where "<end_of_text>" is written out, the caption ends, as open_clip's towers have it.
            ids = ids[: ids.index(self.eot_id) + 1]
        else:
            # Text that reads like a special token is text: a caption must not end in its middle.
            ids = self._impl.tokenizer(self._clean(caption), split_special_tokens=True, verbose=False)["input_ids"]
            if ids[-1:] != [self.eot_id]:  # those made to write text leave the end open
                ids = [*ids, self.eot_id]
        cut = len(ids) > self.context_length
        if cut:
            ids = self._cut(ids, choose) if choose else [*ids[: self.context_length - 1], self.eot_id]
        return np.array(ids, dtype=np.int32), cut

    def decode(self, ids: Sequence[int]) -> str:
        """About the caption that these tokens were made of, without its start and end."""
        if self.is_bpe:
            return str(self._impl.decode([i for i in ids if i not in (self._impl.sot_token_id, self.eot_id)])).strip()
        return str(self._impl.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def save(self, directory: Path) -> None:
        """Write what an ``hf:`` name stands for into a new directory, for a time when it is not to be had; nothing for
        other names, whose tokenizers come with open_clip."""
        if not self.name.startswith(HF) or directory.exists():
            return
        scratch = directory.with_name(f"{directory.name}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        self._impl.tokenizer.save_pretrained(scratch)
        scratch.rename(directory)

    @property
    def pad_id(self) -> int | None:
        """The id with which open_clip's own tokenizer fills captions; None if it fills none."""
        return 0 if self.is_bpe else self._impl.tokenizer.pad_token_id

    def reads_as(self, other: Tokenizer) -> bool:
        """Whether both have the same token for every id, and the same end."""
        if self.is_bpe or other.is_bpe:
            return self.is_bpe == other.is_bpe
        mine, theirs = (one._impl.tokenizer.get_vocab() for one in (self, other))
        return self.eot_id == other.eot_id and mine == theirs

    def write_for_open_clip(self, directory: Path) -> dict[str, Any]:
        """Write into ``directory`` what open_clip's ``local-dir:`` finds there, and return what its configuration of a
        text tower has to say of it; nothing for CLIP's, which open_clip takes by default."""
        if self.is_bpe:
            return {}
        from open_clip.tokenizer import get_clean_fn

        own = getattr(self._impl, "clean_fn", None)
        cleaning = next((kind for kind in ("lower", "whitespace") if get_clean_fn(kind) is own), "canonicalize")
        self._impl.tokenizer.save_pretrained(directory)
        return {"hf_tokenizer_name": shareable_name(self.name), "tokenizer_kwargs": {"clean": cleaning}}

    def _cut(self, ids: list[int], choose: Callable[[int, int], Sequence[int]]) -> list[int]:
        starts = self.is_bpe or ids[0] in self._impl.tokenizer.all_special_ids
        start, inner = ids[:starts], ids[starts:-1]
        return [*start, *(inner[i] for i in choose(len(inner), self.context_length - len(start) - 1)), self.eot_id]

    def _bpe(self, caption: str) -> list[int]:
        # A word's ids do not depend on its neighbours, and words come again: cleaning and merging them anew would cost
        # as much as decoding a small image. What cleaning might change goes the long way.
        if len(self._words) > MOST_WORDS:
            self._words.clear()
        if len(self._impl.cache) > MOST_WORDS:  # open_clip's own memory of words grows for ever
            self._impl.cache = dict(islice(self._impl.cache.items(), len(self._impl.all_special_ids)))
        if len(caption) > (longest := LETTERS * self.context_length):
            caption = re.sub(rf"(\S{{{longest}}})\S+", r"\1", caption)
        if not PLAIN.fullmatch(caption):
            return list(self._impl.encode(caption))
        ids: list[int] = []
        for word in caption.split():
            known = self._words.get(word)
            if known is None:
                known = self._words[word] = list(self._impl.encode(word))
            ids += known
        return ids

    def _clean(self, caption: str) -> str:
        if hasattr(self._impl, "clean_fn"):
            return str(self._impl.clean_fn(caption))
        from open_clip.tokenizer import basic_clean, canonicalize_text  # what its SigLIP tokenizer does inside

        return str(canonicalize_text(basic_clean(caption)))

    def __call__(self, captions: str | Sequence[str]) -> torch.Tensor:
        """Int64[B, L] for B captions, padded to the context length L."""
        captions = [captions] if isinstance(captions, str) else captions
        out = torch.full((len(captions), self.context_length), int(self.eot_id == 0))
        for row, caption in zip(out, captions, strict=True):
            ids, _ = self.encode(caption)
            row[: len(ids)] = torch.from_numpy(ids)
        return out


def shareable_name(name: str) -> str:
    """A tokenizer's name, or one of weights, without the place of a directory that follows ``hf:``."""
    return HF + shareable(name.removeprefix(HF)) if name.startswith(HF) else name


def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of CLIP's tokens, of which the last two start and end a caption, and its merges in their order."""
    impl = _load("clip", 77)
    return dict(impl.encoder), list(impl.bpe_ranks)


def build_tokenizer(config: TokenizerConfig, model: Model, stored: Path | None = None) -> Tokenizer:
    """The configured tokenizer, from ``stored`` if it is there; raises ConfigError when the model's text tower cannot
    take its ids."""
    tokenizer = Tokenizer(config.name, config.context_length or model.context_length, stored)
    if model.text.hf is not None:
        _check_hf(tokenizer, model)
    elif tokenizer.vocab_size > model.text.vocab_size:
        raise ConfigError(
            f"tokenizer.name={config.name} has {tokenizer.vocab_size} tokens, the text tower takes "
            f"{model.text.vocab_size}; use model.text.vocab_size={tokenizer.vocab_size}"
        )
    if tokenizer.eot_id != model.text.eot_id:
        raise ConfigError(
            f"tokenizer.name={config.name} ends captions with id {tokenizer.eot_id}, the text tower pools at "
            f"{model.text.eot_id}; use model.text.eot_id={tokenizer.eot_id}"
        )
    return tokenizer


def _check_hf(tokenizer: Tokenizer, model: Model) -> None:
    """Raise ConfigError for ids that a text tower of Hugging Face's does not have."""
    hf, most = model.text.hf, (model.text.hf_config or {}).get("vocab_size")
    if tokenizer.is_bpe:
        raise ConfigError(
            f"tokenizer.name={tokenizer.name} is CLIP's, model.text.hf={hf} reads the tokens of its own; use "
            f"tokenizer.name={HF}{hf}"
        )
    if most is not None and tokenizer.vocab_size > most:
        raise ConfigError(
            f"tokenizer.name={tokenizer.name} has {tokenizer.vocab_size} tokens, model.text.hf={hf} takes {most}; use "
            f"tokenizer.name={HF}{hf}"
        )


def _load_hf(name: str, context_length: int, stored: Path | None) -> Any:
    setting = f"tokenizer.name={name}"
    require_transformers(setting)
    from open_clip.tokenizer import HFTokenizer

    try:
        place = stored if stored is not None and stored.is_dir() else fetch(name.removeprefix(HF), HF_FILES)
        return HFTokenizer(str(place), context_length, _cleaning(place), trust_remote_code=False, local_files_only=True)
    except ClipscaleError as error:
        raise ConfigError(f"{setting}: {error}") from None
    except Exception as error:
        raise ConfigError(f"{setting}: its tokenizer cannot be read: {str(error).splitlines()[0]}") from None


def _cleaning(place: Path) -> str:
    """How captions are cleaned before a tokenizer of Hugging Face's: as a directory of open_clip's says it."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        config = json.loads((place / "open_clip_config.json").read_text())
        return str(config["model_cfg"]["text_cfg"]["tokenizer_kwargs"]["clean"])
    return "whitespace"


def _load(name: str, context_length: int) -> Any:
    import open_clip  # slow to import, and `clipscale.data` is imported by tools that need no tokenizer

    if name != "clip" and not name.startswith("hf-hub:") and name not in open_clip.list_models():
        # open_clip itself falls back to its default tokenizer for a name that it does not know.
        near = difflib.get_close_matches(name, open_clip.list_models(), n=1)
        raise ConfigError(
            f"tokenizer.name={name} is not `clip`, an open_clip model name, or an hf-hub: or hf: name"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    try:
        return open_clip.get_tokenizer(CLIP_MODEL if name == "clip" else name, context_length=context_length)
    except Exception as error:
        raise ConfigError(f"tokenizer.name={name} could not be loaded: {str(error).splitlines()[0]}") from None
