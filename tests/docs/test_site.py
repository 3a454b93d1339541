"""The site has every public name and page, as they are meant to be read."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rvq_jax

ROOT = Path(__file__).resolve().parents[2]
NAMES = re.findall(
  r'^::: (\S+)\.(\w+)$', (ROOT / 'docs' / 'api.md').read_text(), re.MULTILINE
)


@pytest.mark.parametrize('name', rvq_jax.__all__)
def test_every_public_name_is_on_the_page_of_the_api(name):
  modules = [module for module, short in NAMES if short == name]
  assert modules == [getattr(rvq_jax, name).__module__]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """The folder of the site; a warning is an error."""
  pytest.importorskip('mkdocs', reason='no mkdocs: pip install "rvq_jax[docs]"')
  folder = tmp_path_factory.mktemp('site')
  command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-q']
  shown = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
  done = subprocess.run(
    [*command, '-d', folder], cwd=ROOT, timeout=280, **shown
  )
  assert done.returncode == 0, done.stdout
  return folder


def text_of(page):
  return html.unescape(re.sub('<[^>]+>', '', page.read_text()))


def test_the_api_has_docstrings_and_equations_in_lines(site):
  page = (site / 'api.html').read_text()
  for module, name in NAMES:
    section = page.partition(f'id="{module}.{name}"')[2].partition('<h3')[0]
    assert 'doc-contents' in section, name
    if name in rvq_jax.__all__:  # the example, as code
      assert '<span class="gp">&gt;&gt;&gt; </span>' in section, name
  text = text_of(site / 'api.html')
  # A line of its own, neither joined with its neighbours nor set as Markdown.
  assert re.search(r'^lambda = min\(\|q\|/\|e\|, max_scale\)$', text, re.M)
  assert re.search(r"^n'_k   = decay n_k \+ \(1 - decay\) count_k$", text, re.M)


def test_every_page_is_in_the_navigation_and_formulas_need_no_script(site):
  index = (site / 'index.html').read_text()
  for path in (ROOT / 'docs').glob('*.md'):
    assert f'href="{path.stem}.html"' in index, path.name
  assert '<math' in index and '<mfrac>' in index
  for path in site.glob('*.html'):
    assert 'class="arithmatex"' not in path.read_text(), path.name


def test_links_lead_into_the_site_and_fetch_nothing(site):
  tag = re.compile(r'<(?:script|link|img)[^>]*(?:src|href)="(http[^"]*)"')
  for page in site.glob('*.html'):
    assert not tag.findall(page.read_text()), page.name
    for target in re.findall(r'href="(source/[^"#]+)', page.read_text()):
      assert (site / target).is_file(), target
  source = text_of(site / 'source/configs/cifar10.py.html')
  assert "config.freeze = ''" in source
