"""Questions asked of a run at its newest training state: `python -m sid.probe.gradients`, `.noise`, `.pull`."""
