"""The probes of a run under every candidate of the solver's hyper-parameters, and the weights kept of each."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_modules.probes.bank import ProbeBank
from lightning_modules.subsets.plan import Probe


class Grid(nn.Module):
    """K banks in training, one for each candidate, and for every candidate and probe the weights that were kept.

    Of every probe the candidate with the best validation score counts (the first of equals). A candidate is a value for
    each of the H hyper-parameters; a solver that chooses them by itself fills `hyperparameters`, (K, P, H), in. With
    `refit` there is one more bank, of probes that were then found on train and validation together.
    """

    banks: Any  # nn.ModuleList of ProbeBank
    kept: Any  # nn.ModuleList of ProbeBank
    refitted: Any  # ProbeBank, or None
    is_refitted: Tensor  # whether it holds what became of `kept`
    kept_score: Tensor
    kept_epoch: Tensor
    hyperparameters: Tensor

    def __init__(
        self, probes: Sequence[Probe], outputs: int, candidates: Sequence[tuple[float, ...]], refit: bool = False
    ) -> None:
        super().__init__()
        bank = ProbeBank(probes, outputs)
        self.banks = nn.ModuleList(copy.deepcopy(bank) for _ in candidates)
        self.kept = nn.ModuleList(copy.deepcopy(bank).requires_grad_(False) for _ in candidates)
        self.refitted = bank.requires_grad_(False) if refit else None
        values = torch.tensor(candidates, dtype=torch.float64).unsqueeze(1).repeat(1, len(probes), 1)
        self.register_buffer("kept_score", torch.full(values.shape[:2], -torch.inf, dtype=torch.float64))
        self.register_buffer("kept_epoch", torch.full(values.shape[:2], -1))
        self.register_buffer("hyperparameters", values)  # (K, P, H)
        self.register_buffer("is_refitted", torch.tensor(False))

    def logits(self, coordinates: Tensor) -> Tensor:
        """Return the logits of every candidate and probe in training, shape (K P, C, B)."""
        return torch.cat([bank(coordinates) for bank in self.banks])

    def kept_logits(self, coordinates: Tensor) -> Tensor:
        """Return the logits of the kept weights of each probe's chosen candidate, shape (P, C, B)."""
        return self.of_chosen(torch.stack([bank(coordinates) for bank in self.kept]))

    def final_logits(self, coordinates: Tensor) -> Tensor:
        """Return the logits of the probes that a run ends with: those refitted, else those kept, shape (P, C, B)."""
        return self.kept_logits(coordinates) if self.refitted is None else self.refitted(coordinates)

    def keep(self, which: Tensor, epoch: int) -> None:
        """Keep the weights in training where `which`, shape (K, P), is true."""
        for bank, kept, chosen in zip(self.banks, self.kept, which, strict=True):
            kept.copy_probes(bank, chosen)
        self.kept_epoch.masked_fill_(which, epoch)

    def set_probe(self, index: int, weight: Tensor, bias: Tensor) -> None:
        """Set a probe's weights, shape (C, k), and bias, shape (C,), in training and kept, of the only candidate."""
        for bank in (self.banks[0], self.kept[0]):
            bank.set_probe(index, weight, bias)

    def final_probe(self, index: int) -> tuple[Tensor, Tensor]:
        """Return copies of the weights, shape (C, k), and bias, shape (C,), that a probe ends with."""
        return (self.refitted or self.kept[int(self.kept_score[:, index].argmax())]).get_probe(index)

    def check_kept(self) -> None:
        """Raise a MisconfigurationException where a probe was never validated, and so never kept, or not refitted."""
        if self.kept_epoch.min() < 0:
            raise MisconfigurationException(
                "Training ended before the first validation, so no probe was kept; raise trainer.max_epochs, max_steps "
                "or max_time, or validate more often."
            )
        if self.refitted is not None and not self.is_refitted:
            raise MisconfigurationException(
                "Training ended before the last of trainer.max_epochs, after which model.refit finds probes again; go "
                "on with fit and --ckpt_path last, without early stopping."
            )

    def of_chosen(self, values: Tensor) -> Tensor:
        """Return the values of each probe's chosen candidate, shape (P, ...), from values of shape (K, P, ...)."""
        chosen = self.kept_score.argmax(0)
        return values[chosen.to(values.device), torch.arange(len(chosen), device=values.device)]
