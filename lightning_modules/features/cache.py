"""The one pass over the images, kept on disk and checked before it is believed.

The representations of one view of one split lie in a folder named after their fingerprint, cut into safetensors files
(shards) that are written whole or not at all. Each shard carries the full fingerprint and a hash of its values: a torn,
altered or foreign one is computed again, a finished one survives an interrupted pass. Shards and batches are cut at
fixed places, so that neither their content nor their names depend on the number of processes.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
import torchvision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_modules.files import sweep, whole

BATCH = 32
"""Images per forward pass; fixed, because the last digits of a convolution may depend on its batch."""
SHARDS = 64
"""How many shards a split is cut into, as long as none holds more than `LARGEST` images."""
LARGEST = 4096
VERSIONS = f"torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}"

Extract = Callable[[Sequence[Sequence[int]]], Generator[Tensor, None, None]]
"""From batches of places in a split to their representations, one tensor of shape (b, D) per batch, in order."""


class FeatureRows:
    """A matrix of representations, shape (n, D), in memory or mapped from shards on disk.

    Args:
        shards: Consecutive pieces, all but the last with the same number of rows.
    """

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
    """Representations on disk, one folder per fingerprint.

    Args:
        directory: Where the folders lie; all processes must see it.
        process: Rank of this process.
        processes: Number of processes; each extracts its share of the shards.
        barrier: Waits for all processes.
    """

    def __init__(self, directory: Path, process: int, processes: int, barrier: Callable[[], None]) -> None:
        self.directory = directory
        self.process = process
        self.processes = processes
        self.barrier = barrier

    def features(self, fingerprint: dict[str, Any], images: int, extract: Extract) -> FeatureRows:
        """Return the representations with this fingerprint, from disk where they can be believed.

        Args:
            fingerprint: All that the values depend on, as JSON types.
            images: n, the images in the split.
            extract: Computes what is missing.

        Raises:
            MisconfigurationException: If the folder cannot be written, or another process' shards cannot be seen.
        """
        said = json.dumps(fingerprint, sort_keys=True)
        folder = self.directory / hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
        rows = BATCH * min(max(1, -(-images // (SHARDS * BATCH))), LARGEST // BATCH)
        shards = {
            folder / f"{start:09d}.safetensors": range(start, min(start + rows, images))
            for start in range(0, images, rows)
        }
        mine = list(shards.items())[self.process :: self.processes]
        missing = [(path, span) for path, span in mine if not _is_valid(path, fingerprint, span)]
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
        batches = [list(span[i : i + BATCH]) for _, span in missing for i in range(0, len(span), BATCH)]
        with contextlib.closing(extract(batches) if batches else (torch.empty(0) for _ in ())) as extracted:
            for path, span in missing:
                values = torch.cat(list(itertools.islice(extracted, -(-len(span) // BATCH))))
                with _writing(folder):
                    _write(path, values, fingerprint, span)
            next(extracted, None)  # lets the extraction come to its end, and its progress bar
        self.barrier()
        try:
            tensors = [_open(path) for path in shards]
        except (OSError, SafetensorError) as error:
            raise MisconfigurationException(
                f"Features that another process wrote to {folder} cannot be read ({error}); all processes must see "
                f"the same folder: name one with --model.cache_dir."
            ) from error
        size = sum(tensor.nbytes for tensor in tensors)
        state = "extracted" if len(missing) == len(mine) else "found" if not missing else "completed"
        rank_zero_info(
            f"Features of {fingerprint['split']}, {fingerprint['view']}: {images:,} x {tensors[0].shape[1]:,} "
            f"({size / 1e6:,.1f} MB) {state} in {folder}; delete the folder to clear them."
        )
        if size * max(1, self.processes) < psutil.virtual_memory().available / 2:
            tensors = [torch.cat(tensors)]
        return FeatureRows(tensors)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say where features cannot be written, and what to do about it."""
    try:
        yield
    except OSError as error:
        raise MisconfigurationException(
            f"Features cannot be written to {folder} ({error.strerror or error}); "
            f"name another folder with --model.cache_dir."
        ) from error


def _is_valid(path: Path, fingerprint: dict[str, Any], span: range) -> bool:
    """Return whether a shard is there, whole, unaltered and the one asked for; say why where it is not."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as shard:
            metadata = json.loads((shard.metadata() or {}).get("shard", "{}"))
            values = shard.get_tensor("features")
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        rank_zero_info(f"{path} is torn ({error}); it is computed again.")
        return False
    if (metadata.get("fingerprint"), metadata.get("rows")) != (fingerprint, str(span)) or len(values) != len(span):
        rank_zero_info(f"{path} belongs to other weights, images or settings; it is computed again.")
        return False
    if metadata.get("digest") != _digest(values) or values.dtype != torch.float32:
        rank_zero_info(f"{path} was altered; it is computed again.")
        return False
    if metadata.get("versions") != VERSIONS:
        rank_zero_info(f"{path} was computed with {metadata.get('versions')}, this is {VERSIONS}.")
    return True


def _open(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as shard:
        return shard.get_tensor("features")


def _write(path: Path, values: Tensor, fingerprint: dict[str, Any], span: range) -> None:
    """Write a shard."""
    metadata = {"fingerprint": fingerprint, "rows": str(span), "digest": _digest(values), "versions": VERSIONS}
    try:
        with whole(path) as file:
            # Under one name, as safetensors leaves the order of several to chance: equal shards are equal files.
            save_file({"features": values}, file, {"shard": json.dumps(metadata, sort_keys=True)})
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error


def _digest(values: Tensor) -> str:
    return hashlib.blake2b(values.contiguous().numpy().data, digest_size=16).hexdigest()
