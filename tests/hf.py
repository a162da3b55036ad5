"""Small models and tokenizers as Hugging Face's libraries write them, made here: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipscale.config import load_group
from clipscale.config.model import Model
from clipscale.models.hf import quiet_transformers
from tests.towers import randomise

COLOURS, FORMS = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle", "star")
WORDS = (*COLOURS, *FORMS, "the", "and", "of", "on", "left", "right", "above", "below", "small", "large")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONTEXT = 24
VOCABULARY = 128
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def word_pieces() -> Any:
    """A tokenizer of BERT's kind."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = ("pad", "unk", "cls", "sep", "mask")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, **{f"{n}_token": t for n, t in zip(names, special, strict=True)}
    )


def byte_pieces(*, ends: bool = True) -> Any:
    """A tokenizer of RoBERTa's kind; without ``ends``, of GPT-2's, which writes no token at either end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces = [*special, *LETTERS, *(f"Ġ{letter}" for letter in LETTERS), "re", "Ġre", "Ġred", "Ġ", ".", ","]
    merges = [("r", "e"), ("Ġ", "re"), ("Ġre", "d")]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    names = dict(pad_token="<pad>", unk_token="<unk>", eos_token="</s>", bos_token="<s>")
    if ends:
        made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
        names |= dict(cls_token="<s>", sep_token="</s>", mask_token="<mask>")
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def hf_spec(kind: str) -> Any:
    """A configuration of some kind of text model, small."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = SIZES | dict(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT)
    decoder = dict(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=2, pad_token_id=1)
    makers: dict[str, Any] = {
        "bert": lambda: transformers.BertConfig(**sizes),
        "roberta": lambda: transformers.RobertaConfig(**sizes | dict(max_position_embeddings=CONTEXT + 2)),
        "distilbert": lambda: transformers.DistilBertConfig(
            vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=CONTEXT
        ),
        "t5": lambda: transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
        ),
        "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **decoder),
        "llama": lambda: transformers.LlamaConfig(**sizes | decoder),
        "modernbert": lambda: transformers.ModernBertConfig(**sizes | decoder, cls_token_id=0, sep_token_id=2),
        "opt": lambda: transformers.OPTConfig(
            ffn_dim=64, word_embed_proj_dim=32, **sizes | decoder | dict(bos_token_id=2)
        ),
        "neox": lambda: transformers.GPTNeoXConfig(**sizes | dict(bos_token_id=0, eos_token_id=0)),
        "clip": lambda: transformers.CLIPTextConfig(**sizes | decoder),
        "mpnet": lambda: transformers.MPNetConfig(**sizes | dict(max_position_embeddings=CONTEXT + 2)),
    }
    return makers[kind]()


def save_hf(place: Path, kind: str = "bert", tokenizer: Any = None) -> Path:
    """A model of a kind with weights that hide nothing, and a tokenizer, as ``save_pretrained`` leaves them."""
    from transformers import AutoModel

    model = AutoModel.from_config(hf_spec(kind))
    randomise(model)
    with quiet_transformers():
        model.save_pretrained(place)
    (tokenizer or word_pieces()).save_pretrained(place)
    return place


def hf_model(kind: str, **changes: Any) -> Model:
    """Our `tiny` with a text tower of a kind, its configuration as a run records it; ``changes`` of ``model.text``."""
    config: Model = load_group("model", "tiny", Model)
    config.vision.layers, config.vision.image_size, config.embed_dim, config.context_length = 2, 32, 16, CONTEXT
    config.text.hf, config.text.eot_id = f"some/{kind}", 3
    config.text.hf_config = json.loads(hf_spec(kind).to_json_string())
    for key, value in changes.items():
        setattr(config.text, key, value)
    return config
