"""How a distillation is doing: the figures measured at every tick, the rules that judge them, a run's records."""
