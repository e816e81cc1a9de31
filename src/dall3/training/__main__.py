"""Run `dall3 train MODEL …` in every process of a launcher: `torchrun -m dall3.training MODEL …`."""

import sys

from dall3.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
