"""Makes an export of a tokenizer of other people.

rvq import last.ckpt --rule=euclidean --output=taming
rvq import hf:FoundationVision/vq-ds16-c2i --output=vq16

The file is of taming, LDM, LlamaGen, VAR, IBQ or Janus, or the folder of a
VQModel of diffusers. It is read as data, never run.
"""

from rvq_jax.commands import program
from rvq_jax.commands.parsers import TupleParser
from rvq_jax.commands.program import COUNT, SWITCH, Flag

_LOW = 15.0  # dB


@program.command(
  Flag('output', 'New folder to write.'),
  Flag('rule', 'How codes are chosen: euclidean, cosine or inner_product.'),
  Flag('sides', 'Of the scales of VAR, as (1,2,4).', None, TupleParser()),
  Flag('image_size', 'Pixels; default: as trained, or 256.', None, COUNT),
  Flag('unit_range', 'Images were in [0, 1].', False, SWITCH),
  Flag('name', 'On the card; default: of the source.'),
  Flag('license', 'Of the weights, as the Hub writes it.', 'unknown'),
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
      f'warning: under {_LOW:g} dB; is this another --rule, were the images in '
      '[0, 1], or has the network not been trained?'
    )
