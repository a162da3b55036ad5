"""Do evaluations give what open_clip's features and scikit-learn give, on one model and data?

    python benchmarks/agreement.py RUN TRAIN.tar[,TRAIN.tar…] TEST.tar CLASSES.json

The run's model is exported and opened by open_clip, with its own transform and tokenizer. Its features are scored by
CLIP_benchmark's formulas (top-k accuracy, balanced accuracy, recall@k with several right ones), the linear probe is
scikit-learn's in float64. Beside each stands what ``clipscale eval`` and the probe find.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from clipscale.evals.linear_probe import Labelled, Regression, accuracy

KS = (1, 5, 10)
CS = (0.001, 0.1, 1.0)


def read(shards: str) -> list[dict[str, Any]]:
    """Images, labels and captions of shards."""
    samples: dict[str, dict[str, Any]] = {}
    for shard in shards.split(","):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                data = tar.extractfile(member)
                if data is not None:
                    samples.setdefault(f"{shard}/{key}", {})[ending] = data.read()
    found = []
    for members in samples.values():
        fields = json.loads(members["json"])
        found.append({"image": members["jpg"], "label": fields["label"], "captions": fields["captions"]})
    return found


class Peer:
    """What open_clip finds of samples."""

    def __init__(self, exported: Path) -> None:
        self._model, _, self._transform = open_clip.create_model_and_transforms(f"local-dir:{exported}")
        self._model.eval()
        self._tokenize = open_clip.get_tokenizer(f"local-dir:{exported}")

    @torch.inference_mode()
    def image(self, samples: list[dict[str, Any]]) -> torch.Tensor:
        """Float[N, D], normalised."""
        pixels = [self._transform(Image.open(io.BytesIO(one["image"])).convert("RGB")) for one in samples]
        return torch.cat([self._model.encode_image(part, normalize=True) for part in torch.stack(pixels).split(128)])

    @torch.inference_mode()
    def text(self, texts: list[str]) -> torch.Tensor:
        """Float[N, D], normalised."""
        tokens = self._tokenize(texts)
        return torch.cat([self._model.encode_text(part, normalize=True) for part in tokens.split(128)])


def zero_shot(peer: Peer, image: torch.Tensor, samples: list[dict[str, Any]], classes: Any) -> dict[str, float]:
    """Top-1 and top-5 accuracy and mean recall of the classes, with an ensemble of prompts."""
    names, templates = classes["classnames"], classes["templates"]
    means = [peer.text([template.replace("{}", name) for template in templates]).mean(0) for name in names]
    scores = image @ torch.stack([mean / mean.norm() for mean in means]).T
    label = torch.tensor([one["label"] for one in samples])
    top = scores.topk(5, dim=1).indices == label[:, None]
    return {
        "top1": top[:, 0].double().mean().item(),
        "top5": top.any(1).double().mean().item(),
        "mean_per_class_recall": float(balanced_accuracy_score(label, scores.argmax(1))),
    }


def retrieval(peer: Peer, image: torch.Tensor, samples: list[dict[str, Any]]) -> dict[str, float]:
    """Recall@k both ways over the distinct captions: whether any right one is among the first k."""
    texts = list(dict.fromkeys(caption for one in samples for caption in one["captions"]))
    place = {text: number for number, text in enumerate(texts)}
    right = torch.zeros(len(samples), len(texts), dtype=torch.bool)
    for row, one in enumerate(samples):
        right[row, [place[caption] for caption in one["captions"]]] = True
    scores = image @ peer.text(texts).T
    found = {}
    for k in KS:
        for way, ours, truth in (("i2t", scores, right), ("t2i", scores.T, right.T)):
            hits = truth.gather(1, ours.topk(k, dim=1).indices).any(1)
            found[f"{way}_r{k}"] = hits.double().mean().item()
    return found


def asked(run: str, *options: str) -> dict[str, float]:
    """The scores that ``clipscale eval`` prints."""
    command = [sys.executable, "-m", "clipscale.cli", "eval", run, *options, "--json", "--resamples", "1"]
    (task,) = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["tasks"]
    return dict(task["scores"])


def probes(peer: Peer, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> None:
    """Both probes on open_clip's features: the objective of each, and the accuracy."""
    parts = [
        Labelled(peer.image(part).double(), torch.tensor([one["label"] for one in part])) for part in (train, test)
    ]
    classes = int(max(part.labels.max() for part in parts)) + 1
    regression = Regression(parts[0], classes)
    x, y = parts[0].features.numpy(), parts[0].labels.numpy()
    for c in CS:
        ours = regression.fit(c)
        theirs = LogisticRegression(C=c, tol=1e-10, max_iter=20_000).fit(x, y)
        sums = theirs.decision_function(x)
        rows = np.arange(len(y)), np.searchsorted(theirs.classes_, y)
        entropy = (np.logaddexp.reduce(sums, axis=1) - sums[rows]).mean()
        objective = entropy + (theirs.coef_**2).sum() / (2 * c * len(y))
        told = f"{ours.objective:.12f} {objective:.12f}  relative {ours.objective / objective - 1:+.1e}"
        right = (
            accuracy(ours.logits(parts[1].features), parts[1].labels),
            theirs.score(parts[1].features.numpy(), parts[1].labels.numpy()),
        )
        print(f"probe C={c:<6} objective {told}; accuracy {right[0]:.6f} {right[1]:.6f}")


def main() -> None:
    """Print each figure of ours, the peer's, and whether they are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "train", "test", "classes"):
        parser.add_argument(name)
    given = parser.parse_args()
    train, test = read(given.train), read(given.test)
    with tempfile.TemporaryDirectory() as place:
        exported = Path(place) / "exported"
        command = [sys.executable, "-m", "clipscale.cli", "export", given.run, "--to", "open_clip"]
        subprocess.run([*command, "--out", str(exported)], check=True, stdout=subprocess.DEVNULL)
        peer = Peer(exported)
    image = peer.image(test)
    ours = asked(given.run, given.test, "--classes", given.classes, "--label-key", "json:label")
    ours |= asked(given.run, given.test, "--kind", "retrieval", "--caption-key", "json:captions")
    theirs = zero_shot(peer, image, test, json.loads(Path(given.classes).read_text())) | retrieval(peer, image, test)
    for name, value in theirs.items():
        print(f"{name:22} {ours[name]:.6f} {value:.6f}  {'equal' if abs(ours[name] - value) < 1e-9 else 'DIFFERENT'}")
    probes(peer, train, test)


if __name__ == "__main__":
    main()
