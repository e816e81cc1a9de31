"""Draw with a folder of upstream's files of 2021: python examples/load_2021_checkpoints.py FOLDER [PROMPT]"""

import sys
from pathlib import Path

from dall3 import Dall3Pipeline

folder = Path(sys.argv[1])
prompt = sys.argv[2] if len(sys.argv) > 2 else "a cube made of cloud"

pipe = Dall3Pipeline.from_checkpoints(
    dalle=folder / "dalle-latest.pt",
    bpe=folder / "bpe.model",
    vqgan=folder / "vqgan_gumbel_f8/last.ckpt",
    vqgan_config=folder / "vqgan_gumbel_f8/model.yaml",
    diffusion=folder / "model-latest.pt",
    diffusion_config=folder / "model-latest.json",
    clip=folder / "ViT-B-16.pt",
)

# Draws four candidates and refines the one with the highest CLIP score in 25 steps of CLIP-guided diffusion.
out = pipe(prompt, num_images=1, num_candidates=4, top_p=0.85, num_inference_steps=25, seed=0)

print(f"saved {out.images[0].size} to {out.save('outputs/' + prompt.replace(' ', '_'), overwrite=True)}")
