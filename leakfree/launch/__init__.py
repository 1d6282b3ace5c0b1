"""Runs on clusters and in the background: what is submitted, how jobs go on after a signal, how they are doing."""

from leakfree.launch.command import launch
from leakfree.launch.options import JobOptions, LaunchError
from leakfree.launch.slurm import job_facts

__all__ = ["JobOptions", "LaunchError", "job_facts", "launch"]
