"""Around the output folders of runs: their weights, a run cut short, and one rank of a launcher."""

import json
import os

import torch

from leakfree.config import load_config
from leakfree.errors import CheckpointError, RunError
from leakfree.training import evaluate, train


def weights_of(folder, name="model_final.pt"):
    return torch.load(folder / name, weights_only=True)["state_dict"]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def stop_at(folder, step):
    """Leave of a finished run what a kill right after the checkpoint of ``step`` leaves."""
    for path in folder.glob("*.pt"):
        if path.name == "model_final.pt" or int(path.stem[-7:]) > step:
            path.unlink()
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "status": "running"}))


def launched(rank, world_size, work, config_file, overrides, resume, convert_ranks=False):
    """One rank of a launcher such as torchrun."""
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "GROUP_RANK": 0,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        config = load_config(config_file, overrides)
        record = train(config, resume=resume, convert_ranks=convert_ranks) if work == "train" else evaluate(config)
        return record.status, record.results
    except (RunError, CheckpointError) as error:
        return str(error)
    finally:
        for name in names:
            del os.environ[name]


# A program that begins the run of a config, or goes on with it; exit code 130 after Ctrl-C.
RESUMES = """
import sys
from leakfree.config import load_config
from leakfree.training import train

if __name__ == "__main__":
    try:
        train(load_config(sys.argv[1], sys.argv[2:]), resume=True)
    except KeyboardInterrupt:
        sys.exit(130)
"""
