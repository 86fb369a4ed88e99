"""The teacher's side: training, sampling, data sets, published files, metrics."""
