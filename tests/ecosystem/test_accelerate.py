"""accelerate: prepared training, its files, and its loaders for networks without memory of their own."""

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import layers, lively, photographs
from torch.utils.data import DataLoader, TensorDataset

import timm_masterkeys as mk

accelerate = pytest.importorskip("accelerate")
pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def dense():
    return lively(timm.create_model("test_convnext", num_classes=5), photographs(40, 64))


@pytest.fixture
def files(dense, tmp_path):
    """Folders with the files that accelerate writes of a dense and of a converted network."""
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(dense, tmp_path / "dense")
    accelerator.save_model(mk.convert_to_masterkeys(dense), tmp_path / "converted")
    return tmp_path


def empty():
    """A converted network on the meta device."""
    with accelerate.init_empty_weights():
        model = timm.create_model("test_convnext", num_classes=5)
    return mk.convert_to_masterkeys(model, inplace=True).eval()


def test_prepared_training_and_its_state(dense, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = mk.convert_to_masterkeys(dense).train()
    data = DataLoader(TensorDataset(photographs(40, 64)[:8], torch.arange(8) % 5), batch_size=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for x, y in data:
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    frozen = [name for name in start if name.endswith((".keys", ".key_index", ".scale", ".r2"))]
    assert len(frozen) == 4 * len(layers(model))
    assert all(torch.equal(model.state_dict()[name], start[name]) for name in frozen)
    assert all(not torch.equal(model.state_dict()[n], start[n]) for n in start if n.endswith(".shift"))
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    accelerator.save_state(tmp_path / "state")
    model.load_state_dict(start)
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_its_files_of_a_converted_network_load_into_one(dense, files):
    model, other = mk.convert_to_masterkeys(dense), mk.initialize_masterkeys(dense)
    accelerate.load_checkpoint_in_model(other, files / "converted", strict=True)
    x = photographs(40, 64)[:2]
    assert torch.equal(other(x), model(x))


def test_its_files_of_a_dense_network_are_refused_as_it_mixes_them_with_what_is_there(dense, files):
    other = mk.initialize_masterkeys(dense)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(mk.CheckpointError, match=r"conv_dw\.weight: given together with keys, .* Keep the dense or"):
        accelerate.load_checkpoint_in_model(other, files / "dense")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_an_empty_network_takes_the_files_of_a_converted_one(dense, files):
    x = photographs(40, 64)[:2]
    model = accelerate.load_checkpoint_and_dispatch(empty(), files / "converted", device_map={"": "cpu"})
    assert torch.equal(model(x), mk.convert_to_masterkeys(dense)(x))


def test_an_empty_network_refuses_the_files_of_a_dense_one(files):
    with pytest.raises(mk.CheckpointError, match=r"no values.*load_checkpoint_and_dispatch.*load_state_dict"):
        accelerate.load_checkpoint_and_dispatch(empty(), files / "dense", device_map={"": "cpu"})


def test_what_the_error_recommends_works(dense):
    x = photographs(40, 64)[:2]
    model = empty()
    model.load_state_dict(dense.state_dict(), assign=True)
    assert torch.equal(model(x), mk.convert_to_masterkeys(dense)(x))
