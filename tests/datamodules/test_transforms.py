"""The paper's views, against the composition that its authors published."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import resolve_data_config
from torchvision import transforms

from datamodules.transforms import AUGMENTATIONS, evaluation, normalise

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
RECIPE = {"input_size": (3, 224, 224), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center", **IMAGENET}


def seen(transform, image):
    """What the backbone gets of an image."""
    return normalise(transform(image).permute(1, 2, 0).unsqueeze(0), RECIPE)[0]


@pytest.fixture(params=[(32, 32), (300, 200), (150, 400)], ids=str)
def image(request):
    width, height = request.param
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_the_recipes_test_view_resizes_and_crops_to_224(image):
    published = transforms.Compose(
        [
            transforms.Resize(224),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(**IMAGENET),
        ]
    )
    torch.testing.assert_close(seen(evaluation(RECIPE), image), published(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_recipes_training_view_is_the_published_one(image, seed):
    published = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.25, 0.25, 0.25),
            transforms.RandomRotation(2),
            transforms.ToTensor(),
            transforms.Normalize(**IMAGENET),
        ]
    )
    torch.manual_seed(seed)
    view = seen(AUGMENTATIONS["paper"](RECIPE), image)
    torch.manual_seed(seed)
    assert torch.equal(view, published(image))


def test_the_papers_backbone_is_normalised_as_the_authors_did():
    given = resolve_data_config(model="resnet50.a1_in1k", pretrained_cfg=None, args={})
    assert {key: given[key] for key in IMAGENET} == IMAGENET


@pytest.mark.parametrize("view", ["none", "paper"])
def test_a_backbone_of_one_channel_gets_grey_images_as_they_are_stored(view):
    grey = {"input_size": (1, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
    grey |= {"mean": (0.5,), "std": (0.25,)}
    stored = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    pixels = AUGMENTATIONS[view](grey)(Image.fromarray(stored).convert("RGB"))
    assert pixels.shape == (1, 32, 32)
    if view == "none":
        given = normalise(pixels.permute(1, 2, 0).unsqueeze(0), grey)[0, 0]
        np.testing.assert_allclose(given, (stored / 255 - 0.5) / 0.25, atol=1e-6)
