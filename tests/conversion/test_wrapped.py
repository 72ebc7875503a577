"""Compiled, parallel, averaged and sharded models: the model inside is worked on, or refused; never nothing."""

import copy
import warnings

import pytest
import timm
import torch
import torch.distributed as dist
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


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


SIDES = [("compiled DDP", "model"), ("ModelEma", "model"), ("ModelEmaV3", "model"), ("DDP", "dense")]


@pytest.mark.parametrize(("wrapper", "side"), SIDES)
def test_calibration_takes_the_model_inside(pair, wrapper, side):
    model, dense = copy.deepcopy(pair)
    inner = copy.deepcopy(model)
    x = torch.randn(15, 3, 32, 32)
    expected = mk.calibrate_masterkeys(model, dense, x, stages="statistics")
    if side == "model":
        wrapped = WRAPPERS[wrapper](inner)
        inner = getattr(wrapped, "ema", inner) if wrapper == "ModelEma" else inner
        inner = wrapped.module if wrapper == "ModelEmaV3" else inner  # a copy
        report = mk.calibrate_masterkeys(wrapped, dense, x, stages="statistics")
    else:
        report = mk.calibrate_masterkeys(inner, WRAPPERS[wrapper](dense), x, stages="statistics")
    assert report.after == expected.after and report.stages[0].changed == expected.stages[0].changed != ()
    assert same(inner.state_dict(), model.state_dict())
    assert "calibrated on 15 images" in str(mk.conversion_report(inner))


@pytest.mark.slow
def test_calibration_of_models_compiled_in_place(pair):
    (model, dense), (inner, reference) = copy.deepcopy(pair), copy.deepcopy(pair)
    x = torch.randn(15, 3, 32, 32)
    mk.calibrate_masterkeys(model, dense, x, stages="statistics")
    inner.compile(backend="eager")
    inner.stages[0].compile(backend="eager")
    reference.compile(backend="eager")
    compiled = inner._compiled_call_impl
    mk.calibrate_masterkeys(inner, reference, x, stages="statistics")
    assert same(inner.state_dict(), model.state_dict())
    assert inner._compiled_call_impl is compiled and reference._compiled_call_impl is not None
    with torch.no_grad():
        torch.testing.assert_close(inner(x), model(x))  # what is compiled sees the new values


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_only_reads_takes_the_model_inside(pair, wrapper, tmp_path):
    model, dense = copy.deepcopy(pair)
    wrapped, stock = WRAPPERS[wrapper](model), WRAPPERS[wrapper](dense)
    report, expected = mk.conversion_report(wrapped, stock), mk.conversion_report(*pair)
    assert str(report.layers) == str(expected.layers) and str(report.operators) == str(expected.operators)
    assert str(mk.plan_conversion(stock, include="stages.0.*")) == str(mk.plan_conversion(dense, include="stages.0.*"))
    assert same(mk.fuse_masterkeys(wrapped).state_dict(), mk.fuse_masterkeys(model).state_dict())
    mk.save_compact(wrapped, tmp_path / "wrapped")
    mk.save_compact(model, tmp_path / "model")
    assert (tmp_path / "wrapped").read_bytes() == (tmp_path / "model").read_bytes()


@pytest.mark.parametrize(("wrapper", "inplace"), [(wrapper, i % 2 == 0) for i, wrapper in enumerate(WRAPPERS)])
def test_a_wrapped_model_is_not_converted(pair, wrapper, inplace, tmp_path):
    """Its wrapper would go on with the old layers: their gradients, averages and graphs."""
    model, dense = copy.deepcopy(pair)
    stock, wrapped = WRAPPERS[wrapper](dense), WRAPPERS[wrapper](model)
    for convert in (mk.convert_to_masterkeys, mk.initialize_masterkeys):
        with pytest.raises(mk.ConversionError, match=r"Got a \w+, which has taken hold of the layers.* anew"):
            convert(stock, inplace=inplace)
    mk.save_compact(model, tmp_path / "compact")
    with pytest.raises(mk.ConversionError, match="taken hold"):
        mk.load_compact(stock, tmp_path / "compact")
    with pytest.raises(mk.ConversionError, match="taken hold"):
        mk.fuse_masterkeys(wrapped, inplace=True)
    assert not any(isinstance(module, mk.MasterKeyConv2d) for module in dense.modules())
    assert sum(isinstance(module, mk.MasterKeyConv2d) for module in model.modules()) > 0


@pytest.mark.parametrize("shard", ["fully_shard", "FullyShardedDataParallel"])
def test_a_sharded_model_is_refused(pair, shard):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, shard):
        pytest.skip("public from torch 2.6")
    model, dense = copy.deepcopy(pair)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about CPU and about FSDP's old form
        if shard == "fully_shard":
            mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
            sharded, kept = (getattr(fsdp, shard)(module, mesh=mesh) for module in (dense, model))
        else:
            sharded, kept = (getattr(fsdp, shard)(module, device_id=torch.device("cpu")) for module in (dense, model))
    for convert in (mk.convert_to_masterkeys, mk.initialize_masterkeys):
        with pytest.raises(mk.ConversionError, match="are sharded, expected whole ones"):
            convert(sharded, inplace=True)
    with pytest.raises(mk.ConversionError, match="are sharded"):
        mk.fuse_masterkeys(kept)
    with pytest.raises(mk.CalibrationError, match="sharded"):
        mk.calibrate_masterkeys(kept, pair[1], torch.randn(12, 3, 32, 32))


def test_a_submodule_called_module_is_no_wrapper():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Conv2d(8, 8, 3, groups=8)

    assert [layer.name for layer in mk.plan_conversion(Net()).converted] == ["module"]
    assert isinstance(mk.convert_to_masterkeys(Net()).module, mk.MasterKeyConv2d)
