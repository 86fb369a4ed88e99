"""EDM's science: networks, losses, augmentation, data, teacher training."""
