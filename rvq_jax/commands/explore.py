"""Writes an HTML page about a tokenizer: images, tokens, codes.

rvq explore --workdir=DIR [--output=explore.html]
  [--input=IMAGE|FOLDER|tfds:NAME|wds:PATTERN|...]
"""

from pathlib import Path

from rvq_jax.commands import program
from rvq_jax.commands.program import COUNT, Flag


@program.command(
  *program.MODEL,
  program.DATA_DIR,
  Flag('input', 'Image, folder or data set; default: the data of the run.'),
  Flag('output', 'HTML file to write.', 'explore.html'),
  Flag('images', 'Images on the page.', 12, COUNT),
)
def main(flags):
  """Writes the page."""
  if not flags.workdir:
    program.fail('expected --workdir=DIR, of a run or an export')
  from rvq_jax.data.datasets import SPLIT_FILE
  from rvq_jax.explorer import page
  from rvq_jax.tokenizer.load import load

  program.prepare_backend(flags)
  page.check_output(flags.output)
  tokenizer = load(flags.workdir, flags.step)
  images = page.example_images(
    tokenizer,
    flags.images,
    source=flags.input,
    data_dir=flags.data_dir,
    split_file=Path(flags.workdir) / SPLIT_FILE,
  )
  name = Path(flags.workdir).resolve().name
  page.write_page(flags.output, page.page_data(tokenizer, name, images))
  program.show(f'{flags.output}: {len(images)} images; open it in a browser')
