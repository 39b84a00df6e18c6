import numpy as np
import pytest
import torch
from evaluation import evaluate, quantised
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.neighbors import NearestNeighbors

from lightning_modules.features.moments import Moments
from lightning_modules.measures import Neighbours
from lightning_modules.measures.neighbours import neighbours_kept
from lightning_modules.subsets.bases import Ordering, orthogonal_projection
from lightning_modules.subsets.coordinates import Coordinates
from lightning_modules.subsets.plan import Plan


def subsets(representations, ordering):
    values = representations.double().numpy()
    coordinates = values if ordering.basis is None else values @ ordering.basis.numpy()
    return [coordinates[:, ordering.order[:size].numpy()] for size in ordering.sizes]


def nearest(queries, gallery, neighbours):
    return NearestNeighbors(n_neighbors=neighbours, metric="cosine").fit(gallery).kneighbors(queries)[1]


def test_neighbours_are_scikit_learns_on_real_features(real_features, monkeypatch):
    monkeypatch.setattr("lightning_modules.measures.neighbours.QUERIES", 50)  # several chunks, the last smaller
    queries, gallery = real_features.test, real_features.train
    # One and two coordinates of ReLUs leave ties, whose order scikit-learn does not say.
    groups = [
        Ordering(torch.randperm(1280, generator=torch.Generator().manual_seed(2)), [30, 400, 1280]),
        Ordering(torch.arange(1280), [25], orthogonal_projection(1280, 0)),
    ]
    wanted = nearest(queries.double().numpy(), gallery.double().numpy(), 10)
    for group, found in zip(groups, neighbours_kept(queries, gallery, groups, 10), strict=True):
        kept = [
            sum(len(set(a) & set(b)) for a, b in zip(wanted, nearest(part, stored, 10), strict=True))
            for part, stored in zip(subsets(queries, group), subsets(gallery, group), strict=True)
        ]
        assert found.tolist() == kept
    assert kept[-1] < 1200


def test_ties_go_to_the_smaller_index_and_a_zero_is_as_near_to_all():
    gallery = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 3], [3, 0.1], [0, 0]])
    # Nearest of the full layer: 0 -> 0, 1 -> 0, 2 -> 2, 3 -> 2, 4 -> 4, 5 (zero, cosine 0 with all) -> 0.
    # Of the first neuron alone 0, 1 and 4 point the same way, 2, 3 and 5 are zero: all -> 0.
    kept = neighbours_kept(gallery, gallery, [Ordering(torch.arange(2), [1, 2])], neighbours=1)
    assert kept[0].tolist() == [3, 6]


def test_test_images_are_looked_for_among_training_images_that_are_kept(real_features):
    widths, labels = {"one": 40, "two": 30}, real_features.test_labels
    probes = Plan("random", 0.5, 2).probes(widths)
    gallery, queries = real_features.train[:, 400:470], real_features.test[:, 400:470]
    known = {"inputs": queries, "widths": widths, "classes": 12}

    def features(split):
        assert split == "train"
        return gallery

    measure = Neighbours(7)
    (table,) = evaluate(measure, probes, labels, features=features, **known).values()
    assert table[["split", "queries", "gallery", "neighbours"]].drop_duplicates().values.tolist() == [
        ["test", len(queries), len(gallery), 7]
    ]
    parts = measure.context.coordinates.by_layer(queries), measure.context.coordinates.by_layer(gallery)
    for row in table.itertuples():
        place = next(i for i, p in enumerate(probes) if (p.layer, p.selection, p.seed) == (row[1], row[2], row.seed))
        subset, (seen, stored) = measure.context.coordinates.subset(place), (part[row.layer] for part in parts)
        (kept,) = neighbours_kept(seen, stored, [Ordering(subset, [len(subset)])], neighbours=7)
        assert row.kept == kept.item() / 7 / len(queries)
    assert evaluate(Neighbours(), probes, labels, **known) == {}  # the training images are not kept
    assert evaluate(Neighbours(), probes, labels, features=features, split="val", **known) == {}


def test_neighbours_in_few_bits_are_those_of_what_is_stored(real_features):
    gallery, queries = real_features.train[:, 400:470], real_features.test[:, 400:470]
    probes = Plan(["random", "pca"], 0.5, 1, bits=[32, 2]).probes({"one": 70})
    coordinates, moments = Coordinates(probes, {"one": 70}), Moments(70, 12)
    moments.update(gallery, real_features.train_labels)
    coordinates.fit({"one": moments})
    known = {"inputs": queries, "widths": {"one": 70}, "classes": 12, "coordinates": coordinates}
    (table,) = evaluate(
        Neighbours(7), probes, real_features.test_labels, features=lambda split: gallery, **known
    ).values()
    wanted = nearest(queries.double().numpy(), gallery.double().numpy(), 7)
    kept = table.set_index(["selection", "bits", "fraction"])["kept"]
    for index, probe in enumerate(probes):
        subset, basis, parts = coordinates.subset(index), coordinates.basis(index), (gallery.double(), queries.double())
        away = torch.zeros(len(subset), dtype=torch.float64)
        if basis is not None:  # directions through the origin, as in 32 bits
            matrix, centre = basis[0].double()[:, subset], basis[1].double()
            parts, away = [(part - centre) @ matrix for part in parts], centre @ matrix
        else:
            parts = [part[:, subset] for part in parts]
        stored = [part.numpy() for part in parts]
        if probe.bits < 32:
            stored = [quantised(part, stored[0], probe.bits) for part in stored]
        found = nearest(stored[1] + away.numpy(), stored[0] + away.numpy(), 7)
        share = np.mean([len(set(a) & set(b)) / 7 for a, b in zip(wanted, found, strict=True)])
        assert kept[probe.selection, probe.bits, probe.fraction] == pytest.approx(share, abs=0.002)
    assert kept["random", 2, 0.5] < kept["random", 32, 0.5] < 1


def test_less_than_one_neighbour_is_refused():
    with pytest.raises(MisconfigurationException, match="neighbours is 0; it must be 1 or more"):
        Neighbours(0)
