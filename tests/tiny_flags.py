"""Flags of a command that trains a tiny model in a second."""

TINY = (
  '--config.batch_size=8',
  '--config.data.split=official',
  '--config.data.image_size=16',
  '--config.model.widths=(4,8)',
  '--config.model.factor=4',
  '--config.model.num_res_blocks=0',
  '--config.model.num_heads=2',
  '--config.model.code_dim=4',
  '--config.model.codebook_size=16',
)
