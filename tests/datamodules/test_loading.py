"""Requests and batches: every image once, the same batches everywhere, augmentation that depends on nothing else."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

from datamodules import Digits, loading
from datamodules.images import ArrayImages
from datamodules.loading import FeatureBatches, ImageBatches, Request, RequestSampler, affordable
from datamodules.transforms import evaluation, paper

PREPROCESSING = {
    "input_size": (3, 12, 12),
    "interpolation": "bilinear",
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "crop_pct": 0.875,
    "crop_mode": "center",
}
SIZES = [(41, 8), (41, 100), (41, 41), (41, 1), (5, 2), (40, 8)]


def requests(images, batch_size, processes, shuffle_seed=None, epoch=0):
    asked = []
    for process in range(processes):
        sampler = RequestSampler(images, batch_size, process, processes, shuffle_seed)
        sampler.set_epoch(epoch)
        asked.append(list(sampler))
        assert len(sampler) == len(asked[-1])
    return asked


def whole_batches(asked):
    joined = []
    for shares in zip(*asked, strict=True):
        batch = [None] * shares[0].total
        for process, share in enumerate(shares):
            batch[process :: len(shares)] = share.indices
        joined.append(batch)
    return joined


@pytest.fixture
def batches():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 10, 10, 3), dtype=np.uint8)
    images = ArrayImages(pixels, torch.arange(30) % 7)
    return ImageBatches(images, paper(PREPROCESSING), PREPROCESSING, seed=0, random=True)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("images", "batch_size"), SIZES)
@pytest.mark.parametrize("shuffle_seed", [None, 0])
def test_every_image_is_asked_for_exactly_once_in_fair_shares(images, batch_size, processes, shuffle_seed):
    asked = requests(images, batch_size, processes, shuffle_seed)
    assert sorted(i for share in asked for request in share for i in request.indices) == list(range(images))
    assert {len(share) for share in asked} == {-(-images // batch_size)}
    for place, shares in enumerate(zip(*asked, strict=True)):
        sizes = [len(share.indices) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert {share.total for share in shares} == {sum(sizes)} == {min(batch_size, images - place * batch_size)}


@pytest.mark.parametrize(("images", "batch_size"), SIZES)
@pytest.mark.parametrize("shuffle_seed", [None, 0])
def test_the_batches_do_not_depend_on_the_number_of_processes(images, batch_size, shuffle_seed):
    alone = [request.indices for request in requests(images, batch_size, 1, shuffle_seed, epoch=2)[0]]
    for processes in (2, 3):
        assert whole_batches(requests(images, batch_size, processes, shuffle_seed, epoch=2)) == alone
    if shuffle_seed is None:
        assert [i for batch in alone for i in batch] == list(range(images))


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return [i for request in requests(41, 8, 1, seed, epoch)[0] for i in request.indices]

    torch.manual_seed(1)
    once = order(0, 1)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert order(0, 1) == once
    assert torch.equal(torch.get_rng_state(), before)
    different = [once, order(0, 0), order(0, 2), order(1, 1), order(1, 0), sorted(once)]
    assert len({tuple(one) for one in different}) == len(different)
    assert {request.epoch for request in requests(41, 8, 1, 0, epoch=5)[0]} == {5}


@pytest.mark.parametrize("company", [[4], [4, 9], [9, 4], [1, 2, 3, 4, 5], [4, 4]])
def test_augmentation_does_not_feel_the_company_or_the_order(batches, company):
    alone = batches[Request([4], 1, epoch=3)].inputs[0]
    torch.manual_seed(len(company))
    batch = batches[Request(company, 40, epoch=3)]
    for place in (place for place, index in enumerate(company) if index == 4):
        assert torch.equal(batch.inputs[place], alone)
    assert batch.indices.tolist() == company
    assert batch.labels.tolist() == [index % 7 for index in company]
    assert batch.total == 40


def test_augmentation_differs_between_epochs_images_and_seeds(batches):
    same_pixels = ArrayImages(batches.images.pixels[[4, 4]], batches.images.labels[[4, 4]])
    views = []
    for seed in (0, 1):
        twice = ImageBatches(same_pixels, batches.transform, PREPROCESSING, seed, random=True)
        views += [*twice[Request([0, 1], 2, epoch=0)].inputs, *twice[Request([0, 1], 2, epoch=1)].inputs]
    for i, view in enumerate(views):
        assert not any(torch.equal(view, other) for other in views[:i])


def test_augmentation_leaves_global_random_numbers_alone(batches):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    batches[Request([1, 2], 2, epoch=0)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_augmented_epochs_do_not_feel_workers(workers):
    task = Digits([3, 7], augmentation="paper", batch_size=90, num_workers=workers)
    task.preprocessing = PREPROCESSING
    task.setup()
    loader = task.train_dataloader()
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        seen = list(loader)
        indices = torch.cat([batch.indices for batch in seen])
        assert indices.sort().values.tolist() == list(range(len(task.images["train"])))
        for batch, request in zip(seen, loader.sampler, strict=True):
            assert batch.indices.tolist() == request.indices
        (alone,) = task.extraction_loader("train", [indices[-3:].tolist()], epoch, 3)
        assert torch.equal(seen[-1].inputs[-3:], alone.inputs)
        assert torch.equal(seen[-1].labels[-3:], alone.labels)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_clean_batch_does_not_feel_the_number_of_threads(batches, threads):
    clean = ImageBatches(batches.images, evaluation(PREPROCESSING), PREPROCESSING, seed=0, random=False)
    indices = [7, 0, 29, 7, 12, 3, 4]
    transform = timm.data.create_transform(**PREPROCESSING, is_training=False)
    expected = torch.stack([transform(batches.images[index]) for index in indices])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch = clean[Request(indices, 7, epoch=0)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(batch.inputs, expected)
    assert batch.labels.tolist() == [index % 7 for index in indices]


def test_for_a_refit_every_image_of_train_and_validation_is_served_once_with_its_own_label():
    task = Digits([3, 7], batch_size=90, num_workers=0)
    task.setup()
    parts = [task.images[split] for split in ("train", "val")]
    pixels = torch.cat([torch.from_numpy(part.pixels.reshape(len(part), -1)).float() for part in parts])
    labels = torch.cat([part.labels for part in parts])
    task.extract = lambda split: [pixels[: len(parts[0])] if split == "train" else pixels[len(parts[0]) :]]
    seen = list(task.refit_dataloader())
    indices = torch.cat([batch.indices for batch in seen])
    assert indices.sort().values.tolist() == list(range(len(pixels)))
    assert torch.equal(torch.cat([batch.inputs for batch in seen]), pixels[indices])
    assert torch.equal(torch.cat([batch.labels for batch in seen]), labels[indices])


def test_an_empty_request_gives_an_empty_batch(batches):
    for source, shape in (
        (batches, (0, 3, 12, 12)),
        (FeatureBatches([torch.ones(3, 5)], torch.zeros(3)), (0, 5)),
    ):
        batch = source[Request([], 1, epoch=0)]
        assert batch.inputs.shape == shape
        assert batch.inputs.dtype == torch.float32
        assert batch.labels.shape == batch.indices.shape == (0,)
        assert batch.total == 1


@pytest.mark.parametrize("epoch", range(7))
def test_features_cycle_through_the_views(epoch):
    views = [torch.full((6, 4), float(view)) + torch.arange(6).unsqueeze(1) / 10 for view in range(3)]
    batch = FeatureBatches(views, torch.arange(6) * 2)[Request([5, 0, 3], 3, epoch)]
    assert torch.equal(batch.inputs, views[epoch - 3 * (epoch // 3)][[5, 0, 3]])
    assert batch.labels.tolist() == [10, 0, 6]
    assert batch.indices.tolist() == [5, 0, 3]


@pytest.mark.parametrize(
    ("free", "processes", "workers"),
    [(10**9, 1, 4), (4 * 4 * 32 * 3 * 12 * 12 * 4, 1, 4), (4 * 4 * 32 * 3 * 12 * 12 * 4 - 1, 1, 3), (10_000, 1, 0)],
)
def test_no_more_workers_start_than_shared_memory_has_room_for(
    batches, monkeypatch, tmp_path, caplog, free, processes, workers
):
    monkeypatch.setattr(loading, "SHARED", tmp_path)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    largest = RequestSampler(64, 64, 0, 2, None).largest  # 32 images of 3 x 12 x 12 in float32, four of each
    assert affordable(4, batches, largest) == workers
    assert (f"room for {workers} of 4 workers" in caplog.text) == (workers < 4)
    assert affordable(0, batches, largest) == 0
