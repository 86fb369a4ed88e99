"""What people look at: pictures and metrics during a run, and its summary (`python -m sid.report RUN_FOLDER`)."""
