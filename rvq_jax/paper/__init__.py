"""The paper's tables: grids of runs, their report, rate and distortion."""
