"""A converted network and its dense network, checked to belong together."""

import logging
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..conversion.plan import converted_layers
from ..conversion.record import Record, check_attribute, read_record
from ..conversion.wrapped import is_sharded, quantised_entry, unwrapped
from ..errors import CalibrationError
from ..layers import MasterKeyConv2d
from .blocks import is_pointwise

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NetworkPair:
    """A converted network and the dense network it was converted from.

    Attributes:
        model: The converted one.
        dense: The dense one.
        layers: The converted layers by name.
        record: The converted network's record as it was when the pair was made.
    """

    model: nn.Module
    dense: nn.Module
    layers: dict[str, MasterKeyConv2d]
    record: Record


def checked_pair(model: nn.Module, dense: nn.Module) -> NetworkPair:
    """The plain networks inside these; raises CalibrationError unless the first can be calibrated with the second."""
    model, dense = unwrapped(model), unwrapped(dense)
    if is_sharded(model) or is_sharded(dense):
        raise CalibrationError("The parameters are sharded, expected whole ones. Calibrate first, then shard.")
    if any(map(is_lazy, (*model.parameters(), *dense.parameters()))):
        raise CalibrationError("There are lazy layers, whose sizes are not known yet. Run the dense model once first.")
    if entry := quantised_entry(model) or quantised_entry(dense):
        raise CalibrationError(f"{entry}, expected ordinary tensors. Calibrate first, then quantise.")
    check_attribute(model)
    layers = converted_layers(model)
    if not layers:
        raise CalibrationError(
            f"The first model, a {type(model).__name__}, holds no converted layer. The order is (converted, dense); "
            "convert_to_masterkeys makes the converted one."
        )
    dense_modules = dict(dense.named_modules())
    for name, layer in layers.items():
        dense_layer = dense_modules.get(name)
        if isinstance(dense_layer, MasterKeyConv2d):
            raise CalibrationError(f"The second model is converted too, as at {name}: give the dense one.")
        kind, shape = type(dense_layer).__name__, getattr(getattr(dense_layer, "weight", None), "shape", None)
        if not isinstance(dense_layer, nn.Conv2d) or shape != layer.weight.shape:
            raise CalibrationError(
                f"The dense model has a {kind} with a weight of {shape} at {name}, expected the Conv2d that was "
                f"converted, {layer.weight.shape}."
            )
    missing = [name for name, _ in model.named_modules() if name not in dense_modules]
    if missing:
        raise CalibrationError(f"The dense model has no {missing[0]}: give the one this model was converted from.")
    params, dense_params = dict(model.named_parameters()), dict(dense.named_parameters())
    shared = {name: (params[name], dense_params[name]) for name in params.keys() & dense_params.keys()}
    _check_parameters(shared, [*dense_params.values(), *params.values()])
    in_dense = {tensor.data_ptr() for tensor in dense.state_dict().values() if tensor.numel()}
    if both := [name for name, tensor in model.state_dict().items() if tensor.data_ptr() in in_dense]:
        raise CalibrationError(
            f"The models share {both[0]}, so that a calibration would change both. Give a copy of the dense model: "
            "copy.deepcopy(dense)."
        )
    records = [read_record(part) for part in model.modules()]
    if changed := _unexplained_changes(model, shared, records):
        _logger.warning(
            "Parameters beside the kernels differ from the dense model's (%d of them, for example %s). The dense model "
            "should be the one that this model was converted from.",
            len(changed),
            min(changed),
        )
    return NetworkPair(model, dense, layers, records[0])


Shared = dict[str, tuple[nn.Parameter, nn.Parameter]]  # by name, of the converted and of the dense network


def _check_parameters(shared: Shared, parameters: list[nn.Parameter]) -> None:
    """Raises CalibrationError unless all parameters can be changed and those of both networks are alike."""
    for name, (a, b) in shared.items():
        if a.shape != b.shape or a.device != b.device or a.dtype != b.dtype:
            raise CalibrationError(
                f"The dense model has {tuple(b.shape)} {b.dtype} on {b.device} at {name}, the converted one "
                f"{tuple(a.shape)} {a.dtype} on {a.device}: give the one this model was converted from, in the same "
                "place."
            )
    first = parameters[0]
    if first.device.type in ("meta", "mps") or first.dtype not in (torch.float32, torch.float64):
        raise CalibrationError(
            f"The models are {first.dtype} on {first.device}; calibrate in float32 on CPU or CUDA, then cast and move."
        )
    if any(parameter.is_inference() for parameter in parameters):
        raise CalibrationError("The models were made in inference mode, which allows no change. Make them outside.")


def _unexplained_changes(model: nn.Module, shared: Shared, records: list[Record]) -> list[str]:
    """The parameters beside the kernels that differ from the dense model's for no recorded reason.

    A calibration changes pointwise layers and the biases of converted ones. Training may change all of them.
    ``records`` has those of all modules, the whole model's first.
    """
    calibrated = records[:1]  # the whole model was calibrated after its parts
    if not records[0].was_calibrated:
        calibrated = [record for record in records if record.was_calibrated]
    if any(record.calibration is None for record in calibrated):
        return []
    if calibrated:
        fitted = {n for n, m in model.named_modules() if is_pointwise(m) or isinstance(m, MasterKeyConv2d)}
        shared = {name: two for name, two in shared.items() if name.rpartition(".")[0] not in fitted}
    return [n for n, (a, b) in shared.items() if not torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)]
