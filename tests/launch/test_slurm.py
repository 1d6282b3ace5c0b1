"""What Slurm says of a job, asked of a real controller."""

from leakfree.launch.slurm import job_facts


def test_the_facts_of_a_job_from_its_start_to_its_end(here):
    job_id = here.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 2").strip()
    here.wait_for_state(job_id, "RUNNING", "COMPLETED", seconds=30)
    here.wait_for_state(job_id, "COMPLETED", seconds=30)
    facts = job_facts(job_id)
    assert facts["JobState"] == "COMPLETED"
    assert facts["Restarts"] == "0"


def test_a_job_nobody_knows_has_no_facts(here):
    assert job_facts("99999") == {}


def test_where_slurm_is_missing_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_facts("1") == {}
