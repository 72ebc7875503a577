"""transformers: its own networks, timm's in its wrapper from folders that were saved here, its trainer and loaders."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.optim import param_groups_weight_decay
from tiny import damaged, layers, lively, mended, photographs
from torch import nn

import timm_masterkeys as mk

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]

CLASSES = 7
NETWORKS = {  # with their depthwise convolutions
    "efficientnet": ("EfficientNetForImageClassification", 7),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", 17),
    "segmentation": ("MobileNetV2ForSemanticSegmentation", 17),
}


def network(kind):
    small = {"image_size": 32, "num_labels": CLASSES}
    if kind == "efficientnet":
        config = transformers.EfficientNetConfig(
            width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, **small
        )
    else:
        config = transformers.MobileNetV2Config(depth_multiplier=0.35, classifier_dropout_prob=0.0, **small)
    return lively(getattr(transformers, NETWORKS[kind][0])(config), photographs())


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_its_networks_convert_calibrate_and_fuse(kind):
    dense, x = network(kind), photographs()
    batches = [{"pixel_values": part, "labels": torch.zeros(len(part))} for part in x.split(10)]
    model = damaged(mk.convert_to_masterkeys(dense))
    assert len(layers(model)) == NETWORKS[kind][1]
    report = mk.calibrate_masterkeys(model, dense, batches)
    assert report.record.metric == ("dense prediction" if kind == "segmentation" else "classification")
    assert report.record.images == len(x) and mended(report, "divergence")
    summary = str(mk.conversion_report(model))
    assert report.record.summary() in summary
    fused, out = mk.fuse_masterkeys(model), model(pixel_values=x[:4])
    assert torch.equal(fused(pixel_values=x[:4]).logits, out.logits)
    assert list(fused.state_dict()) == list(dense.state_dict())


def test_a_backbone_is_judged_by_the_last_of_its_maps():
    config = transformers.ConvNextV2Config(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_indices=[1, 3])
    dense = lively(transformers.ConvNextV2Backbone(config), photographs())
    model = damaged(mk.convert_to_masterkeys(dense))
    report = mk.calibrate_masterkeys(model, dense, photographs())
    assert report.record.metric == "embedding" and mended(report, "relative error")


def test_a_few_keys_that_agree():
    dense = network("mobilenet_v2")
    batches = [{"pixel_values": part} for part in photographs().split(10)]
    model, budget = mk.convert_to_agreement(dense, 0.6, batches)
    assert budget.record.metric == "classification" and budget.record.held_out == 15
    assert "metric: classification" in str(budget) and layers(model)


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_its_own_files_hold_fused_networks(kind, tmp_path):
    dense, x = network(kind), photographs(4)
    model = mk.convert_to_masterkeys(dense)
    mk.fuse_masterkeys(model).save_pretrained(tmp_path)
    loaded = type(dense).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(x).logits, model(x).logits)
    torch.testing.assert_close(mk.convert_to_masterkeys(loaded)(x).logits, model(x).logits, rtol=1e-3, atol=1e-3)


class Converted(transformers.EfficientNetForImageClassification):
    """A class that converts itself, so that its own files hold the converted network."""

    def __init__(self, config):
        super().__init__(config)
        mk.convert_to_masterkeys(self, inplace=True)


def test_a_class_that_converts_itself_loads_its_own_files_and_refuses_dense_ones(tmp_path):
    dense, x = network("efficientnet"), photographs(4)
    model = mk.convert_to_masterkeys(dense)
    model.save_pretrained(tmp_path / "converted")
    assert torch.equal(Converted.from_pretrained(tmp_path / "converted").eval()(x).logits, model(x).logits)
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(mk.CheckpointError, match=r"from_pretrained.* do not project dense kernels: load"):
        Converted.from_pretrained(tmp_path / "dense").eval()(x)


# --- The wrapper of timm's networks


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A converted timm network and the folder it was saved in."""
    torch.manual_seed(0)
    model = lively(timm.create_model("test_convnext.mk8", num_classes=CLASSES), photographs(20, 160))
    folder = tmp_path_factory.mktemp("saved") / "out"
    labels = [f"label {i}" for i in range(CLASSES)]
    mk.save_pretrained(model, folder, license="mit", config={"label_names": labels})
    return model, folder


def test_the_wrapper_loads_saved_folders(saved):
    model, folder = saved
    x = photographs(2, 160)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    stock = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert layers(stock) and not layers(wrapped)
    assert torch.equal(wrapped(pixel_values=x).logits, mk.fuse_masterkeys(stock)(x))
    assert torch.equal(wrapped(pixel_values=x).logits, model(x))
    again = mk.convert_to_masterkeys(wrapped)
    torch.testing.assert_close(again(x).logits, model(x), rtol=1e-3, atol=1e-3)
    assert wrapped.config.id2label == {i: f"label {i}" for i in range(CLASSES)}


def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (200, 180, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_image_processor_and_the_pipeline_do_as_timm(saved):
    model, folder = saved
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    x = prepare(picture())[None]
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert torch.equal(processor(picture())["pixel_values"], x)
    pipe = transformers.pipeline("image-classification", model=str(folder), device="cpu")
    scores = {found["label"]: found["score"] for found in pipe(picture(), top_k=CLASSES)}
    expected = model(x).softmax(-1)[0].tolist()
    assert scores == pytest.approx({f"label {i}": p for i, p in enumerate(expected)}, rel=1e-5)


def test_the_wrapped_network_converts_and_is_prepared_for_by_the_timm_model_in_it(saved, tmp_path):
    _, folder = saved
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    model = mk.convert_to_masterkeys(wrapped)
    report = mk.calibrate_masterkeys(model, wrapped, "builtin", max_images=24, stages="norms")
    assert report.record.metric == "classification" and report.record.origin == "builtin"
    mk.fuse_masterkeys(model).save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = photographs(2, 160)
    assert torch.equal(again(x).logits, model(x).logits)


# --- The trainer


class Steps(torch.utils.data.Dataset):
    """Images and labels as the trainer takes them."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"pixel_values": photographs(8)[i], "labels": i % CLASSES}


def trainer(model, folder, **more):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, **more}
    arguments = transformers.TrainingArguments(str(folder), weight_decay=0.1, learning_rate=0.01, **settings)
    return transformers.Trainer(model, arguments, train_dataset=Steps())


def test_the_trainer_leaves_keys_alone_and_decays_shifts(tmp_path):
    """Timm's optimisers give what is one-dimensional no decay; the trainer spares names with bias and norm only."""
    model = mk.convert_to_masterkeys(network("mobilenet_v2"), trainable="affine")
    frozen = {name: value.clone() for name, value in model.state_dict().items() if name.endswith(("keys", "key_index"))}
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    train = trainer(model, tmp_path, save_strategy="no")
    decayed = set(train.get_decay_parameter_names(model))
    ours = {name for name in before if name.endswith((".shift", ".scale"))}
    assert len(ours) == 2 * len(layers(model)) and ours <= decayed
    train.train()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name in ours)


def test_a_group_without_decay_for_the_trainer(tmp_path):
    """What the how-to page recommends."""
    model = mk.convert_to_masterkeys(network("mobilenet_v2"))
    groups = param_groups_weight_decay(model, 0.1)
    train = trainer(model, tmp_path, save_strategy="no")
    train.optimizer = torch.optim.AdamW(groups, lr=0.01)
    train.train()
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(layer.shift) in spared for layer in layers(model))


def test_checkpoints_of_the_trainer_come_back(tmp_path):
    model = mk.convert_to_masterkeys(network("mobilenet_v2"))
    trainer(model, tmp_path, save_steps=1).train()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    again = mk.convert_to_masterkeys(network("mobilenet_v2"))
    trainer(again, tmp_path, save_steps=1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_embeddings_of_a_vision_tower_are_no_classes():
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    tower = transformers.CLIPVisionModelWithProjection(config).eval()
    dense = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), tower).eval()
    report = mk.calibrate_masterkeys(mk.convert_to_masterkeys(dense), dense, photographs(20), stages="norms")
    assert report.record.metric == "embedding"
