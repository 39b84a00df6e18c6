"""VTAB's natural tasks and CIFAR-10: photographs from torchvision, with their official test splits."""

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchvision import datasets

from datamodules.base import Task
from datamodules.images import ArrayImages, Images, as_labels


class CIFAR10(Task):
    """60,000 photographs of 32 x 32 pixels in 10 classes (Krizhevsky, 2009).

    The official 10,000 test images are the test split; validation is a seeded stratified tenth of the 50,000 training
    images, as large as the paper's.
    """

    name = "cifar10"
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def prepare_data(self) -> None:
        """Download and check the archive where it is not there yet."""
        try:
            datasets.CIFAR10(str(self.root), download=True)
        except (OSError, RuntimeError) as error:
            raise MisconfigurationException(
                f"CIFAR-10 could not be downloaded ({error}); put cifar-10-python.tar.gz from "
                f"{datasets.CIFAR10.url} into {self.root}, or name the folder that holds it with --data.root."
            ) from error

    def load(self) -> dict[str, Images]:
        """Return the official splits, with validation taken from train."""
        train, test = (datasets.CIFAR10(str(self.root), train=train) for train in (True, False))
        return {
            **self.split_off(ArrayImages(train.data, as_labels(train.targets)), val=0.1),
            "test": ArrayImages(test.data, as_labels(test.targets)),
        }
