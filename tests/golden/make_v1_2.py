"""Makes tests/golden/v1.2, an index of format 1.2 that every later release must read and, byte for byte, still write.

    python tests/golden/make_v1_2.py FOLDER

The rows and catalog of make_v1_1.py; what is new is that a record vouches for itself. Never regenerate the golden
folder: a new format version gets a folder of its own.
"""

import shutil
import sys
from pathlib import Path

import make_v1_1


def make(folder: Path) -> None:
    make_v1_1.make(folder, golden=make_v1_1.GOLDEN)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists():
        shutil.rmtree(target)
    make(target)
