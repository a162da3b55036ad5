"""Batches: each is the same array, in the same order, for every number of ranks and workers."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipscale.data.manifest import ShardFile
from clipscale.data.order import SampleOrder, mix
from clipscale.data.prepare import Prepared, Preparer, SampleOptions, stack_teachers
from clipscale.data.samples import BadSample, Member, caption_ids, join_digests, pack, pack_some
from clipscale.data.stream import read_stream
from clipscale.data.tokenizer import Tokenizer
from clipscale.distributed import GRACE_S
from clipscale.distributed.workers import LOADER, worker_context
from clipscale.errors import DataError

HOPELESS = 50_000  # samples; if none of so many is usable, the keys are wrong
Skipped = Sequence[Sequence[Sequence[int]]]
STARVED = 100  # epochs; a stream that finds nothing usable in so many never will


@dataclass
class Batch:
    """A batch of pairs, captions without padding.

    ``images`` UInt8[B, 3, S, S]; ``text_ids`` Int32[T], all captions end to end; ``text_lengths`` Int32[B];
    ``positions`` Int64[streams], where each stream stands after this batch; ``keys``, one per pair; ``caption_ids``
    Int64[B], equal for captions of the same tokens; ``seeds`` Int64[B], each sample's own, from which the towers draw.
    With `data.label_key`, a caption is one token: the class index.
    """

    images: torch.Tensor
    text_ids: torch.Tensor
    text_lengths: torch.Tensor
    positions: torch.Tensor
    keys: list[str]
    caption_ids: torch.Tensor
    seeds: torch.Tensor
    bad: list[tuple[str, str]] = field(default_factory=list)
    """``(reason, key)`` of every sample that was passed over."""
    truncated: int = 0
    """Captions cut to the context length."""
    image_ids: torch.Tensor | None = None
    """Int64[B], equal for images of the same encoded bytes; None unless they were asked for."""
    negative_ids: torch.Tensor | None = None
    """Int32[T'], the hard negatives of all samples, in their order, end to end; None unless there are to be any."""
    negative_lengths: torch.Tensor | None = None
    """Int32[B * data.negatives_per_sample]; 0 for each that a sample lacks, behind those that it has."""
    teachers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Of each stored teacher, its embeddings of the images and of the captions, L2-normalised Float32[B, D_t]."""

    @staticmethod
    def concatenate(parts: Sequence[Batch], pin: bool = False) -> Batch:
        """Join the parts that the workers made, in stream order; what goes to the device, into page-locked memory."""

        def join(tensors: list[Any]) -> Any:
            if tensors[0] is None:
                return None
            if not pin:
                return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            rows = sum(len(tensor) for tensor in tensors)
            out = torch.empty(rows, *tensors[0].shape[1:], dtype=tensors[0].dtype, pin_memory=True)
            return torch.cat(tensors, out=out)

        # Of each teacher, the images of all parts and the texts of all parts.
        teachers = [zip(*pairs, strict=True) for pairs in zip(*(p.teachers for p in parts), strict=True)]
        return Batch(
            join([p.images for p in parts]),
            join([p.text_ids for p in parts]),
            join([p.text_lengths for p in parts]),
            torch.cat([p.positions for p in parts]),
            [key for p in parts for key in p.keys],
            join([p.caption_ids for p in parts]),
            join([p.seeds for p in parts]),
            [bad for p in parts for bad in p.bad],
            sum(p.truncated for p in parts),
            join([p.image_ids for p in parts]),
            join([p.negative_ids for p in parts]),
            join([p.negative_lengths for p in parts]),
            [(join(list(images)), join(list(texts))) for images, texts in teachers],
        )

    def cut(self, count: int) -> list[Batch]:
        """``count`` microbatches of consecutive pairs, whose sizes differ by one at most; none is empty if B >= count.

        They hold what the towers take; what the loss takes beside features, and what is told of the batch, they do not.
        """
        if count == 1:
            return [self]
        images, keys = self.images.tensor_split(count), iter(self.keys)
        captions = _cut_packed(self.text_ids, self.text_lengths, count)
        negatives: list[Any] = [(None, None)] * count
        if self.negative_ids is not None and self.negative_lengths is not None:
            negatives = _cut_packed(self.negative_ids, self.negative_lengths.view(len(self.images), -1), count)
        return [
            Batch(
                part,
                *captions[i],
                self.positions,
                list(islice(keys, len(part))),
                self.caption_ids.tensor_split(count)[i],
                self.seeds.tensor_split(count)[i],
                negative_ids=negatives[i][0],
                negative_lengths=negatives[i][1],
            )
            for i, part in enumerate(images)
        ]


def _cut_packed(ids: torch.Tensor, lengths: torch.Tensor, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Packed captions of ``lengths`` Int[B] or Int[B, k] in ``count`` parts of consecutive rows, each packed."""
    parts = lengths.tensor_split(count)
    return list(zip(ids.split([int(part.sum()) for part in parts]), [part.reshape(-1) for part in parts], strict=True))


def _room_for_images(count: int, size: int) -> torch.Tensor:
    """UInt8[count, 3, size, size], to be filled; in a worker, in the memory that it shares with the trainer.

    A batch of images is fresh memory each time, and the first touch of a page costs more than copying it: once is
    enough, and numpy asks for large pages, which torch does not.
    """
    shape = (count, 3, size, size)
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, np.uint8))
    shared: Any = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate function does
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)


def ranges_of(streams: NDArray[np.int64], skipped: Skipped) -> list[list[tuple[int, int]]]:
    """The ranges ``(start, stop)`` of each of some streams that are passed over."""
    return [[(starts[v], stops[v]) for starts, stops in skipped] for v in streams]


@dataclass
class _StreamReader(IterableDataset):
    """Partial batches of the streams that one worker owns: a contiguous, equal-as-possible share of the rank's."""

    order: SampleOrder
    files: Sequence[ShardFile]
    streams: NDArray[np.int64]
    positions: NDArray[np.int64]
    skipped: Sequence[Sequence[tuple[int, int]]]  # ranges of each of the streams that are passed over
    per_stream: int
    prepare: Preparer
    fruitful: bool = False  # whether any sample was usable so far

    def __iter__(self) -> Iterator[Batch | DataError]:
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        streams = np.array_split(self.streams, workers)[number]
        positions = np.array_split(self.positions, workers)[number].copy()
        ranges = [self.skipped[i] for i in np.array_split(np.arange(len(self.streams)), workers)[number]]
        readers = [
            read_stream(self.order, self.files, int(v), int(p), skipped)
            for v, p, skipped in zip(streams, positions, ranges, strict=True)
        ]
        while True:
            try:
                batch = self._batch(streams, readers, positions)
            except DataError as error:  # as data: an exception would come out of the DataLoader as a traceback's text
                yield error
                return
            yield batch

    def _batch(
        self,
        streams: NDArray[np.int64],
        readers: Sequence[Iterator[tuple[int, Member]]],
        positions: NDArray[np.int64],
    ) -> Batch:
        made: list[list[Prepared]] = [[] for _ in readers]
        images = _room_for_images(len(readers) * self.per_stream, self.prepare.options.image.size)
        bad: list[tuple[str, str]] = []
        fed = positions.copy()  # behind the last good sample of each stream
        # What a stream lacks after a round, because samples were bad, it brings in the next one.
        while missing := [i for i, good in enumerate(made) for _ in range(self.per_stream - len(good))]:
            raw = [(i, *next(readers[i])) for i in missing]
            empty = [iter(range(i * self.per_stream + len(good), len(images))) for i, good in enumerate(made)]
            prepared = self.prepare(
                [(int(streams[i]), position, sample) for i, position, sample in raw],
                images,
                [empty[i] for i in missing],
            )
            for (i, position, sample), result in zip(raw, prepared, strict=True):
                if position > positions[i]:  # behind a range that was passed over
                    fed[i] = position
                positions[i] = position + 1
                bad += [("beyond_count", key) for key in sample.beyond]
                if isinstance(result, BadSample):
                    bad.append((str(result), sample.key))
                else:
                    made[i].append(result)
                    fed[i] = position + 1
                    self.fruitful = True
            if self.fruitful:
                self._refuse_starvation(streams, fed, positions)
            elif len(bad) >= HOPELESS:  # or it would read round and round for ever
                reasons = ", ".join(f"{n} x {reason}" for reason, n in Counter(r for r, _ in bad).most_common(5))
                raise DataError(
                    f"none of the first {len(bad)} samples is usable: {reasons}; check data.image_keys and "
                    "data.caption_key"
                )
        return self._assemble(images, [one for stream in made for one in stream], positions, bad)

    def _assemble(
        self, images: torch.Tensor, good: Sequence[Prepared], positions: NDArray[np.int64], bad: list[tuple[str, str]]
    ) -> Batch:
        options = self.prepare.options
        packed, lengths = pack([one.ids for one in good])
        negatives: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
        if options.negatives_key is not None:
            negatives = pack_some([one.negatives for one in good], options.negatives_per_sample)
        return Batch(
            images,
            packed,
            lengths,
            torch.from_numpy(positions.copy()),
            [one.key for one in good],
            caption_ids([one.ids for one in good]),
            torch.tensor([one.seed for one in good], dtype=torch.int64),
            bad,
            sum(one.cut for one in good),
            join_digests([one.image_digest for one in good]) if options.image_ids else None,
            *negatives,
            stack_teachers(good),
        )

    def _refuse_starvation(
        self, streams: NDArray[np.int64], fed: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> None:
        """Raise DataError for a stream that meets the same bad samples in every epoch: it would read on for ever."""
        for i in np.flatnonzero(positions - fed >= STARVED):
            v, order = int(streams[i]), self.order
            if order.epoch_at(v, int(positions[i])) - order.epoch_at(v, int(fed[i])) >= STARVED:
                raise DataError(
                    f"{STARVED} epochs hold no usable sample for stream {v} of {order.streams}: the data is too small "
                    "for that many and some of it is bad; remove its bad samples or set data.streams lower"
                )


class TrainLoader:
    """Endless batches of this rank's share of the order.

    Args:
        order: the global order.
        files: the shards, in the order's numbering.
        positions: Int64[V], where every stream stands.
        skipped: stretches of the order that are passed over, each as ``(starts, stops)``, positions of every stream.
        rank, world: this rank and the number of ranks; ``world`` divides V.
        global_batch_size: B; V divides it.
        workers: decoding processes; 0 decodes here.
    """

    def __init__(
        self,
        order: SampleOrder,
        files: Sequence[ShardFile],
        positions: NDArray[np.int64],
        *,
        rank: int,
        world: int,
        global_batch_size: int,
        options: SampleOptions,
        tokenizer: Tokenizer,
        workers: int,
        pin_memory: bool,
        skipped: Skipped = (),
    ) -> None:
        mine = np.array_split(np.arange(order.streams), world)[rank]
        reader = _StreamReader(
            order,
            files,
            mine,
            positions[mine],
            ranges_of(mine, skipped),
            global_batch_size // order.streams,
            Preparer(options, tokenizer),
        )
        self._parts = max(1, min(workers, len(mine)))
        self._pin_memory = pin_memory
        context = worker_context(LOADER) if workers else None
        with _without_advice():
            self._loader = DataLoader(
                reader,
                batch_size=None,
                num_workers=self._parts if workers else 0,
                multiprocessing_context=context,
                prefetch_factor=4 if workers else None,
                worker_init_fn=_start_worker if workers else None,
            )

    def __iter__(self) -> Iterator[Batch]:
        # The DataLoader takes from its workers in turn, so as many items as there are workers are one batch.
        with _without_advice():
            items = iter(self._loader)
        try:
            while True:
                parts = [next(items) for _ in range(self._parts)]
                for part in parts:
                    if isinstance(part, DataError):
                        raise part
                yield Batch.concatenate(parts, self._pin_memory)
        finally:
            # Now, and not when the error is forgotten that holds the iterator: the signal by which this process ends
            # its workers at last would be taken for the launcher's, at which they go on.
            getattr(items, "_shutdown_workers", lambda: None)()


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without torch's opinion on the number of workers, which the user chose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


def _start_worker(worker: int) -> None:
    # The trainer decides what a signal means, and needs batches until its ranks have agreed on the step at which to
    # stop: torchrun signals a rank's whole process group.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: _end_after(GRACE_S))
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_after(seconds: float) -> None:
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True  # it must not keep a worker that could end before
    timer.start()


def _end_with_the_trainer() -> None:
    # torch's own watchdog looks at the parent process, which is the fork server here; and that one lives as long as its
    # workers do. Without this, a killed trainer leaves both behind for ever.
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    trainer.join()
    os._exit(1)


def step_seed(seed: int, samples_seen: int, rank: int, microbatch: int) -> int:
    """Seed of what is random in the forward pass of a microbatch on one rank and does not draw from the samples' own
    seeds (dropout, where an architecture has it); derived, never saved."""
    return mix(seed, samples_seen, rank, microbatch) >> 1
