"""Prompts to pictures on the bundled weights, offline: python examples/generate.py [PROMPT ...]"""

import sys

from dall3 import Dall3Pipeline

pipe = Dall3Pipeline.from_pretrained()

for prompt in sys.argv[1:] or ["a cube made of cloud", "an avocado"]:
    # Eight candidates; the best by CLIP is refined.
    out = pipe(prompt, num_candidates=8, seed=0)
    folder = out.save("outputs/" + prompt.replace(" ", "_"), overwrite=True)
    out.grid().save(folder / "before_and_after.png")
    print(f"saved {out.images[0].size} before and after diffusion to {folder}")
