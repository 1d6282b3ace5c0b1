"""Training and evaluation of a config, on one process or many.

Importing this loads neither torch nor Lightning; the ranks do.
"""

from leakfree.training.endings import MachineLost, RankError
from leakfree.training.run import evaluate, train
from leakfree.training.stopping import Stopped

__all__ = ["MachineLost", "RankError", "Stopped", "evaluate", "train"]
