"""Small teachers of different kinds, made in minutes from what packages ship: python -m edm.small_teachers"""
