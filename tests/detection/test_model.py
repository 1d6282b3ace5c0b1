import copy

import pytest
import torch
import torchvision

from leakfree.config.schema import DetectionRunConfig
from leakfree.data import build_dataset, build_train_loader
from leakfree.detection import (
    build_detector,
    describe_batch,
    has_batch_statistics,
    statistics_mode,
    training_targets,
)
from leakfree.errors import CheckpointError, ConfigError
from leakfree.norms import PartitionedBatchNorm, ShuffleBatchNorm
from leakfree.shuffle import Shuffled
from leakfree.state import load_weights
from tests.ranks import run_ranks


def _build(config, seed=0):
    torch.manual_seed(seed)
    return build_detector(config, 10)


def _batches(config, num_steps, rank=0, world_size=1):
    dataset = build_dataset(config.data, "train")
    return build_train_loader(
        dataset,
        config.data,
        images_per_rank=config.trainer.total_batch_size // world_size,
        rank=rank,
        world_size=world_size,
        seed=0,
        max_steps=num_steps,
    )


def test_the_schemas_defaults_are_torchvisions_model_weight_for_weight():
    torch.manual_seed(3)
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    torch.manual_seed(3)
    ours = build_detector(DetectionRunConfig(), 90)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in theirs.state_dict().items())
    image = torch.rand(3, 64, 96)
    ours.transform.min_size = theirs.transform.min_size = (64,)
    for a, b in zip(ours.eval()([image]), theirs.eval()([image]), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("backbone", ["resnet18_fpn", "resnet50_fpn"])
def test_frozen_stages_neither_train_nor_update(backbone, make_config):
    config = make_config()
    config.model.backbone.name, config.model.backbone.norm, config.model.backbone.freeze_at = backbone, "BN", 2
    config.model.rpn.anchor_sizes = []
    config.model.weights = "given"  # loading is another step
    body = _build(config).backbone.body
    assert not any(
        parameter.requires_grad for part in (body.conv1, body.bn1, body.layer1) for parameter in part.parameters()
    )
    assert all(parameter.requires_grad for parameter in body.layer2.parameters())
    assert body.bn1.frozen
    assert not body.layer2[0].bn1.frozen


def test_every_head_and_shuffle_trains_a_step(make_config):
    for options in (
        {"norm": "BN"},
        {"norm": "SyncBN"},
        {"norm": "GN", "norm_options": {"num_groups": 4}},
        {"norm": "GhostBN", "norm_options": {"group_size": 8}},
        {"norm": "BN", "roi_shuffle": "statistics"},
        {"norm": "BN", "roi_shuffle": "features"},
        {"norm": "none"},
    ):
        config = make_config(**options)
        model = _build(config)
        images, targets = next(iter(_batches(config, 1)))
        losses = model(images, training_targets(targets))
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert has_batch_statistics(model) == (options["norm"] not in ("GN", "none"))


def test_heads_draw_apart_and_layers_of_a_head_together(make_config):
    config = make_config(roi_shuffle="statistics")
    config.model.images_per_group = 1
    config.model.mask_head.num_convs = 2
    model = _build(config)
    images, targets = next(iter(_batches(config, 1)))
    model(images, training_targets(targets))
    box, mask = (
        [layer for layer in head.modules() if isinstance(layer, ShuffleBatchNorm)]
        for head in (model.roi_heads.box_head, model.roi_heads.mask_head)
    )
    assert torch.equal(box[0].last_groups, box[1].last_groups)
    assert torch.equal(mask[0].last_groups, mask[1].last_groups)
    assert len(box[0].last_groups.unique()) == 4  # as many as images
    assert box[0].seed != mask[0].seed


def _losses(rank, world_size, config, num_steps):
    """Losses of a short training on this rank; gradients are averaged over ranks by hand."""
    torch.manual_seed(0)
    model = build_detector(config, 10)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    losses = []
    for step, (images, targets) in enumerate(_batches(config, num_steps, rank, world_size)):
        torch.manual_seed(1000 * step + rank)
        loss = sum(model(images, training_targets(targets)).values())
        optimizer.zero_grad()
        loss.backward()
        if world_size > 1:
            for parameter in parameters:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= world_size
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("world_size", [1, 2])
def test_shuffling_statistics_and_shuffling_features_train_alike(make_config, world_size):
    curves = []
    for how in ("statistics", "features"):
        config = make_config(roi_shuffle=how)
        config.model.images_per_group = 1
        build_dataset(config.data, "train")
        curves.append(torch.tensor(run_ranks(_losses, world_size, config, 20)))
    assert curves[0].shape == (world_size, 20)
    assert (curves[0] - curves[1]).abs().max() < 1e-5
    assert curves[0][:, -5:].mean() < curves[0][:, :5].mean()  # it does learn


def _head_step(rank, world_size, config):
    """Box head forward and backward on this rank's images, in float64: output, input and parameter gradients."""
    torch.manual_seed(0)
    model = build_detector(config, 10).double()
    heads = model.roi_heads
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(4 * 8, 64, 7, 7, dtype=torch.float64, generator=generator)
    weights = torch.randn(4 * 8, 16, dtype=torch.float64, generator=generator)
    images = range(4)[rank * 4 // world_size : (rank + 1) * 4 // world_size]
    mine = slice(images.start * 8, images.stop * 8)
    x = rows[mine].clone().requires_grad_(True)
    heads.groups[0].rows_per_image = [8] * len(images)
    y = heads.box_head(x)
    (y * weights[mine]).sum().backward()
    return y.detach(), x.grad, torch.cat([parameter.grad.flatten() for parameter in heads.box_head.parameters()])


@pytest.mark.parametrize("images_per_group", [1, 2, 4])
def test_normalization_groups_follow_images_on_any_number_of_ranks(make_config, images_per_group):
    config = make_config()
    config.model.images_per_group = images_per_group
    one = _head_step(0, 1, config)
    for world_size in (2, 4):
        shards = run_ranks(_head_step, world_size, config)
        torch.testing.assert_close(torch.cat([shard[0] for shard in shards]), one[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.cat([shard[1] for shard in shards]), one[1], rtol=0, atol=1e-6)
        torch.testing.assert_close(sum(shard[2] for shard in shards), one[2], rtol=0, atol=1e-6)


def test_two_ranks_equal_one_process_with_two_virtual_groups(make_config):
    ranks = make_config()  # images_per_group 0: each of two ranks normalizes its two images
    virtual = make_config()
    virtual.model.images_per_group = 2
    shards = run_ranks(_head_step, 2, ranks)
    one = _head_step(0, 1, virtual)
    torch.testing.assert_close(torch.cat([shard[0] for shard in shards]), one[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat([shard[1] for shard in shards]), one[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(sum(shard[2] for shard in shards), one[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "GN"])
def test_images_without_objects_and_without_rois_give_finite_losses(make_config, norm):
    model = _build(make_config(norm, norm_options={"num_groups": 4} if norm == "GN" else {}))
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 96, 96, dtype=torch.uint8),
    }
    images = [torch.rand(3, 96, 96) for _ in range(2)]
    losses = model(images, [dict(empty), dict(empty)])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    model.zero_grad()
    model.rpn._post_nms_top_n["training"] = 0  # not one RoI
    losses = model(images, [dict(empty), dict(empty)])
    sum(losses.values()).backward()
    assert losses["loss_classifier"] == 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_training_accuracy_counts_foreground_rois_of_the_last_forward(make_config):
    model = copy.deepcopy(_build(make_config()).train())  # hooks must follow a copy
    heads = model.roi_heads
    assert heads.training_accuracy() == 0
    images, targets = next(iter(_batches(make_config(), 1)))
    model(images, training_targets(targets))
    labels = torch.cat(heads._labels)
    right = ((heads._logits.argmax(1) == labels) & (labels > 0)).sum() / (labels > 0).sum()
    assert heads.training_accuracy() == right
    heads._logits = torch.nn.functional.one_hot(labels, 11).float()
    assert heads.training_accuracy() == 1.0


def _one_rank_without_rois(rank, world_size, config):
    """DDP steps in which rank 1 finds not one RoI; returns its losses and whether gradients agree over ranks."""
    torch.manual_seed(0)
    model = build_detector(config, 10)
    if rank == 1:
        model.rpn._post_nms_top_n["training"] = 0
    parallel = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 96, 96)}
    losses = {}
    for images, targets in _batches(config, 2, rank, world_size):
        losses = parallel(images, training_targets(targets) if rank == 0 else [dict(empty) for _ in images])
        parallel.zero_grad()
        sum(losses.values()).backward()
    total = torch.stack([parameter.grad.double().abs().sum() for parameter in model.parameters()])
    return {name: loss.item() for name, loss in losses.items()}, total


@pytest.mark.parametrize(
    "options", [{"norm": "BN"}, {"norm": "SyncBN"}, {"roi_shuffle": "statistics"}, {"roi_shuffle": "features"}]
)
def test_a_rank_without_a_single_roi_neither_hangs_nor_spoils_the_others(make_config, options):
    config = make_config(**options)
    build_dataset(config.data, "train")
    (first, mine), (second, theirs) = run_ranks(_one_rank_without_rois, 2, config)
    assert first["loss_classifier"] > 0
    assert second["loss_classifier"] == second["loss_mask"] == 0
    assert torch.isfinite(mine).all()
    assert torch.equal(mine, theirs)


def test_statistics_modes_change_only_what_heads_normalize_with(make_config):
    model = _build(make_config("BN")).train()
    config = make_config("BN")
    images, targets = next(iter(_batches(config, 1)))
    model(images, training_targets(targets))
    before = copy.deepcopy(model.state_dict())
    model.eval()
    rows = torch.randn(8, 64, 7, 7)
    outputs = {}
    model.roi_heads.groups[0].rows_per_image = [4, 4]
    for mode in ("population", "image", "random", "all"):
        with statistics_mode(model, mode), torch.no_grad():
            outputs[mode] = model.roi_heads.box_head(rows)
    with torch.no_grad(), statistics_mode(model, "image"):
        model.roi_heads.groups[0].rows_per_image = [4]
        alone = model.roi_heads.box_head(rows[:4])
    torch.testing.assert_close(outputs["image"][:4], alone)
    names = list(outputs)
    assert all(not torch.allclose(outputs[a], outputs[b]) for a in names for b in names if a < b)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.roi_heads.groups[0].grouping == "training"


def test_crowd_regions_do_not_train():
    target = {
        "boxes": torch.eye(4)[:3],
        "labels": torch.tensor([1, 2, 3]),
        "masks": torch.ones(3, 2, 2),
        "iscrowd": torch.tensor([0, 1, 0]),
        "image_id": 7,
    }
    (kept,) = training_targets([target])
    assert kept["labels"].tolist() == [1, 3]
    assert set(kept) == {"boxes", "labels", "masks"}


def test_config_mistakes_are_named(make_config):
    cases = [
        (("box_head", "norm", "SynBN"), r"^model\.box_head\.norm: unknown norm 'SynBN'; choose from SyncBN"),
        (("box_head", "norm", "GN"), r"^model\.box_head\.norm_options: GN: num_groups=32 does not divide 8"),
        (("backbone", "norm", "GhostBN"), r"^model\.backbone\.norm_options: norm GhostBN .* missing .*group_size"),
        (("freeze", None, ["backbone"]), "model.freeze: freezing random weights"),
        (("rpn", "anchor_sizes", [[24], [48]]), "model.rpn.anchor_sizes: 2 lists for the 1 feature maps"),
    ]
    for (part, key, value), message in cases:
        config = make_config()
        if key is None:
            setattr(config.model, part, value)
        else:
            setattr(getattr(config.model, part), key, value)
        with pytest.raises(ConfigError, match=message):
            _build(config)
    config = make_config("GN", norm_options={"num_groups": 4}, roi_shuffle="statistics")
    with pytest.raises(ConfigError, match=r"model\.mask_head\.roi_shuffle: 'statistics' shuffles batch norms"):
        _build(config)
    config = make_config()
    config.model.weights, config.model.freeze = "x", ["bakbone"]
    with pytest.raises(ConfigError, match=r"model\.freeze: the model has no part 'bakbone'; choose from backbone"):
        _build(config)


def test_shuffled_heads_wrap_and_describe_themselves(make_config):
    config = make_config(roi_shuffle="features")
    model = _build(config)
    assert isinstance(model.roi_heads.box_head, Shuffled)
    assert describe_batch(config, 2)["normalization"]["box head"] == "RoIs dealt at random into 2 groups over 4 images"
    config = make_config()
    config.model.images_per_group = 1
    assert describe_batch(config, 2) == {
        "total": 4,
        "per_rank": 2,
        "normalization": {"box head": "1 image", "mask head": "1 image"},
    }


class TestWeights:
    def test_parts_are_loaded_and_the_rest_stays(self, make_config, tmp_path):
        source, model = _build(make_config(), 1), _build(make_config("GN", norm_options={"num_groups": 4}), 2)
        before = copy.deepcopy(model.state_dict())
        torch.save(
            {"state_dict": {f"model.{key}": value for key, value in source.state_dict().items()}}, tmp_path / "a.pth"
        )
        load_weights(model, str(tmp_path / "a.pth"), ["backbone", "rpn"])
        for key, value in model.state_dict().items():
            wanted = source.state_dict() if key.startswith(("backbone.", "rpn.")) else before
            assert torch.equal(value, wanted[key])

    def test_another_model_is_refused_whole(self, make_config, tmp_path):
        torch.save(_build(make_config("GN", norm_options={"num_groups": 4}), 1).state_dict(), tmp_path / "gn.pth")
        model = _build(make_config())
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointError, match=r"another model: it lacks .*running_mean"):
            load_weights(model, str(tmp_path / "gn.pth"))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_missing_damaged_and_hostile_files_are_named(self, make_config, tmp_path):
        model = _build(make_config())
        with pytest.raises(CheckpointError, match="no file"):
            load_weights(model, str(tmp_path / "none.pth"))
        (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 half")
        with pytest.raises(CheckpointError, match=r"half\.pth is damaged: its end is missing"):
            load_weights(model, str(tmp_path / "half.pth"))
        torch.save({"state_dict": _Hostile()}, tmp_path / "hostile.pth")
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_weights(model, str(tmp_path / "hostile.pth"))
        assert not (tmp_path / "owned").exists()


class _Hostile:
    def __reduce__(self):
        return (open, ("owned", "w"))


def test_frozen_parts_stay_as_loaded_through_training(make_config):
    config = make_config()
    config.model.backbone.norm = "BN"
    config.model.weights, config.model.freeze = "given", ["backbone"]
    model = _build(config).train()
    assert all(layer.frozen for layer in model.backbone.modules() if isinstance(layer, PartitionedBatchNorm))
    before = copy.deepcopy(model.backbone.state_dict())
    images, targets = next(iter(_batches(config, 1)))
    sum(model(images, training_targets(targets)).values()).backward()
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.backbone.parameters())
