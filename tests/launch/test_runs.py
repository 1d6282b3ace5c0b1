"""Which runs a line asks for, what they are called, and where they write."""

import pytest

from leakfree.errors import ConfigError
from leakfree.launch.runs import expand_runs, run_name


@pytest.fixture
def configs(tmp_path):
    """Two configs with an output folder each, and one with the first one's name in another folder."""
    (tmp_path / "other").mkdir()
    for place, folder in (("one", "out/one"), ("two", "out/two/"), ("other/one", "out/third")):
        (tmp_path / f"{place}.yaml").write_text(f"task: classification\nseed: 7\noutput_dir: {folder}\n")
    return tmp_path


def folders(runs):
    return [(run.name, str(run.folder), run.config.seed) for run in runs]


def test_a_name_is_the_file_s_and_the_seed_s():
    assert [run_name("a/b/moco_bn.yaml", seed) for seed in (0, 1, 12)] == ["moco_bn", "moco_bn_seed1", "moco_bn_seed12"]


def test_without_seeds_a_config_keeps_its_own_and_its_folder(configs):
    assert folders(expand_runs([configs / "one.yaml"])) == [("one", "out/one", 7)]


def test_seeds_and_configs_multiply(configs):
    runs = expand_runs([configs / "one.yaml", configs / "two.yaml"], ["optimizer.lr=0.5"], seeds=2)
    assert folders(runs) == [
        ("one", "out/one", 0),
        ("one_seed1", "out/one_seed1", 1),
        ("two", "out/two", 0),
        ("two_seed1", "out/two_seed1", 1),
    ]
    assert {run.config.optimizer.lr for run in runs} == {0.5}


def test_a_folder_of_the_user_s_holds_all(configs):
    runs = expand_runs([configs / "one.yaml", configs / "two.yaml"], output=configs / "sweep")
    assert [run.folder for run in runs] == [configs / "sweep" / "one", configs / "sweep" / "two"]


@pytest.mark.parametrize(
    ("files", "more", "words"),
    [
        ([], {}, ["no run asked for"]),
        (["one.yaml"], {"seeds": 0}, ["--seeds", "at least 1"]),
        (["one.yaml"], {"seeds": 2, "overrides": ["seed=1"]}, ["seed=1", "--seeds"]),
        (["one.yaml"], {"output": "x", "overrides": ["output_dir=y"]}, ["output_dir=y", "--output"]),
        (["one.yaml", "two.yaml"], {"overrides": ["output_dir=y"]}, ["both write to y", "--output"]),
        (["one.yaml", "one.yaml"], {}, ["both write to out/one"]),
        (["one.yaml", "other/one.yaml"], {"output": "x"}, ["one name", "both write to x/one"]),
        (["one.yaml"], {"overrides": ["optimizer.lrr=1"]}, ["optimizer.lrr", "did you mean optimizer.lr"]),
        (["none.yaml"], {}, ["none.yaml: no such file"]),
    ],
)
def test_what_cannot_be_runs_side_by_side_is_refused(configs, files, more, words):
    with pytest.raises(ConfigError) as error:
        expand_runs([configs / name for name in files], **more)
    assert all(word in str(error.value) for word in words), error.value
