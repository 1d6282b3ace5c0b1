"""Every file in configs/ loads, saves and reloads to the same run, and says what it is."""

from pathlib import Path

import pytest

from leakfree.config import load_config, save_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


def test_there_are_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS)
def test_a_config_reloads_to_the_same_run(path, tmp_path):
    config = load_config(ROOT / path)
    assert load_config(save_config(config, tmp_path / "config.yaml")) == config


@pytest.mark.parametrize("path", CONFIGS)
def test_a_config_starts_by_saying_what_it_is(path):
    assert (ROOT / path).read_text().startswith("# ")


def test_no_two_configs_write_to_the_same_folder():
    folders: dict[str, str] = {}
    for path in CONFIGS:
        config = load_config(ROOT / path)
        if Path(path).stem == "base":  # runs are its leaves
            continue
        assert config.output_dir not in folders, f"{path} and {folders[config.output_dir]}: {config.output_dir}"
        folders[config.output_dir] = path


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.startswith("configs/detection/coco/")])
def test_a_coco_config_names_its_command_and_what_to_expect(path):
    text = (ROOT / path).read_text()
    assert f"leakfree train --config-file {path} --num-gpus 8" in text
    assert "Expected:" in text
    assert load_config(ROOT / path, ["trainer.num_gpus=8"]).output_dir == f"output/coco/{Path(path).stem}"
