"""Downstream tasks as LightningDataModules; `--data NAME` takes any class listed here."""

from datamodules.base import Task
from datamodules.digits import Digits
from datamodules.image_folder import ImageFolder
from datamodules.natural import CIFAR10, CIFAR100, Flowers102, OxfordIIITPet

__all__ = ["CIFAR10", "CIFAR100", "Digits", "Flowers102", "ImageFolder", "OxfordIIITPet", "Task"]
