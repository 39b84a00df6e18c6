"""Downstream tasks as LightningDataModules; `--data NAME` takes any class listed here."""

from datamodules.base import Task
from datamodules.digits import Digits
from datamodules.embeddings import Embeddings
from datamodules.hub import HuggingFaceImages
from datamodules.image_folder import ImageFolder
from datamodules.large import ImageNet1k, ImageNetV2, Places365
from datamodules.natural import CIFAR10, CIFAR100, DTD, SUN397, SVHN, Caltech101, Flowers102, OxfordIIITPet
from datamodules.retrieval import Retrieval
from datamodules.specialized import RESISC45, DiabeticRetinopathy, EuroSAT, PatchCamelyon
from datamodules.structured import (
    CLEVRCount,
    CLEVRDistance,
    DMLab,
    DSpritesLocation,
    DSpritesOrientation,
    KITTIDistance,
    SmallNORBAzimuth,
    SmallNORBElevation,
)

__all__ = ["CIFAR10", "CIFAR100", "DTD", "RESISC45", "SUN397", "SVHN", "CLEVRCount", "CLEVRDistance", "Caltech101"]
__all__ += ["DMLab", "DSpritesLocation", "DSpritesOrientation", "DiabeticRetinopathy", "Digits", "Embeddings"]
__all__ += ["EuroSAT", "Flowers102", "HuggingFaceImages", "ImageFolder", "ImageNet1k", "ImageNetV2", "KITTIDistance"]
__all__ += [
    "OxfordIIITPet",
    "PatchCamelyon",
    "Places365",
    "Retrieval",
    "SmallNORBAzimuth",
    "SmallNORBElevation",
    "Task",
]
