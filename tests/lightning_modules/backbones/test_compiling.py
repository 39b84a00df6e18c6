"""A network is compiled for extraction alone, and only where it can be."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from networks import PLAIN, images, path_of, random_net
from torch.testing import assert_close

from lightning_modules.backbones.frozen import FrozenBackbone


def backbone(layers=("penultimate", "bn"), compile="default"):
    torch.manual_seed(0)
    return FrozenBackbone(path_of(random_net), "random", pretrained_cfg_overlay=PLAIN, layer=[*layers], compile=compile)


def test_without_a_compiler_it_ends_in_one_line_before_any_image():
    from torch._inductor import config  # a second to import

    network = backbone()
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(MisconfigurationException, match=r"needs a C\+\+ compiler .* --model.backbone.compile off"),
    ):
        network.inference(3).__enter__()
    with network.inference():  # nothing is compiled
        network(images())


def test_compiled_layers_are_those_of_the_network_as_it_is():
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError:
        pytest.skip("There is no C++ compiler.")
    network = backbone()
    expected = network(images())
    with network.inference(3):
        found, again, fewer = network(images()), network(-images()), network(images(count=2))
    with torch.inference_mode(), network.inference(3), torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(network(images()), found)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_close(again, network(-images()), rtol=1e-4, atol=1e-5)
    assert_close(fewer, expected[:2], rtol=1e-4, atol=1e-5)


def test_features_of_compiled_networks_are_told_apart():
    assert len({backbone(compile=mode).preparation for mode in ("off", "default", "max-autotune")}) == 3
