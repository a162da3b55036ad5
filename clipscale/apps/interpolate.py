"""``clipscale interpolate``: weights between those of two models (WiSE-FT, Wortsman et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clipscale.apps.export import LOADING, check_new, head_summary, write_own
from clipscale.checkpoint.interop import State
from clipscale.checkpoint.loading import naming
from clipscale.checkpoint.own import find_checkpoint, load_tokenizer
from clipscale.checkpoint.pretrained import BIAS, HEAD, LIBRARIES, Pretrained, load_pretrained, read_pretrained
from clipscale.config import Config
from clipscale.data.io import resolve
from clipscale.data.tokenizer import Tokenizer, shareable_name
from clipscale.distributed.runtime import start
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.evals import Classes
from clipscale.models import CLIP, Classifier, build_model
from clipscale.trainer.build import build_store, start_head


@dataclass(frozen=True)
class _End:
    """A model to start from, as ``init.weights`` takes it."""

    where: str


@dataclass(frozen=True)
class _Own(_End):
    """One that is clipscale's, and so has a configuration."""

    checkpoint: Path
    config: Config


def interpolate(first: str, second: str, alphas: Sequence[float], out: Path, classes: str | None, device: str) -> None:
    """Write ``(1 - alpha) * first + alpha * second`` as ``clipscale export --to safetensors`` writes a model.

    The ends are what ``init.weights`` takes, and one at least is clipscale's own, for the configuration. One alpha
    fills ``out``, several a directory ``alpha_…`` in it each. Where one end is a classifier, the other becomes its
    zero-shot one for the same classes; ``classes`` is their file, where it is not that of the classifier's run. Raises
    ClipscaleError for ends that do not belong together.
    """
    if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
        raise ConfigError(f"--alpha {','.join(f'{alpha:g}' for alpha in alphas)}: choose numbers from 0 to 1")
    names = [f"alpha_{alpha:g}" for alpha in alphas]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"--alpha: two models would be {out / twice}; give numbers that differ in six digits")
    check_new(out)
    ends = [_find(where) for where in (first, second)]
    known = [end for end in ends if isinstance(end, _Own)]
    if not known:
        raise ConfigError(f"neither {first} nor {second} is clipscale's; train, or evaluate, from one of them first")
    # That of the classifier, or else of the second: what it was trained to is what is kept of the configuration.
    kept = ([end for end in known if end.config.model.classes is not None] or known)[-1]
    config = kept.config
    model = build_model(config.model, logit_bias=config.loss.first_bias)
    middle = _Middle(model, config, load_tokenizer(kept.checkpoint, config), classes, device)
    one, other = (middle.read(end) for end in ends)
    for alpha, name in zip(alphas, names, strict=True):
        place = out if len(alphas) == 1 else out / name
        model.load_state_dict({name: _between(tensor, other[name], alpha) for name, tensor in one.items()})
        write_own(model, config, kept.checkpoint, place, _card(config, alpha, first, second, place))
        print(f"{place}: {1 - alpha:g} of {first}, {alpha:g} of {second}")


def _find(where: str) -> _End:
    try:
        return _Own(where, *find_checkpoint(Path(where)))
    except ClipscaleError:
        return _End(where)  # of another library, or nothing: reading it will tell


def _between(one: torch.Tensor, other: torch.Tensor, alpha: float) -> torch.Tensor:
    """Each end itself is the same bits; what is counted, not weighed, is the nearer end's."""
    if alpha in (0, 1) or not one.is_floating_point():
        return other if alpha >= 0.5 else one
    return torch.lerp(one, other, alpha)


@dataclass(frozen=True)
class _Middle:
    """What lies between the ends: a model, whose weights are read from either."""

    model: CLIP
    config: Config
    tokenizer: Tokenizer
    classes: str | None
    device: str

    def read(self, end: _End) -> State:
        """The weights of one end in the names and shapes of the model, copied."""
        model, where = self.model, end.where
        with naming(where):
            found = read_pretrained(where)
            # Of a classifier, it is the same for all classes, and so none.
            if (BIAS in found.state) != (BIAS in model.state_dict()) and not isinstance(model, Classifier):
                raise ClipscaleError(f"{where}: one end has a bias on its logits, and the other has none")
            self._check_reading(end, found)
            for change in load_pretrained(model, found):
                raise ClipscaleError(f"{where} has another shape than the other end: {change}")
            # What training would start without, or take from elsewhere, would here be the other end's, or a random one.
            for name in model.state_dict():
                if name not in found.state and name != BIAS and not name.startswith(HEAD):
                    raise ClipscaleError(f"{where} holds a part of the model alone, without {name}; name a whole model")
        if isinstance(model, Classifier):
            self._read_head(model, end, found.state)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def _check_reading(self, end: _End, found: Pretrained) -> None:
        """Raise ConfigError where the two read other tokens, or see other parts of a picture."""
        theirs, mine = found.tokenizer, self.config.model.vision.resize_mode
        if theirs is not None and not theirs.reads_as(self.tokenizer):
            raise ConfigError(
                f"{end.where} reads the tokens of {theirs.name}, the other end those of {self.tokenizer.name}: nothing "
                "lies between them"
            )
        if isinstance(end, _Own) and (its := end.config.model.vision.resize_mode) is not mine:
            raise ConfigError(f"{end.where} sees pictures resized by {its.value}, the other end by {mine.value}")

    def _read_head(self, model: Classifier, end: _End, state: State) -> None:
        """The head of a classifier, or the one that the towers of another model have without training."""
        config = self.config
        if isinstance(end, _Own) and end.config.model.classes is not None:
            if end.config.model.classes != config.model.classes:
                raise ConfigError(f"{end.where} tells other classes apart than the other end: their heads do not mix")
            head = {name.removeprefix(HEAD): tensor for name, tensor in state.items() if name.startswith(HEAD)}
            model.head.load_state_dict(head)
            return
        file = self.classes or config.data.zeroshot.classes
        if file is None:
            raise ConfigError(f"{end.where} has no head: name the prompts of its classes, --classes FILE.json")
        named = Classes.load(build_store(config), file if self.classes else resolve(file, config.data.root))
        named.agree(model.config.classes or ())
        runtime = start(self.device, config.distributed.timeout_s)
        start_head(config, model.to(runtime.device), named, self.tokenizer, runtime.device)
        model.cpu()


def _card(config: Config, alpha: float, first: str, second: str, out: Path) -> str:
    return f"""\
# {config.model.name}, between two models

{1 - alpha:g} of the weights of `{_named(first)}` and {alpha:g} of those of `{_named(second)}`.{head_summary(config)}

```python
{LOADING["safetensors"].replace("OUT", out.resolve().name)}```
"""


def _named(where: str) -> str:
    return shareable_name(where) if where.startswith(LIBRARIES) else Path(where).resolve().name
