"""Models that put out dictionaries, tuples, lists and objects; batches that are dictionaries."""

import copy
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn

import timm_masterkeys as mk
from timm_masterkeys.calibration.outputs import gives_features, pick_output


@dataclass
class ModelOutput:
    """As those of transformers."""

    logits: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None


class Holds(nn.Module):
    """A small network whose output comes in something."""

    def __init__(self, pack, classes=5):
        super().__init__()
        torch.manual_seed(1)
        self.pack, self.stem, self.dw = pack, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, pixel_values):
        x = self.dw(self.stem(pixel_values)).relu()
        return self.pack(self.head(x), x)


def keep(maps, x):
    return maps


def calibrated(pack, x, **arguments):
    dense = Holds(pack).eval()
    model = mk.convert_to_masterkeys(dense)
    return model, mk.calibrate_masterkeys(model, dense, x, **arguments)


def same(model, other):
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


PACKS = {
    "dict": lambda maps, x: OrderedDict(out=maps, aux=x),
    "list": lambda maps, x: [maps, x],
    "object": lambda maps, x: ModelOutput(logits=maps, hidden_states=x),
}


@pytest.mark.parametrize("kind", PACKS)
def test_a_model_is_calibrated_whatever_its_output_comes_in(kind):
    x = torch.randn(20, 3, 12, 12)
    expected, figures = calibrated(keep, x)
    model, report = calibrated(PACKS[kind], x)
    assert same(model, expected)
    assert report.after == figures.after and report.record.metric == "dense prediction"
    assert report.after["divergence"] < report.before["divergence"]


def test_as_few_keys_as_agree_for_a_dictionary():
    dense, x = Holds(PACKS["dict"]).eval(), torch.randn(40, 3, 12, 12)
    model, budget = mk.convert_to_agreement(dense, 0.9, x)
    expected, plain = mk.convert_to_agreement(Holds(keep).eval(), 0.9, x)
    assert budget.chosen == plain.chosen and budget.record.metric == "dense prediction"
    assert same(model, expected)


def test_which_tensor_counts():
    model, one, two = nn.Identity(), torch.zeros(2, 3), torch.ones(2, 3)
    for raw in (
        *({"aux": one, "logits": two}, {"logits": two, "out": one}, {"labels": None, "y": two}, [two, one], ("a", two)),
        {"hidden": one, "last_hidden_state": two},
        {"last_hidden_state": one, "image_embeds": two},
        {"feature_maps": (one, two), "hidden_states": (one, one)},
        ModelOutput(logits=two, hidden_states=one),
        two,
    ):
        assert pick_output(model, raw) is two
    held = ModelOutput(logits=one, hidden_states=two)
    for raw, output in (({"out": one, "aux": two}, "aux"), ((one, two), 1), ([one, two], -1), (held, "hidden_states")):
        assert pick_output(model, raw, output) is two
    assert pick_output(model, held, lambda raw: raw.hidden_states) is two


@pytest.mark.parametrize(
    "raw, output, message",
    [
        ({"a": 1}, None, "returns a dict of 'a', expected a tensor in it"),
        (None, None, "returns a NoneType, expected a tensor"),
        ({"a": 1}, "b", "returns a dict of 'a', without 'b'"),
        ((1, 2), 5, "returns a tuple of int, int, without 5"),
        ({"a": 1}, "a", "expected a tensor at 'a', got a int"),
        (ModelOutput(), "nothing", "returns a ModelOutput, without 'nothing'"),
        (torch.zeros(2, 3), 0, r"returns a Tensor, without 0 \(a tensor has no parts"),  # not the first image
    ],
)
def test_what_is_not_there_is_named(raw, output, message):
    with pytest.raises(mk.CalibrationError, match=message):
        pick_output(nn.Identity(), raw, output)


def test_which_models_have_no_head():
    logits, state = ModelOutput(logits=torch.ones(1)), {"last_hidden_state": torch.ones(1)}
    plain, headless = nn.Identity(), timm.create_model("test_efficientnet", num_classes=0)
    assert gives_features(headless, torch.ones(1, 3)) and gives_features(plain, state)
    assert not gives_features(plain, torch.ones(1, 3)) and not gives_features(plain, logits)
    assert not gives_features(plain, {**state, "logits": torch.ones(1)})
    assert gives_features(plain, {"image_embeds": torch.ones(1, 3)})
    assert gives_features(plain, {"feature_maps": (torch.ones(1, 3, 4, 4),)})
    vectors, one = torch.randn(4, 3), torch.tensor([[1.0], [-1.0]])  # one output is a number
    unit = nn.functional.normalize(vectors)  # vectors of length 1 are embeddings
    assert gives_features(plain, unit, unit)
    assert not gives_features(plain, vectors, vectors) and not gives_features(plain, one, one)


def test_a_feature_extractor_is_judged_by_the_last_of_its_maps():
    dense, x = timm.create_model("test_efficientnet", features_only=True).eval(), torch.randn(15, 3, 32, 32)
    model = mk.convert_to_masterkeys(dense)
    last, named = copy.deepcopy(model), copy.deepcopy(model)
    report = mk.calibrate_masterkeys(model, dense, x)
    assert report.record.metric == "embedding" and set(report.after) == {"relative error", "correlation"}
    assert report.after == mk.calibrate_masterkeys(last, dense, x, output=-1).after
    assert report.after != mk.calibrate_masterkeys(named, dense, x, output=1).after
