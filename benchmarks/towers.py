"""clipscale's towers against open_clip's: time of forward and backward, side by side in one run.

    python benchmarks/towers.py [--model vit_b_32] [--pairs 32] [--rounds 5] [--bf16]

One process, torch on one thread, random weights and inputs, no loss. Captions have the lengths of LAION's: log-normal,
11.5 ± 8 words of 1.3 tokens and two more, cut at the context (after such captions' statistics; 17 tokens in the mean).
Both sides take turns; the least CPU seconds of the rounds count, and so does their ratio. The median of the rounds' own
ratios tells how far to trust it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import open_clip  # noqa: E402 - benchmarks run from anywhere, installed or not
import torch  # noqa: E402

from clipscale.config import load_group  # noqa: E402
from clipscale.config.model import Activation, Model  # noqa: E402
from clipscale.models import build_model  # noqa: E402

WORDS, SPREAD, TOKENS_PER_WORD = 11.5, 8.0, 1.3


def draw_lengths(pairs: int, context: int, mean: float = WORDS, spread: float = SPREAD, seed: int = 0) -> torch.Tensor:
    """Tokens of captions as the web has them, ``mean`` ± ``spread`` words, Int32[B]."""
    variance = math.log(1 + (spread / mean) ** 2)
    drawn = torch.randn(pairs, generator=torch.Generator().manual_seed(seed))
    words = torch.exp(math.log(mean) - variance / 2 + math.sqrt(variance) * drawn)
    return (words * TOKENS_PER_WORD + 2).round().clamp(3, context).int()


def peer(config: Model) -> torch.nn.Module:
    """open_clip's model of the same sizes."""
    vision, text = config.vision, config.text
    trunk = build_model(config).visual.trunk
    blocks = trunk.blocks
    return open_clip.CLIP(
        config.embed_dim,
        {
            "image_size": vision.image_size, "layers": len(blocks), "width": trunk.embed_dim,
            "head_width": trunk.embed_dim // blocks[0].attn.num_heads, "patch_size": trunk.patch_embed.patch_size[0],
        },
        {
            "context_length": config.context_length, "vocab_size": text.vocab_size, "width": text.width,
            "heads": text.heads, "layers": text.layers,
        },
        quick_gelu=config.activation is Activation.quickgelu,
    )  # fmt: skip


def measure(config: Model, pairs: int, rounds: int, bf16: bool = False) -> list[dict]:
    """A row per tower: CPU seconds of both sides, the least and the rounds' median ratio."""
    ours, theirs = build_model(config), peer(config)
    lengths = draw_lengths(pairs, config.context_length)
    padded = torch.randint(1, config.text.eot_id, (pairs, config.context_length))
    padded[torch.arange(pairs), lengths.long() - 1] = config.text.eot_id
    padded[torch.arange(config.context_length) >= lengths[:, None]] = 0
    ids, images = ours.text.pack(padded)[0], torch.randn(pairs, 3, *[config.vision.image_size] * 2)
    towers = {
        "text": (lambda: ours.encode_text(ids, lengths), lambda: theirs.encode_text(padded)),
        "image": (lambda: ours.encode_image(images), lambda: theirs.encode_image(images)),
    }

    def seconds(encode: Callable[[], torch.Tensor]) -> float:
        begun = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            features = encode()
        features.float().square().sum().backward()
        spent = time.process_time() - begun
        for model in (ours, theirs):
            model.zero_grad()
        return spent

    rows = []
    for name, sides in towers.items():
        found = [[seconds(side) for side in sides] for _ in range(rounds + 1)][1:]  # the first one only warms up
        mine, other = (min(turn[i] for turn in found) for i in range(2))
        ratio = statistics.median(b / a for a, b in found)
        rows.append({"tower": name, "cpu_s": mine, "peer_s": other, "ratio": other / mine, "median_ratio": ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_b_32", help="one of the model group's ViTs")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_group("model", options.model, Model)
    lengths = draw_lengths(options.pairs, config.context_length)
    print(f"{options.pairs} captions of {lengths.float().mean():.1f} tokens in the mean, {lengths.max()} at most")
    print("tower     CPU s   open_clip's   so many times ours (median of rounds)")
    for row in measure(config, options.pairs, options.rounds, options.bf16):
        print("{tower:<6} {cpu_s:8.2f} {peer_s:13.2f} {ratio:9.2f} ({median_ratio:.2f})".format(**row))


if __name__ == "__main__":
    main()
