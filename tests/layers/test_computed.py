"""The computed weight: reading, assigning, and code that uses it as a parameter; the windows of the input."""

import copy
import pickle

import numpy as np
import pytest
import torch
from compare import snapshot, unchanged
from layer_cases import assert_fitted, geometries, kind_and_bank, make_conv
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.nn.utils import prune

from timm_masterkeys import ConversionError, MasterKeyConv2d, project_kernels


@pytest.fixture
def layer():
    return MasterKeyConv2d.from_conv(nn.Conv2d(8, 8, 3, groups=8))


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: layer.weight.detach().add_(1),
        lambda layer: layer.weight.data.normal_(),
        lambda layer: layer.apply(lambda m: nn.init.normal_(m.weight)),
    ],
    ids=["init", "in place", "data", "apply"],
)
def test_writing_into_the_weight_is_noticed(layer, write):
    x = torch.randn(1, 8, 5, 5)
    with unchanged(layer):
        write(layer)
        with pytest.warns(UserWarning, match="assign the whole tensor"):
            layer(x)
        layer(x)  # once


def test_reading_the_weight_warns_of_nothing(layer):
    layer.weight.square().sum().backward()
    copy.deepcopy(layer)(torch.randn(1, 8, 5, 5))
    layer(torch.randn(1, 8, 5, 5))
    assert layer.shift.grad is not None


@pytest.mark.parametrize("trainable", ["none", "shift"])
def test_what_is_made_of_the_weight_is_plain(layer, trainable, tmp_path):
    layer.set_trainable(trainable)
    expected = layer.compose_weight().detach()
    torch.save(layer.weight.detach(), tmp_path / "weight.pt")
    save_file({"weight": layer.weight}, tmp_path / "weight.safetensors")
    for made in (
        layer.weight * 1,
        layer.weight[:],
        layer.weight.data,
        layer.weight.clone(),
        copy.deepcopy(layer.weight.detach()),
        pickle.loads(pickle.dumps(layer.weight.detach())),
        torch.load(tmp_path / "weight.pt", weights_only=True),
        load_file(tmp_path / "weight.safetensors")["weight"],
    ):
        assert type(made) is torch.Tensor and torch.equal(made, expected)
    assert b"timm_masterkeys" not in pickle.dumps(layer.weight.detach())
    np.testing.assert_array_equal(layer.weight.detach().numpy(), expected.numpy())
    assert layer.weight.requires_grad == (trainable == "shift")


def test_the_weight_makes_a_parameter_and_is_none(layer):
    parameter, conv, before = nn.Parameter(layer.weight), nn.Conv2d(8, 8, 3, groups=8), layer.compose_weight()
    assert type(parameter) is nn.Parameter and parameter.is_leaf and parameter.requires_grad
    assert not isinstance(layer.weight, nn.Parameter) and isinstance(layer.weight, torch.Tensor)
    conv.weight = nn.Parameter(layer.weight.detach())
    conv.weight.data = before + 1
    assert torch.equal(conv.weight, before + 1) and torch.equal(layer.weight, before)


class Reader(nn.Module):
    """Uses the weight beside the layer, as a regulariser does."""

    def __init__(self):
        super().__init__()
        self.conv = MasterKeyConv2d(8, 8, 3)

    def forward(self, x):
        return self.conv(x) + self.conv.weight.square().mean()


def test_reading_the_weight_wherever_tensors_are_no_plain_ones():
    model, x = Reader(), torch.randn(1, 8, 5, 5)
    expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
        assert torch.equal(Reader()(x).isfinite().all(), torch.tensor(True))
    assert torch.equal(model(x), expected)
    parameters = dict(model.named_parameters())
    for _ in range(2):  # the second forward pass looks at what the first has read
        gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
        with torch.no_grad():
            both = torch.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(
                {name: torch.stack([value, value]) for name, value in parameters.items()}
            )
    torch.testing.assert_close(both, torch.stack([expected, expected]))
    expected.sum().backward()
    torch.testing.assert_close(gradients["conv.shift"], model.conv.shift.grad)


def test_reading_the_weight_compiles_nothing_anew(layer):
    torch._dynamo.reset()
    counter, x = CompileCounter(), torch.randn(1, 8, 5, 5)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        compiled(x)
        assert layer.weight.shape == (8, 1, 3, 3)
    assert counter.frame_count == 1


def test_assigning_a_weight_projects_it():
    layer = MasterKeyConv2d.from_conv(nn.Conv2d(8, 8, 7, groups=8), keys_per_kernel=2)
    layer.weight = weight = torch.randn(8, 1, 7, 7)
    assert_fitted(layer, project_kernels(weight, keys_per_kernel=2))
    assert layer.shift.requires_grad


@pytest.mark.parametrize("bad", [torch.randn(8, 1, 7, 7), torch.full((8, 1, 3, 3), torch.nan)], ids=["size", "NaN"])
def test_assigning_what_is_no_kernel_changes_nothing(layer, bad):
    with unchanged(layer), pytest.raises(ConversionError, match="weight"):
        layer.weight = bad


@pytest.mark.parametrize(("trainable", "multiplier"), [("none", 2), ("shift", 1), ("affine", 2), ("sigmas", 1)])
def test_kernels_can_be_left_out_as_torch_pruning_does(trainable, multiplier):
    kind, bank = kind_and_bank(trainable)
    conv = nn.Conv2d(6, 6 * multiplier, 5, groups=6)
    conv.weight.data[2] = 0.5
    conv.weight.data[5] = conv.weight.data[0]
    layer = kind.from_conv(conv, bank, 1 if trainable == "sigmas" else 2, trainable)
    whole, entries, kept = layer.weight.detach(), snapshot(layer), [0, 2, 5]
    rows = [multiplier * channel + i for channel in kept for i in range(multiplier)]
    layer.in_channels = layer.groups = 3
    layer.out_channels = 3 * multiplier
    layer.weight = nn.Parameter(layer.weight[rows])
    layer.bias = nn.Parameter(layer.bias[rows])
    assert torch.equal(layer.weight, whole[rows]) and torch.equal(layer.fuse().weight, whole[rows])
    for name, value in layer.state_dict().items():
        per = value.unflatten(0, (len(rows), -1)) if name != "keys" else value
        before = entries[name].unflatten(0, (6 * multiplier, -1))[rows] if name != "keys" else entries[name]
        assert torch.equal(per, before), name
    assert layer.trainable == trainable and layer.shift.requires_grad == (trainable != "none")
    layer(torch.randn(1, 3, 8, 8)).sum().backward()
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())


@pytest.mark.parametrize(
    "weight",
    [torch.randn(3, 1, 5, 5), torch.randn(6, 1, 5, 5), torch.randn(3, 1, 3, 3), torch.empty(3, 1, 5, 5).to("meta")],
)
def test_other_kernels_than_its_own_are_no_pruning(weight):
    layer = MasterKeyConv2d(6, 6, 5)
    with unchanged(layer):
        layer.out_channels = 3
        with pytest.raises(ConversionError, match="fuse_masterkeys"):
            layer.weight = nn.Parameter(weight)


UTILITIES = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm": lambda layer: torch.nn.utils.weight_norm(layer),
    "spectral_norm": lambda layer: torch.nn.utils.spectral_norm(layer),
    "parametrized weight_norm": lambda layer: torch.nn.utils.parametrizations.weight_norm(layer),
    "parametrized spectral_norm": lambda layer: torch.nn.utils.parametrizations.spectral_norm(layer),
    "fuse_conv_bn_eval": lambda layer: torch.nn.utils.fuse_conv_bn_eval(layer.eval(), nn.BatchNorm2d(8).eval()),
    "a parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach())),
    "other data": lambda layer: setattr(layer.weight, "data", torch.zeros(8, 1, 3, 3)),
    "quantisation": lambda layer: torch.ao.quantization.prepare(quantised(layer)),
    "quantisation by FX": lambda layer: prepare_fx(
        nn.Sequential(layer).eval(), torch.ao.quantization.get_default_qconfig_mapping(), (torch.randn(1, 8, 9, 9),)
    ),
}


def quantised(layer):
    model = nn.Sequential(layer).eval()
    model.qconfig = torch.ao.quantization.default_qconfig
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("utility", UTILITIES)
def test_utilities_that_want_a_parameter_name_the_way_out(layer, utility):
    bare = utility == "weight_norm" and torch.__version__ < "2.6"  # see parameters_without_weight
    error, message = (KeyError, "weight") if bare else (ConversionError, "fuse_masterkeys")
    with unchanged(layer), pytest.raises(error, match=message):
        UTILITIES[utility](layer)
    assert not layer._forward_pre_hooks
    layer(torch.randn(1, 8, 5, 5))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@geometries
def test_windows_are_what_the_kernel_sees(geometry):
    conv = make_conv(geometry, dtype=torch.float64, bias=False)
    layer = MasterKeyConv2d.from_conv(conv)
    x = torch.randn(2, 8, 15, 17, dtype=torch.float64)
    output = layer(x).flatten(2)
    positions = torch.randperm(output.shape[2])[:20]
    windows = layer.windows(x, positions).repeat_interleave(layer.out_channels // 8, 3)
    got = torch.einsum("npkc,ck->ncp", windows, layer.weight.flatten(1))
    torch.testing.assert_close(got, output[:, :, positions])
