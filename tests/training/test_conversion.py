"""Runs that go on with another number of ranks, and are the undisturbed ones all the same; and those that cannot."""

import json
import shutil

import pytest
import torch

from leakfree import cli
from leakfree.config import config_to_dict, load_config
from leakfree.config.schema import ClassificationRunConfig, ContrastiveRunConfig, DetectionRunConfig
from leakfree.errors import RunError
from leakfree.records import read_record
from leakfree.training import evaluate, train
from leakfree.training.buffers import buffers_of_rank
from leakfree.training.conversion import Conversion, amended, convert
from tests.classification import conftest as classification
from tests.contrastive import conftest as contrastive
from tests.ranks import run_ranks
from tests.runs import launched, same, stop_at, weights_of

QUIET = [
    "trainer.precision=64-true",
    "schedule.max_steps=4",
    "evaluation.statistics=[population]",
    "leakage.enabled=false",
]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The config file of a task by its name."""
    folder = tmp_path_factory.mktemp("configs")
    texts = {"classification": classification.CONFIG, "contrastive": contrastive.CONFIG}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: folder / f"{name}.yaml" for name in texts}


def trained(file, folder, ranks, *overrides, resume=False, convert_ranks=False):
    """What each rank of a launcher returned."""
    overrides = [f"output_dir={folder}", f"trainer.num_processes={ranks}", *overrides]
    return run_ranks(launched, ranks, "train", str(file), overrides, resume, convert_ranks, timeout=120)


def parameters_of(folder):
    return {name: value for name, value in weights_of(folder).items() if not name.endswith(BUFFERS)}


@pytest.mark.parametrize(
    ("task", "before", "now", "settings", "changes"),
    [
        ("classification", 4, 2, ["model.images_per_group=0"], {"model.images_per_group": 20}),
        ("classification", 2, 1, ["model.images_per_group=0"], {"model.images_per_group": 40}),
        ("classification", 1, 2, ["model.images_per_group=0"], {"model.images_per_group": 80}),  # a group spans ranks
        ("classification", 2, 1, [], {}),  # groups of 8 already
        ("classification", 2, 1, ["model.norm=SyncBN"], {}),
        ("classification", 2, 1, ["model.norm=GhostBN", "model.norm_options={group_size: 20}"], {}),
        (
            "classification",
            4,
            1,
            ["model.norm=ShuffleBN", "model.images_per_group=0"],
            {"model.norm_options.num_groups": 4},
        ),
        ("contrastive", 2, 1, ["model.images_per_group=0"], {"model.images_per_group": 12}),
        ("contrastive", 2, 1, ["model.images_per_group=0", "model.key=eman"], {"model.images_per_group": 12}),
        ("contrastive", 1, 2, ["model.images_per_group=0", "model.key=shuffle_bn"], {"model.images_per_group": 24}),
        ("contrastive", 2, 1, ["model.query=sync_bn", "model.key=loader_shuffle"], {}),
        (
            "contrastive",
            2,
            1,
            ["model.method=simclr", "model.images_per_group=0", "model.key=shuffle_images"],
            {"model.images_per_group": 12},
        ),
    ],
)  # fmt: skip
def test_the_weights_are_those_of_the_undisturbed_run(files, tmp_path, task, before, now, settings, changes):
    settings = [*QUIET, *settings]
    trained(files[task], tmp_path / "whole", before, *settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    stop_at(tmp_path / "run", 2)
    answers = trained(files[task], tmp_path / "run", now, *settings, resume=True, convert_ranks=True)
    assert answers[0][0] == "finished"
    one, two = parameters_of(tmp_path / "whole"), parameters_of(tmp_path / "run")
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == torch.float64 or not value.is_floating_point()
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    whole, run = weights_of(tmp_path / "whole"), weights_of(tmp_path / "run")
    assert not all(torch.equal(run[name], value) for name, value in whole.items()), "it was not computed anew"
    record = read_record(tmp_path / "run")
    kept = {key: value for key, _, value in record.conversions[0]["changes"]}
    assert (kept, record.conversions[0]["step"]) == (changes, 2)
    assert [session["world_size"] for session in record.sessions] == [before, now]
    assert any(note.startswith(f"converted at step 2 from {before} to {now} ranks: ") for note in record.notes)
    assert f"WARNING: converted at step 2 from {before} to {now} ranks: " in (tmp_path / "run/log.txt").read_text()
    assert load_config(tmp_path / "run/config.yaml") == amended(
        load_config(files[task], [f"output_dir={tmp_path / 'run'}", f"trainer.num_processes={now}", *settings]),
        [tuple(change) for change in record.conversions[0]["changes"]],
    )


def test_a_converted_run_goes_on_with_the_same_command_and_back(files, tmp_path):
    """Refused without the flag; once converted, the config as it was begun and the one in the folder both go on."""
    file, run, settings = files["classification"], tmp_path / "run", [*QUIET, "model.images_per_group=0"]
    trained(file, run, 2, *settings)
    whole = parameters_of(run)
    stop_at(run, 2)
    refused = trained(file, run, 1, *settings, resume=True)[0]
    assert refused == (
        f"output_dir: the run in {run} was started on 2 ranks and cannot go on with 1: each rank would have 80 images "
        "in place of 40, which changes what shares batch statistics; use 2 ranks again, or add --convert-ranks, which "
        "keeps it (model.images_per_group=40)"
    )
    command = ["train", "--config-file", str(file), "--resume", f"output_dir={run}", *settings]
    assert cli.main([*command, "--convert-ranks"]) == 0
    for again in (False, True):  # the flag may stay on the command line
        stop_at(run, 2)
        assert trained(file, run, 1, *settings, resume=True, convert_ranks=again)[0][0] == "finished"
    stop_at(run, 2)
    config = load_config(run / "config.yaml")
    assert config.model.images_per_group == 40
    assert train(config, resume=True).status == "finished"
    assert len(read_record(run).conversions) == 1
    assert evaluate(load_config(file, [f"output_dir={run}", *settings])).status == "finished"
    assert "cannot go on with 2: " in (stop_at(run, 2) or trained(file, run, 2, *settings, resume=True)[0])
    assert trained(file, run, 2, *settings, resume=True, convert_ranks=True)[0][0] == "finished"
    record = read_record(run)
    assert [(item["before"], item["now"]) for item in record.conversions] == [(2, 1), (1, 2)]
    assert sum(note.startswith("converted at step 2") for note in record.notes) == 2
    for name, value in parameters_of(run).items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    config.model.images_per_group = 8
    config.output_dir = str(run)
    with pytest.raises(RunError, match=r"another config: model\.images_per_group was 40, now 8"):
        train(config, resume=True)


def test_a_detector_goes_on_with_the_heads_it_had(config_file, tmp_path):
    """What ranks sample is their own, so its weights are others; what is normalized together is the same."""
    settings = [*QUIET, "trainer.precision=32-true", "model.images_per_group=0"]
    trained(config_file, tmp_path / "run", 2, *settings)
    stop_at(tmp_path / "run", 2)
    together = read_record(tmp_path / "run").batch["normalization"]
    answers = trained(config_file, tmp_path / "run", 1, *settings, resume=True, convert_ranks=True)
    assert answers[0][0] == "finished"
    record = read_record(tmp_path / "run")
    assert record.config["model"]["images_per_group"] == 1
    assert record.batch["normalization"] == together == {"box head": "1 image", "mask head": "1 image"}


def test_a_resume_in_double_precision_rounds_nothing(files, tmp_path):
    trained(files["classification"], tmp_path / "run", 1, *QUIET)
    whole = weights_of(tmp_path / "run")
    stop_at(tmp_path / "run", 2)
    trained(files["classification"], tmp_path / "run", 1, *QUIET, resume=True)
    assert same(weights_of(tmp_path / "run"), whole)


# ---------------------------------------------------------------------------------------- the config alone


def detection(**settings):
    config = DetectionRunConfig()
    config.model.backbone.norm = "FrozenBN"
    config.model.box_head.name = "4conv1fc"
    return changed(config, settings)


def changed(config, settings):
    for key, value in settings.items():
        *path, name = key.split("__")
        section = config.model
        for part in path:
            section = getattr(section, part)
        setattr(section, name, value)
    return config


SHUFFLED = {"box_head__norm": "BN", "box_head__roi_shuffle": "statistics"}


@pytest.mark.parametrize(
    ("config", "before", "now", "changes"),
    [
        (detection(), 4, 2, []),
        (detection(box_head__norm="BN"), 4, 2, [("model.images_per_group", 0, 4)]),
        (detection(box_head__norm="BN"), 4, 8, [("model.images_per_group", 0, 4)]),
        (detection(box_head__norm="BN", images_per_group=1), 4, 2, []),
        (detection(box_head__norm="SyncBN", mask_head__norm="SyncBN"), 4, 2, []),
        (detection(**SHUFFLED), 4, 2, [("model.images_per_group", 0, 4)]),
        (detection(**SHUFFLED), 2, 1, []),  # one rank deals two groups too
        (detection(box_head__norm="BN", box_head__roi_shuffle="features"), 4, 8, [("model.images_per_group", 0, 4)]),
        (
            detection(box_head__norm="ShuffleBN"),
            1,
            4,
            [("model.box_head.norm_options.num_groups", None, 2)],
        ),
        (
            detection(box_head__norm="BN", mask_head__norm="ShuffleBN"),
            1,
            4,
            [("model.images_per_group", 0, 16), ("model.mask_head.norm_options.num_groups", None, 2)],
        ),
        (detection(backbone__norm="BN", freeze=["backbone"], box_head__norm="GN"), 2, 1, []),
        (
            detection(backbone__norm="ShuffleBN"),
            4,
            2,
            [("model.backbone.norm_options.num_groups", None, 4)],
        ),
        (changed(ClassificationRunConfig(), {"norm": "BGN"}), 8, 4, [("model.images_per_group", 0, 2)]),
        (
            changed(ClassificationRunConfig(), {"block_norm": "ShuffleBN", "norm": "GN"}),
            8,
            4,
            [("model.block_norm_options.num_groups", None, 8)],
        ),
        (changed(ContrastiveRunConfig(), {"query": "gn"}), 8, 4, []),
        (changed(ContrastiveRunConfig(), {"query": "ghost_bn", "norm_options": {"group_size": 2}}), 8, 4, []),
    ],
)  # fmt: skip
def test_what_changes_in_the_config(config, before, now, changes):
    found = convert(config, before, now)
    assert list(found) == changes
    again = amended(config, found)
    assert convert(again, now, before) == ()  # and nothing more is needed on the way back
    assert amended(again, found) == again
    assert config_to_dict(amended(config, [])) == config_to_dict(config)


@pytest.mark.parametrize(
    ("config", "before", "now", "words"),
    [
        (detection(backbone__norm="BN"), 2, 1, r"model\.backbone\.norm: BN normalizes a rank's images .* RoI heads"),
        (detection(box_head__norm="GhostBN"), 2, 1, r"model\.box_head\.norm: GhostBN cuts the RoIs"),
        (detection(mask_head__norm="CBN"), 2, 1, r"model\.mask_head\.norm: CBN keeps each rank's own window"),
        (detection(**SHUFFLED), 1, 4, r"model\.box_head\.norm: 2 random groups over 1 ranks cannot be kept on 4"),
        (changed(ClassificationRunConfig(), {"norm": "MBN"}), 2, 1, r"model\.norm: MBN keeps .* own memory"),
        (changed(ClassificationRunConfig(), {"norm": "BatchRenorm"}), 2, 1, "own running averages"),
        (changed(ClassificationRunConfig(), {"norm": "DomainBN"}), 2, 1, "across_ranks=true it could"),
        (changed(ClassificationRunConfig(), {"norm": "Mine"}), 2, 1, "Mine was registered elsewhere"),
        (
            changed(ClassificationRunConfig(), {"norm": "GhostBN", "norm_options": {"group_size": 4}}),
            2,
            8,
            r"chunks of 4 images \(group_size\) do not fill both a rank's 8 images of before and 2 of now",
        ),
        (
            changed(ClassificationRunConfig(), {"norm": "SyncBN", "norm_options": {"process_group": "node"}}),
            2,
            1,
            "SyncBN shares statistics inside process groups",
        ),
        (
            changed(
                ClassificationRunConfig(),
                {"norm": "BN", "block_norm": "ShuffleBN", "block_norm_options": {"draw": "layer"}},
            ),
            4,
            2,
            "ShuffleBN with draw=layer draws otherwise inside groups",
        ),
        (
            changed(ContrastiveRunConfig(), {"key": "ghost_bn", "norm_options": {"group_size": 3}}),
            2,
            1,
            r"model\.key: chunks of 3 images",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_by_its_key(config, before, now, words):
    with pytest.raises(RunError, match=words):
        convert(config, before, now)


def test_a_conversion_survives_its_record():
    conversion = Conversion(20, 4, 2, (("model.images_per_group", 0, 4),))
    raw = json.loads(json.dumps(conversion.to_dict()))
    assert Conversion.from_dict(raw) == conversion
    assert "model.images_per_group=4 keeps what is normalized together; " in str(conversion)
    assert "stays as it was" in str(Conversion(20, 4, 2, ()))
    with pytest.raises(RunError, match="expected changes as"):
        Conversion.from_dict({**raw, "changes": ["model.norm"]})


# --------------------------------------------------------------------------------- buffers of each rank


def kept(*ranks):
    return [
        {
            "bn.running_mean": torch.tensor([float(mean)], dtype=torch.float64),
            "bn.num_batches_tracked": torch.tensor(count),
        }
        for mean, count in ranks
    ]


@pytest.mark.parametrize(
    ("ranks", "now", "means", "counts"),
    [
        ([(1, 5), (3, 5), (5, 5), (9, 6)], 2, [2, 7], [5, 6]),
        ([(1, 5), (3, 5)], 1, [2], [5]),
        ([(1, 5), (3, 4)], 4, [1, 1, 3, 3], [5, 5, 4, 4]),
        ([(3, 5), (6, 5), (9, 5)], 2, [4, 8], [5, 5]),  # the middle one's images are shared
        ([(1, 5), (3, 0)], 1, [1], [5]),  # its layer saw nothing
        ([(1, 0), (3, 0)], 1, [1], [0]),
    ],
)
def test_running_averages_follow_the_images(ranks, now, means, counts):
    found = [buffers_of_rank(kept(*ranks), rank, now) for rank in range(now)]
    assert [item["bn.running_mean"].item() for item in found] == pytest.approx(means)
    assert [item["bn.num_batches_tracked"].item() for item in found] == counts


def test_as_many_ranks_get_their_own_and_domains_are_weighed_apart():
    values = kept((1, 5), (3, 5))
    assert [buffers_of_rank(values, rank, 2) for rank in range(2)] == values
    domains = [
        {"running_mean": torch.tensor([[1.0], [7.0]]), "num_batches_tracked": torch.tensor([2, 0])},
        {"running_mean": torch.tensor([[3.0], [9.0]]), "num_batches_tracked": torch.tensor([2, 1])},
    ]
    assert buffers_of_rank(domains, 0, 1)["running_mean"].tolist() == [[2.0], [9.0]]
    with pytest.raises(RunError, match=r"bn\.window_mean is each rank's own: .* cannot go on with 1 ranks in place"):
        buffers_of_rank([{"bn.window_mean": torch.zeros(1)}] * 2, 0, 1)
