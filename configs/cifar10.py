"""The paper's CIFAR-10 model, and ours.

Command: rvq train --config=cifar10[:VARIANT]
Variants: f8 (default) is the paper's text, 4x4 tokens per image, 224 bits; f4
has 8x8 tokens, 896 bits; best and f4,best train them by our recipe, see
`use_best`; multiscale has 155 tokens on grids of 1x1 to 8x8, 1,860 bits.
Hardware, time and numbers of 300 epochs: not run. 328 steps of f8 on 2 CPU
cores: MSE 0.0455 on [-1, 1], usage 99.4 %, perplexity 14,202; see
docs/results.md.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def use_best(config: ConfigDict, *, quantize_after: int) -> None:
  """Sets the recipe with the least error per bit; see docs/gradients.md.

  It was found with batches of 32 images and with `quantize_after` at a fifth of
  the steps.
  """
  config.model.estimator = 'ste'
  config.model.quantize_after = quantize_after
  config.model.dead_code_threshold = 0.1
  config.model.commitment_weight = 0.1
  config.model.code_dim = 16
  config.model.norm = 'group_blocks'
  config.model.activation = 'swish'
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 100
  config.optimizer.b2 = 0.95


def use_multiscale(
  config: ConfigDict, *, factor: int, quantize_after: int
) -> None:
  """Sets codes on grids with growing sides; see docs/codebook_health.md."""
  use_best(config, quantize_after=quantize_after)
  config.model.factor = factor
  config.model.quantizer = 'multiscale'
  config.model.codebook_size = 4096
  config.model.code_dim = 32
  config.model.commitment_weight = 0.05
  config.model.split_by = 'distortion'
  config.model.decay = 0.95


def get_config(variant: str = 'f8') -> ConfigDict:
  """The config; variant is 'f8', 'f4', 'best', 'f4,best' or 'multiscale'."""
  parts = set(variant.split(','))
  if variant != 'multiscale' and (
    not parts <= {'f4', 'f8', 'best'} or parts >= {'f4', 'f8'}
  ):
    raise ValueError(
      'expected cifar10:f8, :f4, :best, :f4,best or :multiscale, '
      f'got :{variant}'
    )
  config = ConfigDict()
  config.seed = 0  # initial parameters, data order, flips, code replacement
  config.batch_size = 128  # over all devices
  # Microbatches per step: less memory. Each one updates the codebook, so the
  # decay acts as often, and a run cannot resume with another value.
  config.accumulate_steps = 1
  config.num_epochs = 300
  config.num_steps = placeholder(int)  # if set, replaces num_epochs
  config.deterministic = False  # True: bit-exact on GPUs too, but slower
  # Parts that do not train: 'codes'; 'encoder', to put another quantizer behind
  # a trained encoder (--init); or 'encoder,codes': only the decoder adapts to
  # other images, and each image keeps its ids.
  config.freeze = ''
  config.log_every = 50  # steps between two log lines
  config.eval_every = 1640  # steps between evaluations; 0: only at the end
  config.checkpoint_every = 1640  # steps; 0: with each evaluation
  config.keep_checkpoints = 2  # number of newest ones kept besides the best

  config.data = data = ConfigDict()
  data.name = 'tfds:cifar10'  # or folder:PATH, wds:PATTERN, ...
  data.data_dir = placeholder(str)  # for tfds; default ~/tensorflow_datasets
  data.split = 'paper'  # 70-20-10 of all images; 'official': the data set's
  data.image_size = 32  # pixels per side
  data.crop = 'none'  # 'random' or 'random_resized' crops in training
  data.crop_scale = 0.08  # least share of the area, for random_resized
  data.flip = True  # mirror half of the training images
  data.colors = False  # random hue, channel order, saturation, contrast
  data.num_workers = 0  # decoding processes for a set too large for memory

  config.model = model = ConfigDict()
  model.network = 'paper'  # or 'vqgan', the network of LlamaGen and VAR
  model.factor = 4 if 'f4' in parts else 8  # image side over token grid side
  # Each in the encoder and in the decoder; with 'vqgan' per level.
  model.num_res_blocks = 6
  model.widths = (64, 128, 256)  # 'paper': channels of its convolutions
  model.num_heads = 8  # 'paper': heads of the decoder's attention
  # 'vqgan': channels, and their multiples per level.
  model.ch, model.ch_mult = 128, (1, 1, 2, 2, 4)
  # 'vqgan': levels with attention, counted from 1, the image's resolution.
  model.attn_levels = placeholder(tuple)
  model.mid_attention = True  # 'vqgan': attention in the middle
  model.z_channels = 256  # 'vqgan': before the convolution to code_dim
  model.quant_kernel = 1  # 'vqgan': side of that convolution; VAR has 3
  model.movq = False  # 'vqgan': norms of the decoder depend on the codes
  model.unit_range = False  # 'vqgan': the network takes images in [0, 1]
  model.code_dim = 256  # D, dimensions of a code
  model.dtype = 'float32'  # compute dtype; 'bfloat16'
  model.remat = False  # True: less memory, a third more operations
  model.norm = 'batch'  # or 'group'; 'group_blocks': in residual blocks only
  model.activation = 'leaky_relu'  # or 'swish'
  model.quantize_after = 0  # steps of plain autoencoding before the codebook
  # residual, multiscale, product, gumbel, fsq, simvq
  model.quantizer = 'vq'
  model.codebook_size = 16384  # K
  # 'rotation_unscaled', 'reflection' (eq. 4), 'ste' (eq. 7), 'dynamic_ste',
  # 'diveq' (only for learned codes)
  model.estimator = 'rotation'
  model.ema = True  # False: codes are parameters, trained by gradient
  model.decay = 0.99  # alpha of the moving average
  model.commitment_weight = 0.25  # beta
  model.codebook_weight = 1.0  # used when ema is False
  model.loss_form = 'two_weights'  # 'paper_eq5' or 'paper_eq8'
  model.cosine = False  # unit-norm latents and codes
  model.inner_product = False  # chooses codes, as IBQ; 'vq' with freeze
  model.dead_code_threshold = 0.9  # share of the mean count; below: replaced
  model.split_by = 'count'  # or 'distortion': which codes dead codes split
  model.split_fraction = 0.2  # from a code towards its vector; 1: onto it
  model.init_from = 'data'  # 'normal': random codes
  model.depth = 4  # codes per position of 'residual'
  model.heads = 2  # codes per position of 'product'
  # Sides of the grids of 'multiscale', as (1, 2, 4); default: 1, 2, 3, 4, 5, 6,
  # 8, 10, 13, 16 ... up to the side of the latents.
  model.sides = placeholder(tuple)
  model.resize = 'keys'  # or 'torch', as VAR: between scales of 'multiscale'
  model.temperature_steps = 10_000  # 'gumbel': steps to the lowest temperature

  config.objective = objective = ConfigDict()
  objective.pixel = 'mse'  # or 'l1'
  objective.perceptual_weight = 0.0  # LPIPS by VGG16
  # The discriminator's; its loss counts after a third of the run.
  objective.adversarial_weight = 0.0
  objective.lecam_weight = 0.001  # regularises the discriminator
  objective.discriminator_learning_rate = 1e-4  # Adam

  config.optimizer = optimizer = ConfigDict()
  optimizer.learning_rate = 2e-4  # AdamW
  optimizer.weight_decay = 0.01  # on kernels only
  optimizer.schedule = 'cosine'  # to 0 at the end; or 'constant'
  optimizer.warmup_steps = 0
  optimizer.clip_norm = 0.0  # 0: gradients are not clipped
  optimizer.b2 = 0.999  # decay of the second moment
  # Decay of averages for evaluation, lower in the first steps; 0: none.
  optimizer.params_ema = 0.0
  if 'best' in parts:
    use_best(config, quantize_after=10_000)
  if variant == 'multiscale':
    use_multiscale(config, factor=4, quantize_after=10_000)
  return config
