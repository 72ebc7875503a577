"""Model cards: whose licence, which settings, and what was measured."""

import logging

import pytest
import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import timm_masterkeys as mk
from timm_masterkeys import ConversionError
from timm_masterkeys.conversion.record import Source
from timm_masterkeys.hub.license import HUB_LICENSES, require_license, saved_source
from timm_masterkeys.timm_plugin import compat


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return timm.create_model("test_convnext3", dims=(8, 8, 16, 16), num_classes=5).eval()


@pytest.fixture(scope="module")
def model(dense):
    return mk.convert_to_masterkeys(dense)


def card(model, path, **kwargs):
    return ModelCard.load(mk.save_pretrained(model, path, **kwargs) / "README.md")


def first_line(card):
    return card.text.partition("begin (rewritten at every publication) -->")[2].split("\n")[2]


@pytest.mark.parametrize("license", ["gpl-3.0", "Apache-2.0", "other"])
def test_licences_that_the_hub_knows_are_kept(model, tmp_path, license):
    saved = card(model, tmp_path, license=license)
    assert saved.data.license == license.lower() and "license_name" not in saved.data.to_dict()
    assert f"Licence: {license.lower()}, given by the author." in saved.text


def test_another_licence_is_published_with_its_name(model, tmp_path):
    data = card(model, tmp_path, license="Example Research Licence", base_model="me/dense").data
    assert (data.license, data.license_name) == ("other", "example research licence")
    assert data.license_link == "https://huggingface.co/me/dense"


@pytest.mark.parametrize(("given", "likely"), [("apache2", "apache-2.0"), ("cc-by-nc-4", "cc-by-nc-4.0")])
def test_a_typo_is_refused(model, tmp_path, given, likely):
    with pytest.raises(ConversionError, match=f"Did you mean '{likely}'"):
        card(model, tmp_path / "out", license=given)
    assert not (tmp_path / "out").exists()


def test_of_weights_that_timm_knows_no_licence_of_one_can_be_given():
    unknown = Source("timm/a", license="unknown")
    assert saved_source(unknown, None, None).license is None
    assert saved_source(unknown, "mit", None) == Source("timm/a", license="mit", license_given=True)
    with pytest.raises(ConversionError, match=r"not known: .*your[^']*Pass license"):
        require_license(None, {"architecture": "a", "license": "unknown"})


def test_no_licence_of_timms_is_taken_for_a_typo():
    cfgs = (cfg for arch in mk.list_architectures() for cfg in compat.cfgs(arch).values())
    names = {cfg.license for cfg in cfgs if cfg.license}
    assert names - HUB_LICENSES and names & HUB_LICENSES
    for name in names:
        assert saved_source(None, name, None).license == name
        assert saved_source(Source(license=name), None, None).license == (name if name != "unknown" else None)


def test_a_network_that_nothing_was_measured_of_says_so_first(model, tmp_path, caplog):
    """In the card and in the log; until results of it are in the README."""
    assert first_line(card(model, tmp_path)).startswith("**Not calibrated: ")
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING and f"{tmp_path}: not calibrated" in warning.getMessage()
    caplog.clear()
    for metrics in ([EvalResult("image-classification", "imagenet-1k", "ImageNet", "accuracy", 71.2)], None):
        saved = card(model, tmp_path, **({"metrics": metrics} if metrics else {}))
        assert "Not calibrated" not in saved.text and not caplog.records


def test_what_is_said_of_other_weights_is_not_kept(model, dense, tmp_path):
    """Results, a source and its licence go with the weights; of the same weights, and by hand, they stay."""
    metrics = [EvalResult("image-classification", "imagenet-1k", "ImageNet", "accuracy", 71.2)]
    (tmp_path / "README.md").write_text(
        "---\nlicense_link: LICENSE\nlicense_name: mine\nmy_field: kept\n---\nBy hand.\n"
    )
    given = {"license": "Another Licence", "base_model": "me/dense"}
    card(model, tmp_path, metrics=metrics, **given)
    same = card(model, tmp_path, **given).data
    assert [result.metric_value for result in same.eval_results] == [71.2]
    assert (same.license_link, same.base_model) == ("https://huggingface.co/me/dense", "me/dense")
    other = mk.convert_to_masterkeys(dense, keys_per_kernel=2)
    saved = card(other, tmp_path, license="mit")
    assert saved.data.to_dict().keys() == {"library_name", "license", "my_field", "pipeline_tag", "tags"}
    assert "By hand." in saved.text and first_line(saved).startswith("**Not calibrated: ")
    assert "license" not in card(other, tmp_path).data.to_dict()


@pytest.mark.parametrize(
    "damaged",
    [None, "{", '{"masterkeys": {"format_version": 1, "files": {"model.safetensors": "0"}, "source": "a/b"}}'],
)
def test_results_of_a_dense_network_are_not_those_of_the_converted_one(model, dense, tmp_path, damaged):
    """Nor are those of a network of which nothing can be read."""
    timm.models.save_for_hf(dense, str(tmp_path), safe_serialization=True)
    if damaged:
        (tmp_path / "config.json").write_text(damaged)
    data = ModelCardData(
        model_name="dense", eval_results=[EvalResult("image-classification", "a", "a", "accuracy", 90.0)], language="en"
    )
    (tmp_path / "README.md").write_text(f"---\n{data.to_yaml()}\n---\nBy hand.\n")
    saved = card(model, tmp_path)
    assert saved.data.eval_results is None and saved.data.language == "en"
    assert "By hand." in saved.text and "**Not calibrated: " in saved.text


def test_results_join_those_of_the_same_weights(model, tmp_path):
    """One with another value is replaced."""
    for dataset, value in (("a", 71.2), ("b", 80.5), ("a", 71.3)):
        data = card(
            model, tmp_path, metrics=[EvalResult("image-classification", dataset, dataset, "accuracy", value)]
        ).data
    assert [(r.dataset_name, r.metric_value) for r in data.eval_results] == [("a", 71.3), ("b", 80.5)]


def calibrated(dense):
    model = mk.convert_to_masterkeys(dense)
    mk.calibrate_masterkeys(model, dense, torch.randn(10, 3, 64, 64))
    return model


def calibrated_then_trained(dense):
    """The figures are of other weights; but it was calibrated all the same."""
    model = calibrated(dense)
    model.head.fc.weight.data.mul_(2)
    return model


@pytest.mark.parametrize("made", [calibrated, calibrated_then_trained, mk.initialize_masterkeys])
def test_others_do_not(dense, tmp_path, caplog, made):
    model = made(dense)
    saved = card(model, tmp_path)
    assert first_line(saved).startswith("A timm `test_convnext3`") and not caplog.records
    again = card(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), tmp_path)
    assert again.text == saved.text and not caplog.records
    assert "Not calibrated" not in saved.text
    assert ("Calibrated (" in saved.text) == (made is calibrated)
    if made is calibrated:
        summary = mk.conversion_report(model).calibration.summary()
        assert summary.startswith("with 8 images: agreement ")
        assert f"Calibrated (classification) {summary}." in saved.text


def test_layers_converted_after_a_calibration(dense, tmp_path, caplog):
    """The network as a whole is not calibrated until the next calibration, which finds no other weights."""
    images = torch.randn(10, 3, 64, 64)
    model = mk.convert_to_masterkeys(dense, include="stages.0.*")
    mk.calibrate_masterkeys(model, dense, images)
    mk.convert_to_masterkeys(model, inplace=True)
    assert "**Not calibrated: " in card(timm_again(model, tmp_path / "a"), tmp_path / "b").text
    caplog.clear()
    mk.calibrate_masterkeys(model, dense, images)
    assert "Not calibrated" not in card(timm_again(model, tmp_path / "c"), tmp_path / "d").text
    assert not caplog.records


def timm_again(model, path):
    return timm.create_model(f"local-dir:{mk.save_pretrained(model, path)}", pretrained=True)


def test_the_task_of_a_network_without_a_head(tmp_path):
    data = card(timm.create_model("test_convnext.mk8", num_classes=0), tmp_path).data
    assert data.pipeline_tag == "image-feature-extraction" and "image-classification" not in data.tags


def test_settings_are_told_for_each_value(dense, tmp_path):
    model = mk.convert_to_masterkeys(dense, include="stages.0.*", trainable="none")
    text = card(model, tmp_path / "one").text
    assert "| keys per kernel | 1 |" in text and "| trainable | none |" in text
    assert "8 frozen *master keys* of the bank `babaiee2025`" in text
    text = card(mk.convert_to_masterkeys(model, "random8:0", keys_per_kernel=2), tmp_path / "two").text
    assert "| keys per kernel | 1 (1 layer), 2 (3 layers) |" in text
    assert "| trainable | none (1 layer), shift (3 layers) |" in text
    assert "frozen *master keys* of the banks `babaiee2025`, `random8:0`" in text


@pytest.mark.parametrize(("given", "address"), [(None, "local-dir:out"), ("me/net", "hf-hub:me/net")])
def test_what_it_loads_is_there(model, tmp_path, given, address):
    text = card(model, tmp_path / "out", repo_id=given).text
    assert text.count(f'create_model("{address}", pretrained=True)') == text.count("create_model") == 2
