"""Takes embeddings to the levels that stand for them in few bits: a module of sentence-transformers."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Levels(torch.nn.Module):
    """Replaces each number of a sentence embedding by the nearest of its levels, `low + step * code`."""

    def __init__(self, low: torch.Tensor, step: torch.Tensor, most: torch.Tensor) -> None:
        super().__init__()
        for name, value in {"low": low, "step": step, "most": most}.items():
            self.register_buffer(name, value)

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the features with levels for the embedding, shape (n, k)."""
        levels = self.state_dict()
        codes = ((features["sentence_embedding"] - levels["low"]) / levels["step"]).round()
        codes = codes.clamp(min=0).minimum(levels["most"])
        features["sentence_embedding"] = levels["low"] + levels["step"] * codes
        return features

    def save(self, output_path: str, *_: object, **__: object) -> None:
        """Write the levels into a folder."""
        save_file(self.state_dict(), Path(output_path) / "model.safetensors")
        (Path(output_path).parent / Path(__file__).name).write_bytes(
            Path(__file__).read_bytes()
        )  # where it is looked for

    @classmethod
    def load(cls, input_path: str) -> "Levels":
        """Read the levels from a folder."""
        return cls(**load_file(Path(input_path) / "model.safetensors"))
