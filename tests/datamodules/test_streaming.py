"""Images that are streamed are the same, in the same splits, as those that were downloaded; and what is sent for them."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from replicas import content, packed, refusal

from datamodules import HuggingFaceImages

EACH = 12  # images in a file
SIDE = 48  # their pixels are noise, so that none is smaller than 6 kB


def noise(number, seed):
    random = np.random.default_rng(seed)
    images = []
    for _ in range(number):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
    return images


def parquet(files, names=("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
    """Add Parquet files of several row groups each."""
    for seed, name in enumerate(names):
        images = [{"bytes": each, "path": f"{seed}_{place}.png"} for place, each in enumerate(noise(EACH, seed))]
        table = pa.table({"image": images, "label": [["cat", "dog", "eel"][place % 3] for place in range(EACH)]})
        pq.write_table(table, file := io.BytesIO(), row_group_size=5)
        files[f"data/{name}.parquet"] = file.getvalue()


def tars(files, names=("train/0", "train/1", "test/0")):
    """Add webdataset tars."""
    for seed, name in enumerate(names):
        found = {}
        for place, image in enumerate(noise(EACH, seed)):
            found |= {f"{place:04d}.cls": str(place % 3).encode(), f"{place:04d}.png": image}
        files[f"{name}.tar"] = packed(f"{name}.tar", found)


def tasks(name, root, **arguments):
    """Return the same task downloaded and streamed."""
    made = [HuggingFaceImages(name, root=str(root), streaming=each, **arguments) for each in (False, True)]
    for task in made:
        task.prepare_data()
        task.setup()
    return made


@pytest.mark.parametrize("add", [parquet, tars])
def test_streamed_images_are_those_of_a_copy(add, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.parts.TOGETHER", 20_000)  # three images of a tar
    add(hub.files)
    downloaded, streamed = tasks("lab/birds", tmp_path)
    assert streamed.describe() == downloaded.describe()
    for split, images in downloaded.images.items():
        assert content(streamed.images[split]) == content(images)
        assert [streamed.images[split].name(i) for i in range(len(images))] == [images.name(i) for i in range(len(images))]
    print(hub.asked, hub.sent)
