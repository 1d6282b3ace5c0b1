"""Training and evaluation of a config, on one process or many.

Importing this loads neither torch nor Lightning; the ranks do.
"""

from leakfree.training.ranks import RankError
from leakfree.training.run import evaluate, train
from leakfree.training.stopping import Stopped
from leakfree.training.watchdog import MachineLost

__all__ = ["MachineLost", "RankError", "Stopped", "evaluate", "train"]
