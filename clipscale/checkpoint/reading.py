"""Reading tensors out of a checkpoint that anybody may have written.

torch's distributed format keeps its table of contents as a pickle, and so does torch's reader load it. A pickle can run
code, and one that is read by the standard library's fast reader can also ask for any amount of memory. Here it is read
by the slow one, which allocates what it has read, and may name only the few classes that such a table is made of.
"""

from __future__ import annotations

import io
import pathlib
import pickle
import zipfile
from collections import defaultdict
from typing import Any, ClassVar

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as contents
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from clipscale.checkpoint.manifest import DamagedError, Manifest, Stored

METADATA = ".metadata"

_BUILT = (
    contents.BytesStorageMetadata,
    contents.ChunkStorageMetadata,
    contents.Metadata,
    contents.MetadataIndex,
    contents.StorageMeta,
    contents.TensorProperties,
    contents.TensorStorageMetadata,
    _StorageInfo,
)
_ALLOWED: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind for kind in (*_BUILT, contents._MEM_FORMAT_ENCODING, torch.Size)
}
# Where the checkpoint lay when it was written; the class has moved between versions of Python.
_ALLOWED |= {(module, "PosixPath"): pathlib.PurePosixPath for module in ("pathlib", "pathlib._local")}
_ALLOWED |= {
    ("torch", name): value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and str(value) == f"torch.{name}"
}
_ALLOWED["torch.serialization", "_get_layout"] = lambda name: {"torch.strided": torch.strided}[name]


# What a table of contents is pickled with; some of the others reserve what they claim to hold.
_OPCODES = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
    pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.EMPTY_DICT,
    pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.APPEND,
    pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.BINGET, pickle.LONG_BINGET, pickle.MEMOIZE,
    pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD,
)  # fmt: skip


_SLOW: Any = pickle._Unpickler  # the one in Python; its stubs know little of it


class _Unpickler(_SLOW):
    dispatch: ClassVar = {code[0]: _SLOW.dispatch[code[0]] for code in _OPCODES}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _BUILT):  # not a class, whose instances would all change
            raise pickle.UnpicklingError(f"it changes {self.stack[-2]!r:.40}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


class Reader(dcp.StorageReader):
    """Reads a checkpoint by torch's distributed checkpointing, wherever it lies; nothing in it is executed."""

    def __init__(self, stored: Stored, manifest: Manifest) -> None:
        self._stored, self._manifest = stored, manifest
        self._places: dict[Any, _StorageInfo] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing: a reader is of one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> contents.Metadata:
        """The table of contents. Raises DamagedError for a pickle of anything else."""
        with self._stored.open(METADATA) as file:
            text = file.read()
        try:
            found = _Unpickler(io.BytesIO(text)).load()
        except Exception as error:  # a damaged pickle may fail in any way
            raise DamagedError(f"{METADATA} is no table of contents, and is not read: {error}") from None
        if not isinstance(found, contents.Metadata) or not isinstance(found.storage_data, dict):
            raise DamagedError(f"{METADATA} is no table of contents")
        return found

    def set_up_storage_reader(
        self, metadata: contents.Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Take over where everything stands."""
        self._places = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """Read what a plan asks for, file by file and from front to back."""
        by_file: defaultdict[str, list[tuple[int, int, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            place = self._places[item.storage_index]
            self._check(place)
            by_file[place.relative_path].append((place.offset, place.length, item))
        for name, wanted in by_file.items():
            with self._stored.open(name) as file:
                for offset, length, item in sorted(wanted, key=lambda one: one[:2]):
                    file.seek(offset)
                    self._load(io.BytesIO(file.read(length)), item, planner)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def _check(self, place: _StorageInfo) -> None:
        known = self._manifest.files.get(place.relative_path)
        if known is None:
            raise DamagedError(f"{METADATA} names {place.relative_path!r}, which is no file of this checkpoint")
        if not 0 <= place.offset <= place.offset + place.length <= known.bytes or place.transform_descriptors:
            raise DamagedError(f"{METADATA} leads past the end of {place.relative_path}")

    @staticmethod
    def _load(data: io.BytesIO, item: ReadItem, planner: LoadPlanner) -> None:
        _refuse_bombs(data)
        if item.type == LoadItemType.BYTE_IO:
            return planner.load_bytes(item, data)
        tensor = torch.load(data, map_location="cpu", weights_only=True)
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        target = planner.resolve_tensor(item).detach()
        if target.shape != tensor.shape:
            raise DamagedError(f"{item.storage_index.fqn} has shape {list(tensor.shape)}, not {list(target.shape)}")
        target.copy_(tensor)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Any: a reader was given its checkpoint."""
        return True


class SafePlanner(dcp.DefaultLoadPlanner):
    """torch's own planner, but for values that are no tensors: they are read without running code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a number, a text or a list of them into the state dict."""
        content = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], content)


def _refuse_bombs(data: io.BytesIO) -> None:
    """An archive says how large its members are once unpacked; torch would reserve that. It never packs any."""
    size = len(data.getbuffer())
    with zipfile.ZipFile(data) as archive:
        if sum(member.file_size for member in archive.infolist()) > size:
            raise DamagedError("a tensor claims to be larger than its file")
    data.seek(0)
