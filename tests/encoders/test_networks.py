"""Networks: exactly convolutional where they say so, and the paper's DenseNet121."""

from __future__ import annotations

import pytest
import torch

from isimed_index.encoders.networks import PatchDenseNet121, StemNet, ValidNet, build_network
from isimed_index.errors import ConfigError, EncoderMismatch

VALID = "isimed_index.encoders.networks:ValidNet"
OUTPUTS = {"embedding": 4, "position": 3}
convolutional = pytest.mark.parametrize("kind", [ValidNet, StemNet])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@convolutional
@pytest.mark.parametrize(("side", "expected"), [(32, 1), (35, 1), (36, 2), (56, 7)])
def test_one_vector_every_four_voxels(kind: type[ValidNet | StemNet], side: int, expected: int) -> None:
    outputs = kind(OUTPUTS, width=2).eval()(torch.randn(2, 1, side, 32, 33))
    assert {name: tuple(y.shape) for name, y in outputs.items()} == {
        "embedding": (2, 4, expected, 1, 1),
        "position": (2, 3, expected, 1, 1),
    }


@convolutional
def test_a_vector_sees_its_patch_and_nothing_else(kind: type[ValidNet | StemNet]) -> None:
    """Random inputs rather than one: a ReLU may hide a corner of a single patch."""
    network = kind({"embedding": 4}, width=4).double().eval()
    x = torch.randn(4, 1, 40, 40, 40, dtype=torch.float64, requires_grad=True)
    network(x)["embedding"][:, :, 1, 0, 2].square().sum().backward()
    assert x.grad is not None
    seen = torch.nonzero(x.grad.abs().sum(dim=(0, 1)))
    assert seen.min(dim=0).values.tolist() == [4, 0, 8]
    assert seen.max(dim=0).values.tolist() == [35, 31, 39]


def test_the_position_is_the_heads_answer_in_decimetres() -> None:
    network = ValidNet(OUTPUTS, width=2).eval()
    x = torch.randn(1, 1, 32, 32, 32)
    torch.testing.assert_close(network(x)["position"], 100 * network.heads["position"](network.trunk(x)))


@convolutional
def test_alone_and_in_a_volume_a_patch_has_one_vector(kind: type[ValidNet | StemNet]) -> None:
    network = kind(OUTPUTS, width=3).eval()
    x = torch.randn(1, 1, 44, 40, 36)
    with torch.no_grad():
        whole = network(x)
        for i, j, k in ((0, 0, 0), (3, 2, 1), (1, 0, 1)):
            alone = network(x[:, :, 4 * i : 4 * i + 32, 4 * j : 4 * j + 32, 4 * k : 4 * k + 32])
            for name in OUTPUTS:
                torch.testing.assert_close(alone[name][..., 0, 0, 0], whole[name][..., i, j, k], atol=1e-4, rtol=1e-4)


def test_heads_stay_in_full_precision_under_autocast() -> None:
    """bfloat16 has 8 bits: a position of 100 mm would be rounded to half a millimetre."""
    network = ValidNet(OUTPUTS, width=2).eval()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(torch.randn(1, 1, 32, 32, 32))
    assert {y.dtype for y in outputs.values()} == {torch.float32}


def parameter_count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_build_network_knows_its_factories_only() -> None:
    assert parameter_count(build_network(VALID, {"embedding": 4}, {"width": 2})) > 0
    with pytest.raises(EncoderMismatch, match="ValidNet"):
        build_network("os:system", OUTPUTS, {})
    with pytest.raises(EncoderMismatch, match="depth"):
        build_network(VALID, OUTPUTS, {"depth": 2})


def test_parameter_count_of_the_stem_by_hand() -> None:
    w = 2
    a, b, c, d = 2 * w, 4 * w, 8 * w, 12 * w
    convolutions = 216 * a + 216 * a * b + 27 * b * c + 4 * c * c + 27 * c * d + 4 * d * d
    norms = 2 * (a + b + c + 3 * c + d + 3 * d)
    assert parameter_count(StemNet({"embedding": 5}, width=w)) == convolutions + norms + d * 5 + 5


def test_parameter_count_by_hand() -> None:
    w = 2
    convolutions = (
        27 * w + 64 * w * 2 * w + 27 * (2 * w) ** 2 + 64 * 2 * w * 4 * w + 27 * (4 * w) ** 2 + 27 * 4 * w * 8 * w
    )
    norms = 2 * (w + 2 * w + 2 * w + 4 * w + 4 * w + 8 * w)
    assert parameter_count(ValidNet({"embedding": 5}, width=w)) == convolutions + norms + 8 * w * 5 + 5


def test_densenet121_has_one_output() -> None:
    with pytest.raises(ConfigError, match="1024"):
        PatchDenseNet121({"embedding": 64})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_densenet121_is_monais_without_its_classifier() -> None:
    from monai.networks.nets import DenseNet121

    network = PatchDenseNet121({"embedding": 1024})
    reference = DenseNet121(spatial_dims=3, in_channels=1, out_channels=1)
    classifier = 1024 + 1
    assert parameter_count(network) == parameter_count(reference) - classifier == 11_242_624
    reference.features.load_state_dict(network.features.state_dict())
    x = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        found = network.eval()(x)["embedding"]
        expected = reference.eval().class_layers[:3](reference.features(x))  # ReLU, pooling, flattening
    assert found.shape == (2, 1024, 1, 1, 1)
    torch.testing.assert_close(found.flatten(1), expected)
