"""The study's configs load, the README tells of each, and the table is what the records hold."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from leakfree.config import config_to_dict, load_config
from leakfree.records import RunRecord, write_record

PROJECT = Path(__file__).parents[1]
CONFIGS = sorted((PROJECT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_names_its_own_folder(path):
    assert load_config(path).output_dir == f"output/contrastive_shortcut/{path.stem}"
    assert path.read_text().startswith("# ")


def test_the_readme_tells_of_each_config():
    told = set(re.findall(r"^\| (\w+) \| [\d]", (PROJECT / "README.md").read_text(), re.MULTILINE))
    assert told == {path.stem for path in CONFIGS}


def test_the_table_has_means_and_paired_intervals(tmp_path):
    config = config_to_dict(load_config(CONFIGS[0]))
    for variant, low in (("style_bn_g4", 0.2), ("style_shuffle_g4", 0.5)):
        for seed in range(3):
            record = RunRecord(variant, "contrastive", "finished", seed, config)
            pretext = {"loss": 3.0, "same": 0.5, "other": 0.1, "gap": 0.4, "query_probe": 0.7, "key_probe": None}
            record.leakage = {"pretext": pretext}
            record.results = {"precise": {"knn": low + seed / 10 + (seed == 2) / 100, "linear": 0.9}}
            folder = tmp_path / (variant + (f"_seed{seed}" if seed else ""))
            folder.mkdir()
            write_record(folder, record)
    command = [sys.executable, str(PROJECT / "table.py"), str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    (row,) = [line for line in lines if line.startswith("| style_bn_g4 |")]
    assert row.split("|")[2:4] == [" 3 ", " 3.000 ± 0.000 "]
    assert row.split("|")[7] == " 0.303 ± 0.105 "  # 0.2, 0.3, 0.41
    assert row.split("|")[10].strip() == "n.a."
    (difference,) = [line for line in lines if line.startswith("| style_shuffle_g4 − style_bn_g4 |")]
    assert difference.split("|")[2:5] == [" 3 ", " +0.000 ± 0.000 ", " +0.300 ± 0.000 "]
