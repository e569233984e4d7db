"""Training of encoders: the loop and its parts. `loop.train` is the way in; read `loop.py` from top to
bottom.
"""
