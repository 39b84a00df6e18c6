"""An extraction says how fast it was, and which side waited for the other."""

import contextlib
import logging
import re
import time
from types import SimpleNamespace

import pytest
import torch

from lightning_modules.features.extractor import Extractor

LOGGER = "lightning.pytorch.utilities.rank_zero"


class Backbone:
    """Takes `seconds` for a batch, and returns the images as they are."""

    widths = {"layer": 4}  # noqa: RUF012
    preparation = "none"

    def __init__(self, seconds):
        self.seconds = seconds

    def provenance(self):
        return {}

    def inference(self, batch):
        return contextlib.nullcontext()

    def __call__(self, images):
        time.sleep(self.seconds)
        return images


def extractor(folder, images, backbone):
    """Return what extracts 64 images, a batch of which takes so many seconds on either side."""

    def loader(split, batches, view, largest):
        for batch in batches:
            time.sleep(images)
            yield SimpleNamespace(inputs=torch.ones(len(batch), 4), indices=torch.tensor(batch))

    split = type("Split", (), {"__len__": lambda _: 64, "digest": lambda _: "digest"})()
    task = SimpleNamespace(images={"val": split}, view_provenance=lambda _: "clean view", extraction_loader=loader)
    strategy = SimpleNamespace(root_device=torch.device("cpu"), barrier=lambda: None)
    plugin = SimpleNamespace(forward_context=contextlib.nullcontext)
    trainer = SimpleNamespace(
        global_rank=0, world_size=1, strategy=strategy, precision="32-true", precision_plugin=plugin
    )
    return Extractor(Backbone(backbone), task, trainer, str(folder), "clean")


@pytest.mark.parametrize(("images", "backbone"), [(0.2, 0.0), (0.0, 0.2)], ids=["images", "backbone"])
def test_the_side_that_waits_is_told(tmp_path, caplog, images, backbone):
    logger = logging.getLogger(LOGGER)
    logger.addHandler(caplog.handler)  # Lightning's loggers do not propagate
    caplog.set_level(logging.INFO, LOGGER)
    extract = extractor(tmp_path, images, backbone)
    extract.extract("val")
    extract.extract("val")
    logger.removeHandler(caplog.handler)
    made, *_, found = [record.getMessage() for record in caplog.records]
    rate, share = re.search(r"([\d,]+) images/s; the backbone waited for images (\d+) % of the time\.$", made).groups()
    assert 16 < int(rate) <= 160  # 64 images in 0.4 s at best
    assert int(share) > 80 if images else int(share) < 20
    assert "images/s" not in found
