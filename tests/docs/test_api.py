"""The API page lists what is public; the HTML shows it as it is meant."""

import html
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rvq_jax

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.findall(
  r'^\| \[(.+?)\]\((.+?)\) \| (.+?) \|$',
  (ROOT / 'docs' / 'api.md').read_text(),
  re.MULTILINE,
)


def test_every_public_name_has_a_row():
  listed = [name for name, _, _ in ROWS if '.' not in name]
  assert sorted(listed) == sorted(rvq_jax.__all__)


@pytest.mark.parametrize(('name', 'link', 'line'), ROWS)
def test_a_row_links_to_the_file_that_defines_the_name(name, link, line):
  module, _, short = name.rpartition('.')
  assert getattr(importlib.import_module(module or 'rvq_jax'), short)
  source = (ROOT / 'docs' / link).resolve().read_text()
  assert re.search(rf'^(class|def) {short}\b', source, re.MULTILINE)
  assert line


def test_the_html_has_every_name_and_equations_in_lines(tmp_path):
  pytest.importorskip('pdoc', reason='no pdoc: pip install "rvq_jax[docs]"')
  done = subprocess.run(
    [sys.executable, '-W', 'error::UserWarning', 'docs/build_api.py', tmp_path],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=280,
  )
  assert done.returncode == 0, done.stderr
  page = (tmp_path / 'rvq_jax.html').read_text()
  for name in rvq_jax.__all__:
    section = page.partition(f'<section id="{name}">')[2]
    section = section.partition('<section id=')[0]
    assert '&gt;&gt;&gt; ' in section, name  # the example, so the docstring
  text = html.unescape(re.sub('<[^>]+>', '', page))
  # A line of its own, neither joined with its neighbours nor set as Markdown.
  assert re.search(r'^lambda = min\(\|q\|/\|e\|, max_scale\)$', text, re.M)
  assert re.search(r"^n'_k   = decay n_k \+ \(1 - decay\) count_k$", text, re.M)
