"""How fast this device trains an experiment, technique by technique, and what that will cost.

embedded.py   experiments that need no file: the reference on a GPU, a tiny one on a CPU
tokens.py     what the steps learn from: the corpus in the root, or random tokens
runner.py     one technique's model, replica and optimiser, stepping as the training loop does
floor.py      the least time that a step can take at the measured ceilings
ladder.py     the techniques, and the row that each leaves
quick.py      a model of many layers projected from two of few
document.py   the document of ``--json``: figures, and what follows from them
session.py    a whole ``tessera bench``: ceilings, then the ladder or a projection
"""
