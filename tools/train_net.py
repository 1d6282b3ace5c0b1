#!/usr/bin/env python
"""``leakfree train`` under the name detectron2's users know: ``tools/train_net.py --config-file FILE --num-gpus 8``."""

import sys

from leakfree.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], own=True))
