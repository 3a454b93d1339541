"""Makes a page to look at a tokenizer: images, tokens, codes.

python launch/explore.py --workdir=DIR [--output=explore.html] [--images=12]
  [--input=IMAGE|FOLDER|tfds:NAME|photos] [--step=N|best] [--data_dir=DIR]
python launch/explore.py --workdir=DIR --serve [--port=8000]

DIR is a run, an exported model or hf:OWNER/NAME; an export of a model that was
trained on a folder needs --input. The first writes one HTML file
that needs no server. The second serves the page on 127.0.0.1, and encodes
images that are dropped on it.
"""

from pathlib import Path

import command_line
from absl import flags

_WORKDIR = flags.DEFINE_string('workdir', None, 'Run, export or hf:NAME.')
_STEP = flags.DEFINE_string('step', None, 'A saved step, or best; the newest.')
_INPUT = flags.DEFINE_string(
  'input', None, 'Image, folder or data set; default: test images of the run.'
)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Of prepared tfds data.')
_OUTPUT = flags.DEFINE_string('output', 'explore.html', 'HTML file to write.')
_IMAGES = flags.DEFINE_integer('images', 12, 'Images on the page.')
_SERVE = flags.DEFINE_bool('serve', False, 'Serve the page instead.')
_PORT = flags.DEFINE_integer('port', 8000, 'To serve on; 0: any that is free.')


def main():
  """Writes or serves the page."""
  if not _WORKDIR.value:
    command_line.fail('expected --workdir=DIR, of a run or an export')
  if _IMAGES.value < 1:
    command_line.fail(f'--images: expected at least 1, got {_IMAGES.value}')
  step = command_line.parse_step(_STEP.value)
  from rvq_jax.evaluation.load import HUB, is_export, load
  from rvq_jax.explorer import page

  command_line.prepare_backend()
  workdir = _WORKDIR.value
  tokenizer = load(workdir, step)
  exported = workdir.startswith(HUB) or is_export(workdir)
  trained_on = tokenizer.config['data.name']
  if exported and not _INPUT.value and trained_on.startswith('folder:'):
    command_line.fail(
      f'{workdir} is an export and holds no data: give --input=IMAGE, FOLDER, '
      'tfds:NAME or photos'
    )
  images = page.example_images(
    tokenizer, _IMAGES.value, source=_INPUT.value, data_dir=_DATA_DIR.value
  )
  data = page.page_data(tokenizer, Path(workdir).resolve().name, images)
  if not _SERVE.value:
    page.write_page(_OUTPUT.value, data)
    print(f'{_OUTPUT.value}: {len(images)} images; open it in a browser')
    return
  with page.make_server(tokenizer, data, _PORT.value) as server:
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      pass


if __name__ == '__main__':
  command_line.run(main)
