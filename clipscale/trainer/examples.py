"""What an evaluation saw, put where it can be looked at."""

from __future__ import annotations

import json
import logging
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from clipscale.config.running import TrackingMode
from clipscale.data.loader import Batch
from clipscale.evals import Examples

if TYPE_CHECKING:
    from clipscale.trainer.trainer import Trainer

log = logging.getLogger("clipscale")


def record_examples(trainer: Trainer, examples: Examples) -> None:
    """Write ``RUN/examples.json``, by the main rank; what cannot be shown is no reason to stop."""
    if not trainer.runtime.is_main:
        return
    try:
        with trainer.timesheet.on("evaluation"):
            shown = {"samples_seen": trainer.saved.samples_seen, **examples.shown()}
        scratch = trainer.path / "examples.tmp"
        scratch.write_text(json.dumps(shown))
        scratch.replace(trainer.path / "examples.json")
        if _are_wanted(trainer):
            from clipscale.telemetry.pictures import of_examples

            trainer.sinks.show(of_examples(shown), trainer.saved.samples_seen)
    except Exception as error:
        log.warning("no examples of this evaluation: %s", error)


def show_batch(trainer: Trainer, batch: Batch) -> None:
    """Let the tracker see the first batch of an attempt as training saw it, if it may see any."""
    if not _are_wanted(trainer) or trainer.shown_batch:
        return
    trainer.shown_batch = True
    from clipscale.telemetry.pictures import SHOWN, batch_sheet

    ids, lengths = batch.text_ids.tolist(), batch.text_lengths[:SHOWN].tolist()
    ends = [0, *accumulate(lengths)]
    texts = [trainer.tokenizer.decode(ids[a:b]) for a, b in pairwise(ends)]
    if (classes := trainer.config.model.classes) is not None:  # a caption is one token: the class
        texts = [classes[i] for i in ids[: len(lengths)]]
    trainer.sinks.show({"batch": [batch_sheet(batch.images, texts)]}, trainer.saved.samples_seen)


def _are_wanted(trainer: Trainer) -> bool:
    tracking = trainer.config.tracking
    return trainer.runtime.is_main and tracking.media and tracking.mode is not TrackingMode.disabled
