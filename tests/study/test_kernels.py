"""Kernels gathered from networks, checkpoints and arrays."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import timm_masterkeys as mk
from timm_masterkeys.study.kernels import collect_kernels, name_sources, read_kernels


def test_collect_kernels(tmp_path):
    model = timm.create_model("test_convnext")
    depthwise = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups == m.in_channels > 1]
    seven = [m.weight.detach().clone() for m in depthwise if m.kernel_size == (7, 7)]
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    torch.save({"state_dict": {**model.state_dict(), "epoch": 3}}, tmp_path / "b.pth")
    np.savez(tmp_path / "c.npz", *[weight[:, 0].numpy() for weight in seven], np.zeros((3, 5, 5)))
    bad = torch.randn(50, 7, 7)
    bad[0], bad[1], bad[2, 0, 0] = 0, 3, float("nan")
    sources = {"model": model, **{n: tmp_path / n for n in ("a.safetensors", "b.pth", "c.npz")}, "array": bad}
    kernels = collect_kernels(sources)
    assert kernels.names == tuple(sources) and (kernels.constant, kernels.non_finite) == (2, 1)
    count = sum(map(len, seven))
    assert torch.bincount(kernels.network).tolist() == [count] * 4 + [47]
    own = torch.cat(seven).flatten(1).double()
    own = own - own.mean(1, keepdim=True)
    for network in range(4):
        torch.testing.assert_close(kernels.values[kernels.network == network], own / own.norm(dim=1, keepdim=True))
    for equal, each in ((True, 1 / 5), (False, 47 / len(kernels))):
        weights = kernels.weights(equal)
        assert abs(float(weights.sum()) - 1) < 1e-12
        assert abs(float(weights[kernels.network == 4].sum()) - each) < 1e-12


def test_strips_and_what_is_no_kernel():
    rows = torch.randn(40, 1, 1, 11)
    assert collect_kernels([rows], (1, 11)).kernel_size == (1, 11)
    others = [torch.randn(4), torch.randn(8, 4, 3, 3)]  # a bias and an ordinary convolution
    assert [tuple(k.shape) for k in read_kernels([rows, torch.randn(3, 5, 5), *others])] == [(40, 1, 11), (3, 5, 5)]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([torch.randn(40, 5, 5)], "'Tensor 0' holds no depthwise kernel of 7x7"),
        ([], "no network to take kernels from"),
        ([torch.randn(40, 5, 5), torch.randn(9, 1, 3, 3)], "of 7x7, but 5x5. Leave it out"),
        (["a/x.npz", "a/x.npz"], "Two sources are called 'a/x.npz'"),
        ("convnext_tiny", "one string, 'convnext_tiny'. Give a list"),
        (torch.randn(40, 1, 7, 7), "one Tensor, expected a list"),  # not forty networks of a kernel each
        (torch.nn.Linear(2, 2), "one Linear, expected a list"),
        ([None], "Expected arrays of kernels"),
        (["tests"], "'tests' is a folder"),
        *([[name], f"'{name}' is no file, and timm cannot make it"] for name in ("no_such_network", "no.npz", "/no")),
    ],
)
def test_errors(sources, message):
    with pytest.raises(mk.BankError, match=message):
        collect_kernels(sources)


@pytest.mark.parametrize("name", ["junk.npz", "array.npz", "junk.safetensors", "junk.pth"])
def test_damaged_files_are_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"junk")
    if name == "array.npz":
        with (tmp_path / name).open("wb") as file:
            np.save(file, np.zeros((40, 7, 7)))
    with pytest.raises(mk.BankError, match=f"Cannot read kernels from '.*{name}'"):
        collect_kernels([tmp_path / name])


def test_files_of_one_name_are_called_by_their_paths():
    paths = [Path(folder) / "net.npz" for folder in ("a", "b")]
    assert list(name_sources(paths)) == list(map(str, paths))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted model, and the folder it was saved in."""
    model = mk.convert_to_masterkeys(timm.create_model("test_convnext"))
    folder = tmp_path_factory.mktemp("converted") / "out"
    mk.save_pretrained(model, folder)
    torch.save({"state_dict": model.state_dict()}, folder.parent / "trained.pth")
    np.savez(folder.parent / "arrays.npz", **{name: value.numpy() for name, value in model.state_dict().items()})
    return model, folder


@pytest.mark.parametrize(
    "source",
    [
        lambda model, folder: model,
        lambda model, folder: torch.nn.DataParallel(model),
        lambda model, folder: folder,
        lambda model, folder: folder / "masterkeys.safetensors",
        lambda model, folder: folder / "model.safetensors",  # dense, but of fused kernels
        lambda model, folder: folder.parent / "trained.pth",
        lambda model, folder: folder.parent / "arrays.npz",
        lambda model, folder: f"local-dir:{folder}",
        lambda model, folder: "test_convnext.mk8",
        lambda model, folder: "test_convnext.mk8_r160_in1k",
    ],
)
def test_converted_models_are_refused(source, converted):
    """Their kernels are computed from keys: compare and discover would report R2 = 1.000."""
    with pytest.raises(mk.BankError, match=r"is a converted model.*R2 = 1.*Give the dense model"):
        collect_kernels([source(*converted)])


def test_a_dense_file_beside_a_converted_folder_is_read(converted, tmp_path):
    model, folder = converted
    kernels = sum(m.out_channels for m in model.modules() if isinstance(m, mk.MasterKeyConv2d))
    for path in (folder / "other.safetensors", tmp_path / "model.safetensors"):
        save_file(mk.fuse_masterkeys(model).state_dict(), path)
        assert len(collect_kernels([path])) == kernels


@pytest.mark.parametrize("value", [0, 0.1, 1e-30, -3e8])
def test_which_kernels_are_constant(value):
    """As the projection has it: all taps equal. The least difference in a tap makes a kernel that can be fitted."""
    kernels = torch.full((2, 7, 7), value, dtype=torch.float32)
    kernels[1, 3, 3] = float(np.nextafter(np.float32(value), np.float32(1)))
    found = collect_kernels([kernels])
    assert (found.constant, len(found)) == (1, 1)
    centre = torch.zeros(49, dtype=torch.float64)
    centre[24] = 1
    centre -= 1 / 49
    torch.testing.assert_close(found.values[0].abs(), (centre / centre.norm()).abs())
