#!/usr/bin/env python
"""``leakfree compare``: put the output folders of runs side by side."""

import sys

from leakfree.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
