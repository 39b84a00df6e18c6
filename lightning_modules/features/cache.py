"""Features on disk: cut into files that are written whole or not at all, and checked before they are used.

The features of one view of one split lie in a folder named after their provenance, cut into safetensors files (shards).
Each carries the full provenance and a hash of its values: a torn, altered or foreign one is computed again. Shards and
batches are cut at fixed places, whatever the number of processes.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
import torchvision
from filelock import BaseFileLock, FileLock, Timeout
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_modules.files import atomic, remove_unfinished, writing

BATCH = 32  # Images per forward pass; fixed, because the last digits of a convolution may depend on its batch
SHARDS = 64  # How many shards a split is cut into, as long as none holds more than `LARGEST` images
LARGEST = 4096
VERSIONS = f"torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}"


class FeatureRows:
    """A matrix of features, shape (n, D), in memory or mapped from shards, all but the last with as many rows."""

    def __init__(self, shards: Sequence[Tensor]) -> None:
        self.shards = shards
        self.rows = len(shards[0])
        self.shape = (sum(map(len, shards)), shards[0].shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the rows at `indices`, shape (b, D)."""
        if len(self.shards) == 1:
            return self.shards[0].index_select(0, indices)
        picked = torch.empty(len(indices), self.shape[1], dtype=self.shards[0].dtype)
        homes = indices // self.rows
        for home in homes.unique().tolist():
            here = homes == home
            picked[here] = self.shards[home].index_select(0, indices[here] - home * self.rows)
        return picked


class FeatureCache:
    """The features of one view of one split of n images, in a folder of `directory`, which all processes must see.

    `provenance` is all that the values depend on, as JSON types.
    """

    def __init__(self, directory: Path, provenance: dict[str, Any], images: int) -> None:
        text = json.dumps(provenance, sort_keys=True)
        self.provenance = provenance
        self.folder = directory / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        rows = BATCH * min(max(1, -(-images // (SHARDS * BATCH))), LARGEST // BATCH)
        self.shards = [range(start, min(start + rows, images)) for start in range(0, images, rows)]
        """The places in the split that each shard holds."""
        self._held: dict[range, BaseFileLock] = {}
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.folder)

    def missing(self, shards: Sequence[range]) -> list[range]:
        """Return those of the shards that are not there, or not as they were asked for."""
        return [shard for shard in shards if not self._is_valid(shard)]

    def claim(self, shards: Iterable[range]) -> Iterator[range]:
        """Yield the shards that no other process is at, and hold each until it is written or let go of."""
        for shard in shards:
            lock = FileLock(self._path(shard).with_suffix(".lock"))
            with self._writing(), contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                self._held[shard] = lock
            if shard in self._held and self._path(shard).exists() and self._is_valid(shard):
                self.release(shard)  # another process has just written it
            elif shard in self._held:
                yield shard

    def write(self, shard: range, values: Tensor) -> None:
        """Write a shard's values, shape (len(shard), D); refuse another number of rows."""
        if len(values) != len(shard):
            raise MisconfigurationException(
                f"Images {shard.start} to {shard.stop - 1} gave {len(values)} rows of features, not one each; name "
                f"another model.backbone.layer."
            )
        metadata = {"provenance": self.provenance, "rows": str(shard), "digest": _digest(values), "versions": VERSIONS}
        with self._writing():
            try:
                with atomic(self._path(shard)) as file:
                    # Under one name, as safetensors leaves the order of several to chance: equal shards, equal files.
                    save_file({"features": values}, file, {"shard": json.dumps(metadata, sort_keys=True)})
            except SafetensorError as error:  # how safetensors reports a full disk
                raise OSError(str(error)) from error
        self.release(shard)

    def release(self, *shards: range) -> None:
        """Let go of shards, of all if none is named, so that other processes may make them."""
        for shard in shards or list(self._held):
            if lock := self._held.pop(shard, None):
                lock.release()
                self._path(shard).with_suffix(".lock").unlink(missing_ok=True)

    def read(self, processes: int) -> FeatureRows:
        """Return all features, in memory where they fit well beside those of the other processes, else mapped.

        A MisconfigurationException is raised if a shard is not there, or has not one row for each of its images.
        """
        try:
            tensors = [_open(self._path(shard)) for shard in self.shards]
        except (OSError, SafetensorError) as error:
            raise MisconfigurationException(
                f"Features that another process wrote to {self.folder} cannot be read ({error}); all processes must "
                f"see the same folder: name one with --model.cache_dir."
            ) from error
        for tensor, shard in zip(tensors, self.shards, strict=True):
            if tensor.shape != (len(shard), tensors[0].shape[-1]):
                raise MisconfigurationException(
                    f"{self._path(shard)} holds values of shape {tuple(tensor.shape)}, not {len(shard)} rows of "
                    f"{tensors[0].shape[-1]}; delete it, and it is computed again."
                )
        if sum(tensor.nbytes for tensor in tensors) * max(1, processes) < psutil.virtual_memory().available / 2:
            tensors = [torch.cat(tensors)]
        return FeatureRows(tensors)

    def _path(self, shard: range) -> Path:
        return self.folder / f"{shard.start:09d}.safetensors"

    def _writing(self) -> Any:
        return writing(self.folder, "name another folder with --model.cache_dir")

    def _is_valid(self, shard: range) -> bool:
        """Return whether a shard is there, complete, unaltered and the one asked for; say why where it is not."""
        path = self._path(shard)
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get("shard", "{}"))
                values = file.get_tensor("features")
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            rank_zero_info(f"{path} is torn ({error}); it is computed again.")
            return False
        known = (metadata.get("provenance"), metadata.get("rows"))
        if known != (self.provenance, str(shard)) or len(values) != len(shard):
            rank_zero_info(f"{path} belongs to other weights, images or settings; it is computed again.")
            return False
        if metadata.get("digest") != _digest(values) or values.dtype != torch.float32:
            rank_zero_info(f"{path} was altered; it is computed again.")
            return False
        if metadata.get("versions") != VERSIONS:
            rank_zero_info(f"{path} was computed with {metadata.get('versions')}, this is {VERSIONS}.")
        return True


def _open(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("features")


def _digest(values: Tensor) -> str:
    return hashlib.blake2b(values.contiguous().numpy().data, digest_size=16).hexdigest()
