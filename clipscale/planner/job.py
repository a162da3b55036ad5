"""What a configuration comes to on each process: its share of the batch, its shards, its captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

from clipscale.config import Config
from clipscale.config.data import Builtin
from clipscale.config.optim import LossName, PrecisionName
from clipscale.config.running import Strategy
from clipscale.config.validate import default_streams, usable_processes
from clipscale.errors import ConfigError
from clipscale.hardware import Hardware
from clipscale.models.flops import (
    NOMINAL,
    TYPICAL,
    Activations,
    Execution,
    Flops,
    Parameters,
    activations,
    blocks,
    flops,
    parameters,
    trained_parameters,
)

SPREAD = 0.63  # deviation of the logarithm of captions' words on the web: 11.5 ± 8
DRAWN = 64  # captions that stand for all


@dataclass(frozen=True)
class Job:
    """A valid configuration on ``hardware``, with captions of ``tokens`` in the mean (None: those of LAION's)."""

    config: Config
    hardware: Hardware
    mean_tokens: float | None = None

    def __post_init__(self) -> None:
        mean, most = self.mean_tokens, self.config.model.context_length
        if mean is not None and not 3 <= mean <= most:
            raise ConfigError(f"--tokens {mean:g} must lie between 3 and model.context_length={most}")

    @cached_property
    def asked(self) -> int:
        """Processes that the cluster has."""
        return self.config.cluster.nodes * self.config.cluster.processes_per_node

    @cached_property
    def world(self) -> int:
        """Those of them that train: as many as can share the streams evenly."""
        batch = self.config.global_batch_size
        return usable_processes(self.config.data.streams or default_streams(batch, self.asked), self.asked)

    @property
    def per_node(self) -> int:
        """Processes of a node."""
        return min(self.config.cluster.processes_per_node, self.world)

    @property
    def nodes(self) -> int:
        """Nodes of which processes train."""
        return -(-self.world // self.config.cluster.processes_per_node)

    @property
    def pairs(self) -> int:
        """A process's share of a batch."""
        return self.config.global_batch_size // self.world

    @cached_property
    def microbatches(self) -> int:
        """Into how many parts it is cut."""
        return self.config.optim.count_microbatches(self.pairs)

    @property
    def microbatch(self) -> int:
        """Pairs of the largest part."""
        return -(-self.pairs // self.microbatches)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return -(-self.config.total_samples // self.config.global_batch_size)

    @property
    def shards(self) -> int:
        """Processes over which a copy of the model is cut."""
        parallel = self.config.parallel
        if parallel.strategy is Strategy.ddp:
            return 1
        if parallel.strategy is Strategy.fsdp:
            return self.world
        return parallel.shard_size or math.gcd(self.world, self.config.cluster.processes_per_node)

    @property
    def is_classifier(self) -> bool:
        """Whether the text tower is left out of steps."""
        return self.config.loss.name is LossName.cross_entropy

    @property
    def packs(self) -> bool:
        """Whether captions of any lengths are computed at once; elsewhere they are, in groups of equal ones."""
        return self.hardware.is_gpu and self.config.precision.name is not PrecisionName.fp32

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens of some captions that stand for all: log-normal words, as the web's."""
        most = self.config.model.context_length
        fills = self.config.data.builtin is Builtin.synthetic  # its captions do
        mean = min(self.mean_tokens or (most if fills else TYPICAL), most)
        if mean == most:
            return [most]
        normal = NormalDist(0, SPREAD)
        drawn = [math.exp(normal.inv_cdf((i + 0.5) / DRAWN)) for i in range(DRAWN)]
        scale = 1.0
        for _ in range(8):  # until what the context cuts off is made up for
            lengths = [min(max(3, round(2 + scale * one)), most) for one in drawn]
            scale *= max(mean - 2, 1) / max(sum(lengths) / DRAWN - 2, 1)
        return lengths

    @property
    def tokens(self) -> float:
        """Tokens of a caption, in the mean."""
        return sum(self.lengths) / len(self.lengths)

    @cached_property
    def execution(self) -> Execution:
        """How the towers run."""
        return Execution(
            self.lengths,
            grouped=not self.packs,
            checkpointing=self.config.parallel.activation_checkpointing,
            lock=self.config.lock,
            classifies=self.is_classifier,
        )

    @cached_property
    def parameters(self) -> Parameters:
        """Exactly those of the model."""
        return parameters(self.config.model, logit_bias=self.config.loss.first_bias is not None)

    @cached_property
    def trained(self) -> int:
        """Parameters that are trained."""
        rest = self.parameters.temperature + self.parameters.head
        return trained_parameters(self.config.model, self.execution) + rest

    @cached_property
    def trained_vision(self) -> int:
        """Those of the image tower among them."""
        images_only = Execution(lock=self.config.lock, classifies=True)
        return trained_parameters(self.config.model, images_only)

    @cached_property
    def blocks(self) -> list[int]:
        """Parameters of every block of both towers."""
        vision, text = blocks(self.config.model)
        return [*vision, *text]

    @property
    def tables(self) -> int:
        """Parameters of the text tower that no product multiplies."""
        text = self.config.model.text
        return (text.vocab_size + self.config.model.context_length) * text.width

    @cached_property
    def flops(self) -> Flops:
        """Of a sample, as it is computed here."""
        return flops(self.config.model, self.execution)

    @cached_property
    def nominal(self) -> float:
        """FLOPs of training on a sample with every token of the full context in every block: what papers count."""
        everything = Execution(
            pooled_last_block=NOMINAL.pooled_last_block, lock=self.config.lock, classifies=self.is_classifier
        )
        return flops(self.config.model, everything).training

    @cached_property
    def executed(self) -> float:
        """FLOPs of a sample with all that is computed twice: for checkpointing, and for all microbatches but one."""
        again = (self.microbatches - 1) / self.microbatches
        return self.flops.executed + again * self.flops.forward

    def activations(self) -> Activations:
        """Bytes per sample that wait for the backward pass."""
        return activations(self.config.model, self.execution, self.config.precision.name)
