"""Write a folder of small checkpoints in the formats of 2021, to try the library without a download.

The networks have weights by rule, not by training: what they draw is noise. Every file format and every step is real.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from originals import save_seedset

folder = save_seedset(Path(sys.argv[1] if len(sys.argv) > 1 else "checkpoints"))
print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}")
