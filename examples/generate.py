"""Draw prompts with the bundled weights, offline: python examples/generate.py [PROMPT ...]"""

import sys

from dall3 import Dall3Pipeline

pipe = Dall3Pipeline.from_pretrained()

for prompt in sys.argv[1:] or ["a cube made of cloud", "an avocado"]:
    # The four of 32 candidates with the highest CLIP scores.
    out = pipe(prompt, num_images=4, num_candidates=32, seed=0)
    folder = out.save("outputs/" + prompt.replace(" ", "_"), overwrite=True)
    out.grid().save(folder / "grid.png")
    print(f"saved {len(out)} images of {out.images[0].size} to {folder}")
