"""torch plumbing: processes and devices, snapshots, statistics."""
