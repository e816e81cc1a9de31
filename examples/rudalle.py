"""ruDALL-E Malevich, a Russian prompt to 512 px: python examples/rudalle.py [PROMPT]

Downloads about 5.8 GB once. "rudalle-emojich" draws emoji, "rudalle-surrealist" draws surreal paintings.
"""

import sys

import torch

from dall3 import Dall3Pipeline

prompt = sys.argv[1] if len(sys.argv) > 1 else "рыжий кот на луне"
on_gpu = torch.cuda.is_available()

pipe = Dall3Pipeline.from_pretrained(
    "rudalle-malevich", device="cuda" if on_gpu else "cpu", dtype=torch.float16 if on_gpu else torch.float32
)

# The defaults of these weights are top_k=1024 and top_p=0.99. Lower values give plainer images.
out = pipe(prompt, num_images=4, top_k=512, top_p=0.97, seed=0)

print(f"saved {len(out)} images to {out.save('outputs/' + prompt.replace(' ', '_'), overwrite=True)}")
