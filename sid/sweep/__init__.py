"""Many distillations from one file, their records, their table and their plots: python -m sid.sweep FILE"""
