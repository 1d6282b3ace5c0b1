"""N steps equal k + (N - k) bit for bit, at every k. All cases: ``python -m tests.training.exact_resume --all``."""

import pytest
import torch

from leakfree.records import read_record
from tests.classification.conftest import CONFIG
from tests.ranks import run_ranks
from tests.runs import launched
from tests.training.exact_resume import CASES, CHOSEN, differences, found_differences


@pytest.mark.parametrize("name", CHOSEN)
def test_a_run_stopped_after_any_step_is_the_undisturbed_one(name, tmp_path):
    assert found_differences(CASES[name], tmp_path) == []


@pytest.mark.gpu
def test_the_scaler_of_half_precision_goes_on(tmp_path):
    if torch.cuda.device_count() < CASES["precision-16"].world_size:
        pytest.skip("needs two GPUs")
    assert found_differences(CASES["precision-16"], tmp_path) == []


def test_an_evaluation_later_and_elsewhere_is_the_one_at_the_end_of_the_training(tmp_path):
    """Also of norms with a memory of each rank's own, or a ramp that is no buffer."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    for norm in ("MBN", "BatchRenorm"):
        settings = [f"model.norm={norm}", "evaluation.statistics=[population]", "model.images_per_group=0"]
        trained = [f"output_dir={tmp_path / norm}", "trainer.num_processes=2", *settings]
        run_ranks(launched, 2, "train", tmp_path / "tiny.yaml", trained, False, timeout=120)
        weights = f"model.weights={tmp_path / norm / 'model_final.pt'}"
        again = [f"output_dir={tmp_path / norm}-again", weights, "trainer.num_processes=2", *settings]
        run_ranks(launched, 2, "evaluate", tmp_path / "tiny.yaml", again, False, timeout=120)
        one, other = read_record(tmp_path / norm), read_record(tmp_path / f"{norm}-again")
        assert one.leakage["influence"]["total"] > 0
        assert list(differences((one.results, one.leakage), (other.results, other.leakage))) == []


@pytest.mark.parametrize(
    ("one", "other", "line"),
    [
        ({"a": torch.zeros(2)}, {"a": torch.tensor([0.0, 0.5])}, "a: differs by up to 0.5"),
        ({"a": torch.zeros(1)}, {"a": -torch.zeros(1)}, "a: differs by up to 0"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2).double()}, "a: torch.float32 (2,), resumed torch.float64 (2,)"),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, "a.b[1]: 2, resumed 3"),
        ({"a": [1]}, {"a": [1, 2]}, "a: 1 items, resumed 2"),
        ({"a": 1}, {"a": True}, "a: 1, resumed True"),
        ({"a": 1, "b": 2}, {"a": 1}, "b: only undisturbed"),
        ({"a": 1}, {"a": 1, "b": 2}, "b: only resumed"),
    ],
)
def test_a_difference_is_seen_and_named(one, other, line):
    assert list(differences(one, other)) == [line]


def test_equal_nests_have_no_difference():
    nan = torch.full((2,), float("nan"))
    assert list(differences({"a": [nan, float("nan"), "x"]}, {"a": [nan.clone(), float("nan"), "x"]})) == []
