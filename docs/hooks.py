"""Makes the site of pages as GitHub shows them; read by mkdocs.yml.

The README and its like become pages, and so do files of the repository that a
page links to, which thus need no address to link to. Formulas become MathML,
which browsers show without a script.
"""

import html
import posixpath
import re
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
  'README.md': 'index.md',
  'CONTRIBUTING.md': 'contributing.md',
  'CHANGELOG.md': 'changelog.md',
}
_LINK = re.compile(r'(?<=\]\()([^)#:]+)')
_EXAMPLE = re.compile(r'^>>> .*(?:\n.+)*', re.MULTILINE)
_FORMULA = re.compile(
  r'<(?:div|span) class="arithmatex">\\([\[(])(.*?)\\[\])]</(?:div|span)>',
  re.DOTALL,
)


class Examples(griffe.Extension):
  """Makes code blocks of the examples in docstrings."""

  def on_object(self, *, obj, **_):
    """Called for each function and class."""
    if obj.docstring:
      text = obj.docstring.value
      obj.docstring.value = _EXAMPLE.sub('```pycon\n\\g<0>\n```', text)


def on_files(files, config):
  """Adds the pages that do not lie in docs."""
  for source, page in PAGES.items():
    path = str(ROOT / source)
    files.append(File.generated(config, page, abs_src_path=path))
  linked = {
    _target(file, link)
    for file in files.documentation_pages()
    for link in _LINK.findall(file.content_string)
  }
  for path in sorted(linked - set(PAGES)):
    if not path.startswith('docs/') and (ROOT / path).is_file():
      files.append(_source_page(config, path))
  return files


def on_page_markdown(markdown, page, config, files):
  """Turns links between files into links between pages."""
  if page.file.src_uri.startswith('source/'):
    return markdown

  def link(match):
    path = _target(page.file, match[0])
    if path in PAGES:
      return PAGES[path]
    if files.get_file_from_path(_source_uri(path)):
      return _source_uri(path)
    return path.removeprefix('docs/')

  return _LINK.sub(link, markdown)


def on_page_content(content, page, config, files):
  """Turns formulas into MathML."""

  def formula(match):
    display = 'block' if match[1] == '[' else 'inline'
    return convert(html.unescape(match[2]).strip(), display=display)

  return _FORMULA.sub(formula, content)


def _target(file, link: str) -> str:
  """The path in the repository that a link of a page leads to."""
  folder = '' if file.src_uri in PAGES.values() else 'docs'
  return posixpath.normpath(posixpath.join(folder, link))


def _source_uri(path: str) -> str:
  return f'source/{path}' + ('' if path.endswith('.ipynb') else '.md')


def _source_page(config, path: str):
  """A page with the text of a file; a notebook stays a file."""
  uri, source = _source_uri(path), ROOT / path
  if uri.endswith('.ipynb'):
    return File.generated(config, uri, abs_src_path=str(source))
  kind = source.suffix.lstrip('.').replace('cff', 'yaml')
  text = f'# {path}\n\n~~~~{kind}\n{source.read_text()}~~~~\n'
  return File.generated(config, uri, content=text)
