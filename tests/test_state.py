"""What is kept of a model's state, and what is loaded into it."""

import os
import zipfile

import pytest
import torch
from torch import nn

from leakfree.errors import CheckpointError, ConfigError
from leakfree.norms import build_norm
from leakfree.state import (
    as_in_training,
    buffers_kept,
    evaluating,
    freeze_parts,
    has_running_statistics,
    load_weights,
    modes_kept,
    random_numbers_kept,
    read_torch_file,
)


def make_model(norm="BN", **options):
    return nn.Sequential(nn.Conv2d(3, 4, 1), build_norm(norm, 4, **options), nn.Dropout(0.5))


def stop_after(action):
    action()
    raise RuntimeError("stop")


def modes(model):
    return [module.training for module in model.modules()]


def test_modes_come_back_also_after_an_error():
    model = make_model()
    model[2].eval()
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model))
        assert not torch.is_grad_enabled()
    assert modes(model) == before
    assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="stop"), modes_kept(model):
        stop_after(model.eval)
    assert modes(model) == before


def test_as_in_training_leaves_batch_norms_as_they_are():
    model = make_model().eval()
    with as_in_training(model):
        assert modes(model) == [True, True, False, True]
    assert not any(modes(model))


def test_buffers_come_back_in_place_also_after_an_error():
    model = make_model()
    mean = model[1].running_mean
    seen = []
    model.register_forward_hook(lambda *_: seen.append(mean.clone()))
    with pytest.raises(RuntimeError, match="stop"), buffers_kept(model):
        stop_after(lambda: model(torch.randn(4, 3, 2, 2)))
    assert seen[0].any()
    assert model[1].running_mean is mean
    assert not mean.any()
    assert model[1].num_batches_tracked == 0


def test_random_numbers_inside_are_of_the_seed_and_outside_go_on():
    model = make_model()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with random_numbers_kept(model, 5):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with random_numbers_kept(model, 5):
        assert torch.equal(torch.rand(2), first)


def test_which_models_have_statistics_to_estimate():
    assert has_running_statistics(make_model())
    assert not has_running_statistics(make_model("GN", num_groups=2))
    assert not has_running_statistics(make_model("BN", track_running_stats=False))
    frozen = make_model()
    freeze_parts(frozen, ["1"])
    assert not has_running_statistics(frozen)


def test_a_frozen_part_keeps_weights_and_statistics():
    model = make_model()
    freeze_parts(model, ["0", "1"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.train()(torch.randn(4, 3, 2, 2))
    assert not model[1].running_mean.any()
    with pytest.raises(ConfigError, match=r"model\.freeze: the model has no part '7'; choose from "):
        freeze_parts(model, ["7"])


def test_weights_of_one_norm_load_into_another_which_keeps_its_own_books(tmp_path):
    source = make_model()
    source(torch.randn(8, 3, 2, 2))
    torch.save({"state_dict": {f"model.{name}": value for name, value in source.state_dict().items()}}, tmp_path / "a")
    target = make_model("MBN", memory=3)
    load_weights(target, str(tmp_path / "a"))
    assert torch.equal(target[1].running_mean, source[1].running_mean)
    assert target[1].memory_count == 0
    for lacking in ("1.running_mean", "1.weight"):
        state = {name: value for name, value in source.state_dict().items() if name != lacking}
        torch.save(state, tmp_path / "b")
        with pytest.raises(CheckpointError, match=f"it lacks {lacking} \\(1\\)"):
            load_weights(target, str(tmp_path / "b"))


@pytest.mark.parametrize(("name", "options"), [("MBN", {}), ("CBN", {"rho": 0.0, "burn_in": 0}), ("FrozenBN", {})])
def test_what_a_norm_remembers_for_its_training_is_no_hindrance_to_another(name, options, tmp_path):
    source, target = make_model(name, **options), make_model("BN")
    for _ in range(3):
        source(torch.randn(8, 3, 2, 2)).sum().backward()
    torch.save(source.state_dict(), tmp_path / "a")
    load_weights(target, str(tmp_path / "a"))
    assert torch.equal(target[1].running_var, source[1].running_var)
    gated = make_model("IEBN")  # learned, not remembered: this is another model
    torch.save(gated.state_dict(), tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"has left over 1\.gate_weight, 1\.gate_bias \(2\)"):
        load_weights(target, str(tmp_path / "b"))


# ------------------------------------------------------------------------------- files that cannot be trusted


def test_a_flipped_bit_in_weights_is_seen(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(make_model().state_dict(), path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        member = next(item for item in file.infolist() if item.filename.endswith("data/0"))
    data[member.header_offset + 30 + len(member.filename) + 64] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"weights\.pt.*data/0"):
        load_weights(make_model(), str(path))


def test_a_few_bytes_that_would_fill_the_memory_are_refused(tmp_path):
    sound, path = tmp_path / "sound.pt", tmp_path / "bomb.pt"
    torch.save({"a": torch.zeros(4)}, sound)
    with zipfile.ZipFile(sound) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, bytes(1 << 24) if item.filename.endswith("data/0") else old.read(item))
    with pytest.raises(CheckpointError, match="its members are larger than the file"):
        read_torch_file(path)


@pytest.mark.parametrize("name", ["pipe", "folder", "loop", "empty"])
def test_what_is_no_file_of_torch_is_one_line_and_nobody_waits(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read as a checkpoint: ."):
        read_torch_file(tmp_path / name)


@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_weights_of_a_kind_that_cannot_be_copied_are_one_line(tmp_path, kind):
    state = make_model().state_dict()
    value = state["0.weight"]
    state["0.weight"] = value.to("meta") if kind == "meta" else value.to_sparse()
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt: .*0\.weight") as caught:
        load_weights(make_model(), str(tmp_path / "weights.pt"))
    assert "\n" not in str(caught.value)
