"""The benchmark of the training step: python -m sid.bench --help; docs/performance.md says how to read it."""
