"""Store vectors as an exported subset says, and read them back: NumPy alone, beside `subset.safetensors`."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent


def store(features: np.ndarray, folder: Path = FOLDER) -> np.ndarray:
    """Return vectors as they are stored, uint8 of shape (n, bytes), from the layer's features, shape (n, D)."""
    subset, bits = load_file(folder / "subset.safetensors"), json.loads((folder / "card.json").read_text())["bits"]
    kept = features[:, subset["indices"]] if "indices" in subset else (features - subset["mean"]) @ subset["basis"]
    if bits == 32:
        return np.ascontiguousarray(kept, np.float32).view(np.uint8)
    codes = np.clip(np.round((kept - subset["low"]) / subset["step"]), 0, 2**bits - 1).astype(np.uint8)
    places = np.unpackbits(codes[:, :, None], axis=2)[:, :, 8 - bits :]
    return np.packbits(places.reshape(len(codes), -1), axis=1)


def read(stored: np.ndarray, folder: Path = FOLDER) -> np.ndarray:
    """Return the k numbers that stored vectors stand for, float32 of shape (n, k)."""
    subset, bits = load_file(folder / "subset.safetensors"), json.loads((folder / "card.json").read_text())["bits"]
    if bits == 32:
        return stored.view(np.float32)
    size = len(subset["low"])
    places = np.unpackbits(stored, axis=1, count=size * bits).reshape(len(stored), size, bits)
    codes = np.packbits(np.pad(places, [(0, 0), (0, 0), (8 - bits, 0)]), axis=2)[:, :, 0]
    return subset["low"] + subset["step"] * codes
