"""Makes ``saved_1``, a saved model of format version 1, and ``saved_1.safetensors``, what it holds and puts out.

Once: it is committed, and every later version must load it bit for bit. A new format gets a folder of its own.
"""

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import timm_masterkeys as mk

HERE = Path(__file__).parent


def main() -> None:
    torch.manual_seed(0)
    dense = timm.create_model("test_convnext3", dims=(8, 8, 16, 16), num_classes=5).eval()
    model = mk.convert_to_masterkeys(dense, include="stages.0.*")  # 7x7
    own = mk.KeyBank("mine", torch.randn(3, 5, 5), source="a search", licence="mit")
    settings = [
        {"bank": own, "keys_per_kernel": 2, "trainable": "affine", "include": "stages.1.*"},  # 5x5
        {"bank": "scale-space-b", "trainable": "scales", "include": "stages.2.*"},  # 5x5
        {"bank": "babaiee2025", "keys_per_kernel": 3, "trainable": "none"},  # 3x3
    ]
    for setting in settings:
        mk.convert_to_masterkeys(model, inplace=True, **setting)
    mk.calibrate_masterkeys(model, dense, torch.randn(10, 3, 64, 64))
    labels = {"label_names": ["a", "b", "c", "d", "e"]}
    mk.save_pretrained(model, HERE / "saved_1", license="mit", base_model="me/dense", config=labels)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        save_file({**model.state_dict(), "x": x, "out": model(x)}, HERE / "saved_1.safetensors")


if __name__ == "__main__":
    main()
