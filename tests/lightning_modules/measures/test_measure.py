import math

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.measures import CKA, Accuracy, Column, Ensembles, Inequality, LayerRanks, Neighbours, Neurons
from lightning_modules.measures.suite import Suite


@pytest.mark.parametrize(
    ("column", "value", "spread", "shown"),
    [
        (Column("cka", "CKA"), 0.98765, 0.01234, "0.988 ± 0.012"),
        (Column("accuracy", "accuracy", "%", 1), 0.5, math.nan, "50.0"),
        (Column("difference", "difference", "points", 1), 0.025, math.nan, "+2.5"),
        (Column("difference", "difference", "points", 1), -0.025, 0.1, "-2.5 ± 10.0"),
        (Column("cka", "CKA"), math.nan, math.nan, ""),
    ],
)
def test_values_are_shown_in_their_unit_with_their_spread(column, value, spread, shown):
    assert column.words(value, spread) == shown


def test_every_measure_goes_with_every_other_but_what_gives_the_same_table_or_column():
    Suite([Accuracy(), CKA(), Inequality(), Neighbours(), Ensembles(), Neurons()], clean=True)
    for one, other, name in ((CKA, LayerRanks, "layers.csv"), (Inequality, Inequality, "mean_class_accuracy")):
        said = f"model.measures: {one.__name__} and {other.__name__} would both write {name}; leave one out."
        with pytest.raises(MisconfigurationException, match=said):
            Suite([Accuracy(), one(), other()], clean=True)
