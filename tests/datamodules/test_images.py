"""Images of every mode come out as their stored colours; those that cannot be read are named."""

import io

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from replicas import refusal

from datamodules.images import ArrayImages, FileImages

COLOUR = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
DEEP = np.random.default_rng(1).integers(0, 65536, (24, 20), dtype=np.uint16)


def read(folder, content, name="image.img"):
    (folder / name).write_bytes(content)
    return FileImages(folder, [name], torch.tensor([0]))[0]


def encoded(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def colour():
    return Image.fromarray(COLOUR)


def transparent(mode):
    """An image whose left half is transparent and stores its colours all the same."""
    alpha = np.full((24, 20, 1), 255, np.uint8)
    alpha[:, :10] = 0
    pixels = COLOUR if mode == "RGBA" else GREY[..., None]
    return Image.fromarray(np.concatenate([pixels, alpha], axis=2))


def as_rgb(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


LOSSLESS = {
    "rgb png": (encoded(colour(), "PNG"), COLOUR),
    "rgb tiff": (encoded(colour(), "TIFF"), COLOUR),
    "rgb bmp": (encoded(colour(), "BMP"), COLOUR),
    "rgba png": (encoded(transparent("RGBA"), "PNG"), COLOUR),
    "rgba webp": (encoded(transparent("RGBA"), "WEBP", lossless=True, exact=True), COLOUR),
    "grey and alpha": (encoded(transparent("LA"), "PNG"), as_rgb(GREY)),
    "grey": (encoded(Image.fromarray(GREY), "PNG"), as_rgb(GREY)),
    "one bit": (encoded(Image.fromarray(GREY > 127), "PNG"), as_rgb((GREY > 127) * np.uint8(255))),
    "cmyk tiff": (encoded(Image.fromarray(np.dstack([255 - COLOUR, GREY * 0]), mode="CMYK"), "TIFF"), COLOUR),
    "16 bit png": (encoded(Image.fromarray(DEEP), "PNG"), as_rgb(np.round(DEEP / 257).astype(np.uint8))),
    "16 bit tiff": (encoded(Image.fromarray(DEEP), "TIFF"), as_rgb(np.round(DEEP / 257).astype(np.uint8))),
    "16 bit pgm": (encoded(Image.fromarray(DEEP), "PPM"), as_rgb(np.round(DEEP / 257).astype(np.uint8))),
    "32 bit tiff of 16": (
        encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
        as_rgb(np.round(DEEP / 257).astype(np.uint8)),
    ),
    "animation": (encoded(Image.fromarray(GREY), "GIF", save_all=True, append_images=[Image.new("L", (20, 24))]), None),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_an_image_of_any_mode_comes_out_as_its_stored_colours(tmp_path, kind):
    content, expected = LOSSLESS[kind]
    image = read(tmp_path, content)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), as_rgb(GREY) if expected is None else expected)


def test_a_cmyk_jpeg_is_not_inverted(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0] = 255  # all cyan and no other ink: no red is left
    given = np.asarray(read(tmp_path, encoded(Image.fromarray(pixels, mode="CMYK"), "JPEG", quality=100)))
    assert np.abs(given.astype(int) - (0, 255, 255)).max() <= 3


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
@pytest.mark.filterwarnings("error")
def test_a_palette_gives_its_colours_whatever_it_says_of_transparency_and_without_a_warning(tmp_path, transparency):
    image = colour().quantize(64)
    options = {} if transparency is None else {"transparency": transparency}
    palette = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    given = np.asarray(read(tmp_path, encoded(image, "PNG", **options)))
    assert np.array_equal(given, palette[np.asarray(image)])


def test_the_orientation_that_a_camera_noted_is_not_applied_as_in_torchvision_and_timm(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    given = read(tmp_path, encoded(colour(), "PNG", exif=exif))
    assert np.array_equal(np.asarray(given), COLOUR)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (DEEP.astype(np.float32) / 65535, "floats"),
        (DEEP.astype(np.int32) * 2, "8 or 16 bits"),
        (-DEEP.astype(np.int32), "8 or 16 bits"),
    ],
)
def test_pixels_of_unknown_range_are_named_and_not_guessed(tmp_path, pixels, reason):
    message = refusal(lambda: read(tmp_path, encoded(Image.fromarray(pixels), "TIFF")))
    assert str(tmp_path / "image.img") in message
    assert reason in message
    with pytest.raises(MisconfigurationException, match=f"image 1 .*{reason}"):
        ArrayImages(
            np.stack([pixels * 0, pixels]) if reason != "floats" else pixels[None].repeat(2, 0), torch.zeros(2)
        )[1]


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("kept", [0.5, 0.9, 0.02, 0.0])
@pytest.mark.filterwarnings("ignore")
def test_a_truncated_file_is_named_with_the_reason(tmp_path, fmt, kept):
    content = encoded(colour(), fmt)
    message = refusal(lambda: read(tmp_path, content[: int(len(content) * kept)]))
    assert message.startswith(f"{tmp_path / 'image.img'} is not a readable image (")
    assert "()" not in message


@pytest.mark.parametrize("content", [b"this is no image", b"<!DOCTYPE html>\n<html></html>\n"])
def test_a_file_of_something_else_is_named_when_it_is_reached_and_so_is_one_that_vanished(tmp_path, content):
    (tmp_path / "good.png").write_bytes(encoded(colour(), "PNG"))
    (tmp_path / "bad.png").write_bytes(content)
    images = FileImages(tmp_path, ["good.png", "bad.png", "gone.png"], torch.tensor([0, 0, 0]))
    assert images[0].size == (20, 24)
    for index, name in ((1, "bad.png"), (2, "gone.png")):
        assert str(tmp_path / name) in refusal(lambda index=index: images[index])


def test_sixteen_bits_in_an_array_are_scaled_too():
    images = ArrayImages(DEEP[None], torch.tensor([0]))
    assert np.array_equal(np.asarray(images[0]), as_rgb(np.round(DEEP / 257).astype(np.uint8)))
