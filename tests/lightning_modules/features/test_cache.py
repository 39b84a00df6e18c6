import logging

import psutil
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_modules.features.cache import BATCH, FeatureCache, FeatureRows

IMAGES = 100  # cut into four shards
VALUES = torch.randn(IMAGES, 5, generator=torch.Generator().manual_seed(0))
PROVENANCE = {"split": "train", "view": "clean", "backbone": {"name": "a", "weights": "1"}, "images": "x"}
LOGGER = "lightning.pytorch.utilities.rank_zero"


class Extraction:
    """Makes values of the rows that it is asked for, and remembers which."""

    def __init__(self, values=VALUES, fails_after=None, error=None):
        self.values, self.fails_after, self.error = values, fails_after, error
        self.asked = []

    def __call__(self, shard):
        if len(self.asked) == self.fails_after:
            raise self.error
        self.asked.append(list(shard))
        return self.values[list(shard)]


def features(folder, extract, provenance=PROVENANCE, images=IMAGES, process=0, processes=1):
    """Make what is missing and read all, as the extractor does."""
    cache = FeatureCache(folder, provenance, images)
    try:
        for shard in cache.claim(cache.missing(cache.shards[process::processes])):
            cache.write(shard, extract(shard))
    finally:
        cache.release()
    return cache.read(processes)


def shards(folder):
    return sorted(folder.rglob("*.safetensors"))


def read(path):
    with safe_open(path, framework="pt") as shard:
        return shard.metadata(), shard.get_tensor("features").tolist()


def all_rows(rows):
    return rows[torch.arange(len(rows))]


@pytest.fixture
def lines(caplog):
    logger = logging.getLogger(LOGGER)
    logger.addHandler(caplog.handler)  # Lightning's loggers do not propagate
    caplog.set_level(logging.INFO, LOGGER)

    def since():
        said = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return said

    yield since
    logger.removeHandler(caplog.handler)


def test_what_was_extracted_once_is_found_again(tmp_path):
    first, second = Extraction(), Extraction()
    rows = features(tmp_path, first)
    again = features(tmp_path, second)
    assert first.asked == [list(range(start, min(start + BATCH, IMAGES))) for start in range(0, IMAGES, BATCH)]
    assert second.asked == []
    assert torch.equal(all_rows(rows), VALUES)
    assert torch.equal(all_rows(again), VALUES)
    assert rows.shape == again.shape == (IMAGES, 5)
    assert len(rows) == IMAGES


def test_rows_that_are_not_one_for_each_image_are_neither_written_nor_read(tmp_path):
    with pytest.raises(MisconfigurationException, match="Images 0 to 31 gave 64 rows"):
        features(tmp_path, lambda shard: VALUES[: 2 * len(shard)])
    assert shards(tmp_path) == []
    features(tmp_path, Extraction())
    cache = FeatureCache(tmp_path, PROVENANCE, IMAGES)
    for values in (VALUES[:5], torch.ones(BATCH, 6)):  # as another process might leave them
        path = shards(tmp_path)[1]
        save_file({"features": values}, path)
        with pytest.raises(MisconfigurationException, match="not 32 rows of 5; delete it"):
            cache.read(1)
    assert torch.equal(all_rows(features(tmp_path, Extraction())), VALUES)


@pytest.mark.parametrize("key", PROVENANCE)
def test_another_provenance_gets_a_folder_of_its_own(tmp_path, key):
    features(tmp_path, Extraction())
    changed = PROVENANCE | {key: PROVENANCE[key] + "2" if key != "backbone" else {"name": "a", "weights": "2"}}
    other = Extraction(-VALUES)
    assert torch.equal(all_rows(features(tmp_path, other, changed)), -VALUES)
    assert sum(map(len, other.asked)) == IMAGES
    assert torch.equal(all_rows(features(tmp_path, Extraction())), VALUES)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_order_of_a_provenances_keys_does_not_matter(tmp_path):
    features(tmp_path, Extraction())
    second = Extraction()
    features(tmp_path, second, dict(reversed(PROVENANCE.items())))
    assert second.asked == []


def cut(content):
    return content[:-7]


def emptied(content):
    return b""


def headless(content):
    return content[:5]


def flipped(content):
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def of_another_type(content):
    return content.replace(b'"F32"', b'"I32"')


def with_another_provenance(content):
    return content.replace(b'\\"weights\\": \\"1\\"', b'\\"weights\\": \\"2\\"')


def overwritten(content):
    return b"<!DOCTYPE html>\n<html></html>\n"


@pytest.mark.parametrize("shard", [0, 3])
@pytest.mark.parametrize(
    "damage",
    [
        cut,
        emptied,
        headless,
        flipped,
        of_another_type,
        with_another_provenance,
        overwritten,
    ],
)
def test_exactly_the_shard_that_cannot_be_believed_is_computed_again(tmp_path, lines, damage, shard):
    features(tmp_path, Extraction())
    paths = shards(tmp_path)
    before, content = read(paths[shard]), paths[shard].read_bytes()
    assert damage(content) != content
    paths[shard].write_bytes(damage(content))
    lines()
    second = Extraction()
    rows = features(tmp_path, second)
    said = lines()
    assert [line for line in said if str(paths[shard]) in line and "computed again" in line and "\n" not in line]
    assert not [line for line in said for path in paths if path != paths[shard] and str(path) in line]
    assert torch.equal(all_rows(rows), VALUES)
    assert second.asked == [list(range(shard * BATCH, min((shard + 1) * BATCH, IMAGES)))]
    assert read(paths[shard]) == before


@pytest.mark.parametrize(("place", "other"), [(3, 2), (0, 3), (1, 2)], ids=["too many", "too few", "as many"])
def test_a_whole_shard_in_the_place_of_another_is_computed_again(tmp_path, lines, place, other):
    features(tmp_path, Extraction())
    paths = shards(tmp_path)
    paths[place].write_bytes(paths[other].read_bytes())
    lines()
    second = Extraction()
    assert torch.equal(all_rows(features(tmp_path, second)), VALUES)
    assert second.asked == [list(range(place * BATCH, min((place + 1) * BATCH, IMAGES)))]
    assert [line for line in lines() if str(paths[place]) in line]


def test_a_whole_shard_of_another_provenance_is_computed_again(tmp_path, lines):
    features(tmp_path / "here", Extraction())
    features(tmp_path / "there", Extraction(-VALUES), PROVENANCE | {"view": "other"})
    path = shards(tmp_path / "here")[1]
    path.write_bytes(shards(tmp_path / "there")[1].read_bytes())
    lines()
    second = Extraction()
    assert torch.equal(all_rows(features(tmp_path / "here", second)), VALUES)
    assert second.asked == [list(range(32, 64))]
    assert [line for line in lines() if str(path) in line]


def test_a_missing_shard_is_computed_again(tmp_path):
    features(tmp_path, Extraction())
    shards(tmp_path)[1].unlink()
    second = Extraction()
    assert torch.equal(all_rows(features(tmp_path, second)), VALUES)
    assert second.asked == [list(range(32, 64))]


@pytest.mark.parametrize("after", [0, 2, 3])
def test_an_extraction_that_fails_midway_keeps_the_shards_it_finished(tmp_path, after):
    with pytest.raises(RuntimeError, match="lamp"):
        features(tmp_path, Extraction(fails_after=after, error=RuntimeError("the lamp went out")))
    assert len(shards(tmp_path)) == after
    assert not list(tmp_path.rglob("*.tmp"))
    second = Extraction()
    assert torch.equal(all_rows(features(tmp_path, second)), VALUES)
    assert [i for batch in second.asked for i in batch] == list(range(after * BATCH, IMAGES))


def test_an_extraction_out_of_memory_or_files_is_not_blamed_on_the_folder(tmp_path):
    with pytest.raises((OSError, MisconfigurationException), match="Too many open files") as error:
        features(tmp_path, Extraction(fails_after=1, error=OSError(24, "Too many open files")))
    assert "cannot be written" not in str(error.value)


@pytest.mark.parametrize("processes", [2, 3])
def test_files_do_not_depend_on_the_number_of_processes(tmp_path, processes):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    features(alone, Extraction())
    asked = []
    for process in range(processes):
        extract = Extraction()
        if process < processes - 1:  # without a real barrier, it looks before the others have written
            with pytest.raises(MisconfigurationException, match=r"another process.*--model\.cache_dir") as error:
                features(shared, extract, process=process, processes=processes)
            assert "\n" not in str(error.value)
        else:
            rows = features(shared, extract, process=process, processes=processes)
            assert torch.equal(all_rows(rows), VALUES)
        asked += extract.asked
    assert sorted(i for batch in asked for i in batch) == list(range(IMAGES))
    names = [path.relative_to(alone) for path in shards(alone)]
    assert [path.relative_to(shared) for path in shards(shared)] == names
    for name in names:
        assert read(alone / name) == read(shared / name)
    for process in range(processes):
        extract = Extraction()
        assert torch.equal(all_rows(features(shared, extract, process=process, processes=processes)), VALUES)
        assert extract.asked == []


def test_processes_that_share_a_folder_make_every_shard_once(tmp_path):
    one, other = (FeatureCache(tmp_path, PROVENANCE, IMAGES) for _ in range(2))
    missing = one.missing(one.shards)
    mine, theirs = one.claim(missing), other.claim(missing)
    first, second = next(mine), next(theirs)
    assert (first, second) == (missing[0], missing[1])
    one.write(first, VALUES[list(first)])
    other.release()  # as when its process ends before it wrote
    assert list(mine) == missing[1:]
    assert list(theirs) == []
    for shard in missing[1:]:
        one.write(shard, VALUES[list(shard)])
    assert other.missing(missing) == list(other.claim(missing)) == []
    assert torch.equal(all_rows(other.read(1)), VALUES)
    assert len(shards(tmp_path)) == len(list(tmp_path.glob("*/*"))) == 4  # no lock stays


def test_a_folder_that_cannot_be_written_ends_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    extract = Extraction()
    with pytest.raises(MisconfigurationException, match=r"cannot be written.*--model\.cache_dir") as error:
        features(tmp_path / "file" / "cache", extract)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "file" / "cache") in str(error.value)
    assert extract.asked == []


def test_a_shard_that_cannot_be_written_leaves_nothing_half_written(tmp_path):
    features(tmp_path, Extraction())
    path = shards(tmp_path)[1]
    path.unlink()
    path.mkdir()
    with pytest.raises(MisconfigurationException, match=r"cannot be written.*--model\.cache_dir") as error:
        features(tmp_path, Extraction())
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.tmp"))


PICKS = [torch.randint(23, (size,), generator=torch.Generator().manual_seed(size)) for size in (0, 1, 9, 200)]


@pytest.mark.parametrize("picks", [*PICKS, torch.arange(23).flip(0)], ids=len)
@pytest.mark.parametrize("rows", [1, 4, 8, 23])
def test_rows_of_several_shards_are_those_of_one_matrix(picks, rows):
    whole = torch.randn(23, 3, generator=torch.Generator().manual_seed(1))
    matrix = FeatureRows(whole.split(rows))
    assert matrix.shape == (23, 3)
    assert len(matrix) == 23
    picked = matrix[picks]
    assert picked.dtype == whole.dtype
    assert picked.shape == (len(picks), 3)
    assert torch.equal(picked, whole[picks])


@pytest.mark.parametrize("picks", PICKS, ids=len)
def test_features_that_do_not_fit_into_memory_come_back_the_same(tmp_path, monkeypatch, picks):
    memory = psutil.virtual_memory()._replace(available=VALUES.nbytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    for _ in range(2):
        rows = features(tmp_path, Extraction())
        assert len(rows.shards) == 4
        assert torch.equal(rows[picks], VALUES[picks])
        assert torch.equal(all_rows(rows), VALUES)
    monkeypatch.undo()
    assert len(features(tmp_path, Extraction()).shards) == 1
