"""Libraries that change layers: Torch-Pruning, PEFT, transformers. Each works on a converted model, or names what does.

The oracle is the fused model, which holds ordinary convolutions only: what a library does to it, it shall do to the
converted one.
"""

import copy

import pytest
import timm
import torch
from torch import nn

import timm_masterkeys as mk

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]

SETTINGS = {
    "shift": {},
    "none": {"trainable": "none"},
    "affine, 3 keys": {"trainable": "affine", "keys_per_kernel": 3},
    "fixed sigmas": {"bank": "scale-space-b"},
}


def converted(name, **settings):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for block in model.modules():
        if hasattr(block, "gamma"):  # of ConvNeXt: near 0, which would hide the depthwise layers
            nn.init.ones_(block.gamma)
    return mk.convert_to_masterkeys(model, **settings)


def layers(model):
    return [module for module in model.modules() if isinstance(module, mk.MasterKeyConv2d)]


def prune(model, x):
    import torch_pruning

    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    ignored = [model.get_classifier()]
    torch_pruning.pruner.MagnitudePruner(
        model, x, importance=importance, pruning_ratio=0.5, ignored_layers=ignored
    ).step()
    return model.eval()


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "mobilenetv3_small_050"])
@pytest.mark.parametrize("settings", list(SETTINGS))
def test_torch_pruning_prunes_as_in_the_dense_model(name, settings):
    x = torch.randn(2, 3, 64, 64)
    model = converted(name, **SETTINGS[settings])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    channels = [layer.out_channels for layer in layers(model)]
    dense = prune(mk.fuse_masterkeys(model), x)
    prune(model, x)
    assert all(layer.out_channels < before for layer, before in zip(layers(model), channels, strict=True))
    expected = dense(x)
    assert torch.equal(model(x), expected)
    assert torch.equal(mk.fuse_masterkeys(model)(x), expected)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    model.train()(x).square().sum().backward()
    for layer in layers(model):
        assert len(layer.shift) == layer.groups == layer.out_channels
        assert layer.shift.grad is not None or SETTINGS[settings].get("trainable") == "none"


def test_learned_sigmas_are_pruned_once_they_are_fixed():
    x = torch.randn(2, 3, 64, 64)
    model = converted("test_convnext", bank="scale-space-b", trainable="sigmas")
    for layer in layers(model):
        layer.set_trainable("none")  # Torch-Pruning follows every path of autograd: those of sigmas have no end
    dense = prune(mk.fuse_masterkeys(model), x)
    assert torch.equal(prune(model, x)(x), dense(x))
    for layer in layers(model):
        layer.set_trainable("sigmas")
        assert len(layer.log_sigma) == 2 * layer.out_channels


@pytest.mark.parametrize("settings", [{}, {"bank": "scale-space-b", "trainable": "sigmas"}])
def test_lora_on_a_depthwise_layer_is_refused_and_nothing_is_changed(settings):
    import peft

    model = converted("test_convnext", include="stages.0.*", **settings)
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    rank = layers(model)[0].groups
    config = peft.LoraConfig(r=rank, target_modules=r"stages\.0\.blocks\.\d\.conv_dw")
    with pytest.raises(mk.ConversionError, match="fuse_masterkeys"):
        peft.get_peft_model(model, config)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    peft.get_peft_model(mk.fuse_masterkeys(model), config)


def test_lora_on_other_layers_works():
    import peft

    model = converted("test_convnext")
    x = torch.randn(2, 3, 64, 64)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["fc1", "fc2"]))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    expected = adapted.eval()(x)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)
    assert layers(merged)


@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3_trains_and_merges_once_the_model_is_fused(feedforward):
    import peft

    model = converted("test_convnext")
    x = torch.randn(2, 3, 64, 64)
    kinds = {"target_modules": ["conv_dw"], "feedforward_modules": ["conv_dw"] if feedforward else []}
    adapted = peft.get_peft_model(model, peft.IA3Config(**kinds)).eval()
    plain = adapted(x)
    for name, parameter in adapted.named_parameters():
        if "ia3_" in name:
            nn.init.uniform_(parameter, 0.5, 2)
    expected = adapted(x)
    assert (expected - plain).abs().max() > 1e-3
    with pytest.raises(mk.ConversionError, match="fuse_masterkeys"):
        adapted.merge_adapter()
    assert torch.equal(adapted(x), expected)
    mk.fuse_masterkeys(adapted, inplace=True)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)
    assert not any("Layer" in type(module).__name__ and hasattr(module, "ia3_l") for module in merged.modules())


def test_the_depthwise_layers_of_transformers_convert():
    from transformers import EfficientNetConfig, EfficientNetModel

    config = EfficientNetConfig(
        image_size=64, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, num_channels=3
    )
    torch.manual_seed(0)
    model = EfficientNetModel(config).eval()
    plan = mk.plan_conversion(model)
    assert {layer.kind for layer in plan.converted} == {"EfficientNetDepthwiseConv2d"}
    assert len(plan.converted) == sum(type(m).__name__ == "EfficientNetDepthwiseConv2d" for m in model.modules())
    ours = mk.convert_to_masterkeys(model)
    fused = mk.fuse_masterkeys(ours)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(x).last_hidden_state, fused(x).last_hidden_state)
    assert list(fused.state_dict()) == list(model.state_dict())
