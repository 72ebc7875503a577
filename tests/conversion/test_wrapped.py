"""Compiled, parallel, averaged and sharded models: the model inside is worked on, or refused; never nothing."""

import copy
import warnings

import pytest
import timm
import torch
import torch.distributed as dist
from compare import layers, same
from timm.utils import ModelEma, ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import timm_masterkeys as mk

WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "ModelEma": ModelEma,
    "ModelEmaV3": ModelEmaV3,
    "compiled DDP": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
}


@pytest.fixture(scope="module", autouse=True)
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    dense = timm.create_model("test_convnext", num_classes=5).eval()
    return mk.convert_to_masterkeys(dense), dense


@pytest.fixture(scope="module")
def expected_report(pair):
    return mk.conversion_report(*pair)


@pytest.mark.parametrize(("wrapper", "side"), [("compiled DDP", "model"), ("ModelEmaV3", "model"), ("DDP", "dense")])
def test_calibration_takes_the_model_inside(pair, wrapper, side):
    model, dense = copy.deepcopy(pair)
    inner, x = copy.deepcopy(model), torch.randn(15, 3, 32, 32)
    expected = mk.calibrate_masterkeys(model, dense, x, stages="norms")
    wrapped = WRAPPERS[wrapper](inner if side == "model" else dense)
    inner = wrapped.module if wrapper == "ModelEmaV3" else inner  # a copy
    given = (wrapped, dense) if side == "model" else (inner, wrapped)
    report = mk.calibrate_masterkeys(*given, x, stages="norms")
    assert report.after == expected.after and report.stages[0].changed == expected.stages[0].changed != ()
    same(inner, model)
    assert "calibrated with 12 images" in str(mk.conversion_report(inner))


@pytest.mark.slow
def test_calibration_of_models_compiled_in_place(pair):
    (model, dense), (inner, other) = copy.deepcopy(pair), copy.deepcopy(pair)
    x = torch.randn(15, 3, 32, 32)
    mk.calibrate_masterkeys(model, dense, x, stages="norms")
    for compiled in (inner, inner.stages[0], other):
        compiled.compile(backend="eager")
    call = inner._compiled_call_impl
    mk.calibrate_masterkeys(inner, other, x, stages="norms")
    same(inner, model)
    assert inner._compiled_call_impl is call and other._compiled_call_impl is not None
    with torch.no_grad():
        torch.testing.assert_close(inner(x), model(x))  # what is compiled sees the new values


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_only_reads_takes_the_model_inside(pair, expected_report, wrapper, tmp_path):
    model, dense = copy.deepcopy(pair)
    wrapped, wrapped_dense = WRAPPERS[wrapper](model), WRAPPERS[wrapper](dense)
    report = mk.conversion_report(wrapped, wrapped_dense)
    for part in ("layers", "operators"):
        assert str(getattr(report, part)) == str(getattr(expected_report, part))
    plan, expected = (str(mk.plan_conversion(m, include="stages.0.*")) for m in (wrapped_dense, dense))
    assert plan == expected
    same(mk.fuse_masterkeys(wrapped), mk.fuse_masterkeys(model))
    for name, saved in (("wrapped", wrapped), ("model", model)):
        mk.save_compact(saved, tmp_path / name)
    assert (tmp_path / "wrapped").read_bytes() == (tmp_path / "model").read_bytes()


@pytest.mark.parametrize(("wrapper", "inplace"), [(wrapper, i % 2 == 0) for i, wrapper in enumerate(WRAPPERS)])
def test_a_wrapped_model_is_not_converted(pair, wrapper, inplace, tmp_path):
    """Its wrapper would go on with the old layers: their gradients, averages and graphs."""
    model, dense = copy.deepcopy(pair)
    wrapped_dense, wrapped = WRAPPERS[wrapper](dense), WRAPPERS[wrapper](model)
    mk.save_compact(model, tmp_path / "compact")
    for change in (
        lambda: mk.convert_to_masterkeys(wrapped_dense, inplace=inplace),
        lambda: mk.initialize_masterkeys(wrapped_dense, inplace=inplace),
        lambda: mk.load_compact(wrapped_dense, tmp_path / "compact"),
        lambda: mk.fuse_masterkeys(wrapped, inplace=True),
    ):
        with pytest.raises(mk.ConversionError, match=r"Got a \w+, which has taken hold of the layers"):
            change()
    assert not layers(dense) and layers(model)


@pytest.mark.parametrize("shard", ["fully_shard", "FullyShardedDataParallel"])
def test_a_sharded_model_is_refused(pair, shard, tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, shard):
        pytest.skip("public from torch 2.6")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    where = {"mesh": mesh} if shard == "fully_shard" else {"device_id": torch.device("cpu")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about CPU and about FSDP's old form
        model, dense = (getattr(fsdp, shard)(module, **where) for module in copy.deepcopy(pair))
    for error, call in (
        (mk.ConversionError, lambda: mk.convert_to_masterkeys(dense, inplace=True)),
        (mk.ConversionError, lambda: mk.initialize_masterkeys(dense, inplace=True)),
        (mk.ConversionError, lambda: mk.fuse_masterkeys(model)),
        (mk.CalibrationError, lambda: mk.calibrate_masterkeys(model, pair[1], torch.randn(12, 3, 32, 32))),
        (mk.ConversionError, lambda: mk.save_compact(model, tmp_path / "compact.safetensors")),
    ):
        with pytest.raises(error, match="sharded"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_submodule_called_module_is_no_wrapper():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Conv2d(8, 8, 3, groups=8)

    assert [layer.name for layer in mk.plan_conversion(Net()).converted] == ["module"]
    assert isinstance(mk.convert_to_masterkeys(Net()).module, mk.MasterKeyConv2d)
