"""CITATION.cff agrees with the package."""

import tomllib
from pathlib import Path

import yaml

import rvq_jax

ROOT = Path(__file__).resolve().parents[1]


def test_the_citation_is_of_this_version():
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  assert citation['title'] == project['name']
  assert citation['version'] == rvq_jax.__version__
  assert citation['license'] == project['license']
  # What the format asks for, and what every entry must have to be cited.
  assert citation['cff-version'] == '1.2.0' and citation['message']
  for entry in (citation, *citation['references']):
    assert entry['title'] and entry['authors']
