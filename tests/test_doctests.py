"""Every public name has an example in its docstring, and it is true."""

import doctest
import inspect

import pytest

import rvq_jax
from rvq_jax.data.datasets import open_images
from rvq_jax.tokenizer.encoding import encode_dataset
from rvq_jax.tokenizer.export import write_export


@pytest.fixture
def beside_files(make_tokenizer, image_folder, tmp_path, monkeypatch):
  """runs/photos, here untrained and of the same factor, and its tokens."""
  folder = tmp_path / 'runs' / 'photos'
  folder.mkdir(parents=True)
  write_export(folder, make_tokenizer())
  monkeypatch.chdir(tmp_path)
  images = open_images(str(image_folder))['test']
  encode_dataset(make_tokenizer(), images, 'tokens')


@pytest.mark.parametrize('name', rvq_jax.__all__)
def test_the_example_of_a_public_name_is_true(name, request):
  if name in ('Tokenizer', 'load', 'TokenDataset'):
    request.getfixturevalue('beside_files')
  text = inspect.getdoc(getattr(rvq_jax, name))
  # An example stands on its own: it starts with its imports.
  test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
  sources = ''.join(example.source for example in test.examples)
  assert name.lower() in sources.lower(), 'no example'
  report = []
  failed = doctest.DocTestRunner().run(test, out=report.append).failed
  assert not failed, ''.join(report)
