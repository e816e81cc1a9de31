"""Train weights on a folder of images: python examples/train_on_your_pictures.py IMAGES [WEIGHTS [STEPS]]

Each image needs a .txt of the same name with one caption per line. The default of 200 steps per part only shows that
the training runs (on a CPU, 2 are enough). Useful weights need many more. docs/training.md describes the settings.
"""

import sys

from dall3 import Dall3Pipeline
from dall3.training.run import TRAINABLE, train_model

images, weights, steps = (*sys.argv[1:], *("my-weights", 200)[len(sys.argv) - 2 :])

for model in TRAINABLE:  # tokenizer, vqgan, transformer, clip, upsampler: a part may need the earlier ones
    how = {"steps": int(steps)} if model == "tokenizer" else {"steps": int(steps), "batch_size": 8, "every": 100}
    train_model(model, weights, data=[f"folder:{images}=3", "scenes=1"], **how)

Dall3Pipeline.from_pretrained(weights)("a red cube", seed=0).save("outputs/mine", overwrite=True)
