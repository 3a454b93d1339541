"""Evaluation runs on one device."""

import pytest


@pytest.fixture(autouse=True)
def on_one_device(one_device):
  """Several devices are a test of their own."""
