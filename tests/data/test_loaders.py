import dataclasses

import pytest
import torch

from leakfree.config.schema import DatasetConfig, DetectionDataConfig, DigitScenesConfig
from leakfree.data import CocoInstances, build_dataset, build_eval_loader, build_train_loader
from leakfree.errors import DataError


@pytest.fixture
def config(write_coco):
    images, annotations = write_coco()
    part = DatasetConfig("coco", str(images), str(annotations))
    return DetectionDataConfig(train=part, val=part, min_size=[30, 36], max_size=80, num_workers=0)


def flat(batches):
    """Everything in some batches, comparable with ==."""
    return [
        [(image.tolist(), {key: getattr(value, "tolist", lambda v=value: v)() for key, value in target.items()})
         for image, target in zip(images, targets, strict=True)]
        for images, targets in batches
    ]  # fmt: skip


def training(config, num_workers=0, **options):
    config = dataclasses.replace(config, num_workers=num_workers)
    options = {"images_per_rank": 2, "max_steps": 5, **options}
    return flat(build_train_loader(build_dataset(config, "train"), config, **options))


def test_a_batch_is_two_lists_with_the_documented_types(config):
    images, targets = next(iter(build_train_loader(build_dataset(config, "train"), config, images_per_rank=3,
                                                   max_steps=1)))  # fmt: skip
    assert len(images) == len(targets) == 3
    assert all(image.dtype == torch.float32 and image.shape[0] == 3 and image.max() <= 1 for image in images)
    kinds = {key: value.dtype for key, value in targets[0].items() if isinstance(value, torch.Tensor)}
    assert kinds == {"boxes": torch.float32, "labels": torch.int64, "masks": torch.uint8, "area": torch.float32,
                     "iscrowd": torch.int64, "original_size": torch.int64}  # fmt: skip
    assert targets[0]["image_id"] in (11, 12)
    assert targets[0]["masks"].shape[1:] == images[0].shape[1:]


def test_loader_processes_change_nothing(config):
    assert training(config, num_workers=2) == training(config, num_workers=0)


def test_a_resumed_run_repeats_the_draws_of_the_uninterrupted_one(config):
    assert training(config, start_step=3) == training(config)[3:]


def test_ranks_together_get_the_draws_of_one_process(config):
    parts = [training(config, images_per_rank=2, rank=rank, world_size=2) for rank in range(2)]
    together = [[*first, *second] for first, second in zip(*parts, strict=True)]
    assert together == training(config, images_per_rank=4)


def test_another_seed_gives_other_batches(config):
    assert training(config, seed=1) != training(config, seed=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_numbers_alone(config, num_workers):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    training(config, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_is_every_image_once_over_ranks(config):
    dataset = build_dataset(config, "val")
    loaders = [build_eval_loader(dataset, config, images_per_batch=3, rank=rank, world_size=2) for rank in range(2)]
    ids = [[[target["image_id"] for target in targets] for _, targets in loader] for loader in loaders]
    assert ids == [[[11, 12, 13]], [[14]]]
    assert [len(loader) for loader in loaders] == [1, 1]
    first = build_eval_loader(dataset, config, images_per_batch=3, max_images=2)
    assert [len(images) for images, _ in first] == [2]
    images, targets = next(iter(first))
    assert [list(image.shape[1:]) for image in images] == [target["original_size"].tolist() for target in targets]


def test_training_leaves_out_empty_images_unless_told(config):
    assert build_dataset(config, "train").image_ids == [11, 12]
    assert build_dataset(dataclasses.replace(config, keep_empty=True), "train").image_ids == [11, 12, 13, 14]
    assert build_dataset(config, "val").image_ids == [11, 12, 13, 14]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_broken_image_reaches_the_user_as_one_line(config, write_coco, num_workers):
    config = dataclasses.replace(config, num_workers=num_workers)
    dataset = build_dataset(config, "val")
    path = dataset.folder / "12.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError) as caught:
        list(build_eval_loader(dataset, config, images_per_batch=2))
    assert type(caught.value) is DataError
    message = str(caught.value)
    assert message.startswith(f"{path}: broken image file: ")
    assert "(image 12)" in message
    assert "\n" not in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skip_makes_the_batch_smaller_and_counts_once_over_epochs(config, num_workers):
    config = dataclasses.replace(config, num_workers=num_workers, on_error="skip")
    dataset = build_dataset(config, "val")
    (dataset.folder / "12.png").write_bytes(b"")
    (dataset.folder / "14.png").write_bytes(b"")
    loader = build_eval_loader(dataset, config, images_per_batch=1)
    for _ in range(2):
        assert [[target["image_id"] for target in targets] for _, targets in loader] == [[11], [13]]
    assert dataset.problems.counts == {"image_unreadable": 2}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skip_in_training_puts_the_next_readable_image_in(config, num_workers):
    config = dataclasses.replace(config, num_workers=num_workers, on_error="skip")
    dataset = build_dataset(config, "train")
    (dataset.folder / "12.png").write_bytes(b"")
    loader = build_train_loader(dataset, config, images_per_rank=2, max_steps=2)
    assert [[target["image_id"] for target in targets] for _, targets in loader] == [[11, 11]] * 2
    assert dataset.problems.counts == {"image_unreadable": 1}
    (dataset.folder / "11.png").write_bytes(b"")
    with pytest.raises(DataError, match="not one image can be read"):
        list(loader)


def test_large_batches_from_processes_need_few_open_files(config):
    """64 images a batch, two processes that read two batches ahead, 1024 open files as usual."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = dataclasses.replace(config, num_workers=2)
    loader = build_train_loader(build_dataset(config, "train"), config, images_per_rank=64, max_steps=5)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        assert sum(len(images) for images, _ in loader) == 320
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_digit_scenes_are_written_once_under_the_root(tmp_path):
    part = DatasetConfig("digit_scenes", digits=DigitScenesConfig(num_images=4))
    config = DetectionDataConfig(root=str(tmp_path / "data"), train=part, val=part)
    train, val = build_dataset(config, "train"), build_dataset(config, "val")
    assert isinstance(train, CocoInstances)
    assert (len(train), train.num_classes, len(val)) == (4, 10, 4)
    folders = sorted((tmp_path / "data").iterdir())
    assert len(folders) == 2
    build_dataset(config, "train")
    assert sorted((tmp_path / "data").iterdir()) == folders


def test_relative_paths_start_at_the_root(config, tmp_path):
    part = DatasetConfig("coco", "images", "instances.json")
    config = dataclasses.replace(config, root=str(tmp_path), val=part)
    assert len(build_dataset(config, "val")) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ""}, r"data\.train\.images is empty; give the folder of the images.*\(data\)"),
        ({"annotations": ""}, r"data\.train\.annotations is empty; give the instances JSON"),
        (
            {"images": "coco/train2017"},
            r"data\.train\.images: data/coco/train2017: it does not exist; put .*data\.root",
        ),
        ({"annotations": "no.json"}, r"data\.train\.annotations: data/no\.json: it does not exist"),
        ({"name": "coca"}, r"data\.train\.name is 'coca'; valid: coco, digit_scenes"),
    ],
)
def test_data_that_is_not_there_names_the_key_and_what_to_do(config, change, message):
    config = dataclasses.replace(config, root="data", train=dataclasses.replace(config.train, **change))
    with pytest.raises(DataError, match=message):
        build_dataset(config, "train")


def test_a_split_without_an_image_left_says_so_before_training(config, write_coco):
    write_coco(lambda content: content.update(annotations=content["annotations"][3:]))  # only the crowd
    with pytest.raises(DataError, match=r"data\.train: .* leaves no image with an object \(see data\.keep_empty\)"):
        build_dataset(config, "train")
    assert len(build_dataset(config, "val")) == 4
