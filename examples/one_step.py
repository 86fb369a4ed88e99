"""Makes a grid of images with a distilled generator, one network evaluation for each image.

python examples/one_step.py training-runs/00000-demo grid.png
"""

import sys

from edm.images import save_grid
from sid import OneStepGenerator

network, picture = sys.argv[1:]
generator = OneStepGenerator.from_pretrained(network)
save_grid(generator(64, seed=0), picture)
