"""The deliverable: images to tokens and back, load, export, token folders."""
