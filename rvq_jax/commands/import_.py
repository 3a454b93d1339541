"""Imports another project's tokenizer and writes it as an export.

rvq import last.ckpt --rule=euclidean --output=taming
rvq import hf:FoundationVision/vq-ds16-c2i --output=vq16

The source is a file of taming, LDM, LlamaGen, VAR, IBQ or Janus, or the folder
of a diffusers VQModel. The command reads it as data and never runs it.
"""

from rvq_jax.commands import program
from rvq_jax.commands.parsers import TupleParser
from rvq_jax.commands.program import COUNT, LICENSE, SWITCH, Flag

_LOW = 15.0  # dB


@program.command(
  Flag('output', 'New folder to write.'),
  Flag('rule', 'How to choose codes: euclidean, cosine or inner_product.'),
  Flag('sides', 'Sides of the scales (VAR), as (1,2,4).', None, TupleParser()),
  Flag('image_size', 'Pixels; default: as trained, or 256.', None, COUNT),
  Flag('unit_range', 'The network takes images in [0, 1].', False, SWITCH),
  Flag('name', 'Name on the card; default: name of the source.'),
  LICENSE,
  paths=True,
)
def main(flags, *sources):
  """Imports."""
  if len(sources) != 1 or not flags.output:
    program.fail('expected SOURCE --output=FOLDER')
  (source,) = sources
  program.prepare_backend(flags)
  from rvq_jax import metrics
  from rvq_jax.data.photos import photograph
  from rvq_jax.data.transforms import resize_and_center_crop
  from rvq_jax.io import check_folder
  from rvq_jax.tokenizer.export import export_run
  from rvq_jax.tokenizer.load import import_model

  check_folder(flags.output)
  options = dict(vars(flags))
  about = {name: options.pop(name) for name in ('output', 'name', 'license')}
  tokenizer = import_model(source, **options)
  folder = export_run(source, tokenizer=tokenizer, **about)
  size = tokenizer.image_size
  image = resize_and_center_crop(photograph('astronaut'), size)[None]
  psnr = metrics.psnr(image, tokenizer.reconstruct(image))[0]
  tokens = ' x '.join(map(str, tokenizer.ids_shape(size, size)))
  program.show(
    f'{folder}: {size} x {size} pixels to {tokens} tokens of '
    f'{tokenizer.codebook_size:,} codes, PSNR of a photograph {psnr:.2f} dB'
  )
  if not psnr >= _LOW:
    program.show(
      f'warning: PSNR under {_LOW:g} dB; try another --rule or --unit_range, '
      'unless the network is untrained'
    )
