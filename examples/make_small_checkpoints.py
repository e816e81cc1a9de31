"""Write a folder of small checkpoints in the formats of 2021, to try the library without a download.

The networks are not trained, so the images are noise. The file formats and all steps are the real ones.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from originals import save_upstream_files

folder = save_upstream_files(Path(sys.argv[1] if len(sys.argv) > 1 else "checkpoints"))
print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}")
