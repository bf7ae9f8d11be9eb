"""What export may not fold is left alone, what reparametrises weights is made permanent, and the copy is checked."""

import copy
import warnings

import pytest
import torch
from test_convert import randomise
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import thresholdnet as tn
from thresholdnet.export import export, plain

SIDE = 9


def layers():
    torch.manual_seed(0)
    return randomise(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4), nn.ReLU(),
        )
    ).eval()  # fmt: skip


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def written(model, path, side=SIDE):
    """The exported program, and what it and the model make of the same images."""
    x = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    program = torch.export.load(export(model, path / "a.pt2", image_size=side)).module()
    with torch.no_grad():
        return program, program(x), model(x)


def doubled(module, inputs, output):
    return 2 * output


@pytest.mark.parametrize("part", [0, 1])
def test_hooks_on_either_part(part, tmp_path):
    """Folded, a hook of the BatchNorm was lost, and one of the convolution saw what the BatchNorm makes."""
    model = layers()
    model[part].register_forward_hook(doubled)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the model is exported")
        _, got, expected = written(model, tmp_path)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert norms(plain(model)) == 1  # that of the second pair is folded


class List(nn.Module):
    """Runs its Sequential's modules in an order of its own."""

    def __init__(self):
        super().__init__()
        self.s = layers()[:2]

    def forward(self, x):
        return self.s[1](self.s[0](x)) + self.s[0](x)


class Reader(nn.Module):
    """Returns what lies between convolution and BatchNorm as well, as style transfer reads it."""

    def __init__(self):
        super().__init__()
        self.features = layers()

    def forward(self, x):
        found = {}
        for name, module in self.features.named_children():
            x = found[name] = module(x)
        return found["0"].mean((2, 3)), x


@pytest.mark.parametrize("kind", [List, Reader])
def test_a_sequential_used_as_a_list(kind, tmp_path):
    model = kind().eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="the model is exported with its BatchNorms as they are: .* differ by"):
        _, got, expected = written(model, tmp_path)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="as they are"):
        assert norms(plain(model, (2, 3, SIDE, SIDE))) == norms(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_one_module_in_two_places(tmp_path):
    """The BatchNorm follows the second run of the convolution, not the first."""
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = randomise(nn.Sequential(conv, conv, nn.BatchNorm2d(3))).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, got, expected = written(model, tmp_path)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert norms(plain(model)) == 0


def parametrised_spectrum(conv):
    parametrizations.spectral_norm(conv)
    conv.train()(torch.randn(1, conv.in_channels, 3, 3))  # a step of its power iteration, which eval mode leaves out


def half_of(conv):
    prune.random_unstructured(conv, "weight", 0.5)
    if conv.bias is not None:
        prune.random_unstructured(conv, "bias", 0.5)
    prune.l1_unstructured(conv, "weight", 0.2)  # a second method: a container of both


REPARAMETRISED = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": half_of,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrised_spectrum,
    "parametrizations.orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`", "ignore:.*torch.nn.utils.weight_norm")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", REPARAMETRISED)
def test_reparametrised_weights(name, trained, tmp_path):
    """Made plain weights on the copy; `trained`: after a step, when the weight is no leaf and torch copies none."""
    model = layers()
    for conv in (model[0], model[3]):
        REPARAMETRISED[name](conv)
    if trained:
        model.train()(torch.randn(2, 3, SIDE, SIDE)).sum().backward()
    model.eval()
    keys = list(model.state_dict())
    _, got, expected = written(model, tmp_path)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    folded = plain(model)
    assert norms(folded) == 0 and sorted(folded.state_dict()) == ["0.bias", "0.weight", "3.bias", "3.weight"]
    assert list(model.state_dict()) == keys  # the model itself keeps them


def test_pruned_blocks(tmp_path):
    """Of our own blocks, fused, whose layers are pruned."""
    model = tn.create_model("thresholdnet_ab", 3, layers=(2,), growth_rates=(4,), transitions=(8,))
    for module in randomise(model).eval().modules():
        if isinstance(module, nn.Conv2d):
            prune.random_unstructured(module, "weight", 0.3)
    _, got, expected = written(model, tmp_path, 32)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert norms(plain(model)) == 0


def test_the_check_leaves_random_numbers_alone():
    model = layers()
    state = torch.random.get_rng_state()
    plain(model, (2, 3, SIDE, SIDE))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_check_passes_what_is_right(dtype):
    model = tn.create_model("thresholdnet_v1", 3, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        folded = plain(randomise(model), (2, 3, 40, 33))
    assert norms(folded) < norms(model)


def test_models_without_parameters():
    assert isinstance(plain(nn.Sequential(nn.ReLU()), (1, 3, 2, 2))[0], nn.ReLU)
