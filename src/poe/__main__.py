"""`python -m poe` is `poe`, and `python -m poe train` is `poe-train`."""

import sys

from poe.commands import poe, train


def main() -> None:
    if sys.argv[1:2] == ["train"]:
        del sys.argv[1]
        train.main()
    poe.main()


if __name__ == "__main__":
    main()
