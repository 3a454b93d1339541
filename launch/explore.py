"""Writes an HTML page to look at a tokenizer: images, tokens, codes.

python launch/explore.py --workdir=DIR [--output=explore.html] [--images=12]
  [--input=IMAGE|FOLDER|tfds:NAME|photos] [--step=N|best] [--data_dir=DIR]

DIR is a run, an export or hf:OWNER/NAME. Without --input the page shows test
images of the run. It needs no server: open the file in a browser.
"""

from pathlib import Path

import command_line
from absl import flags

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run, export or hf:NAME.')
_STEP = flags.DEFINE_string('step', None, 'Saved step or best; default newest.')
_INPUT = flags.DEFINE_string(
  'input', None, 'Image, folder or data set; default: test images of the run.'
)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Of prepared tfds data.')
_OUTPUT = flags.DEFINE_string('output', 'explore.html', 'HTML file to write.')
_IMAGES = flags.DEFINE_integer('images', 12, 'Images on the page.', 1)


def main():
  """Writes the page."""
  if not _WORKDIR.value:
    command_line.fail('expected --workdir=DIR, of a run or an export')
  step = command_line.parse_step(_STEP.value)
  from rvq_jax.data.datasets import SPLIT_FILE
  from rvq_jax.explorer import page
  from rvq_jax.tokenizer.load import load

  command_line.prepare_backend()
  page.check_output(_OUTPUT.value)
  tokenizer = load(_WORKDIR.value, step)
  images = page.example_images(
    tokenizer,
    _IMAGES.value,
    source=_INPUT.value,
    data_dir=_DATA_DIR.value,
    split_file=Path(_WORKDIR.value) / SPLIT_FILE,
  )
  name = Path(_WORKDIR.value).resolve().name
  page.write_page(_OUTPUT.value, page.page_data(tokenizer, name, images))
  print(f'{_OUTPUT.value}: {len(images)} images; open it in a browser')


if __name__ == '__main__':
  command_line.run(main)
