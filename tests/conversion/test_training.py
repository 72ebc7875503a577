"""Training with timm's own parts: what may change changes, what is frozen stays, and a run can be resumed."""

import argparse

import pytest
import timm
import torch
from compare import layers, same
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch import nn

import timm_masterkeys as mk

MODEL = "test_convnext"


def build(trainable="shift", model=MODEL):
    torch.manual_seed(0)
    return mk.convert_to_masterkeys(timm.create_model(model, num_classes=4), trainable=trainable)


def batches(count):
    torch.manual_seed(1)
    return [(torch.randn(4, 3, 64, 64), torch.randint(4, (4,))) for _ in range(count)]


def entries(model, *, trained):
    """Copies of what may change in the converted layers, or of what must stay bit for bit."""
    named = nn.Module.named_parameters if trained else nn.Module.named_buffers
    return {f"{name}.{n}": v.detach().clone() for name, layer in layers(model).items() for n, v in named(layer)}


@pytest.mark.parametrize(
    ("trainable", "trains"),
    [("none", {"bias"}), ("shift", {"bias", "shift"}), ("affine", {"bias", "shift", "scale"})],
)
def test_what_is_frozen_stays_bit_for_bit(trainable, trains, device):
    model = build(trainable).to(device)
    ema = ModelEmaV3(model, decay=0.5)
    before, started = entries(model, trained=False), entries(model, trained=True)
    assert {name.rpartition(".")[2] for name in started} == trains
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.1)
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=3)
    task, scaler = ClassificationTask(model.train()), NativeScaler(device=device)
    for step, (x, y) in enumerate(batches(3)):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = task(x.to(device), y.to(device))["loss"]
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
        scheduler.step(step)
        ema.update(model, step=step)
    for trained_model in (model, ema.module):
        same(entries(trained_model, trained=False), before)
        moved = entries(trained_model, trained=True)
        assert not any(torch.equal(value, started[name]) for name, value in moved.items())


@pytest.mark.filterwarnings("ignore")  # of optimisers with fallbacks
@pytest.mark.parametrize("opt", list_optimizers())
def test_no_weight_decay_on_shift_and_scale(opt):
    model = build("affine")
    try:
        optimizer = create_optimizer_v2(model, opt, lr=1e-3, weight_decay=0.1)
    except Exception:  # wants CUDA, or a package that is not there
        with pytest.raises(Exception):  # noqa: B017  # for the dense model as well
            create_optimizer_v2(timm.create_model(MODEL), opt, lr=1e-3, weight_decay=0.1)
        return
    own = {id(p) for layer in layers(model).values() for p in (layer.scale, layer.shift, layer.bias)}
    decays = [group["weight_decay"] for group in optimizer.param_groups for p in group["params"] if id(p) in own]
    assert decays == [0] * len(own)


@pytest.mark.parametrize("name", [MODEL, "test_efficientnet"])
def test_layer_decay_groups_are_those_of_the_dense_model(name):
    def scales(model, entry):
        optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
        scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
        return {n.removesuffix(entry): scale[id(p)] for n, p in model.named_parameters() if n.endswith(entry)}

    dense = timm.create_model(name, num_classes=4)
    ours, expected = scales(mk.convert_to_masterkeys(dense), ".shift"), scales(dense, ".weight")
    assert ours == {layer: expected[layer] for layer in ours}
    assert len(set(ours.values())) > 1


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    def start(model):
        return model.train(), create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.1)

    def train(model, optimizer, data):
        for x, y in data:
            optimizer.zero_grad()
            ClassificationTask(model)(x, y)["loss"].backward()
            optimizer.step()

    data, whole, first = batches(4), start(build("affine")), start(build("affine"))
    train(*whole, data)
    train(*first, data[:2])
    args = argparse.Namespace(model=MODEL)
    CheckpointSaver(*first, args=args, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)).save_checkpoint(0)

    torch.manual_seed(99)
    again = start(mk.initialize_masterkeys(timm.create_model(MODEL, num_classes=4), trainable="affine"))
    assert resume_checkpoint(again[0], str(tmp_path / "last.pth.tar"), again[1], weights_only=False) == 1
    train(*again, data[2:])
    same(again[0], whole[0])


def test_distillation_from_the_dense_teacher():
    teacher = timm.create_model("test_efficientnet", num_classes=4)
    student = mk.convert_to_masterkeys(teacher).train()
    before = entries(student, trained=False)
    task = LogitDistillationTask(student, teacher, distill_loss_weight=1.0, task_loss_weight=0.0)
    optimizer = create_optimizer_v2(student, "adamw", lr=1e-3)
    (x, y), losses = batches(1)[0], []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(task(x, y)["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    same(entries(student, trained=False), before)


def test_training_from_scratch_starts_at_the_dense_scale():
    def activations(name):
        """What the depthwise layers give out on noise, root mean square."""
        torch.manual_seed(0)
        model, seen = timm.create_model(name, num_classes=4), []
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
                layer.register_forward_hook(lambda m, i, out: seen.append(out.square().mean().sqrt()))
        with torch.no_grad():
            torch.manual_seed(2)
            model(torch.randn(2, 3, 192, 192))
        return torch.stack(seen)

    ratio = activations("convnext_atto.mk8") / activations("convnext_atto")
    assert 0.8 < ratio.min() and ratio.max() < 1.4
