"""VTAB's specialized tasks: satellite and medical images, in which colour and orientation carry meaning."""

from typing import ClassVar

from datamodules.base import class_names
from datamodules.downloads import Download, DownloadedTask
from datamodules.hub import HubTask
from datamodules.images import Images
from datamodules.splits import Percent


class PatchCamelyon(HubTask):
    """327,680 patches of 96 x 96 pixels of lymph node sections, with a metastasis or without (Veeling et al., 2018).

    The official test images are the test split; VTAB's validation images are not published with the Hub's copy.
    """

    name = "patch_camelyon"
    group = "specialized"
    repository = "clip-benchmark/wds_vtab-pcam"
    classes = ("normal", "metastasis")


class EuroSAT(DownloadedTask):
    """27,000 satellite images of 64 x 64 pixels in 10 classes of land use (Helber et al., 2019).

    As in VTAB, 60 % are for training and 20 % each for validation and test; which ones is seeded here.
    """

    name = "eurosat"
    group = "specialized"
    cut: ClassVar = {"val": Percent(20), "test": Percent(20)}
    classes = class_names("eurosat")
    subfolder = "eurosat"
    url = (
        "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip"
    )
    downloads = (Download(url, "c8fa014336c82ac7804f0398fcb19387", "2750"),)

    def read(self) -> dict[str, Images]:
        """Return all images as train."""
        return {"train": self.class_folders(self.folder / "2750")}


class RESISC45(HubTask):
    """31,500 satellite images of 256 x 256 pixels in 45 classes of scenes (Cheng et al., 2017), in VTAB's splits."""

    name = "resisc45"
    group = "specialized"
    repository = "clip-benchmark/wds_vtab-resisc45"
    classes = class_names("resisc45")


class DiabeticRetinopathy(HubTask):
    """88,702 photographs of retinas in 5 stages of a disease (Kaggle and EyePacs, 2015), in VTAB's splits."""

    name = "diabetic_retinopathy"
    group = "specialized"
    repository = "clip-benchmark/wds_vtab-diabetic_retinopathy"
    classes = ("none", "mild", "moderate", "severe", "proliferative")
