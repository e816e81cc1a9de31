"""`accelerate launch -m dall3.training MODEL …` is `dall3 train MODEL …` on as many processes as it starts."""

import sys

from dall3.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
