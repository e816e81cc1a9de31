"""Weights of your own from a folder of pictures: python examples/train_on_your_pictures.py PICTURES [WEIGHTS]

Every picture has a .txt of the same name, a caption a line. This is a short run, which shows that all fits together;
`dall3 train` with more steps makes weights worth having.
"""

import sys

from dall3 import Dall3Pipeline
from dall3.training.run import TRAINABLE, train_model

pictures, weights = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "my-weights"

for model in TRAINABLE:  # tokenizer, vqgan, transformer, clip, upsampler: each needs those before it
    train_model(model, weights, data=[f"folder:{pictures}=3", "scenes=1"], steps=200, every=100)

Dall3Pipeline.from_pretrained(weights)("a red cube", seed=0).save("outputs/mine", overwrite=True)
